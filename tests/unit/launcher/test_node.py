"""The node of this process, read from the variables of SLURM."""

from __future__ import annotations

import os
import socket

import pytest

from dl2pa.errors import UserError
from launcher.node import Node, interface_toward, this_node

TWO_NODES = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of an enclosing job."""
    for name in [n for n in os.environ if n.startswith(("SLURM", "DL2PA_"))]:
        monkeypatch.delenv(name)


def node_under(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> Node:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return this_node()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
        },
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"},
    ],
    ids=["no SLURM", "a job but no step", "a step of one task", "a step without a task count"],
)
def test_one_machine_needs_no_rendezvous_address(env: dict[str, str]) -> None:
    node = this_node(env)
    assert (node.index, node.count) == (0, 1)
    assert node.interface() == "lo"


def test_the_head_is_the_first_node_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_under(monkeypatch, TWO_NODES)
    assert (node.index, node.count, node.head) == (1, 2, "127.0.0.1")
    assert 10000 <= node.port < 30000
    assert node.rendezvous == "1234.0"
    assert node.interface() == "lo"


def test_head_and_port_of_the_batch_shell_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DL2PA_HEAD": "localhost", "DL2PA_PORT": "12345", "SLURM_RESTART_COUNT": "3"}
    node = node_under(monkeypatch, {**TWO_NODES, **chosen})
    assert (node.head, node.port, node.rendezvous) == ("localhost", 12345, "1234.3")


def test_nodes_of_one_attempt_agree_and_attempts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    first = node_under(monkeypatch, {**TWO_NODES, "SLURM_NODEID": "0"})
    second = node_under(monkeypatch, TWO_NODES)
    again = node_under(monkeypatch, {**TWO_NODES, "SLURM_RESTART_COUNT": "1"})
    assert (first.head, first.port, first.rendezvous) == (second.head, second.port, second.rendezvous)
    assert second.port != again.port
    assert second.rendezvous != again.rendezvous


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 2), (2, 4)])
def test_several_tasks_per_node_are_refused(nodes: int, tasks: int) -> None:
    counts = {"SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(tasks)}
    with pytest.raises(UserError, match=rf"runs {tasks} tasks on {nodes} node.*--ntasks-per-node=1"):
        this_node({**TWO_NODES, **counts, "DL2PA_HEAD": "127.0.0.1"})


@pytest.mark.parametrize("variable", ["DL2PA_HEAD", "SLURM_JOB_NODELIST"])
def test_an_unresolvable_head_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake, because the network may take long to answer.
    def no_answer(host: str, *rest: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, f"{host}: name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    with pytest.raises(UserError, match=r"'gpu-17'.*does not resolve on node2.*DL2PA_HEAD") as caught:
        node_under(monkeypatch, {**TWO_NODES, "SLURMD_NODENAME": "node2", variable: "gpu-17"})
    assert (caught.value.field, caught.value.value) == ("node name", "gpu-17")


def test_the_interface_is_the_one_that_reaches_the_host() -> None:
    assert interface_toward("127.0.0.1") == "lo"


def test_an_unreachable_host_has_no_interface() -> None:
    assert interface_toward("no such host") is None
