"""Consistency of the image with the repository, without building it (docker/build-test builds and runs it)."""

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
    """Yield the Dockerfile's instructions as words, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line.split()


def copied() -> set[str]:
    """Paths that the Dockerfile copies from the repository."""
    sources: set[str] = set()
    for name, *words in instructions():
        if name == "COPY" and not any(word.startswith("--from") for word in words):
            sources |= {word for word in words[:-1] if not word.startswith("--")}
    return sources


def sent_to_builder() -> set[str]:
    """Paths that .dockerignore does not exclude."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def service(name: str) -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())["services"][name]


def test_copied_paths_exist_and_reach_the_builder() -> None:
    assert {source for source in copied() if not (ROOT / source).exists()} == set()
    assert copied() == sent_to_builder()


def test_image_contains_every_installed_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        f.parent.name for f in ROOT.glob("*/__init__.py") if any(fnmatch(f.parent.name, p) for p in patterns)
    }
    assert packages and packages <= copied()


def test_compose_names_existing_configurations_and_its_server() -> None:
    for name in ("train", "train-gpu"):
        command = service(name)["command"]
        config = re.search(r"\$\{CONFIG:-(.*?)\}", command)
        assert config is not None and (ROOT / config[1]).is_file(), command
        address = service(name)["environment"]["MLFLOW_TRACKING_URI"]
        assert address == "http://tracking:5000"  # a host name that docker/tracking-server accepts
    assert "for name in tracking " in (ROOT / "docker/tracking-server").read_text()
    targets = {words[-1] for name, *words in instructions() if name == "FROM"}
    assert service("tracking")["build"]["target"] in targets


def test_the_driver_library_for_jpeg_hardware_is_requested() -> None:
    words = [word for name, *words in instructions() if name == "ENV" for word in words]
    (image,) = [w.partition("=")[2] for w in words if w.startswith("NVIDIA_DRIVER_CAPABILITIES=")]
    assert set(image.split(",")) == {"compute", "utility", "video"}
    (devices,) = service("train-gpu")["deploy"]["resources"]["reservations"]["devices"]
    assert set(devices["capabilities"]) == {"gpu", *image.split(",")}


def test_the_image_can_compile_and_load_code_for_torch_compile() -> None:
    stages = {words[-1]: words[0] for name, *words in instructions() if name == "FROM"}
    lineage, stage, installed = [], "train", set[str]()
    while stage in stages:
        lineage.append(stage)
        stage = stages[stage]
    current = ""
    for name, *words in instructions():
        current = words[-1] if name == "FROM" else current
        installed |= set(words) if name == "RUN" and current in lineage else set()
    assert "g++" in installed and any("libpython3-dev" in word for word in installed)
    for name in ("train", "train-gpu"):  # Docker mounts a tmpfs noexec by default
        assert service(name)["tmpfs"] == ["/tmp:exec"]


def test_sign_in_is_on_by_default_and_training_has_credentials() -> None:
    def default(name: str, variable: str) -> str:
        return re.sub(r"\$\{\w+:?-(.*)\}", r"\1", service(name)["environment"][variable])

    password = default("tracking", "MLFLOW_AUTH_ADMIN_PASSWORD")
    assert len(password) >= 12, "MLflow refuses shorter passwords"
    for name in ("train", "train-gpu"):
        assert default(name, "MLFLOW_TRACKING_USERNAME") == "admin"
        assert default(name, "MLFLOW_TRACKING_PASSWORD") == password
    assert "127.0.0.1" in service("tracking")["ports"][0], "the default password is for loopback only"


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", [[], ["--profile", "cpu"], ["--profile", "gpu"]])
def test_docker_compose_accepts_the_file(profile: list[str]) -> None:
    command = ["docker-compose", "--file", str(COMPOSE), *profile, "config", "--quiet"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


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
def test_published_password_is_refused_on_an_open_address(
    tmp_path: Path, address: str, password: str, code: int
) -> None:
    """A script in place of `mlflow` prints its arguments, among them the allowed hosts."""
    (tmp_path / "mlflow").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "mlflow").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TRACKING_ADDRESS": address,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "TRACKING_HOSTS": "mlflow.example",
    }
    process = subprocess.run([ROOT / "docker/tracking-server"], env=env, capture_output=True, text=True)
    assert process.returncode == code, process.stderr
    if code == 2:
        assert "ADMIN_PASSWORD=dl2pa-tracking" in process.stderr and process.stdout == ""
        return
    assert ("without sign-in" in process.stderr) == (password == "")
    words = process.stdout.split()
    hosts = words[words.index("--allowed-hosts") + 1].split(",")
    assert {"localhost", "tracking", "mlflow.example"} <= set(hosts)
    assert not [host for host in hosts if "*" in host.removesuffix(":*")], "host names are complete"
