"""Each method with its defaults, built from a configuration, compared with float64 NumPy references.

Compares logits, loss, and gradients (by central differences) with respect to the features and every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dl2pa.config import Config, parse_config
from dl2pa.errors import UserError
from dl2pa.geometry import build_prototypes
from dl2pa.geometry.objectives import ebv_threshold
from dl2pa.methods import METHODS, Method, PrototypeMethod, Targets
from dl2pa.model.model import build_method, init_prototypes
from dl2pa.specs import METHODS as SPECS

Floats = NDArray[np.float64]
Values = dict[str, Floats]
BATCH, CLASSES, DIM = 10, 7, 6
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 6, 5])
OTHERS = torch.tensor([1, 2, 3, 3, 0, 0, 0, 1, 6, 4])
SHARES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.9, 0.1, 0.5, 0.3, 0.6])


def features() -> Tensor:
    """Return features [B, d] with norms between 0.3 and 3."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, DIM, generator=generator) * torch.logspace(-0.5, 0.5, BATCH)[:, None]


def configured(name: str, tmp_path: Path, **choices: Any) -> Config:
    method = {"name": name, **choices}
    if name == "word2vec":
        method["class_vectors"] = str(tmp_path / "vectors.npy")
        np.save(tmp_path / "vectors.npy", word_vectors())
    return parse_config({"model": {"embedding_dim": DIM}, "method": method})


def word_vectors() -> NDArray[np.float32]:
    return np.random.default_rng(4).standard_normal((CLASSES, 20)).astype(np.float32) + 3.0


def built(name: str, tmp_path: Path, **choices: Any) -> Method:
    config = configured(name, tmp_path, **choices)
    torch.manual_seed(3)
    method = build_method(config, CLASSES, init_prototypes(config, CLASSES))
    with torch.no_grad():  # initial biases and gains would hide a missing term
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    return method


def unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def layer_norm(rows: Floats, gain: Floats, bias: Floats) -> Floats:
    centered = rows - rows.mean(1, keepdims=True)
    return gain * centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5) + bias


def cosine_logits(scale: float) -> Callable[[Values, Floats], Floats]:
    return lambda v, f: scale * unit(f) @ v["prototypes"][v["assignment"].astype(int)].T


def dnc_logits(v: Values, f: Floats) -> Floats:
    f = unit(layer_norm(f, v["feature_norm.weight"], v["feature_norm.bias"]))
    scores = np.stack([(f @ centroids.T).max(1) for centroids in v["centroids"]], 1)
    return layer_norm(scores, v["class_norm.weight"], v["class_norm.bias"])


def goto_logits(v: Values, f: Floats) -> Floats:
    """Reference by QR factorization with a positive diagonal, which equals Gram-Schmidt."""
    scores = []
    for frame in v["frames"]:
        q, r = np.linalg.qr(frame.T)
        scores.append((unit(f) @ (q * np.sign(np.diag(r)))).max(1))
    return np.stack(scores, 1) / 0.07


LOGITS: dict[str, Callable[[Values, Floats], Floats]] = {
    "dl2pa": cosine_logits(1.0),
    "psc": lambda v, f: unit(f) @ unit(v["weight"]).T / 0.07,
    "psc linear": lambda v, f: f @ v["weight"].T + v["bias"],
    "word2vec": cosine_logits(1.0),
    "hpn": cosine_logits(1.0),
    "ebv": cosine_logits(1 / 0.07),
    "etf": cosine_logits(1.0),
    "kasarla": lambda v, f: 0.1 * f @ v["prototypes"].T,
    "dnc": dnc_logits,
    "goto": goto_logits,
}
LOGITS |= {"psc margin": LOGITS["psc"], "goto margin": LOGITS["goto"], "ebv margin": LOGITS["ebv"]}
CHOICES: dict[str, dict[str, Any]] = {
    "psc linear": {"normalize": False},
    **{f"{name} margin": {"margin": 0.3} for name in ("psc", "goto", "ebv")},
}
COUNTS = np.array([500, 200, 90, 40, 20, 3, 0])
ADJUSTED: dict[str, dict[str, Any]] = {
    "psc linear": {"normalize": False},
    **{name: {} for name in ("psc", "ebv", "kasarla", "dnc", "goto", "ebv margin", "psc margin")},
}


