"""The position of this machine among those of a training, and the rendezvous address.

It comes from a SLURM step with one task per node, or from DL2PA_NODES and the variables with it (see `envvars`).
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dl2pa import envvars
from dl2pa.errors import UserError

_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_SIOCGIFADDR = 0x8915
_PORTS = (10000, 30000)
_DEFAULT_PORT = 29400
"""The default of torchrun, of nodes outside SLURM."""
_MIN_SECRET = 16


@dataclass(frozen=True)
class Node:
    """One of `count` machines; node 0 runs rank 0 and the store at `head`:`port`."""

    index: int
    count: int
    head: str
    port: int
    rendezvous: str
    """Rendezvous id, the same on all nodes and different for every attempt."""

    def interface(self) -> str | None:
        """Network interface through which this node reaches the head; None if unknown."""
        return "lo" if self.count == 1 else interface_toward(self.head)


def this_node(env: Mapping[str, str] = os.environ) -> Node:
    """Return the node of this process in its SLURM step or among DL2PA_NODES, else a single local node.

    Raises:
        UserError: several tasks per node, the name of the head node does not resolve here, or invalid variables.
    """
    if "SLURM_STEP_ID" not in env and env.get(envvars.NODES):
        return _described(env)
    count = int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if "SLURM_STEP_ID" not in env or (count == 1 and int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1):
        return Node(0, 1, "localhost", 0, "local")
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", str(count)))
    if tasks != count:
        message = f"runs {tasks} tasks on {count} node(s); torchrun starts the processes of a node"
        raise UserError("srun --ntasks", tasks, message, "Use srun --ntasks-per-node=1.")
    job = int(env["SLURM_JOB_ID"])
    attempt = int(env.get("SLURM_RESTART_COUNT", "0"))
    head = env.get(envvars.HEAD) or _first_host(env)
    port = int(env.get(envvars.PORT) or _PORTS[0] + (job * 13 + attempt * 211) % (_PORTS[1] - _PORTS[0]))
    _check_resolves(head)
    return Node(int(env.get("SLURM_NODEID", "0")), count, head, port, f"{job}.{attempt}")


def _described(env: Mapping[str, str]) -> Node:
    """The node that the variables describe.

    Raises:
        UserError: a variable is missing or invalid.
    """
    names = (envvars.NODES, envvars.NODE, envvars.HEAD, envvars.PORT)
    values = " ".join(f"{name}={env[name]}" for name in names if name in env)

    def number(name: str, default: str | None, limits: range) -> int:
        text = env.get(name, default)
        if text is None or not text.isascii() or not text.isdigit() or int(text) not in limits:
            message = f"{name} must be a whole number from {limits.start} to {limits.stop - 1}"
            raise UserError("environment", values, message, f"Set {name}, or unset {envvars.NODES}.")
        return int(text)

    count = number(envvars.NODES, None, range(1, 100_000))
    if count == 1:
        return Node(0, 1, "localhost", 0, "local")
    index = number(envvars.NODE, None, range(count))
    port = number(envvars.PORT, str(_DEFAULT_PORT), range(1, 65535))
    if not env.get(envvars.HEAD):
        message = f"{envvars.HEAD} is not set"
        raise UserError("environment", values, message, "Set it to the name or address of node 0.")
    try:
        env[envvars.HEAD].encode("idna")  # as socket does
    except UnicodeError:
        message = f"{envvars.HEAD} is not a valid host name"
        raise UserError("environment", values, message, "Set it to the name or address of node 0.") from None
    shared_secret(env)
    return Node(index, count, env[envvars.HEAD], port, "dl2pa")


def shared_secret(env: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the secret of the nodes outside SLURM; None if none is set.

    Raises:
        UserError: it is too short to be one.
    """
    text = env.get(envvars.SECRET)
    if text is None:
        return None
    if len(text.strip()) < _MIN_SECRET:
        message = f"has fewer than {_MIN_SECRET} characters"
        remedy = "Set it to a random text, for example of `openssl rand -hex 32`, or unset it."
        raise UserError("environment", envvars.SECRET, message, remedy)
    return text.strip().encode(errors="surrogateescape")


def run_task(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `dl2pa train`; submitit calls this on every node.

    This removes submitit's signal handlers, which would requeue the job. Stop signals are blocked until the new
    program has installed its handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    for number in (*_STOP_SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-u", "-m", "dl2pa", *arguments])


def listen_again() -> None:
    """Unblock the stop signals that `run_task` blocked; call after installing their handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def interface_toward(host: str) -> str | None:
    """Return the network interface whose address this machine uses to reach `host`."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, only selects a route
            address = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex()]
            return next((n for n in names if _address_of(probe, n) == address), None)
    except OSError:
        return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:
        return None


def _first_host(env: Mapping[str, str]) -> str:
    from submitit.slurm.slurm import SlurmJobEnvironment

    names = SlurmJobEnvironment().hostnames
    return names[0] if names else env.get(envvars.NODE_NAME, socket.gethostname())


def _check_resolves(host: str) -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        here = os.environ.get(envvars.NODE_NAME, socket.gethostname())
        message = f"the first node's name does not resolve on {here} ({error.strerror})"
        remedy = f"Ask the cluster for name resolution between nodes, or set {envvars.HEAD} to its address."
        raise UserError("node name", host, message, remedy) from None
