"""Attacks on a training of this machine, and secrets that must stay out of what a run leaves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support.commands import run_here
from support.runs import IN_MEMORY, Process, Program, Training, config_with, processes_of
from support.secrets import FORMS, SECRET, environment, holders_of_secrets
from support.servers import free_port

pytestmark = pytest.mark.xdist_group("runs")
LOOPBACK = ("127.0.0.1", "::1")


def listeners(processes: list[Process]) -> list[str]:
    """The addresses that the processes listen on."""
    connections = [c for p in processes for c in psutil.Process(p.pid).net_connections("tcp")]
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def two_ranks(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A training of two processes that goes on for the tests of this file."""
    folder = tmp_path_factory.mktemp("two ranks")
    config = config_with(folder, digits, {"train": {"epochs": 1000}, "data": IN_MEMORY})
    training = Training(Program(folder), config, folder / "run", 2)
    training.wait_for_step(training.start(), 1, 0)
    yield training
    training.program.close()


def test_a_run_of_two_processes_records_the_command_of_its_ranks(two_ranks: Training) -> None:
    attempts = json.loads((two_ranks.run / "environment.json").read_text())["attempts"]
    words = shlex.split(attempts[-1]["command"])
    assert words[:3] == ["dl2pa", "train", str(two_ranks.config)]


def test_a_training_on_one_machine_listens_on_loopback_only(two_ranks: Training) -> None:
    processes = processes_of(two_ranks.run)
    assert sorted(p.kind for p in processes) == ["launcher", "rank", "rank", "torchrun"]
    found = listeners(processes)
    assert found, "the ranks talk to each other"
    assert [address for address in found if address not in LOOPBACK] == []
    assert listeners([p for p in processes if p.kind != "rank"]) == [], "no store is served"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
@pytest.mark.parametrize(
    "attack", ["cat {0}", "ls {1}", "echo x >>{0}", "touch {1}/new", "rm -f {0}", "mv {1} {1}-moved"]
)
def test_another_user_can_neither_read_nor_write_the_store(two_ranks: Training, attack: str) -> None:
    agent = next(p for p in processes_of(two_ranks.run) if p.kind == "torchrun")
    words = Path(f"/proc/{agent.pid}/cmdline").read_text().split("\0")
    folder = Path(words[words.index("launcher.agent") + 3])
    assert (folder / "ranks").is_file() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sh", "-c"]
    done = subprocess.run([*nobody, attack.format(folder / "ranks", folder)], capture_output=True, text=True)
    assert (done.returncode != 0 and "denied" in done.stderr) or "not permitted" in done.stderr, done
    assert (folder / "ranks").is_file()


def test_no_secret_reaches_the_files_of_a_run_or_what_is_printed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each form stands in the environment, in a tag, in the command and in an uncommitted change."""
    assert len(FORMS) >= 40
    tags = {f"form {number}": text for number, text in enumerate(FORMS.values())}
    address = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    tracking = {"uri": address, "tags": tags, "figures": True}
    config = config_with(
        tmp_path / "config",
        digits,
        {"train": {"epochs": 1, "max_steps": 2}, "tracking": tracking, "data": IN_MEMORY},
    )
    run = tmp_path / "run"
    said = [f"tracking.tags.said{number}={json.dumps(text)}" for number, text in enumerate(FORMS.values())]
    command = ["train", str(config), *said, "--run-dir", str(run), "--json"]
    changes = "\n".join(FORMS.values())
    git = "dl2pa.training.environment._git"
    monkeypatch.setattr(git, lambda *words: changes if words[0] == "diff" else "")
    env = {**environment(), "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    done = [run_here(*command, env=env)]
    assert done[0].code == 0, done[0].error
    done.append(run_here("export", run, "--out", tmp_path / "export", env=env))
    done.append(run_here("report", run, "--out", tmp_path / "report", env=env))
    done.append(run_here("sync", run, env=env))
    done.append(run_here("train", config, f"optim.lr=token={SECRET}", "--json", env=env))
    assert [d.code for d in done[1:3]] == [0, 0], done[1].error + done[2].error
    assert done[-1].code == 2
    assert not [d for d in done if SECRET in d.output + d.error]
    assert holders_of_secrets(run) == [] and holders_of_secrets(tmp_path / "export") == []
    assert holders_of_secrets(tmp_path / "report") == []
    diff = next((run / "code").glob("*.diff"))
    assert "***" in diff.read_text() and "***" in (run / "environment.json").read_text()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (diff, run / "logs/rank-0.log")}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((run / "model.safetensors").stat().st_mode) == 0o644


@pytest.fixture
def foreign(undisturbed: Callable[..., Training], tmp_path: Path) -> Path:
    """Somebody else's run directory."""
    run = tmp_path / "theirs/run"
    shutil.copytree(undisturbed(1, None).run, run)
    return run


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_server_named_only_by_the_run_gets_no_credentials(foreign: Path, variable: str) -> None:
    config = foreign / "config.yaml"
    address = f"http://127.0.0.1:{free_port()}"
    config.write_text(config.read_text().replace("uri: none", f"uri: {address}"))
    assert address in config.read_text()
    done = run_here("sync", foreign, env={variable: SECRET})
    assert done.code == 2
    assert f"{address}" in done.error and "named only by the run directory" in done.error


