"""`dl2pa evaluate` on named sets: counts by class name, records, out-of-distribution detection and retrieval."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import log_loss, roc_auc_score, roc_curve
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid, NearestNeighbors
from sklearn.preprocessing import normalize

import dl2pa
from dl2pa.config import parse_config
from dl2pa.errors import UserError
from dl2pa.evaluation import measure
from dl2pa.evaluation.layers import Detector, Layers, compute_layers, join_layers
from dl2pa.evaluation.measure import evaluate_split
from dl2pa.evaluation.sizes import check_image_size
from dl2pa.model.head import Norm
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier
from dl2pa.recorded_run import load_run_config
from dl2pa.tracking.spool import read_events
from dl2pa.training.data import build_eval_pipeline, open_split
from dl2pa.training.distributed import World
from pipelines.datasets import index_folder
from pipelines.datasets.index import INDEX_NAME, Index, SplitIndex, write_index
from support.commands import Completed, run_here
from unit.dl2pa.evaluation.conftest import CLASSES, write_images

SUBSET = ("fox", "bee", "ant", "elk")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "run"))


@pytest.fixture(scope="session")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of four classes."""
    return write_images(tmp_path_factory.mktemp("subset") / "s", dict.fromkeys(SUBSET, 10), 5)


def evaluate(run: Path, *arguments: object) -> Completed:
    return run_here("evaluate", run, *arguments, "--json")


