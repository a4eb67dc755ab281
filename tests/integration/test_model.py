"""Log, register, serve and export a trained model: all give the same predictions."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dl2pa.cli import main
from dl2pa.model.inference import load_classifier
from pipelines.single import load_image
from support.paths import REPOSITORY, SHARED_DATA
from support.runs import copy_as_another_run
from support.servers import MlflowServer, free_port, serving

pytestmark = pytest.mark.xdist_group("servers")
PHOTOGRAPHS = SHARED_DATA / "imagenet-samples"
MLFLOW = (sys.executable, "-m", "mlflow")


@pytest.fixture(scope="module")
def server(mlflow_server: MlflowServer) -> str:
    return mlflow_server.uri


@pytest.fixture(scope="module")
def synced(trained: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained run after `dl2pa sync`."""
    run = copy_as_another_run(trained, tmp_path_factory.mktemp("model") / "run", "models")
    assert main(["sync", str(run), "--uri", server]) == 0
    return run


@pytest.fixture(scope="module")
def register(synced: Path, server: str) -> Callable[..., int]:
    def call(*options: str, run: Path = synced, uri: str = server) -> int:
        return main(["register", str(run), "--uri", uri, *options])

    return call


@pytest.fixture(scope="module")
def predict(
    register: Callable[..., int], server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Start `mlflow models serve`; yields a function that predicts encoded images."""
    assert register("--name", "served", "--alias", "champion") == 0
    port = str(free_port())
    command = [*MLFLOW, "models", "serve", "-m", "models:/served@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", port, "--workers", "1"]

    def ask(images: list[bytes], **params: int) -> Any:
        rows = [[base64.b64encode(image).decode()] for image in images]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}, "params": params})
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["predictions"]

    folder = tmp_path_factory.mktemp("serve")
    # MLflow starts uvicorn by name, so it must be on the path, as in an activated environment.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    variables = {"MLFLOW_TRACKING_URI": server, "PATH": path}
    with serving(folder, f"http://127.0.0.1:{port}/ping", command, **variables):
        yield ask


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def files_of(digits: Path) -> list[Path]:
    return sorted((digits / "val").rglob("*.jpeg")) or sorted((digits / "val").rglob("*.jpg"))


def test_the_model_is_logged_once(
    synced: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    assert main(["sync", str(synced), "--uri", server]) == 0
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("models")
    (model,) = client.search_logged_models([experiment.experiment_id])
    run = client.get_run(model.source_run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert (model.name, str(model.status), model.model_type) == ("model", "READY", "image-classifier")
    result = json.loads((synced / "result.json").read_text())
    assert model.tags["dl2pa.top1_last"] == f"{result['top1_last']:.2f}"
    assert model.params["backbone"] == "resnet8"
    files = {file.path: file for file in client.list_logged_model_artifacts(model.model_id)}
    assert {"MLmodel", "requirements.txt", "input_example.json", "code", "artifacts"} <= files.keys()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    place = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/model", dst_path=str(tmp_path))
    weights = Path(place, "artifacts", "model.safetensors").read_bytes()
    assert weights == (synced / "model.safetensors").read_bytes(), "the path on the run's summary page"
    assert "model.safetensors" not in {f.path for f in client.list_artifacts(run.info.run_id)}, "stored once"
    assert not (synced / "events" / "mlflow-model").exists()


def test_the_logged_model_needs_only_its_requirements(
    synced: Path, server: str, digits: Path, tmp_path: Path
) -> None:
    """Load it in another folder, in a process that cannot import the other packages of this environment."""
    import mlflow

    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("models")
    (model,) = client.search_logged_models([experiment.experiment_id])
    script = f"""
import sys
for name in ("nvidia.dali", "submitit", "torchvision"):
    sys.modules[name] = None
import base64, json, mlflow, pandas
loaded = mlflow.pyfunc.load_model("models:/{model.model_id}")
image = open({str(files_of(digits)[0])!r}, "rb").read()
frames = [loaded.predict(pandas.DataFrame({{"image": [kind]}}), params={{"top_k": 2}})
          for kind in (image, bytearray(image), base64.b64encode(image).decode())]
assert all(frame.equals(frames[0]) for frame in frames)
example = loaded.predict(loaded.input_example)
import dl2pa.model.inference, dl2pa.model.serving
assert not {{"dl2pa.config", "dl2pa.methods"}} & set(sys.modules)
top = frames[0]["top"][0]
pins = open(mlflow.pyfunc.get_model_dependencies("models:/{model.model_id}")).read()
print(json.dumps([dl2pa.model.inference.__file__, top, len(example), str(loaded.metadata.signature.inputs), pins]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environment, "MLFLOW_TRACKING_URI": server},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, top, examples, inputs, pinned = json.loads(done.stdout.splitlines()[-1])
    assert not Path(file).is_relative_to(REPOSITORY), "the code in the logged model runs, not this checkout's"
    assert (len(top), examples) == (2, 1)
    assert "binary" in inputs
    pins = dict(line.split("==") for line in pinned.split())
    assert pins.keys() == {"mlflow", "numpy", "pandas", "pillow", "safetensors", "torch"}
    assert pins["torch"] == torch.__version__.partition("+")[0]


def test_serving_agrees_with_evaluate_and_predict(
    predict: Callable[..., Any], synced: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(digits)
    assert len(files) == 359
    answers = predict([file.read_bytes() for file in files])
    right = sum(a["class_name"] == file.parent.name for a, file in zip(answers, files, strict=True))
    assert main(["evaluate", str(synced), "--json"]) == 0
    evaluated = last_json(capsys)
    assert 100 * right / 359 == pytest.approx(evaluated["top1"], abs=1e-9)
    assert evaluated["top1"] > 50
    assert main(["predict", str(synced), *map(str, files[::30]), "--json"]) == 0
    for answer, predicted in zip(answers[::30], last_json(capsys)["predictions"], strict=True):
        assert [guess["class"] for guess in answer["top"]] == [guess["class"] for guess in predicted["top"]]
        expected = [guess["probability"] for guess in predicted["top"]]
        assert [guess["probability"] for guess in answer["top"]] == pytest.approx(expected, abs=1e-4)
        first = answer["top"][0]
        assert (answer["class_index"], answer["probability"]) == (first["index"], first["probability"])


def test_serving_a_photograph(
    predict: Callable[..., Any], synced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"needs photographs in {PHOTOGRAPHS}")
    for photograph in sorted(PHOTOGRAPHS.rglob("*.*"))[:3]:
        (answer,) = predict([photograph.read_bytes()], top_k=3)
        assert main(["predict", str(synced), str(photograph), "--top", "3", "--json"]) == 0
        (predicted,) = last_json(capsys)["predictions"]
        assert answer["class_name"] == predicted["top"][0]["class"]
        probabilities = [guess["probability"] for guess in answer["top"]]
        assert probabilities == pytest.approx([g["probability"] for g in predicted["top"]], abs=1e-4)


def test_serving_names_a_row_that_is_not_an_image(predict: Callable[..., Any], digits: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        predict([files_of(digits)[0].read_bytes(), b"no image"])
    assert refusal.value.code == 400
    assert "row 1" in refusal.value.read().decode()


def test_registering_again_changes_nothing_and_aliases_move(
    register: Callable[..., int], server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    options = ("--name", "digits", "--alias", "candidate", "--json")
    answers: list[Any] = []
    for _ in range(2):
        assert register(*options) == 0
        answers.append(last_json(capsys))
    assert [(a["version"], a["created"]) for a in answers] == [("1", True), ("1", False)]
    client = mlflow.MlflowClient(server)
    (version,) = client.search_model_versions("name = 'digits'")
    model_id = answers[0]["model_id"]
    client.create_model_version("digits", version.source, version.run_id, model_id=model_id)
    client.set_registered_model_alias("digits", "champion", "2")
    assert client.get_model_version_by_alias("digits", "candidate").version == "1"
    assert register(*options, "--alias", "champion") == 0
    again = last_json(capsys)
    assert (again["version"], again["aliases"]) == ("2", ["candidate", "champion"]), (
        "the latest of two equal versions"
    )
    assert again["moved_from"] == {"candidate": "1"}
    assert client.get_model_version_by_alias("digits", "champion").source == version.source


def test_register_logs_a_deleted_model_again(
    register: Callable[..., int], synced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    store = f"sqlite:///{tmp_path / 'other.db'}"
    assert main(["sync", str(synced), "--uri", store]) == 0
    client = mlflow.MlflowClient(store)
    (model,) = client.search_logged_models([client.get_experiment_by_name("models").experiment_id])
    client.delete_logged_model(model.model_id)
    assert register("--name", "digits", "--json", uri=store) == 0
    answer = last_json(capsys)
    assert (answer["created"], answer["uri"]) == (True, "models:/digits/1")
    assert answer["model_id"] != model.model_id


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--name", "a/b"), "--name"),
        (("--name", ""), "--name"),
        (("--name", "x", "--alias", "v1"), "--alias"),
        (("--name", "x", "--alias", "Latest"), "--alias"),
        (("--name", "x", "--uri", "http://127.0.0.1:9"), "--uri"),
    ],
)
def test_register_refuses(
    register: Callable[..., int], options: tuple[str, ...], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert register(*options, "--json") == 2
    assert last_json(capsys)["error"]["field"] == field


def test_register_refuses_an_unfinished_run(
    register: Callable[..., int], synced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert register("--name", "x", "--json", run=tmp_path / "nothing") == 2
    assert "not a run directory" in last_json(capsys)["error"]["message"]
    run = tmp_path / "run"
    shutil.copytree(synced, run)
    (run / "status.json").write_text('{"state": "stopped"}')
    assert register("--name", "x", "--json", run=run) == 2
    assert "not finished" in last_json(capsys)["error"]["message"]


def test_register_reports_a_store_without_a_registry(
    register: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "nowhere://x")
    assert register("--name", "x", "--json") == 2
    assert "no model registry" in last_json(capsys)["error"]["message"]


def test_an_exported_mlflow_folder_predicts(trained: Path, digits: Path, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd

    assert main(["export", str(trained), "--mlflow", "--out", str(tmp_path / "out")]) == 0
    shutil.copytree(tmp_path / "out" / "mlflow", tmp_path / "else where")
    shutil.rmtree(tmp_path / "out")
    file = files_of(digits)[5]
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "else where"))
    answer = loaded.predict(pd.DataFrame({"image": [file.read_bytes()]}))
    classifier = load_classifier(trained)
    assert answer["class_name"][0] == classifier.predict(file).names[0]


def test_the_onnx_file_gives_the_same_logits(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(trained), "--onnx", "--out", str(tmp_path), "--json"]) == 0
    exported = last_json(capsys)
    assert (exported["onnx_checked_on"], exported["onnx_images"]) == ("validation images", 64)
    assert (exported["onnx_top1_equal"], exported["onnx_relative_difference"] < 1e-4) == (100.0, True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    classes, prepared = json.loads(metadata["classes"]), json.loads(metadata["preprocessing"])
    classifier = load_classifier(trained)
    assert classes == classifier.classes
    assert prepared.pop("channels") == "RGB"
    for count in (1, 5):
        images = torch.stack([load_image(file, **prepared) for file in files_of(digits)[:count]])
        logits, probabilities = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        assert torch.allclose(logits, classifier.score(images), atol=1e-4)
        assert torch.allclose(probabilities, (logits / classifier.temperature).softmax(1), atol=1e-5)
    assert str(REPOSITORY).encode() not in (tmp_path / "model.onnx").read_bytes()