def softmax_loss(logits: Floats, y: NDArray[np.int64], smoothing: float) -> Floats:
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.eye(CLASSES)[y] * (1 - smoothing) + smoothing / CLASSES
    return -(target * logs).sum(1)


def regression_loss(f: Floats, w: Floats, y: NDArray[np.int64]) -> Floats:
    """Return ½ (f·w̃ - |w̃||f|)² / |f| for normalized f, which is ½ |w̃|² (cos - 1)²."""
    counts = np.bincount(y, minlength=CLASSES)
    size = np.sqrt(len(y) / (counts > 0).sum() / counts[y])
    return 0.5 * (size * ((unit(f) * w[y]).sum(1) - 1)) ** 2


def reference_loss(name: str, v: Values, f: Floats) -> Callable[[NDArray[np.int64]], Floats]:
    if name == "etf":
        return lambda y: regression_loss(f, v["prototypes"], y)
    logits = LOGITS[name](v, f)
    if name in ("dl2pa", "hpn", "word2vec"):
        return lambda y: (1 - logits[np.arange(len(y)), y]) ** 2
    margin = 0.3 / 0.07 if "margin" in name else 0.0
    smoothing = 0.1 if "ebv" in name else 0.0
    return lambda y: softmax_loss(logits - margin * np.eye(CLASSES)[y], y, smoothing)


def expectation(loss: Callable[[NDArray[np.int64]], Floats], mixed: bool) -> tuple[Floats, Targets]:
    """Return the loss per sample with plain or mixed labels, and the targets for it."""
    if not mixed:
        return loss(LABELS.numpy()), Targets(LABELS)
    share = SHARES.double().numpy()
    expected = share * loss(LABELS.numpy()) + (1 - share) * loss(OTHERS.numpy())
    return expected, Targets(LABELS, OTHERS, SHARES)


def values_of(method: Method) -> Values:
    return {k: v.detach().double().numpy() for k, v in method.state_dict().items()}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    method = built(name.split()[0], tmp_path, **CHOICES.get(name, {}))
    expected = LOGITS[name](values_of(method), features().double().numpy())
    logits = method.logits(features()).detach().numpy()
    assert logits.shape == (BATCH, CLASSES)
    assert np.abs(logits - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())
    assert np.ptp(expected, axis=1).min() > 1e-3, "equal logits would prove nothing"


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", LOGITS)
def test_the_loss_equals_the_reference(name: str, mixed: bool, tmp_path: Path) -> None:
    method = built(name.split()[0], tmp_path, **CHOICES.get(name, {}))
    f = features().double().numpy()
    expected, targets = expectation(reference_loss(name, values_of(method), f), mixed)
    assert method.loss(features(), targets).item() == pytest.approx(expected.mean(), rel=2e-5)


@pytest.mark.parametrize("name", LOGITS)
def test_gradients_equal_central_differences_of_the_reference(name: str, tmp_path: Path) -> None:
    method = built(name.split()[0], tmp_path, **CHOICES.get(name, {}))
    values, f = values_of(method), features().double().numpy()
    leaf = features().requires_grad_()
    method.loss(leaf, Targets(LABELS)).backward()
    assert leaf.grad is not None
    compare(leaf.grad, f, lambda moved: reference_loss(name, values, moved)(LABELS.numpy()).mean())
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key

        def moved_loss(moved: Floats, key: str = key) -> float:
            return float(reference_loss(name, {**values, key: moved}, f)(LABELS.numpy()).mean())

        compare(parameter.grad, values[key], moved_loss)


