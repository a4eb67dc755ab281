"""This machine's processes: torchrun, with signals and exit codes that survive it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dl2pa import envvars
from dl2pa.osutil import set_parent_death_signal, usable_cores
from launcher.node import Node, listen_again

_IMPATIENT = 3
"""Ctrl-C so often does not wait for a save."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def agent_command(
    nproc: int, modules: Sequence[str], arguments: Sequence[str], node: Node, folder: Path
) -> list[str]:
    """The command line of the agent that forks `nproc` ranks on this machine, one of several or alone."""
    place = json.dumps(dataclasses.asdict(node))
    return [
        *(sys.executable, "-P", "-m", "launcher.agent"),
        *(place, str(nproc), str(folder), ",".join(modules), *arguments),
    ]


def run_local(
    nproc: int,
    modules: Sequence[str],
    arguments: Sequence[str],
    stop_file: Path,
    extra: Mapping[str, str],
    node: Node,
) -> int:
    """Run `main(arguments)` of the first module as ranks under torchrun's agent; returns the agent's exit code.

    A stop signal to this process writes the stop file, which the ranks watch; the agent itself ignores stop
    signals. If this process is killed, the agent dies with it, and the ranks with the agent.

    Args:
        modules: imported once, by the agent, before it forks the ranks.
        extra: environment variables of the ranks.
    """
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as folder:
        command = agent_command(nproc, modules, arguments, node, Path(folder))
        return _run_agent(command, _environment(nproc, extra, node, Path(folder)), stop_file)


def _environment(nproc: int, extra: Mapping[str, str], node: Node, folder: Path) -> dict[str, str]:
    env = {**os.environ, **extra}
    env.pop(envvars.STORE, None)
    if node.count == 1:
        env[envvars.STORE] = str(folder / "ranks")
        env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = "lo"
    else:
        # Gloo would take whatever address this machine's own name resolves to, often one nobody else can reach.
        interface = node.interface()
        if interface is not None:
            env.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Once a rank has failed the others cannot save: no reason to wait longer for them.
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    return env


def _run_agent(command: list[str], env: Mapping[str, str], stop_file: Path) -> int:
    process: subprocess.Popen[bytes] | None = None

    interrupts = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        stop_file.touch()
        interrupts += number == signal.SIGINT
        if interrupts >= _IMPATIENT and process is not None:
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
