"""Values and gradients of the losses, compared with float64 references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import MatchSchedule
from dl2pa.methods import METHODS, Method, Targets
from dl2pa.methods.losses import dot_regression, head_cross_entropy, ntce, squared_cosine
from dl2pa.model.head import ClassifierHead

Floats = NDArray[np.float64]
BATCH, CLASSES, DIM = 8, 5, 3
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
OTHERS = torch.tensor([1, 2, 3, 3, 0, 0, 0, 1])
SHARES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.9, 0.1, 0.5])


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features [B, d] with different norms and unit class vectors [C, d]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(BATCH, DIM, generator=generator) * torch.logspace(-1, 1, BATCH)[:, None]
    return features, F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)


def unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_squared_cosine(f: Floats, w: Floats, y: NDArray[np.int64]) -> Floats:
    return (1 - (unit(f) * w[y]).sum(1)) ** 2


def reference_dot_regression(f: Floats, w: Floats, y: NDArray[np.int64]) -> Floats:
    """Return ½ (f·w̃_y - |w̃_y||f|)² / |f| for normalized f, with w̃_k = √(γ/n_k) w_k and γ = B / classes present."""
    f = unit(f)
    counts = np.bincount(y, minlength=len(w))
    gamma = len(y) / (counts > 0).sum()
    scaled = np.sqrt(gamma / counts[y])[:, None] * w[y]
    norm = np.linalg.norm(f, axis=1)
    return 0.5 * ((f * scaled).sum(1) - np.linalg.norm(scaled, axis=1) * norm) ** 2 / norm


def reference_cross_entropy(
    scale: float, smoothing: float, margin: float = 0.0, normalize: bool = True
) -> Callable[[Floats, Floats, NDArray[np.int64]], Floats]:
    def loss(f: Floats, w: Floats, y: NDArray[np.int64]) -> Floats:
        logits = scale * ((unit(f) if normalize else f) @ w.T - margin * np.eye(len(w))[y])
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = np.eye(len(w))[y] * (1 - smoothing) + smoothing / len(w)
        return -(target * logs).sum(1)

    return loss


CASES: dict[str, tuple[dict[str, Any], Callable[[Floats, Floats, NDArray[np.int64]], Floats]]] = {
    "squared_cosine": ({"loss": "squared_cosine"}, reference_squared_cosine),
    "dot_regression": ({"loss": "dot_regression"}, reference_dot_regression),
    "cross_entropy": ({"loss": "cross_entropy", "scale": 14.0}, reference_cross_entropy(14.0, 0.0)),
    "smoothed": (
        {"loss": "cross_entropy", "scale": 5.0, "label_smoothing": 0.1},
        reference_cross_entropy(5.0, 0.1),
    ),
    "margin": (
        {"loss": "cross_entropy", "scale": 5.0, "label_smoothing": 0.1, "margin": 0.35},
        reference_cross_entropy(5.0, 0.1, margin=0.35),
    ),
    "dot products": (
        {"loss": "cross_entropy", "scale": 0.1, "normalize": False},
        reference_cross_entropy(0.1, 0.0, normalize=False),
    ),
}


def differences(value: Callable[[Floats], float], base: Floats) -> Floats:
    """Return the gradient of `value` at `base` by central differences."""
    slope = np.zeros_like(base)
    for index in np.ndindex(base.shape):
        step = np.zeros_like(base)
        step[index] = 1e-5
        slope[index] = (value(base + step) - value(base - step)) / 2e-5
    return slope


def method_with(weights: Tensor, **options: Any) -> Method:
    """Return a method with these prototypes."""
    return METHODS["dl2pa"].build(weights, METHODS["dl2pa"].options(**options), None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_loss_equals_its_reference(case: str, mixed: bool) -> None:
    options, reference = CASES[case]
    features, weights = draw()
    f, w = features.double().numpy(), weights.double().numpy()
    first = reference(f, w, LABELS.numpy())
    expected = first.mean()
    targets = Targets(LABELS)
    if mixed:
        share = SHARES.double().numpy()
        expected = (share * first + (1 - share) * reference(f, w, OTHERS.numpy())).mean()
        targets = Targets(LABELS, OTHERS, SHARES)
    assert float(method_with(weights, **options).loss(features, targets)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_loss_has_the_gradient_of_its_reference(case: str) -> None:
    options, reference = CASES[case]
    features, weights = draw()
    w, y = weights.double().numpy(), LABELS.numpy()
    slope = differences(lambda f: float(reference(f, w, y).mean()), features.double().numpy())
    leaf = features.clone().requires_grad_()
    method_with(weights, **options).loss(leaf, Targets(LABELS)).backward()
    assert leaf.grad is not None
    assert np.abs(leaf.grad.numpy() - slope).max() < 1e-4 * np.abs(slope).max()


def test_dot_regression_does_not_differentiate_the_norm() -> None:
    features, weights = draw()
    w, y, base = weights.double().numpy(), LABELS.numpy(), features.double().numpy()
    norms, counts = np.linalg.norm(base, axis=1), np.bincount(y, minlength=CLASSES)
    size = np.sqrt(len(y) / (counts > 0).sum() / counts[y])
    slope = differences(
        lambda f: float((0.5 * (size * ((f * w[y]).sum(1) - norms)) ** 2 / norms).mean()), base
    )
    leaf = features.clone().requires_grad_()
    dot_regression(leaf, weights, Targets(LABELS)).backward()
    assert leaf.grad is not None
    assert np.abs(leaf.grad.numpy() - slope).max() < 1e-4 * np.abs(slope).max()


def test_dot_regression_does_not_change_the_norm_of_features() -> None:
    """As with the paper's head, which normalizes features."""
    features, weights = draw()
    leaf = features.clone().requires_grad_()
    method_with(weights, loss="dot_regression").loss(leaf, Targets(LABELS)).backward()
    assert leaf.grad is not None
    along = (leaf.grad * F.normalize(features, dim=1)).sum(dim=1).abs()
    assert float((along / leaf.grad.norm(dim=1)).max()) < 1e-5