def compare(gradient: Tensor, at: Floats, value: Callable[[Floats], float]) -> None:
    """Compare a gradient with central differences of `value`."""
    slope = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-6
        slope[index] = (value(at + step) - value(at - step)) / 2e-6
    assert np.abs(slope).max() > 1e-4
    assert np.abs(gradient.numpy() - slope).max() < 2e-4 * np.abs(slope).max()


def test_every_method_has_a_spec_that_fits_its_class() -> None:
    assert METHODS.keys() == SPECS.keys()
    for name, entry in METHODS.items():
        assert entry.defaults is SPECS[name]
        assert isinstance(entry.build, type)
        assert issubclass(entry.build, PrototypeMethod) != entry.defaults.learned


@pytest.mark.parametrize("name", METHODS)
def test_the_state_dict_is_complete(name: str, tmp_path: Path) -> None:
    """A method that loads it computes bit-identical results afterward."""
    choices: dict[str, Any] = {} if SPECS[name].learned else {"assignment": "dynamic"}
    method = built(name, tmp_path, **choices)
    observe(method, 0)
    other = built(name, tmp_path, **choices)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(method.state_dict())
    other.refresh()
    for each in (method, other):
        observe(each, 1)
        each.rematch()
    assert torch.equal(other.logits(features()), method.logits(features()))
    assert torch.equal(other.class_vectors(), method.class_vectors())
    assert torch.equal(other.loss(features(), Targets(LABELS)), method.loss(features(), Targets(LABELS)))


