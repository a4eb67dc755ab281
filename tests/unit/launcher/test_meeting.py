"""Nodes outside SLURM: their variables, and the agreement on a launch, with real connections."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from dl2pa.errors import UserError
from launcher import meeting
from launcher.node import Node, this_node
from support.servers import free_port
from support.waiting import eventually

VARIABLES = {"DL2PA_NODES": "3", "DL2PA_NODE": "2", "DL2PA_HEAD": "127.0.0.1", "DL2PA_PORT": "12345"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and no signal handlers, which only the main thread may install."""
    monkeypatch.setattr(meeting, "_PAUSE_S", 0.01)
    monkeypatch.setattr(meeting.signal, "signal", lambda number, handler: handler)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def node(index: int, port: int, count: int = 3) -> Node:
    return Node(index, count, "127.0.0.1", port, "dl2pa")


def start(pool: ThreadPoolExecutor, one: Node) -> Future[str]:
    return pool.submit(meeting.meet, one, 60)


def hello(port: int, message: object) -> socket.socket:
    """A connection that has said which node it is."""

    def connected() -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", port + 1), 60)
        except OSError:
            return None

    connection = eventually(connected, "node 0 listens")
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def test_variables_describe_a_node() -> None:
    assert this_node(VARIABLES) == Node(2, 3, "127.0.0.1", 12345, "dl2pa")
    assert this_node({**VARIABLES, "DL2PA_PORT": "29400"}) == this_node(
        {name: value for name, value in VARIABLES.items() if name != "DL2PA_PORT"}
    )
    assert this_node({"DL2PA_NODES": "1"}).rendezvous == "local"
    assert this_node({"DL2PA_NODES": ""}).count == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"DL2PA_NODES": "two"}, "DL2PA_NODES must be a whole number from 1"),
        ({"DL2PA_NODES": "0"}, "DL2PA_NODES must be a whole number from 1"),
        ({"DL2PA_NODE": "3"}, "DL2PA_NODE must be a whole number from 0 to 2"),
        ({"DL2PA_NODE": None}, "DL2PA_NODE must be a whole number"),
        ({"DL2PA_HEAD": None}, "DL2PA_HEAD is not set"),
        ({"DL2PA_HEAD": "node..0"}, "DL2PA_HEAD is not a valid host name"),
        ({"DL2PA_PORT": "65535"}, "DL2PA_PORT must be a whole number from 1 to 65534"),
    ],
)
def test_invalid_variables_are_refused(changes: dict[str, str | None], problem: str) -> None:
    values = {**VARIABLES, **changes}
    with pytest.raises(UserError, match=problem) as refused:
        this_node({name: value for name, value in values.items() if value is not None})
    assert refused.value.field == "environment"


def test_all_nodes_get_the_same_launch_and_the_next_one_is_another(
    pool: ThreadPoolExecutor, port: int
) -> None:
    launches = [{start(pool, node(i, port)) for i in order} for order in ((2, 0, 1),)]
    first = {one.result(60) for one in launches[0]}
    second = {one.result(60) for one in {start(pool, node(i, port)) for i in (0, 1, 2)}}
    assert len(first) == len(second) == 1
    assert first != second


def test_node_that_was_restarted_while_it_waited_is_counted_once(pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port))
    hello(port, {"node": 1, "nodes": 3}).close()  # killed
    waiting = hello(port, {"node": 1, "nodes": 3})
    two = start(pool, node(2, port))
    waiting.close()  # killed again, after node 2 may have arrived
    one = start(pool, node(1, port))
    assert zero.result(60) == one.result(60) == two.result(60)


def test_restarted_node_waits_for_the_next_launch(pool: ThreadPoolExecutor, port: int) -> None:
    """Node 0 of the old launch does not listen any more; one that restarts does."""
    restarted = start(pool, node(1, port, 2))
    other = start(pool, node(0, port, 2))
    assert restarted.result(60) == other.result(60)


def test_another_number_of_nodes_is_refused(pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port, 2))
    with pytest.raises(UserError, match="node 0 was started with DL2PA_NODES=2"):
        start(pool, node(1, port, 3)).result(60)
    start(pool, node(1, port, 2))
    assert zero.result(60)


def test_other_programs_do_not_disturb(pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port, 2))
    for message in ("GET / HTTP/1.1", {"node": 7, "nodes": 2}, {"node": "1", "nodes": 2}, []):
        with hello(port, message) as connection:
            assert b"refused" in connection.recv(1000)
    assert start(pool, node(1, port, 2)).result(60) == zero.result(60)


def test_missing_nodes_are_named(port: int) -> None:
    with pytest.raises(meeting.NodesMissing, match=r"node\(s\) 1, 2 of 3 did not arrive"):
        meeting.meet(node(0, port), 0.05)
    with pytest.raises(meeting.NodesMissing, match=rf"node 0 did not answer at 127.0.0.1:{port + 1}"):
        meeting.meet(node(1, port), 0.05)


def test_a_line_that_comes_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is that of the line, not of each byte."""
    clock = iter(range(100))
    monkeypatch.setattr(meeting.time, "monotonic", lambda: next(clock))
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b" " * 50 + b"{}\n")
        assert meeting._receive(here, 10.0) == {}  # pyright: ignore[reportPrivateUsage]
        assert here.recv(100).startswith(b" " * 40)
