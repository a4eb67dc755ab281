"""The parts of docker/compose.yaml together: MLflow on PostgreSQL in its image, a training in its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testing.report import check, give_up, say
from testing.runs import QUICKSTART, Scene, only_run, wait_for

_PASSWORD = "only for this test"
_PORT = 5000
_TOOL = Path(__file__).resolve().parents[1] / "testpostgres"
_COMPOSE = _TOOL.with_name("compose.yaml")


@contextmanager
def database(folder: Path) -> Generator[dict[str, str]]:
    """A PostgreSQL of this machine; yields libpq's variables."""
    tool = str(_TOOL)
    subprocess.run([tool, "down", str(folder)], check=False)
    done = subprocess.run([tool, "up", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        give_up(done.stderr.strip())
    check(done.returncode == 0, done.stderr.strip())
    try:
        words = (folder / "env").read_text(encoding="utf-8").removeprefix("export ").split()
        yield dict(word.split("=", 1) for word in words)
    finally:
        subprocess.run([tool, "down", str(folder)], check=False)


def request(
    url: str, body: dict[str, Any] | None = None, host: str = "", signed: bool = True
) -> tuple[int, Any]:
    """Status and JSON of one answer; 0 where there is none."""
    headers = {"Content-Type": "application/json"} | ({"Host": host} if host else {})
    if signed:
        headers["Authorization"] = "Basic " + b64encode(f"admin:{_PASSWORD}".encode()).decode()
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else text
    except urllib.error.HTTPError as error:
        return error.code, None
    except OSError:
        return 0, None


def _free_port() -> int:
    """The image's own if nobody listens there: only there its health check can look."""
    try:
        free = socket.create_server(("127.0.0.1", _PORT))
    except OSError:
        free = socket.create_server(("127.0.0.1", 0))
    with free:
        return int(free.getsockname()[1])


def check_compose() -> None:
    """Debian's docker-compose takes the file."""
    command = ["docker-compose", "--file", str(_COMPOSE), "config", "--services"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check(done.returncode == 0 and not done.stderr, f"{' '.join(command)}: {done.stderr.strip()}")
    say("docker-compose config", f"valid: {', '.join(sorted(done.stdout.split()))}")


def check_pages(scene: Scene) -> None:
    """`ui` in the training image shows the runs on its volume, to a browser outside, until it is told to end."""
    port = _free_port()
    volumes = {"/runs": (scene.volume("runs"), "rw")}
    began = time.monotonic()
    others = ["--host", "0.0.0.0", "--allow-others", "localhost,127.0.0.1"]
    pages = scene.start("ui", *others, "--port", str(port), volumes=volumes)
    address = f"http://127.0.0.1:{port}"
    wait_for(lambda: request(f"{address}/health")[0] == 200, pages, "MLflow's pages")
    seconds = time.monotonic() - began
    experiments = request(f"{address}/api/2.0/mlflow/experiments/search?max_results=10")[1]["experiments"]
    names = sorted(experiment["name"] for experiment in experiments)
    check("quickstart" in names, f"the pages show {names}")
    pages.signal(signal.SIGTERM)
    code = pages.wait(60)
    check(code == 0, f"ui ends with {code}:\n{pages.error[-2000:]}")
    say("ui", f"answers after {seconds:.0f} s, shows {', '.join(names)}, ends with 0")


def check_tracking(scene: Scene) -> None:
    """The compose file's parts: MLflow on PostgreSQL in its image, the training in its own, as it signs in there."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    with database(scene.folder / "postgres") as variables:
        server = scene.start(
            *("--host", "127.0.0.1", "--port", str(port)),
            image="dl2pa-tracking",
            volumes={"/artifacts": (scene.volume("artifacts"), "rw")},
            env={**variables, "MLFLOW_AUTH_ADMIN_PASSWORD": _PASSWORD},
        )
        began = time.monotonic()
        wait_for(lambda: request(f"{address}/health")[0] == 200, server, "the tracking server")
        seconds = time.monotonic() - began
        experiments = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
        answers = {
            "anonymous": request(experiments, signed=False)[0],
            "as tracking:5000": request(experiments, host="tracking:5000")[0],
            "as a stranger": request(experiments, host="stranger.invalid")[0],
        }
        wanted = {"anonymous": 401, "as tracking:5000": 200, "as a stranger": 403}
        check(answers == wanted, f"the tracking server answers {answers}, not {wanted}")
        if port == _PORT:
            check(server.health()[0] == 0, f"its own health check fails: {server.health()[1]}")
        say("MLflow on PostgreSQL", f"healthy after {seconds:.0f} s; {answers}")
        signed_in = {
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": _PASSWORD,
        }
        volumes = {"/runs": (scene.volume("tracked"), "rw")}
        result = scene.run(*QUICKSTART, "train.epochs=2", volumes=volumes, env=signed_in).result
        # A server on a busy machine may not have taken all when the training stopped waiting for it.
        name = only_run(volumes["/runs"][0]).name
        scene.run("sync", f"/runs/{name}", volumes=volumes, env=signed_in)
        run = request(f"{address}/api/2.0/mlflow/runs/get?run_id={result['mlflow_run_id']}")[1]["run"]
        values = {m["key"]: m["value"] for m in run["data"]["metrics"]}
        check(run["info"]["status"] == "FINISHED", f"MLflow has the run as {run['info']['status']}")
        top1 = values.get("val/top1")
        check(top1 == result["top1_last"], f"MLflow has {top1}, not {result['top1_last']}")
        stored = [path for path in scene.volume("artifacts").rglob("*") if path.is_file()]
        check(
            any(path.name.endswith(".safetensors") for path in stored),
            f"no model among the artifacts: {stored}",
        )
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        server.wait(60)
        ended = f"the server ends in {time.monotonic() - began:.1f} s"
        say("a training records itself there", f"top-1 {top1:.2f} %, {len(stored)} artifacts; {ended}")
