"""What `dl2pa doctor` sees of a SLURM cluster, from here and from one of its nodes."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dl2pa.commands.finding import Finding

_PROBE_MIB = 64
_STATE_MIB = 400
"""A checkpoint of Swin-T with AdamW at d = 512, C = 1000; ResNet-50 with SGD has half of it."""
_MOST_SKEW_S = 2.0
_NODE_WAIT_S = 120
_MOST_NAMES = 64

# Runs on a node: says its time, whether it sees the folder, and whether it reaches the tracking server, whose address
# comes by the environment: it may hold a password, and SLURM keeps command lines.
_ON_NODE = """
import json, os, pathlib, socket, sys, time
from dl2pa import envvars
seen = {"host": os.environ.get(envvars.NODE_NAME) or socket.gethostname(), "time": time.time()}
seen["shared"] = pathlib.Path(sys.argv[1]).exists()
if os.environ.get(envvars.TRACKING_URI, "").startswith("http"):
    from dl2pa.commands.finding import server_health
    seen["mlflow"] = server_health(os.environ[envvars.TRACKING_URI])
print(json.dumps(seen))
"""


def findings(*, on_a_node: bool, partition: str | None) -> list[Finding]:
    """All checks of the cluster; one line where there is none.

    Args:
        on_a_node: also run a job of one task there.
        partition: for that job; None takes the default one.
    """
    if shutil.which("sbatch") is None:
        return [Finding("slurm", False, "sbatch not found", "Only needed to submit jobs.", needed=on_a_node)]
    settings = _settings()
    if not settings:
        said = _run("scontrol", "ping") or "no answer"
        return [Finding("slurm", False, said, "Ask the cluster: its controller does not answer.", on_a_node)]
    found = [
        Finding("slurm", True, settings.get("SLURM_VERSION", "answers")),
        _partitions(),
        _names(),
        _network(),
        _warning(settings),
        _time_to_save(settings),
        _accounts(),
    ]
    if on_a_node:
        return [*found, *_from_a_node(partition)]
    looked = "not looked at: clock, shared folder, tracking server"
    return [*found, Finding("from a node", False, looked, "dl2pa doctor --cluster", needed=False)]


def _settings() -> dict[str, str]:
    """`scontrol show config` as name and value."""
    pairs = (line.partition("=") for line in _run("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _partitions() -> Finding:
    lines = _run("sinfo", "-h", "-o", "%P %a %D %G %l").splitlines()
    shown: list[str] = []
    for line in lines:
        name, state, nodes, gres, limit = line.split()
        gpus = "no GPUs" if gres == "(null)" else gres
        shown.append(f"{name} {state}: {nodes} node(s), {gpus}, limit {limit}")
    has_gpus = any("gpu" in line for line in lines)
    remedy = "No partition offers gres/gpu: submit with --gpus-per-node 0." if lines else "Ask the cluster."
    return Finding("partitions", has_gpus, "; ".join(shown) or "none", remedy, needed=False)


def _names() -> Finding:
    """Whether every node's name resolves, here at least: the processes meet at the first node's."""
    names = sorted(set(_run("sinfo", "-h", "-N", "-o", "%N").split()))
    missing: list[str] = []
    for name in names:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            missing.append(name)
    remedy = "Ask for name resolution between nodes, or set DL2PA_HEAD in the job."
    seen = f"{len(names) - len(missing)} of {len(names)} resolve" + (f", not {missing[0]}" if missing else "")
    return Finding("node names", not missing, seen, remedy, needed=False)


def _network() -> Finding:
    """Whether the store of a job on several nodes, which has no authentication, listens on a public address."""
    names = sorted(set(_run("sinfo", "-h", "-N", "-o", "%N").split()))
    addresses: set[str] = set()
    for name in names[:_MOST_NAMES]:
        with contextlib.suppress(OSError):
            addresses |= {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    public = sorted(a for a in addresses if ipaddress.ip_address(a.partition("%")[0]).is_global)
    seen = "jobs of several nodes meet at " + (", ".join(sorted(addresses)[:2]) or "no known address")
    remedy = "A trusted network is needed: close ports 10000 to 29999 to others, or set DL2PA_HEAD (docs/security.md)."
    return Finding("network", not public, seen, remedy, needed=False)


def _warning(settings: dict[str, str]) -> Finding:
    """Whether a preempted job hears of it through its own signal, and how long it then has."""
    sends = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    grace = re.findall(r"PartitionName=(\S+).*? GraceTime=(\d+)", _run("scontrol", "show", "partition", "-o"))
    shown = ", ".join(f"{name} {seconds} s" for name, seconds in grace)
    seen = f"preempt_send_user_signal {'on' if sends else 'off'}; grace {shown or 'unknown'}"
    remedy = "Preempted jobs are warned by TERM only, and where the grace is 0 by nothing: save by steps."
    return Finding("preemption", sends, seen, remedy, needed=False)


def _time_to_save(settings: dict[str, str]) -> Finding:
    """The time between SLURM's TERM and its KILL against the time a checkpoint takes to write here."""
    match = re.match(r"\d+", settings.get("KillWait", ""))
    kill_wait = int(match[0]) if match else 0
    folder = Path("runs") if Path("runs").is_dir() else Path()
    try:
        seconds = _probe_seconds(folder) * _STATE_MIB / _PROBE_MIB
    except OSError as error:
        return Finding(
            "time to save", False, f"{folder}: {error.strerror}", "Choose another --run-dir.", False
        )
    seen = (
        f"KillWait {kill_wait} s; {_STATE_MIB} MiB take about {seconds:.0f} s to write in {folder.absolute()}"
    )
    remedy = f"Give --stop-before at least {seconds + 60:.0f}, and save by steps (checkpoint.every_steps)."
    return Finding("time to save", seconds < kill_wait, seen, remedy, needed=False)


