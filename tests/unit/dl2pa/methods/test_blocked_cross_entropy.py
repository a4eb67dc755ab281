"""Cross-entropy in blocks of classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dl2pa.methods import METHODS, Targets
from dl2pa.methods.losses import head_cross_entropy
from dl2pa.model.head import ClassifierHead

CLASSES, DIM, BATCH = 50, 8, 16


class Tensors:
    """Leaf tensors of one head and one batch."""

    def __init__(self, per_class: int) -> None:
        generator = torch.Generator().manual_seed(per_class)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).requires_grad_()

        self.vectors, self.features = leaf(CLASSES * per_class, DIM), leaf(BATCH, DIM)
        self.scale = torch.tensor(7.0, requires_grad=True)
        self.bias = leaf(CLASSES) if per_class == 1 else None
        self.head = ClassifierHead(self.vectors, self.scale, True, per_class, self.bias)
        labels = [torch.randint(0, CLASSES, (BATCH,), generator=generator) for _ in range(2)]
        self.labels, self.other = labels
        self.share = torch.rand(BATCH, generator=generator)
        self.adjustment = torch.randn(CLASSES, generator=generator)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.vectors, self.scale, self.features, self.bias) if t is not None]


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("mixed", [False, True])
def test_blocks_give_the_value_and_gradients_of_all_logits_at_once(
    per_class: int, smoothing: float, margin: float, mixed: bool
) -> None:
    results: list[list[Tensor]] = []
    for max_logits in (BATCH * CLASSES, BATCH * 7, 1):
        t = Tensors(per_class)
        targets = Targets(t.labels, t.other, t.share) if mixed else Targets(t.labels)
        scaled = margin * t.scale if margin else 0.0
        loss = head_cross_entropy(t.head, t.features, targets, smoothing, scaled, t.adjustment, max_logits)
        loss.backward()
        gradients = [leaf.grad for leaf in t.leaves()]
        results.append([loss.detach(), *(gradient for gradient in gradients if gradient is not None)])
        assert len(results[-1]) == len(t.leaves()) + 1
    for blocked in results[1:]:
        for expected, actual in zip(results[0], blocked, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["dl2pa", "psc", "goto"])
def test_at_most_max_logits_exist_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = METHODS[name].options(loss="cross_entropy", scale=5.0, max_logits=BATCH * 6)
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    entry = METHODS[name]
    method = entry.build(points, options, None) if name == "dl2pa" else entry.build(CLASSES, DIM, options)  # type: ignore[arg-type,call-arg]
    sizes: list[int] = []
    logits = ClassifierHead.logits

    def recorded(head: ClassifierHead, features: Tensor) -> Tensor:
        result = logits(head, features)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(ClassifierHead, "logits", recorded)
    features = torch.randn(BATCH, DIM, generator=generator, requires_grad=True)
    method.loss(features, Targets(torch.arange(BATCH))).backward()
    assert max(sizes) <= BATCH * 6
    assert sum(sizes) == 2 * BATCH * CLASSES, "all logits, once in the forward and once in the backward pass"
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