def observe(method: Method, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    method.observe(torch.randn(40, DIM, generator=generator), Targets(torch.arange(40) % CLASSES))


@pytest.mark.parametrize("name", [n for n in METHODS if not SPECS[n].learned])
@pytest.mark.parametrize("loss", ["squared_cosine", "dot_regression", "cross_entropy"])
def test_any_prototypes_can_be_assigned_dynamically_under_any_loss(
    name: str, loss: str, tmp_path: Path
) -> None:
    """After one update, labels have the prototypes at which their features are."""
    method = built(name, tmp_path, assignment="dynamic", loss=loss)
    assert isinstance(method, PrototypeMethod)
    points, planted = method.prototypes.clone(), torch.tensor([3, 0, 4, 1, 6, 2, 5])
    labels = torch.arange(CLASSES)
    before = method.loss(2.0 * points[planted], Targets(labels))
    method.observe(2.0 * points[planted], Targets(labels))
    result = method.rematch()
    assert result is not None
    assert result.moved == 7
    assert torch.equal(method.class_vectors(), points[planted])
    assert torch.equal(method.logits(points[planted]).argmax(dim=1), labels)
    assert method.loss(2.0 * points[planted], Targets(labels)) < before
    assert method.due_after_epoch(0)


@pytest.mark.parametrize("name", [n for n in METHODS if not SPECS[n].learned])
def test_a_static_assignment_is_never_updated(name: str, tmp_path: Path) -> None:
    method = built(name, tmp_path, assignment="static")
    observe(method, 0)
    assert method.rematch() is None
    assert not method.due_after_epoch(0)
    assert torch.equal(method.class_vectors(), dict(method.named_buffers())["prototypes"])


@pytest.mark.parametrize(
    ("name", "assignment"),
    [(n, "static") for n in METHODS] + [(n, "dynamic") for n in METHODS if not SPECS[n].learned],
)
def test_a_step_does_not_synchronize_with_the_device(name: str, assignment: str, tmp_path: Path) -> None:
    """Fake tensors have no values: operations that read one (item, nonzero, a mask as index) raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    softmax = SPECS[name].loss == "cross_entropy" and name not in ("dnc", "kasarla")
    choices: dict[str, Any] = {"learn_scale": True, "margin": 0.2} if softmax else {}
    config = configured(name, tmp_path, assignment=assignment, **choices)
    prototype_init = init_prototypes(config, CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = build_method(config, CLASSES, prototype_init)
        leaf = torch.randn(BATCH, DIM, requires_grad=True)
        for targets in (
            Targets(LABELS.clone()),
            Targets(LABELS.clone(), OTHERS.clone(), SHARES.clone()),
        ):
            method.loss(leaf, targets).backward()
            method.observe(leaf.detach(), targets)


@pytest.mark.parametrize("name", ["dl2pa", "hpn", "ebv"])
def test_refit_moves_prototypes_toward_their_classes(name: str, tmp_path: Path) -> None:
    choices = {"assignment": "dynamic", "match": {"refit_cosine": 0.97}}
    method, fixed = built(name, tmp_path, **choices), built(name, tmp_path, assignment="dynamic")
    generator = torch.Generator().manual_seed(11)
    centers = F.normalize(torch.randn(CLASSES, DIM, generator=generator) + 1.0, dim=1)
    for each in (method, fixed):
        each.observe(centers, Targets(torch.arange(CLASSES)))
    before = method.head().vectors.clone()
    moved, stayed = method.rematch(), fixed.rematch()
    assert moved is not None and stayed is not None
    assert moved.moves == stayed.moves, "σ is computed before the prototypes move"
    assert "prototypes_stayed" not in stayed.metrics()
    assert moved.metrics()["prototypes_stayed"] < 0.999
    vectors = method.head().vectors
    assert (vectors * centers).sum(dim=1).mean() > (fixed.head().vectors * centers).sum(dim=1).mean() + 0.1
    assert not torch.equal(vectors, before)
    assert (vectors @ vectors.T).fill_diagonal_(-1).max() < 0.98
    again = built(name, tmp_path, **choices)  # a resumed method, restored from the state only
    again.load_state_dict(method.state_dict())
    again.refresh()
    assert torch.equal(again.head().vectors, vectors)


def test_a_warm_up_ends_with_prototypes_near_its_learned_vectors(tmp_path: Path) -> None:
    """Afterward they follow the class means."""
    method = built("dl2pa", tmp_path, match={"refit_cosine": 0.97, "warmup_epochs": 1})
    assert isinstance(method, PrototypeMethod) and method.warmup is not None
    generator = torch.Generator().manual_seed(11)
    centers, learned = (F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1) for _ in range(2))
    with torch.no_grad():
        method.warmup.copy_(3.0 * learned)
    for epoch, expected, other in ((0, learned, centers), (1, centers, learned)):
        method.begin_epoch(epoch)
        method.observe(centers, Targets(torch.arange(CLASSES)))
        method.rematch()
        near, far = ((method.weights * rows).sum(dim=1).mean() for rows in (expected, other))
        assert near > 0.95 and near > far + 0.2


def test_a_refit_cosine_below_that_of_the_prototypes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are already closer") as caught:
        built("dl2pa", tmp_path, match={"refit_cosine": -0.5})
    assert caught.value.field == "method.match.refit_cosine"


class TestGeometry:
    """Properties of each method's prototypes."""

    def points(self, name: str, tmp_path: Path, classes: int, dim: int, seed: int = 0) -> Tensor:
        method: dict[str, Any] = {"name": name, "prototype_seed": seed}
        if name == "word2vec":
            np.save(tmp_path / "v.npy", np.random.default_rng(classes).standard_normal((classes, 30)) + 2.0)
            method["class_vectors"] = str(tmp_path / "v.npy")
        config = parse_config({"model": {"embedding_dim": dim}, "method": method})
        prototype_init = init_prototypes(config, classes)
        assert prototype_init is not None
        assert prototype_init.assignment is None
        assert torch.allclose(prototype_init.prototypes.norm(dim=1), torch.ones(classes), atol=1e-6)
        return prototype_init.prototypes

    def cosines(self, points: Tensor) -> Tensor:
        gram = points.double() @ points.double().T
        return gram[torch.triu(torch.ones_like(gram), diagonal=1).bool()]

    @pytest.mark.parametrize(
        ("name", "dim"), [("etf", 12), ("etf", 20), ("etf", 11), ("kasarla", 11), ("kasarla", 20)]
    )
    def test_enough_dimensions_give_a_simplex(self, name: str, dim: int, tmp_path: Path) -> None:
        cosines = self.cosines(self.points(name, tmp_path, 12, dim))
        assert torch.allclose(cosines, torch.tensor(-1 / 11, dtype=torch.float64), atol=1e-6)

    def test_an_etf_is_rotated_at_random(self, tmp_path: Path) -> None:
        first, second = (self.points("etf", tmp_path, 12, 16, seed) for seed in (0, 1))
        assert not torch.allclose(first, second, atol=0.1)
        assert first.abs().min() > 0, "in general position, unlike the closed-form simplex"

    @pytest.mark.parametrize(("classes", "dim"), [(12, 7), (9, 2)])
    def test_a_low_dimensional_etf_is_the_auto_construction(
        self, classes: int, dim: int, tmp_path: Path
    ) -> None:
        points = self.points("etf", tmp_path, classes, dim)
        assert torch.equal(points, build_prototypes(classes, dim, "auto").points)

    def test_ebv_keeps_every_cosine_small(self, tmp_path: Path) -> None:
        points = self.points("ebv", tmp_path, 40, 30)
        assert self.cosines(points).abs().max() <= ebv_threshold(40, 30) + 1e-3
        assert ebv_threshold(40, 30) < 0.2

    def test_hpn_uses_its_construction(self, tmp_path: Path) -> None:
        assert torch.equal(self.points("hpn", tmp_path, 9, 4), build_prototypes(9, 4, "hpn").points)

    @pytest.mark.parametrize("dim", [3, 8, 30])
    def test_word_vectors_are_projected_onto_principal_components(self, dim: int, tmp_path: Path) -> None:
        """With 11 or more dimensions only the mean is lost."""
        points = self.points("word2vec", tmp_path, 12, dim)
        vectors = np.random.default_rng(12).standard_normal((12, 30)) + 2.0
        vectors = vectors.astype(np.float32).astype(np.float64)
        centered = vectors - vectors.mean(0)
        _, axes = np.linalg.eigh(centered.T @ centered)
        projected = centered @ axes[:, ::-1][:, : min(dim, 11)]
        expected = unit(projected) @ unit(projected).T
        assert np.abs(points.double().numpy() @ points.double().numpy().T - expected).max() < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_class_vectors_are_unit_rows_in_label_order(name: str, tmp_path: Path) -> None:
    method = built(name, tmp_path)
    vectors = method.class_vectors()
    assert vectors.shape == (CLASSES, DIM)
    assert not vectors.requires_grad
    assert torch.allclose(vectors.norm(dim=1), torch.ones(CLASSES), atol=1e-6)
    if not SPECS[name].learned:
        assert torch.equal(method.logits(5.0 * vectors).argmax(dim=1), torch.arange(CLASSES))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ADJUSTED)
