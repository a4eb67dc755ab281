"""Rendezvous: a file on one machine, a port of the first node on several."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from launcher.node import Node
from launcher.rendezvous import NodeRendezvous, listen_at


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def test_the_store_listens_only_on_the_address_of_the_head(tmp_path: Path) -> None:
    port = free_port("127.0.0.2")
    nodes = [NodeRendezvous(Node(i, 2, "127.0.0.2", port, "7.0"), tmp_path) for i in range(2)]
    infos = {}
    threads = [
        threading.Thread(target=lambda i=i: infos.update({i: nodes[i].next_rendezvous()})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [(infos[i].rank, infos[i].world_size) for i in range(2)] == [(0, 2), (1, 2)]
    infos[1].store.set("word", "value")
    assert infos[0].store.get("word") == b"value"
    assert all(node.use_agent_store for node in nodes)
    socket.create_connection(("127.0.0.2", port), timeout=5).close()
    for other in ("127.0.0.1", "127.0.0.3"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port), timeout=5)


def test_one_node_uses_a_file_store(tmp_path: Path) -> None:
    rendezvous = NodeRendezvous(Node(0, 1, "localhost", 0, "local"), tmp_path)
    info = rendezvous.next_rendezvous()
    info.store.set("word", "value")
    assert b"value" in (tmp_path / "agent").read_bytes()
    assert not rendezvous.use_agent_store


def test_listening_on_a_remote_address_fails() -> None:
    with pytest.raises(OSError, match="Cannot assign"):
        listen_at("192.0.2.1", 12345)
