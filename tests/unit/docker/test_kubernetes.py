"""The manifests of docker/kubernetes: their schema, and that everything they name exists in dl2pa."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa import envvars
from dl2pa.cli import build_parser
from dl2pa.config import load_config
from dl2pa.errors import EXIT_STOPPED, EXIT_USER_ERROR
from launcher.node import Node, shared_secret, this_node

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docker/kubernetes"
MANIFESTS = sorted(path.name for path in FOLDER.glob("*.yaml"))
JOBS = ("one-node.yaml", "several-nodes.yaml")
VERSION = "1.37"
SECRET = "0123456789abcdef"


def objects(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))


def job(name: str) -> dict[str, Any]:
    return next(one["spec"] for one in objects(name) if one["kind"] == "Job")


def pod(name: str) -> dict[str, Any]:
    return job(name)["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    (one,) = pod(name)["containers"]
    return one


def environment(name: str, index: int = 0) -> dict[str, str]:
    """Variables of the pod with an index."""
    field = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    values = {("fieldPath", field): str(index), ("key", envvars.SECRET): SECRET}

    def value(one: dict[str, Any]) -> str:
        if "value" in one:
            return one["value"]
        (source,) = one["valueFrom"].values()
        return next(values[item] for item in source.items() if item in values)

    return {one["name"]: value(one) for one in container(name)["env"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_valid(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for one in objects(name):
        validator.validate(one, VERSION, strict=True)


def test_the_validator_refuses_an_unknown_field() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    (one,) = objects("one-node.yaml")
    one["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(validator.ValidationError):
        validator.validate(one, VERSION, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_arguments_are_those_of_dl2pa_train(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = container(name)["args"]
    args = build_parser("train").parse_args(words)
    monkeypatch.chdir(ROOT)  # the image has configs/ in its working directory
    load_config(args.config, args.overrides)
    mounts = {mount["mountPath"]: mount for mount in container(name)["volumeMounts"]}
    assert str(args.run_dir).startswith("/runs/")
    assert set(mounts) == {"/runs", "/data", "/tmp", "/dev/shm"}
    assert mounts["/data"]["readOnly"]
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod(name)["volumes"]}


@pytest.mark.parametrize("name", JOBS)
def test_exit_codes_decide_on_a_restart(name: str) -> None:
    spec = job(name)
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert rules == {EXIT_USER_ERROR: "FailJob", EXIT_STOPPED: "Ignore"}
    names = {
        r["onExitCodes"]["containerName"] for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r
    }
    assert names == {container(name)["name"]}
    assert pod(name)["restartPolicy"] == "Never", "the only one that podFailurePolicy accepts"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimit"] > 0
    assert pod(name)["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("name", JOBS)
def test_container_has_no_privileges(name: str) -> None:
    security, limits = pod(name)["securityContext"], container(name)["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] == 1000
    assert limits["readOnlyRootFilesystem"] and not limits["allowPrivilegeEscalation"]
    assert limits["capabilities"] == {"drop": ["ALL"]}
    assert not pod(name)["automountServiceAccountToken"]


def test_volume_claims_exist() -> None:
    claims = {one["metadata"]["name"] for one in objects("volumes.yaml")}
    for name in JOBS:
        volumes = [volume.get("persistentVolumeClaim", {}) for volume in pod(name)["volumes"]]
        assert {volume["claimName"] for volume in volumes if volume} == claims


def test_pods_find_each_other() -> None:
    service = next(one for one in objects("several-nodes.yaml") if one["kind"] == "Service")
    spec, name = job("several-nodes.yaml"), service["metadata"]["name"]
    job_name = next(one for one in objects("several-nodes.yaml") if one["kind"] == "Job")["metadata"]["name"]
    nodes = [this_node(environment("several-nodes.yaml", index)) for index in (0, 1)]
    assert [node.index for node in nodes] == [0, 1]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == nodes[0].count == 2
    assert pod("several-nodes.yaml")["subdomain"] == name
    assert nodes[1].head == f"{job_name}-0.{name}"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job_name}
    assert {port["port"] for port in service["spec"]["ports"]} == {nodes[0].port, nodes[0].port + 1}


def test_pods_of_several_nodes_need_a_secret() -> None:
    variables = {one["name"]: one for one in container("several-nodes.yaml")["env"]}
    source = variables[envvars.SECRET]["valueFrom"]["secretKeyRef"]
    assert not source.get("optional", False), "without it, the pod does not start"
    assert shared_secret(environment("several-nodes.yaml")) == SECRET.encode()


def test_one_pod_is_one_machine() -> None:
    assert environment("one-node.yaml") == {envvars.NODES: "1"}
    assert this_node(environment("one-node.yaml")) == Node(0, 1, "localhost", 0, "local")
