"""Rendezvous of agents and ranks: a private file on one machine, a TCP port on several.

On one machine, no port is opened: the stores of the agent and the ranks are files in a folder that only this user
can enter. On several machines, the store of the first one listens only on the address of its node name. Values from
a store are never unpickled: agents exchange JSON, ranks exchange addresses.
"""

from __future__ import annotations

import datetime
import socket
from pathlib import Path

from torch.distributed import FileStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from launcher.node import Node

_TIMEOUT = datetime.timedelta(seconds=600)
"""Time that a machine waits for the others."""


class NodeRendezvous(RendezvousHandler):
    """Rendezvous of a fixed number of nodes in a known order."""

    def __init__(self, node: Node, folder: Path) -> None:
        self._node = node
        self._folder = folder
        self._store: Store | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        node = self._node
        if self._store is None:
            self._store = FileStore(str(self._folder / "agent")) if node.count == 1 else _tcp_store(node)
        store = PrefixStore(node.rendezvous, self._store)
        return RendezvousInfo(store, node.index, node.count, RendezvousStoreInfo(node.head, node.port))

    @property
    def use_agent_store(self) -> bool:
        """Return whether the ranks also use this store; on one machine they use a file."""
        return self._node.count > 1

    def get_backend(self) -> str:
        return "dl2pa"

    def get_run_id(self) -> str:
        return self._node.rendezvous

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: nodes never join later."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def _tcp_store(node: Node) -> TCPStore:
    if node.index > 0:
        return TCPStore(node.head, node.port, node.count, False, _TIMEOUT)
    listener = listen_at(node.head, node.port)
    return TCPStore(node.head, node.port, node.count, True, _TIMEOUT, master_listen_fd=listener.detach())


def listen_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens only on the address that `host` resolves to."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen()
    return listener