def _probe_seconds(folder: Path) -> float:
    """Seconds to write and sync the probe."""
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(_PROBE_MIB):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _accounts() -> Finding:
    from launcher.jobs import has_accounting

    remedy = "`dl2pa jobs` then knows ended jobs by their run directories only."
    there = has_accounting()
    return Finding("accounting", there, "sacct answers" if there else "none", remedy, needed=False)


def _from_a_node(partition: str | None) -> list[Finding]:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    try:
        return _from_a_node_into(folder, partition)
    except OSError as error:
        remedy = "Choose another --run-dir."
        return [Finding("shared folder", False, f"{folder.absolute()}: {error.strerror}", remedy)]


def _from_a_node_into(folder: Path, partition: str | None) -> list[Finding]:
    where = [f"--partition={partition}"] if partition else []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as shared:
        srun = [
            "srun",
            "--nodes=1",
            "--ntasks=1",
            "--time=1",
            f"--immediate={_NODE_WAIT_S}",
            "--quiet",
            *where,
        ]
        place = str(Path(shared.name).absolute())
        began = time.time()
        try:
            done = subprocess.run(
                [*srun, sys.executable, "-c", _ON_NODE, place],
                capture_output=True,
                text=True,
                timeout=2 * _NODE_WAIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [Finding("from a node", False, "no node answered in time", "Try another --partition.")]
        ended = time.time()
    seen: dict[str, object] = {}
    with contextlib.suppress(ValueError, IndexError):
        seen = json.loads(done.stdout.strip().splitlines()[-1])
    if not seen:
        return [Finding("from a node", False, done.stderr.strip() or "no answer", "Try another --partition.")]
    told = float(str(seen["time"]))
    skew = max(0.0, began - told, told - ended)
    host = str(seen["host"])
    found = [
        Finding("clock", skew < _MOST_SKEW_S, f"{host} differs by at least {skew:.1f} s", "Ask for NTP."),
        Finding(
            "shared folder",
            bool(seen["shared"]),
            f"{folder.absolute()} {'is' if seen['shared'] else 'is not'} seen on {host}",
            "Put --run-dir on a file system that all nodes share.",
        ),
    ]
    if "mlflow" in seen:
        reached = seen["mlflow"] == "the server answers"
        remedy = "Set tracking.uri=none: the job spools, and `dl2pa sync` sends it from here."
        said = str(seen["mlflow"])
        found.append(Finding("mlflow from node", reached, f"{host}: {said}", remedy, needed=False))
    return found


def _run(*command: str) -> str:
    """A command's standard output; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
