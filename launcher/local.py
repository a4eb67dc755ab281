"""Run the ranks of this machine under torchrun, with stop signals and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dl2pa import envvars
from dl2pa.osutil import set_parent_death_signal, usable_cores
from dl2pa.process import shown_words
from launcher.node import Node, listen_again

_INTERRUPTS_TO_KILL = 3
"""Number of Ctrl-C after which the run ends without saving."""
ARGUMENTS = "arguments.json"
"""File with the arguments of the ranks, in the private folder of the agent."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def agent_command(
    nproc: int, modules: Sequence[str], arguments: Sequence[str], node: Node, folder: Path
) -> list[str]:
    """Command line of the agent that forks `nproc` ranks on this machine; it reads the arguments from the folder."""
    shown = shown_words(arguments)
    return [
        *(sys.executable, "-P", "-m", "launcher.agent"),
        *(json.dumps(dataclasses.asdict(node)), str(nproc), str(folder), ",".join(modules), *shown),
    ]


def run_local(
    nproc: int,
    modules: Sequence[str],
    arguments: Sequence[str],
    request_stop: Callable[[], None],
    extra: Mapping[str, str],
    node: Node,
) -> int:
    """Run `main(arguments)` of the first module as ranks under the agent; return its exit code, see `agent.main`.

    On a stop signal, this process writes the stop file, which the ranks poll; the agent ignores stop signals. If
    this process is killed, the agent is killed too, and the ranks with it.

    Args:
        request_stop: writes the stop file.
        modules: imported once by the agent, before it forks the ranks.
        extra: environment variables of the ranks.
    """
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as folder:
        (Path(folder) / ARGUMENTS).write_text(json.dumps(list(arguments)), encoding="utf-8")
        command = agent_command(nproc, modules, arguments, node, Path(folder))
        return _run_agent(command, _environment(nproc, extra, node, Path(folder)), request_stop)


def choose_interface(env: Mapping[str, str], probe: Callable[[], str | None]) -> dict[str, str]:
    """Variables that select one network interface for gloo and for nccl's TCP connections.

    A variable that is already set is kept, and the other follows it. By default, gloo would use the address of this
    host's name, which other nodes often cannot reach, and nccl an interface of its own choice.

    Args:
        probe: returns the interface that routes to node 0, or None if unknown.
    """
    gloo, nccl = env.get("GLOO_SOCKET_IFNAME"), env.get("NCCL_SOCKET_IFNAME")
    if gloo:
        return {} if nccl else {"NCCL_SOCKET_IFNAME": f"={gloo}"}
    exact = (nccl or "").removeprefix("=")
    existing = {name for _, name in socket.if_nameindex()}
    interface = exact if exact in existing else probe()  # nccl also accepts lists, prefixes and exclusions
    if interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface, **({} if nccl else {"NCCL_SOCKET_IFNAME": f"={interface}"})}


def _environment(nproc: int, extra: Mapping[str, str], node: Node, folder: Path) -> dict[str, str]:
    env = {**os.environ, **extra}
    env.pop(envvars.STORE, None)
    env.pop(envvars.SECRET, None)  # needed only to meet
    env[envvars.CORES] = str(usable_cores())
    if node.count == 1:
        env[envvars.STORE] = str(folder / "ranks")
        env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = "lo"
    else:
        env.update(choose_interface(env, node.interface))
    # After a rank has failed, the others cannot save, so end them soon.
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    return env


def _run_agent(command: list[str], env: Mapping[str, str], request_stop: Callable[[], None]) -> int:
    process: subprocess.Popen[bytes] | None = None

    interrupts = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        request_stop()
        interrupts += number == signal.SIGINT
        if interrupts >= _INTERRUPTS_TO_KILL and process is not None:
            process.kill()

    previous = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    listen_again()
    try:
        process = subprocess.Popen(command, env=env, preexec_fn=_prepare_child(os.getpid()))
        return process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _prepare_child(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    return prepare
