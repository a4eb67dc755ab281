"""Dynamic label-to-prototype assignment for a timm model with cross-entropy over 1,000 classes."""

import timm
import torch
from torch.nn import functional as F

from dl2pa.assignment import AssignmentSolver, ClassStatistic, match
from dl2pa.geometry import build_prototypes

torch.manual_seed(0)
classes, dim = 1000, 512
model = timm.create_model("test_resnet", pretrained=False, num_classes=dim)  # its last layer is the embedding
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

prototypes = build_prototypes(classes, dim).points
assignment, statistic, solver = torch.arange(classes), ClassStatistic(classes, dim), AssignmentSolver()
for step in range(1, 13):
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, classes, (16,))
    features = F.normalize(model(images), dim=1)
    loss = F.cross_entropy(14 * features @ prototypes[assignment].T, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    statistic.add(features, labels)
    if step % 6 == 0:
        result = match(statistic, prototypes, assignment, solver=solver)
        print(
            f"step {step}: {result.moved} labels moved, {result.objective_after:.2f} from {result.objective_before:.2f}"
        )