def test_logit_adjustment_changes_only_the_training_loss(name: str, mixed: bool, tmp_path: Path) -> None:
    """CE(logits + τ log π); a class without images counts as having one."""
    choices = {**CHOICES.get(name, {}), "logit_adjustment": 0.7}
    method, plain = (
        built(name.split()[0], tmp_path, **choices),
        built(name.split()[0], tmp_path, **CHOICES.get(name, {})),
    )
    method.set_class_counts(torch.from_numpy(COUNTS))
    f = features().double().numpy()
    shift = 0.7 * np.log(np.maximum(COUNTS, 1) / COUNTS.sum())
    logits = LOGITS[name](values_of(method), f) + shift
    margin, smoothing = 0.3 / 0.07 * ("margin" in name), 0.1 * ("ebv" in name)

    def loss(y: NDArray[np.int64]) -> Floats:
        return softmax_loss(logits - margin * np.eye(CLASSES)[y], y, smoothing)

    expected, targets = expectation(loss, mixed)
    assert method.loss(features(), targets).item() == pytest.approx(expected.mean(), rel=2e-5)
    assert torch.equal(method.logits(features()), plain.logits(features())), "predictions are not adjusted"
    assert method.state_dict().keys() == plain.state_dict().keys(), "recomputed from the data, not saved"


