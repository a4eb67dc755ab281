"""Rendezvous of the nodes of a training outside SLURM.

Each node may be restarted at any time, alone. Node 0 waits until all others are there and gives them the identifier of
the launch. A restarted node waits until the current launch, which it is missing from, has failed
and node 0 waits again, so processes of different launches never connect to each other.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from dl2pa import envvars
from dl2pa.errors import EXIT_STOPPED, UserError
from launcher.node import Node

log = logging.getLogger(__name__)

_TIMEOUT_S = 600.0
"""Time that a node waits for the others."""
_ANSWER_S = 10.0
_PAUSE_S = 0.5
_MAX_LINE = 1000
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class NodesMissing(TimeoutError):
    """Nodes that did not arrive in time; they may still be queued."""


def meet(node: Node, timeout_s: float = _TIMEOUT_S) -> str:
    """Wait for the other nodes; return the identifier of the launch, the same on all. A stop signal ends the process.

    Raises:
        UserError: node 0 was started with another number of nodes.
        NodesMissing: a node did not arrive in time.
    """
    deadline = time.monotonic() + timeout_s
    with _ending_when_stopped():
        return _gather(node, deadline) if node.index == 0 else _join(node, deadline)


@contextmanager
def _ending_when_stopped() -> Generator[None]:
    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_STOPPED)

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gather(node: Node, deadline: float) -> str:
    """Wait until all other nodes are connected at the same time, then start the launch."""
    launch = uuid.uuid4().hex
    others: dict[int, socket.socket] = {}
    log.info("waiting for %d other node(s) at %s:%d", node.count - 1, node.head, node.port + 1)
    with _listen(node, deadline) as listener:
        while len(others) < node.count - 1:
            missing = sorted(set(range(1, node.count)) - set(others))
            try:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                connection = listener.accept()[0]
            except TimeoutError:
                shown = ", ".join(map(str, missing[:10]))
                raise NodesMissing(f"node(s) {shown} of {node.count} did not arrive at node 0") from None
            connection.settimeout(_ANSWER_S)
            index = _admit(connection, node)
            if index is not None:
                if (replaced := others.pop(index, None)) is not None:
                    replaced.close()
                others[index] = connection
            if len(others) == node.count - 1:  # some may have ended while they waited
                others = {index: one for index, one in others.items() if _ask(one, {"ready": True})}
        for connection in others.values():
            with suppress(OSError):
                _send(connection, {"launch": launch})
            connection.close()
    return launch


def _admit(connection: socket.socket, node: Node) -> int | None:
    """Index of the node that connected; None if it is not one of this training."""
    hello = _receive(connection)
    index = hello.get("node")
    if hello.get("nodes") == node.count and isinstance(index, int) and 0 < index < node.count:
        return index
    with suppress(OSError):
        _send(connection, {"refused": f"node 0 was started with {envvars.NODES}={node.count}"})
    connection.close()
    return None


def _ask(connection: socket.socket, question: dict[str, Any]) -> bool:
    try:
        _send(connection, question)
        return bool(_receive(connection))
    except OSError:
        return False


def _join(node: Node, deadline: float) -> str:
    """Connect to node 0, again and again, until it starts a launch."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((node.head, node.port + 1), _ANSWER_S) as connection:
                _send(connection, {"node": node.index, "nodes": node.count})
                while answer := _receive(connection, deadline - time.monotonic()):
                    if "refused" in answer:
                        remedy = f"Set {envvars.NODES} to the same number on all nodes."
                        raise UserError(envvars.NODES, node.count, str(answer["refused"]), remedy)
                    if "launch" in answer:
                        return str(answer["launch"])
                    _send(connection, {"node": node.index})
                reason = "the connection was closed"
        except OSError as error:
            if not reason:
                log.info("waiting for node 0 at %s:%d (%s)", node.head, node.port + 1, error)
            reason = str(error)
        time.sleep(_PAUSE_S)
    raise NodesMissing(f"node 0 did not answer at {node.head}:{node.port + 1} ({reason})")


def _listen(node: Node, deadline: float) -> socket.socket:
    """Listen at the address of node 0, whose name may not resolve at once."""
    while True:
        try:
            address = socket.getaddrinfo(node.head, node.port + 1, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(*address[:3])
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
            listener.listen(node.count)
            return listener
        except OSError as error:
            if time.monotonic() > deadline:
                raise NodesMissing(f"{node.head}:{node.port + 1} cannot be used ({error})") from None
        time.sleep(_PAUSE_S)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
    """One line of JSON; empty at the end of the connection and for anything else."""
    deadline = time.monotonic() + timeout_s
    line = bytearray()
    while len(line) < _MAX_LINE:
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if (left := deadline - time.monotonic()) <= 0:  # of the line, not of each byte
                return {}
            connection.settimeout(left)
            byte = connection.recv(1)
        except OSError:
            return {}
        if byte in (b"", b"\n"):
            break
        line += byte
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