def files_of(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.png"))


def count_by_hand(run: Path, root: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Correct predictions per class when only `names` can be predicted."""
    model = dl2pa.load(run, device="cpu")
    columns = [model.classes.index(name) for name in names]
    correct = dict.fromkeys(names, 0)
    for file in files_of(root):
        scores = model.predict(file).scores[0, columns]
        correct[file.parent.name] += names[int(scores.argmax())] == file.parent.name
    return correct


def events(run: Path) -> list[dict[str, Any]]:
    return [entry.event for entry in read_events(run / "events" / "events.jsonl") if entry.event]


def test_subset_is_counted_by_class_name_and_recorded_once(run: Path, subset: Path) -> None:
    before = events(run)
    done = evaluate(run, "--set", f"four={subset}", "--only-present-classes")
    assert done.code == 0, done.error
    result = done.result["sets"]["four"]
    expected = count_by_hand(run, subset, SUBSET)
    assert result["num_correct"] == sum(expected.values())
    assert 10 < result["num_correct"] < 40  # neither chance nor perfect
    interval = binomtest(result["num_correct"], 40).proportion_ci(method="wilson")
    assert (result["top1_low"], result["top1_high"]) == pytest.approx(
        (100 * interval.low, 100 * interval.high)
    )
    file = run / "evaluations" / "four.json"
    record = json.loads(file.read_text())
    assert dict(zip(record["classes"], record["class_correct"], strict=True)) == expected
    assert record["classes"] == sorted(SUBSET)
    assert sum(record["confusion"]["count"]) == 40
    assert sorted(path.name for path in (run / "evaluations" / "four").iterdir()) == [
        *("confusion.html", "per_class.csv", "per_class.html"),
    ]
    added = events(run)[len(before) :]
    assert [event["e"] for event in added] == ["inputs", "tags", "artifact", "artifact", "metrics"]
    assert added[-1]["v"]["eval/four/top1"] == result["top1"]
    assert added[0]["datasets"][0]["digest"] == record["data_fingerprint"] == result["data_fingerprint"]
    content, size = file.read_bytes(), len(events(run))
    again = evaluate(run, "--set", f"four={subset}", "--only-present-classes", "train.eval_batch_size=7")
    assert again.result == done.result
    assert (file.read_bytes(), len(events(run))) == (content, size)


def test_order_of_the_classes_in_an_index_does_not_matter(run: Path, subset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(subset, tmp_path / "indexed"))
    names = ("elk", "fox", "gnu", "bee", "ant")  # no image of the class gnu
    table = index_folder(root, names, "root")
    flags = np.zeros(len(table), np.uint8)
    write_index(root / INDEX_NAME, root, Index({"all": SplitIndex(table, flags)}, names, {}))
    done = evaluate(run, "--set", f"a={subset}", "--set", f"b={root}", "--only-present-classes")
    assert done.code == 0, done.error
    first, second = done.result["sets"].values()
    assert first["num_correct"] == second["num_correct"]
    labels = [json.loads((run / "evaluations" / f"{n}.json").read_text())["class_correct"] for n in "ab"]
    assert labels[0] == labels[1]


def test_the_model_is_loaded_once_for_all_sets(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = measure.load_classifier
    monkeypatch.setattr(measure, "load_classifier", lambda path: [loaded.append(path), load(path)][1])
    done = evaluate(run, "--set", f"a={images / 'val'}", "--set", f"b={images}")
    assert done.code == 0, done.error
    assert len(loaded) == 1
    both = done.result["sets"]
    validation = evaluate(run).result
    for key, value in validation.items():
        assert both["a"][key] == both["b"][key] == value, key
    assert validation["top1"] == json.loads((run / "result.json").read_text())["top1_last"]


def set_sync_bn(run: Path) -> None:
    """Record `train.sync_bn`, as of a run on GPUs; an evaluation on CPUs does not need it."""
    config = (run / "config.yaml").read_text()
    assert "sync_bn: false" in config
    (run / "config.yaml").write_text(config.replace("sync_bn: false", "sync_bn: true"))


def test_several_processes_count_the_same(run: Path, subset: Path, images: Path) -> None:
    set_sync_bn(run)
    sets = ("--set", f"four={subset}", "--only-present-classes")
    alone = evaluate(run, *sets).result
    shutil.rmtree(run / "evaluations")
    both = evaluate(run, *sets, "--nproc", "2")
    assert both.code == 0, both.error
    assert both.result == alone
    assert (run / "evaluations" / "four.json").is_file()


def test_several_processes_detect_and_retrieve_the_same(run: Path, images: Path, tmp_path: Path) -> None:
    set_sync_bn(run)
    other = write_images(tmp_path / "other", {"sun": 30}, 8, spread=160)
    options = ("--ood", f"sun={other}", "--retrieval", "train.eval_batch_size=5")
    alone = evaluate(run, *options)
    assert alone.code == 0, alone.error
    files = {path: path.read_bytes() for path in (run / "evaluations").rglob("*.json")}
    shutil.rmtree(run / "evaluations")
    both = evaluate(run, *options, "--nproc", "2")
    assert both.code == 0, both.error
    assert both.result == alone.result
    assert {path: path.read_bytes() for path in (run / "evaluations").rglob("*.json")} == files


@pytest.mark.parametrize("size", [2, 3, 20])
def test_shares_of_the_batches_join_to_the_layers_of_one_process(
    size: int, finished: Path, images: Path, tmp_path: Path
) -> None:
    config = load_run_config(finished, ["train.eval_batch_size=5", "data.max_bad_val_fraction=0.1"])
    classifier = load_classifier(finished)
    world = World(0, 1, 0, 1, torch.device("cpu"), 1)
    val = open_split(config, "val")
    whole = compute_layers(config, classifier, val, world)
    parts: list[Layers] = []
    for rank in range(size):
        part = compute_layers(config, classifier, val, replace(world, rank=rank, size=size))
        part.save(tmp_path / "part.npz")
        parts.append(Layers.load(tmp_path / "part.npz"))
    joined = join_layers(parts, str(images))
    for name in ("embedding", "backbone", "labels", "samples"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert whole.samples.tolist() == list(range(36)) and len(whole.backbone) == 36


def test_embedding_of_a_head_with_a_layer_norm_is_that_of_embed(finished: Path) -> None:
    config, plain = load_run_config(finished, []), load_classifier(finished)
    norm = Norm(torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.5, -1.0, 0.0, 1.0]))
    classifier = replace(plain, head=plain.head._replace(feature_norm=norm))
    world, val = World(0, 1, 0, 1, torch.device("cpu"), 1), open_split(config, "val")
    layers = compute_layers(config, classifier, val, world)
    batches = [b.images[: b.valid] for b in build_eval_pipeline(config, val, world)]
    expected = torch.cat([classifier.unit_vectors(images) for images in batches])
    assert torch.allclose(layers.unit, expected, atol=1e-6)
    logits = torch.cat([classifier.score(images) for images in batches])
    energy = Detector(classifier, layers).score(layers)["embedding_energy"]
    assert np.allclose(energy, logits.double().logsumexp(dim=1).numpy(), atol=1e-5)


@pytest.mark.parametrize(("backbone", "accepted"), [("resnet8", True), ("timm:test_vit3", False)])
def test_image_size_that_the_network_does_not_accept_is_refused(
    backbone: str, accepted: bool, tmp_path: Path
) -> None:
    data = {"dataset": "synthetic", "num_classes": 3, "synthetic_samples": [8, 8]}
    trained, larger = (
        parse_config({"data": {**data, "image_size": side}, "model": {"backbone": backbone}})
        for side in (32, 48)
    )
    save_classifier(tmp_path / "model.safetensors", build_model(trained, 3), trained, ("a", "b", "c"))
    classifier, val = load_classifier(tmp_path), open_split(larger, "val")
    world = World(0, 1, 0, 1, torch.device("cpu"), 1)
    check_image_size(trained, classifier)
    if accepted:
        check_image_size(larger, classifier)
        return
    for measurement in (evaluate_split, compute_layers):
        with pytest.raises(
            UserError, match=r"data.image_size=48: the network .* Set data.image_size=32"
        ) as e:
            measurement(larger, classifier, val, world)
        assert e.value.field == "data.image_size"


def test_unreadable_images_of_all_processes_are_counted_together() -> None:
    rows, numbers = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    part = Layers(rows, rows, numbers, numbers, 1, 1)
    with pytest.raises(UserError, match="exceed the 1 allowed") as caught:
        join_layers([part, part], "root")
    assert (caught.value.field, caught.value.value) == ("data.max_bad_val_fraction", 2)
    with pytest.raises(UserError, match="unreadable training images") as caught:
        join_layers([part, part], "root", of_training=True)
    assert caught.value.field == "data.max_bad_fraction"
    nothing = Layers(rows[:0], rows[:0], numbers[:0], numbers[:0], 0, 1)
    with pytest.raises(UserError, match="no image that can be read"):
        join_layers([nothing, nothing], "root")


def test_probabilities_are_measured_raw_and_calibrated(run: Path, subset: Path) -> None:
    done = evaluate(run, "--set", f"four={subset}", "--only-present-classes")
    assert done.code == 0, done.error
    result = done.result["sets"]["four"]
    model = dl2pa.load(run, device="cpu")
    files, names = files_of(subset), sorted(SUBSET)
    scores = model.predict(files).scores[:, [model.classes.index(name) for name in names]].astype(np.float64)
    truth = [names.index(file.parent.name) for file in files]
    for suffix, temperature in (("", 1.0), ("_calibrated", model.temperature)):
        p = np.exp(scores / temperature)
        p /= p.sum(axis=1, keepdims=True)
        expected = log_loss(truth, p, labels=range(4))
        assert result[f"nll{suffix}"] == pytest.approx(expected, abs=1e-6)
        bins = np.minimum((p.max(axis=1) * 15).astype(int), 14)
        hits = p.argmax(axis=1) == truth
        gaps = [abs((hits[bins == b] - p.max(axis=1)[bins == b]).sum()) for b in range(15)]
        assert result[f"ece{suffix}"] == pytest.approx(100 * sum(gaps) / 40, abs=1e-4)
    assert result["temperature"] == model.temperature != 1.0
    assert result["nll_calibrated"] < result["nll"]
    record = json.loads((run / "evaluations" / "four.json").read_text())["metrics"]
    point = events(run)[-1]["v"]
    for name in ("ece", "ece_calibrated", "nll", "nll_calibrated", "temperature"):
        assert record[name] == point[f"eval/four/{name}"] == result[name]
    printed = run_here("evaluate", run, "--set", f"four={subset}", "--only-present-classes").output
    for name in ("ECE, raw", "ECE, calibrated", "NLL, raw", "NLL, calibrated", "temperature"):
        assert name in printed.splitlines()[0]


def test_validation_split_has_the_figures_of_the_run(run: Path, images: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    done = run_here("evaluate", run)
    assert "fitted on the validation split" in done.error
    values = dict(line.strip().rsplit("  ", 1) for line in done.output.splitlines()[1:])
    values = {name.strip(): value for name, value in values.items()}
    assert float(values["NLL, raw"]) == pytest.approx(result["nll"], rel=1e-3)
    assert float(values["temperature"]) == pytest.approx(result["temperature"], rel=1e-3)
    assert float(values["ECE, raw"]) == pytest.approx(result["ece_last"], rel=1e-3)
    checkpoint = evaluate(run, "--checkpoint", "latest").result  # a checkpoint has no temperature
    assert checkpoint["nll"] == pytest.approx(result["nll"], abs=1e-6)
    assert not {"ece_calibrated", "nll_calibrated", "temperature"} & checkpoint.keys()


def test_record_of_an_earlier_version_is_completed(run: Path, images: Path) -> None:
    assert evaluate(run, "--set", f"val={images}").code == 0
    file, spool = run / "evaluations" / "val.json", run / "events" / "events.jsonl"
    record = json.loads(file.read_text())
    whole = spool.read_bytes().splitlines(keepends=True)
    old = {"top1": record["metrics"]["top1"], "ece": record["metrics"]["ece"]}
    point = {**json.loads(whole[-1]), "v": {f"eval/val/{name}": value for name, value in old.items()}}
    spool.write_bytes(b"".join([*whole[:-1], json.dumps(point).encode() + b"\n"]))
    file.write_text(json.dumps({**record, "metrics": old}))
    for _ in range(2):
        assert evaluate(run, "--set", f"val={images}").code == 0
    assert json.loads(file.read_text())["metrics"] == record["metrics"]
    added = [event["v"] for event in events(run) if "eval/val/temperature" in event.get("v", {})]
    assert len(added) == 1 and "eval/val/top1" not in added[0]


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "unknown class": (
        ["--set", "x=UNKNOWN"],
        "--set",
        "'foxx' in UNKNOWN is not among the 6 classes; the nearest is 'fox'",
    ),
    "missing classes": (
        ["--set", "x=SUBSET"],
        "--set",
        "no images of 2 of the model's 6 classes: 'cat', 'dog'",
    ),
    "no folder": (["--set", "x=gone"], "--set", "does not exist"),
    "no name": (["--set", "SUBSET"], "--set", "is not of the form NAME=DIR"),
    "a path as name": (["--set", "../x=SUBSET"], "--set", "does not consist of letters"),
    "the same name": (["--set", "x=SUBSET", "--set", "x=SUBSET"], "--set", "appears twice"),
    "a reserved name": (["--set", "ood=SUBSET"], "--set", "is reserved"),
    "nothing to choose from": (["--only-present-classes"], "--only-present-classes", "does not classify"),
    "two kinds": (["--embedding", "--ood", "x=SUBSET"], "--ood", "cannot be combined"),
    "no processes": (["--nproc", "none"], "--nproc", "must be a positive number or auto"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_sets_are_refused_before_anything_is_written(
    case: str, run: Path, subset: Path, tmp_path: Path
) -> None:
    unknown = write_images(tmp_path / "unknown", {"ant": 1, "foxx": 1}, 3)
    arguments, field, message = REFUSED[case]

    def placed(text: str) -> str:
        return text.replace("UNKNOWN", str(unknown)).replace("SUBSET", str(subset))

    before = sorted(run.rglob("*"))
    done = evaluate(run, *map(placed, arguments))
    assert done.code == 2, done.error
    assert done.result["error"]["field"] == field
    assert placed(message) in done.result["error"]["message"]
    assert sorted(run.rglob("*")) == before


def test_other_data_under_a_recorded_name_is_refused(run: Path, subset: Path, images: Path) -> None:
    assert evaluate(run, "--set", f"x={subset}", "--only-present-classes").code == 0
    content = (run / "evaluations" / "x.json").read_bytes()
    other = evaluate(run, "--set", f"x={images}")
    assert (other.code, other.result["error"]["value"]) == (2, "x")
    assert "other images or labels" in other.result["error"]["message"]
    option = evaluate(run, "--set", f"x={subset}", "--only-present-classes", "train.precision=bf16")
    assert (option.code, option.result["error"]["value"]) == (2, "x")
    assert (run / "evaluations" / "x.json").read_bytes() == content


def test_retrieval_with_other_options_follows_the_remedy(run: Path, images: Path) -> None:
    """The validation split has a fixed name."""
    assert evaluate(run, "--retrieval").code == 0
    error = evaluate(run, "--retrieval", "train.precision=bf16").result["error"]
    assert (error["field"], error["value"]) == ("evaluation", "retrieval/validation")
    assert "--set NAME=DIR" in error["remedy"] and "delete that file" in error["remedy"]
    split = f"half={images / 'val'}"
    assert evaluate(run, "--retrieval", "train.precision=bf16", "--set", split).code == 0
    (run / "evaluations" / "retrieval" / "validation.json").unlink()
    assert evaluate(run, "--retrieval", "train.precision=bf16").code == 0


def test_record_that_a_kill_interrupted_is_completed(run: Path, images: Path) -> None:
    assert evaluate(run, "--set", f"val={images}").code == 0
    spool = run / "events" / "events.jsonl"
    whole = spool.read_bytes().splitlines(keepends=True)
    spool.write_bytes(b"".join(whole[:-1]))
    assert evaluate(run, "--set", f"val={images}").code == 0
    assert events(run)[-1]["v"] == json.loads(whole[-1])["v"]


def test_model_that_was_trained_further_has_a_new_record(run: Path, images: Path) -> None:
    assert evaluate(run, "--set", f"val={images}").code == 0
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "steps": result["steps"] + 6}))
    assert evaluate(run, "--set", f"val={images}").code == 0
    assert json.loads((run / "evaluations" / "val.json").read_text())["step"] == result["steps"] + 6
    points = [event["step"] for event in events(run) if "eval/val/top1" in event.get("v", {})]
    assert points == [result["steps"], result["steps"] + 6]


def test_server_outage_loses_nothing(run: Path, images: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("uri: none", "uri: http://127.0.0.1:9"))
    done = evaluate(run, "--set", f"val={images}")
    assert done.code == 0, done.error
    assert f"`dl2pa sync {run}` sends it" in done.error
    assert "eval/val/top1" in events(run)[-1]["v"]


def test_run_without_tracking_has_the_record_as_a_file(run: Path, images: Path) -> None:
    shutil.rmtree(run / "events")
    done = evaluate(run, "--set", f"val={images}")
    assert done.code == 0, done.error
    assert (run / "evaluations" / "val.json").is_file()
    assert not (run / "events").exists()


def test_only_the_final_model_is_recorded(run: Path, images: Path) -> None:
    done = evaluate(run, "--set", f"val={images}", "--checkpoint", "best")
    assert done.code == 0, done.error
    assert "not recorded" in done.error
    assert done.result["sets"]["val"]["top1"] == json.loads((run / "result.json").read_text())["top1_best"]
    assert not (run / "evaluations").exists()


@pytest.mark.parametrize("count", [6, 5])
def test_checkpoint_does_not_take_the_classes_of_other_data(count: int, run: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "other" / split, dict.fromkeys("ghijkl"[:count], 3), 1)
    done = evaluate(run, "--checkpoint", "best", f"data.root={tmp_path / 'other'}")
    assert done.code == 2, done.result
    assert done.result["error"]["field"] == "data.root"
    assert "other classes than the model was trained on" in done.result["error"]["message"]


def test_unreadable_training_images_have_the_limit_of_training(
    run: Path, images: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(images, tmp_path / "images"))
    settings = f"data.root={root}", "data.loader=torchvision"
    (root / "train" / "ant" / "0.png").write_bytes(b"not an image")
    done = evaluate(run, "--embedding", *settings)
    assert done.code == 0, done.error
    assert (done.result["num_reference"], done.result["num_validated"]) == (71, 36)
    (root / "train" / "bee" / "0.png").write_bytes(b"not an image")
    error = evaluate(run, "--embedding", *settings).result["error"]
    assert error["field"] == "data.max_bad_fraction" and "exceed the 1 allowed" in error["message"]
    done = evaluate(run, "--embedding", *settings, "data.max_bad_fraction=0.03")
    assert done.result["num_reference"] == 70


def backbone_scores(model: Classifier, images: Path, other: Path) -> dict[str, np.ndarray]:
    """Scores of the layer before the embedding for the validation images, then others, by scikit-learn."""
    outputs: list[torch.Tensor] = []
    hook = model.embedder.backbone.register_forward_hook(lambda *call: outputs.append(call[2]))
    counts: list[int] = []
    for root in (images / "train", images / "val", other):
        model.embed(files_of(root))
        counts.append(sum(map(len, outputs)))
    hook.remove()
    unit = normalize(torch.cat(outputs).double().numpy())
    train, both = unit[: counts[0]], unit[counts[0] :]
    labels = np.array([file.parent.name for file in files_of(images / "train")])
    means = NearestCentroid().fit(train, labels).centroids_
    distance = NearestNeighbors(n_neighbors=50).fit(train).kneighbors(both)[0][:, -1]
    return {
        "backbone_knn": -distance,
        "backbone_class_mean": cosine_similarity(both, means).max(axis=1),
    }


@pytest.mark.parametrize("flat", [True, False])
def test_detection_equals_scikit_learns(flat: bool, run: Path, images: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", {"sun": 30}, 8, spread=160)
    done = evaluate(run, "--ood", f"sun={other / 'sun' if flat else other}")
    assert done.code == 0, done.error
    result = done.result["ood"]["sun"]
    model = dl2pa.load(run, device="cpu")
    train, val, outside = (model.embed(files_of(root)) for root in (images / "train", images / "val", other))
    is_inside = [1] * len(val) + [0] * len(outside)
    both = np.concatenate([val, outside])
    cosine = (both @ model.class_vectors.T).max(axis=1)
    assert result["embedding_cosine_auroc"] == pytest.approx(100 * roc_auc_score(is_inside, cosine), abs=1e-6)
    neighbors = NearestNeighbors(n_neighbors=50, metric="euclidean").fit(train.astype(np.float64))
    distance = neighbors.kneighbors(both.astype(np.float64))[0][:, -1]
    assert result["embedding_knn_auroc"] == pytest.approx(100 * roc_auc_score(is_inside, -distance), abs=1e-6)
    assert (result["num_inside"], result["num_outside"], result["num_reference"]) == (36, 30, 72)
    scores = model.predict([*files_of(images / "val"), *files_of(other)]).scores.astype(np.float64)
    energy = np.log(np.exp(scores).sum(axis=1))
    assert result["embedding_energy_auroc"] == pytest.approx(100 * roc_auc_score(is_inside, energy), abs=1e-6)
    assert result["backbone_knn_auroc"] != result["embedding_knn_auroc"]
    for name, value in backbone_scores(model, images, other).items():
        accepted, kept, _ = roc_curve(is_inside, value, drop_intermediate=False)
        assert result[f"{name}_auroc"] == pytest.approx(100 * roc_auc_score(is_inside, value), abs=1e-6)
        assert result[f"{name}_fpr95"] == pytest.approx(100 * accepted[np.argmax(kept >= 0.95)], abs=1e-6)
    assert json.loads((run / "evaluations" / "ood" / "sun.json").read_text())["metrics"] == result
    assert events(run)[-1]["v"]["ood/sun/backbone_class_mean_fpr95"] == result["backbone_class_mean_fpr95"]


def test_retrieval_equals_scikit_learns(run: Path, images: Path, tmp_path: Path) -> None:
    new = write_images(
        tmp_path / "new", {"gnu": 8, "owl": 8, "ant": 8}, 9
    )  # classes that the model does not know
    done = evaluate(run, "--retrieval", "--set", f"new={new}")
    assert done.code == 0, done.error
    validation = evaluate(run, "--retrieval").result["retrieval"]["validation"]
    model = dl2pa.load(run, device="cpu")
    for root, result in ((new, done.result["retrieval"]["new"]), (images / "val", validation)):
        files = files_of(root)
        vectors = model.embed(files).astype(np.float64)
        labels = np.array([file.parent.name for file in files])
        found = NearestNeighbors(n_neighbors=11).fit(vectors).kneighbors(vectors, return_distance=False)
        same = labels[found[:, 1:]] == labels[:, None]
        for k in (1, 5, 10):
            assert result[f"hits_at_{k}"] == int(same[:, :k].any(axis=1).sum())
        assert result["num_queries"] == len(files)
    assert (run / "evaluations" / "retrieval" / "validation.json").is_file()


def test_classes_are_those_of_the_run(finished: Path) -> None:
    assert dl2pa.load(finished, device="cpu").classes == list(CLASSES)
