"""What can go wrong between the image and the rest of the repository; docker/build-test builds and runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "docker/compose.yaml"


def instructions() -> Iterator[list[str]]:
    """The Dockerfile's instructions as words, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line.split()


def copied() -> set[str]:
    """What the Dockerfile copies out of the repository."""
    found: set[str] = set()
    for name, *words in instructions():
        if name == "COPY" and not any(word.startswith("--from") for word in words):
            found |= {word for word in words[:-1] if not word.startswith("--")}
    return found


def let_in() -> set[str]:
    """What .dockerignore sends to the builder."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def service(name: str) -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())["services"][name]


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    assert {source for source in copied() if not (ROOT / source).exists()} == set()
    assert copied() == let_in()


def test_every_package_that_is_installed_is_in_the_image() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        f.parent.name for f in ROOT.glob("*/__init__.py") if any(fnmatch(f.parent.name, p) for p in patterns)
    }
    assert packages and packages <= copied()


def test_compose_trains_configurations_that_exist_on_a_server_that_answers_to_its_name() -> None:
    for name in ("train", "train-gpu"):
        command = service(name)["command"]
        config = re.search(r"\$\{CONFIG:-(.*?)\}", command)
        assert config is not None and (ROOT / config[1]).is_file(), command
        address = service(name)["environment"]["MLFLOW_TRACKING_URI"]
        assert address == "http://tracking:5000"  # the name docker/tracking-server answers to
    assert "for name in tracking " in (ROOT / "docker/tracking-server").read_text()
    targets = {words[-1] for name, *words in instructions() if name == "FROM"}
    assert service("tracking")["build"]["target"] in targets


def test_everyone_signs_in_unless_told_otherwise_and_the_training_knows_how() -> None:
    def default(name: str, variable: str) -> str:
        return re.sub(r"\$\{\w+:?-(.*)\}", r"\1", service(name)["environment"][variable])

    password = default("tracking", "MLFLOW_AUTH_ADMIN_PASSWORD")
    assert len(password) >= 12, "MLflow takes no shorter one"
    for name in ("train", "train-gpu"):
        assert default(name, "MLFLOW_TRACKING_USERNAME") == "admin"
        assert default(name, "MLFLOW_TRACKING_PASSWORD") == password
    assert "127.0.0.1" in service("tracking")["ports"][0], "whoever opens it to others chooses a password"


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", [[], ["--profile", "cpu"], ["--profile", "gpu"]])
def test_docker_compose_takes_the_file(profile: list[str]) -> None:
    command = ["docker-compose", "--file", str(COMPOSE), *profile, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("address", "password", "code"),
    [
        ("0.0.0.0", "dl2pa-tracking", 2),
        ("192.168.1.5", "dl2pa-tracking", 2),
        ("0.0.0.0", "another one", 0),
        ("0.0.0.0", "", 0),
        ("127.0.0.1", "dl2pa-tracking", 0),
        ("", "dl2pa-tracking", 0),
    ],
)
def test_the_published_password_is_refused_where_others_reach_the_server(
    tmp_path: Path, address: str, password: str, code: int
) -> None:
    """`mlflow` stands for the server, which is not the subject: it shows the hosts that it is to answer to."""
    (tmp_path / "mlflow").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "mlflow").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TRACKING_ADDRESS": address,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "TRACKING_HOSTS": "mlflow.example",
    }
    done = subprocess.run([ROOT / "docker/tracking-server"], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "ADMIN_PASSWORD = dl2pa-tracking" in done.stderr and done.stdout == ""
        return
    assert ("nobody has to sign in" in done.stderr) == (password == "")
    words = done.stdout.split()
    hosts = words[words.index("--allowed-hosts") + 1].split(",")
    assert {"localhost", "tracking", "mlflow.example"} <= set(hosts)
    assert not [host for host in hosts if "*" in host.removesuffix(":*")], "no pattern within a name"
