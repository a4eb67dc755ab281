"""A model of timm's over 1,000 classes with learned assignment, the matching solved while training goes on."""

import timm
import torch
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic, PendingMatching
from dl2pa.geometry import build_prototypes

torch.manual_seed(0)
classes, dim = 1000, 512
model = timm.create_model("test_resnet", pretrained=False, num_classes=dim)  # its classifier is the embedding
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

prototypes = build_prototypes(classes, dim).points
assignment, statistic, pending = torch.arange(classes), ClassStatistic(classes, dim), None
for step in range(1, 13):
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, classes, (16,))
    features = F.normalize(model(images), dim=1)
    loss = F.cross_entropy(14 * features @ prototypes[assignment].T, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    statistic.add(features, labels)
    if pending is None and step % 6 == 0:
        pending = PendingMatching.begin(statistic, prototypes, assignment, step, lag=3)
    if pending is not None and step == pending.due:
        result, pending = pending.finish(step), None
        print(
            f"step {step}: {result.moved} labels moved, {result.objective_after:.2f} from {result.objective_before:.2f}"
        )
if pending is not None:
    pending.finish(step)