def test_logit_adjustment_applies_to_the_warm_up(tmp_path: Path) -> None:
    choices: dict[str, Any] = {"loss": "cross_entropy", "scale": 14.0, "match": {"warmup_epochs": 1}}
    method = built("dl2pa", tmp_path, **choices, logit_adjustment=1.0)
    method.set_class_counts(torch.from_numpy(COUNTS))
    shift = np.log(np.maximum(COUNTS, 1) / COUNTS.sum())
    for epoch in (0, 1):  # learned directions, then prototypes
        method.begin_epoch(epoch)
        logits = 14.0 * unit(features().double().numpy()) @ method.class_vectors().double().numpy().T
        expected = softmax_loss(logits + shift, LABELS.numpy(), 0.0).mean()
        assert method.loss(features(), Targets(LABELS)).item() == pytest.approx(expected, rel=2e-5)


def test_logit_adjustment_does_not_change_a_loss_without_logits(tmp_path: Path) -> None:
    method, plain = built("dl2pa", tmp_path, logit_adjustment=1.0), built("dl2pa", tmp_path)
    method.set_class_counts(torch.from_numpy(COUNTS))
    assert torch.equal(method.loss(features(), Targets(LABELS)), plain.loss(features(), Targets(LABELS)))


def test_a_margin_does_not_change_predictions(tmp_path: Path) -> None:
    plain, strict = (built("ebv", tmp_path, margin=m) for m in (0.0, 0.35))
    assert torch.equal(plain.logits(features()), strict.logits(features()))
    assert strict.loss(features(), Targets(LABELS)) > plain.loss(features(), Targets(LABELS)) + 1.0


@pytest.mark.parametrize(
    ("name", "margin"), [(n, m) for n in ("ebv", "psc", "goto") for m in (0.0, 0.2)] + [("kasarla", 0.0)]
)
def test_a_learned_scale_starts_at_the_value_and_has_the_right_gradient(
    name: str, margin: float, tmp_path: Path
) -> None:
    """s = s₀ exp(t/10): central differences of the loss at t = ±0.1."""

    def loss(scale: float, learn: bool) -> tuple[Tensor, Method]:
        config = configured(name, tmp_path, scale=scale, margin=margin, learn_scale=learn)
        torch.manual_seed(3)
        method = build_method(config, CLASSES, init_prototypes(config, CLASSES))
        return method.loss(features(), Targets(LABELS, OTHERS, SHARES)), method

    learned, method = loss(5.0, True)
    assert learned.item() == pytest.approx(loss(5.0, False)[0].item(), rel=1e-6)
    learned.backward()
    shift = dict(method.named_parameters())["scale.shift"]
    assert shift.grad is not None
    slope = (loss(5.0 * np.exp(0.01), False)[0] - loss(5.0 * np.exp(-0.01), False)[0]).item() / 0.2
    assert shift.grad.item() == pytest.approx(slope, rel=1e-2)
    before = method.logits(features())
    with torch.no_grad():
        shift += 10.0
    assert torch.allclose(method.logits(features()), torch.e * before, rtol=1e-5)


@pytest.mark.parametrize("name", ["ebv", "psc", "goto"])
@pytest.mark.parametrize(("far", "factor"), [(1e3, 10.0), (-1e3, 0.1), (5.0, np.exp(0.5))])
def test_a_learned_scale_is_clamped_to_a_factor_of_ten(
    name: str, far: float, factor: float, tmp_path: Path
) -> None:
    method = built(name, tmp_path, learn_scale=True, scale=6.0)
    with torch.no_grad():
        dict(method.named_parameters())["scale.shift"].fill_(far)
    method.observe(features(), Targets(LABELS))
    scale = torch.as_tensor(method.head().scale).detach().item()
    assert scale == pytest.approx(6.0 * factor, rel=1e-5)
