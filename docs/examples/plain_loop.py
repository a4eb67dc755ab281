"""Dynamic label-to-prototype assignment in a plain PyTorch loop: ten handwritten digits on the sphere of R^4."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic, match
from dl2pa.geometry import build_prototypes

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images, classes, dim = images.float() / 16, 10, 4
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, dim))
optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)

prototypes = build_prototypes(classes, dim).points  # unit vectors [C, d]
assignment = torch.arange(classes)  # σ: class c is represented by prototypes[assignment[c]]
statistic = ClassStatistic(classes, dim)  # sum of unit features per class
for step in range(600):
    batch = torch.randint(0, 1400, (64,))
    features = F.normalize(network(images[batch]), dim=1)
    target = prototypes[assignment[labels[batch]]]
    (1 - (features * target).sum(dim=1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    statistic.add(features, labels[batch])
    if step in (9, 19, 29, 59, 119, 239):
        result = match(statistic, prototypes, assignment)  # changes assignment in place
        print(f"step {step + 1}: {result.moved} labels moved")

with torch.no_grad():
    predicted = (network(images[1400:]) @ prototypes[assignment].T).argmax(dim=1)
print(f"top-1 {100 * (predicted == labels[1400:]).float().mean():.1f} % of {len(predicted)}")