def test_database_named_only_by_the_run_must_be_in_its_folder(foreign: Path, tmp_path: Path) -> None:
    config = foreign / "config.yaml"
    config.write_text(config.read_text().replace("uri: none", f"uri: sqlite:///{tmp_path}/mine/other.db"))
    done = run_here("sync", foreign)
    assert done.code == 2 and "named only by the run directory" in done.error
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("by", ["path", "link", "folder with a link"])
def test_sync_sends_no_file_from_outside_the_run(foreign: Path, tmp_path: Path, by: str) -> None:
    pytest.importorskip("mlflow")
    mine = tmp_path / "mine.txt"
    mine.write_text(SECRET)
    (foreign / "box").mkdir()
    (foreign / "box/link").symlink_to(mine)
    name = {"path": "../../mine.txt", "link": "box/link", "folder with a link": "box"}[by]
    events = foreign / "events/events.jsonl"
    events = events if events.exists() else next((foreign / "events").glob("*.jsonl"))
    last = json.loads(events.read_text().splitlines()[-1])
    event = {"e": "artifact", "t": last["t"], "a": last["a"], "path": name, "folder": ""}
    with events.open("a") as file:
        file.write(json.dumps(event) + "\n")
    store = tmp_path / "store"
    done = run_here("sync", foreign, "--uri", f"sqlite:///{store}/mlflow.db", "--json")
    assert done.result["refused"] == 1, done.error
    assert "outside the run directory" in done.error
    assert list(store.rglob("metrics")) or (store / "mlflow.db").exists(), "the rest was sent"
    assert holders_of_secrets(store) == []


@pytest.mark.parametrize("chosen", ["all artifacts", "models only"])
def test_database_of_the_run_does_not_choose_where_files_go(
    foreign: Path, tmp_path: Path, chosen: str
) -> None:
    """MLflow's client writes a run's and a model's files to the paths that the database names."""
    mlflow = pytest.importorskip("mlflow")
    database = foreign.parent / "mlflow.db"
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    identity = json.loads((foreign / "events/run.json").read_text())
    mine = tmp_path / "mine"
    number = client.create_experiment(identity["experiment"], mine.as_uri())
    run = client.create_run(number, tags={"dl2pa.run_uuid": identity["run_uuid"]})
    if chosen == "models only":
        with sqlite3.connect(database) as connection:
            place = (foreign.parent / "mlartifacts").as_uri()
            connection.execute("update runs set artifact_uri = ?", [f"{place}/{run.info.run_id}"])
    config = foreign / "config.yaml"
    config.write_text(config.read_text().replace("uri: none", f"uri: sqlite:///{database}"))
    done = run_here("sync", foreign)
    assert done.code == 2 and "would write artifacts to" in done.error, done.error
    assert not mine.exists()


@pytest.mark.parametrize("name", ["status.json", "events/run.json", "events/mlflow.json", "environment.json"])
def test_deeply_nested_file_is_reported_as_damaged(foreign: Path, name: str) -> None:
    (foreign / name).write_text("[" * 100_000)
    for command in (["report", foreign, "--out", foreign.parent / "report"], ["sync", foreign]):
        done = run_here(*command)
        assert "Traceback" not in done.error and done.code in (0, 1, 2), done.error
