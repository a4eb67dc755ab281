"""This machine's processes: torchrun, with signals and exit codes that survive it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from launcher.node import Node, listen_again

_PR_SET_PDEATHSIG = 1
_IMPATIENT = 3
"""Ctrl-C so often does not wait for a save."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def torchrun_command(nproc: int, module: str, arguments: Sequence[str], node: Node) -> list[str]:
    """The command line that starts `nproc` workers on this machine, one of several or alone."""
    return [
        sys.executable,
        "-m",
        "launcher.agent",
        *node.torchrun_options(),
        f"--nproc-per-node={nproc}",
        "--max-restarts=0",
        # Stop signals are ours: torchrun would end its workers 30 s later, saved or not.
        "--signals-to-handle=SIGHUP,SIGQUIT",
        "--module",
        module,
        *arguments,
    ]


def run_local(
    nproc: int, module: str, arguments: Sequence[str], stop_file: Path, extra: Mapping[str, str], node: Node
) -> int:
    """Run workers under torchrun and wait; returns torchrun's own exit code.

    A stop signal to this process writes the stop file, which the workers watch; torchrun itself ignores them
    (USR2 unhandled would kill it). If this process is killed, torchrun dies with it, and the workers with torchrun.
    """
    env = {**os.environ, **extra}
    # Gloo would take whatever address this machine's own name resolves to, often one that nobody else can reach.
    interface = node.interface()
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Once a rank has failed the others cannot save: no reason to wait for them.
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
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
        process = subprocess.Popen(
            torchrun_command(nproc, module, arguments, node),
            env=env,
            preexec_fn=_prepare_child(os.getpid()),
        )
        return process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _prepare_child(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    return prepare
