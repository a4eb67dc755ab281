"""Nodes outside SLURM: their variables, and the agreement on a launch, with real connections."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from dl2pa.errors import UserError
from launcher import channel, meeting
from launcher.channel import Channel, NotAuthentic
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


def start(pool: ThreadPoolExecutor, one: Node, secret: bytes | None = None) -> Future[str]:
    return pool.submit(meeting.meet, one, secret, 60)


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
        ({"DL2PA_SECRET": "short"}, "has fewer than 16 characters"),
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


SECRET = b"0123456789abcdef"


def test_nodes_with_the_same_secret_meet(pool: ThreadPoolExecutor, port: int) -> None:
    launches = {start(pool, node(i, port), SECRET) for i in (0, 1, 2)}
    assert len({one.result(60) for one in launches}) == 1


def test_process_without_the_secret_takes_no_place(pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port, 2), SECRET)
    with hello(port, {"node": 1, "nodes": 2}) as stranger:
        with stranger.makefile() as lines:
            assert [key for line in lines for key in json.loads(line)] == ["nonce"], "no launch, and the end"
        with pytest.raises(UserError, match="is set on node 0 but not on this node"):
            start(pool, node(1, port, 2)).result(60)
        one = start(pool, node(1, port, 2), SECRET)
        assert zero.result(60) == one.result(60)


def test_node_obeys_only_a_head_that_knows_the_secret(pool: ThreadPoolExecutor, port: int) -> None:
    """Another program at the address of node 0 can neither start nor end the training."""
    with socket.create_server(("127.0.0.1", port + 1)) as listener:
        one = start(pool, node(1, port, 2), SECRET)
        for answer in ({"launch": "theirs"}, {"refused": "go"}, {"nonce": "0"}):
            with listener.accept()[0] as connection:
                connection.sendall(json.dumps(answer).encode() + b"\n" + b'{"launch": "theirs"}\n')
                with suppress(ConnectionResetError):
                    connection.makefile().read()
    assert start(pool, node(0, port, 2), SECRET).result(60) == one.result(60)


HALF = '"\\ud800"'
"""A JSON text that cannot be encoded in UTF-8: half of a surrogate pair."""


@pytest.mark.parametrize(
    "lines",
    [
        f'{{"nonce": {HALF}}}\n{{"text": "a", "mac": "b"}}\n',
        f'{{"nonce": "{64 * "0"}"}}\n{{"text": "a", "mac": {HALF}}}\n',
        f'{{"nonce": "{64 * "0"}"}}\n{{"text": {HALF}, "mac": "b"}}\n',
        f'{{"nonce": "{64 * "0"} 1"}}\n{{"text": "a", "mac": "b"}}\n',
        "",
    ],
)
def test_no_text_of_a_stranger_ends_a_node(lines: str, pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port, 2), SECRET)
    with hello(port, {}) as first:
        first.close()
    # node 0 may close the connection before all is sent
    with socket.create_connection(("127.0.0.1", port + 1), 60) as stranger, suppress(OSError):
        stranger.sendall(lines.encode())
        stranger.shutdown(socket.SHUT_WR)
        stranger.makefile().read()
    assert start(pool, node(1, port, 2), SECRET).result(60) == zero.result(60)


def test_a_head_that_does_not_answer_is_not_said_to_have_another_secret(pool: ThreadPoolExecutor) -> None:
    node, stranger = socket.socketpair()
    with stranger:
        silent = Channel(node, SECRET, is_head=False)
        with pytest.raises(ConnectionError, match="no message") as caught:
            silent.open(0.05)
        assert not isinstance(caught.value, NotAuthentic)
        silent.close()


def test_strangers_do_not_extend_the_deadline(pool: ThreadPoolExecutor, port: int) -> None:
    zero = pool.submit(meeting.meet, node(0, port, 2), SECRET, 1)
    with pytest.raises(meeting.NodesMissing, match="did not arrive"):
        while not zero.done():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port + 1), 60):
                pass
        zero.result(60)


def test_node_with_another_secret_names_the_variable(pool: ThreadPoolExecutor, port: int) -> None:
    zero = start(pool, node(0, port, 2), SECRET)
    with pytest.raises(meeting.NodesMissing, match="check that DL2PA_SECRET is the same on all nodes"):
        while True:  # node 0 may not listen yet
            try:
                meeting.meet(node(1, port, 2), b"another secret text", 0.5)
            except meeting.NodesMissing as missing:
                if "DL2PA_SECRET" in str(missing):
                    raise
    assert start(pool, node(1, port, 2), SECRET).result(60) == zero.result(60)


Ends = tuple[Channel, socket.socket]


def opened(pool: ThreadPoolExecutor) -> tuple[Ends, Ends]:
    """Node 0 and another node, connected and with the same secret."""
    sockets = socket.socketpair()
    head, other = Channel(sockets[0], SECRET, is_head=True), Channel(sockets[1], SECRET, is_head=False)
    opening = pool.submit(head.open)
    other.open()
    opening.result(60)
    return (head, sockets[0]), (other, sockets[1])


def test_messages_are_accepted_once_from_the_other_side_of_the_same_connection(
    pool: ThreadPoolExecutor,
) -> None:
    (head, to_other), (other, to_head) = opened(pool)
    (_, to_stranger), (stranger, _) = opened(pool)
    head.send({"launch": "x"})
    line = to_head.recv(1000)
    to_other.sendall(line)
    assert other.receive() == {"launch": "x"}
    for sender, receiver in ((to_other, other), (to_head, head), (to_stranger, stranger)):
        sender.sendall(line)  # a second time, to its author, and in another connection
        with pytest.raises(NotAuthentic):
            receiver.receive()


def test_missing_nodes_are_named(port: int) -> None:
    with pytest.raises(meeting.NodesMissing, match=r"node\(s\) 1, 2 of 3 did not arrive"):
        meeting.meet(node(0, port), None, 0.05)
    with pytest.raises(meeting.NodesMissing, match=rf"node 0 did not answer at 127.0.0.1:{port + 1}"):
        meeting.meet(node(1, port), None, 0.05)


def test_a_line_that_comes_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is that of the line, not of each byte."""
    clock = iter(range(100))
    monkeypatch.setattr(channel.time, "monotonic", lambda: next(clock))
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b" " * 50 + b"{}\n")
        assert Channel(here, None, is_head=True).receive(10.0) == {}
        assert here.recv(100).startswith(b" " * 40)