def test_rare_classes_have_the_weight_of_common_ones() -> None:
    """dot_regression: at equal angles every class present contributes the same total."""
    weights = torch.eye(2)
    features = torch.tensor([[0.0, 1.0]]).repeat(9, 1)
    features[8] = torch.tensor([1.0, 0.0])
    labels = torch.tensor([0] * 8 + [1])
    leaf = features.requires_grad_()
    dot_regression(leaf, weights, Targets(labels)).backward()
    assert leaf.grad is not None
    assert float(leaf.grad[:8].norm(dim=1).sum()) == pytest.approx(float(leaf.grad[8].norm()), rel=1e-5)


def test_a_feature_at_its_prototype_has_zero_loss() -> None:
    _, weights = draw()
    features = 3.0 * weights[LABELS]
    assert float(squared_cosine(features, weights, Targets(LABELS))) == pytest.approx(0, abs=1e-10)
    assert float(dot_regression(features, weights, Targets(LABELS))) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_zero_feature_gives_a_finite_loss_and_gradient(case: str) -> None:
    _, weights = draw()
    leaf = torch.zeros(BATCH, DIM, requires_grad=True)
    loss = method_with(weights, **CASES[case][0]).loss(leaf, Targets(LABELS))
    loss.backward()
    assert torch.isfinite(loss)
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("case", [*CASES, "psc linear", "psc", "dnc", "goto", "warm-up"])
def test_autocast_does_not_change_loss_and_logits(case: str) -> None:
    features, weights = draw()
    low = features.bfloat16()
    torch.manual_seed(0)
    name = case.split()[0]
    if name in ("psc", "dnc", "goto"):
        entry = METHODS[name]
        options = entry.options(
            normalize=case != "psc linear", scale=14.0, label_smoothing=0.1, sub_prototypes=2
        )
        method = entry.build(CLASSES, DIM, options)
    elif case == "warm-up":
        method = method_with(weights, schedule=MatchSchedule(warmup_epochs=1))
        method.begin_epoch(0)
    else:
        method = method_with(weights, **CASES[case][0])
    expected, logits = method.loss(low.float(), Targets(LABELS)), method.logits(low.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, autocast_logits = method.loss(low, Targets(LABELS)), method.logits(low)
    assert loss.dtype == autocast_logits.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(autocast_logits, logits)


@pytest.mark.parametrize("blocked", [False, True])
def test_generalized_cross_entropy_of_wrong_labels_is_bounded(blocked: bool) -> None:
    head, f, y = ClassifierHead(torch.eye(4), 6.0), torch.eye(4)[:3], torch.tensor([0, 1, 3])
    limit = 4 if blocked else 2**20
    p = head.logits(f).softmax(dim=1)[torch.arange(3), y].double()
    for q in (1e-4, 0.3, 1.0):
        loss = head_cross_entropy(head, f, Targets(y), max_logits=limit, gce_q=q)
        assert loss.item() == pytest.approx(((1 - p**q) / q).mean().item(), rel=1e-3)
    plain = head_cross_entropy(head, f, Targets(y), max_logits=limit)
    almost = head_cross_entropy(head, f, Targets(y), max_logits=limit, gce_q=1e-4)
    assert almost.item() == pytest.approx(plain.item(), rel=1e-3)


def test_ntce_contrasts_the_vector_of_each_class_with_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=1)
    f, y = torch.randn(5, 3, generator=generator, requires_grad=True), torch.tensor([0, 1, 1, 3, 2])
    loss = ntce(ClassifierHead(vectors, 5.0), f, Targets(y))
    unit = (f / f.norm(dim=1, keepdim=True)).double()
    scores = 5.0 * vectors.double()[y] @ unit.T
    expected = -(scores.diagonal() - scores.exp().sum(dim=1).log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert f.grad is not None and f.grad.abs().max() > 0.01
