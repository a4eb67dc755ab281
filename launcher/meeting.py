"""Rendezvous of the nodes of a training outside SLURM.

Each node may be restarted at any time, alone. Node 0 waits until all others are there and gives them the identifier of
the launch. A restarted node waits until the current launch, which it is missing from, has failed
and node 0 waits again, so processes of different launches never connect to each other. With a secret that all nodes
share (`DL2PA_SECRET`), node 0 admits only nodes that know it, and they obey only a node 0 that does.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from dl2pa import envvars
from dl2pa.errors import EXIT_STOPPED, UserError
from launcher.channel import ANSWER_S, Channel, NotAuthentic
from launcher.node import Node

log = logging.getLogger(__name__)

_TIMEOUT_S = 600.0
"""Time that a node waits for the others."""
_PAUSE_S = 0.5
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class NodesMissing(TimeoutError):
    """Nodes that did not arrive in time; they may still be queued."""


def meet(node: Node, secret: bytes | None = None, timeout_s: float = _TIMEOUT_S) -> str:
    """Wait for the other nodes; return the identifier of the launch, the same on all. A stop signal ends the process.

    Args:
        secret: of this training; None: any process that can connect can take part.

    Raises:
        UserError: node 0 was started with another number of nodes, or with a secret that this node lacks.
        NodesMissing: a node did not arrive in time.
    """
    deadline = time.monotonic() + timeout_s
    with _ending_when_stopped():
        return _gather(node, secret, deadline) if node.index == 0 else _join(node, secret, deadline)


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


def _gather(node: Node, secret: bytes | None, deadline: float) -> str:
    """Wait until all other nodes are connected at the same time, then start the launch."""
    launch = uuid.uuid4().hex
    others: dict[int, Channel] = {}
    log.info("waiting for %d other node(s) at %s:%d", node.count - 1, node.head, node.port + 1)
    with _listen(node, deadline) as listener:
        while len(others) < node.count - 1:
            missing = sorted(set(range(1, node.count)) - set(others))
            try:
                if (left := deadline - time.monotonic()) <= 0:  # also if strangers connect again and again
                    raise TimeoutError
                listener.settimeout(left)
                connection = listener.accept()[0]
            except TimeoutError:
                shown = ", ".join(map(str, missing[:10]))
                raise NodesMissing(f"node(s) {shown} of {node.count} did not arrive at node 0") from None
            connection.settimeout(ANSWER_S)
            channel = Channel(connection, secret, is_head=True)
            index = _admit(channel, node)
            if index is not None:
                if (replaced := others.pop(index, None)) is not None:
                    replaced.close()
                others[index] = channel
            if len(others) == node.count - 1:  # some may have ended while they waited
                others = {index: one for index, one in others.items() if _ask(one, {"ready": True})}
        for channel in others.values():
            with suppress(OSError):
                channel.send({"launch": launch})
            channel.close()
    return launch


def _admit(channel: Channel, node: Node) -> int | None:
    """Index of the node that connected; None if it is not one of this training."""
    try:
        channel.open()
        hello = channel.receive()
    except NotAuthentic as error:
        log.warning("a connection was refused: %s (%s)", error, envvars.SECRET)
        channel.close()
        return None
    except OSError:
        channel.close()
        return None
    index = hello.get("node")
    if hello.get("nodes") == node.count and isinstance(index, int) and 0 < index < node.count:
        return index
    with suppress(OSError):
        channel.send({"refused": f"node 0 was started with {envvars.NODES}={node.count}"})
    channel.close()
    return None


def _ask(channel: Channel, question: dict[str, bool]) -> bool:
    try:
        channel.send(question)
        return bool(channel.receive())
    except OSError:
        return False


def _join(node: Node, secret: bytes | None, deadline: float) -> str:
    """Connect to node 0, again and again, until it starts a launch."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((node.head, node.port + 1), ANSWER_S) as connection:
                launch = _wait_for_launch(Channel(connection, secret, is_head=False), node, deadline)
            if launch is not None:
                return launch
            same = f"; check that {envvars.SECRET} is the same on all nodes" if secret is not None else ""
            reason = f"the connection was closed{same}"
        except OSError as error:
            if not reason:
                log.info("waiting for node 0 at %s:%d (%s)", node.head, node.port + 1, error)
            reason = str(error)
        time.sleep(_PAUSE_S)
    raise NodesMissing(f"node 0 did not answer at {node.head}:{node.port + 1} ({reason})")


def _wait_for_launch(channel: Channel, node: Node, deadline: float) -> str | None:
    """Return the launch that node 0 starts; None if it closes the connection before.

    Raises:
        UserError: node 0 refuses this node.
        OSError: the connection has ended, or node 0 does not know the secret.
    """
    channel.open(deadline - time.monotonic())
    channel.send({"node": node.index, "nodes": node.count})
    while answer := channel.receive(deadline - time.monotonic()):
        if "refused" in answer:
            remedy = f"Set {envvars.NODES} to the same number on all nodes."
            raise UserError(envvars.NODES, node.count, str(answer["refused"]), remedy)
        if "nonce" in answer:
            message = "is set on node 0 but not on this node"
            raise UserError(envvars.SECRET, None, message, "Set it to the same text on all nodes.")
        if "launch" in answer:
            return str(answer["launch"])
        channel.send({"node": node.index})
    return None


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
