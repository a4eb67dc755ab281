"""Checks of a SLURM cluster for `dl2pa doctor`, on this machine and on a compute node."""

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

from dl2pa.commands.finding import SERVER_ANSWERS, Finding, run_folder

_PROBE_MIB = 64
_STATE_MIB = 400
"""Size of a checkpoint of Swin-T with AdamW at d = 512, C = 1000; ResNet-50 with SGD takes half of it."""
_MAX_SKEW_S = 2.0
_NODE_WAIT_S = 120
_MAX_NAMES = 64

# Program that runs on a node. The address of the tracking server is passed in the environment, because it may contain
# a password and SLURM records command lines.
_ON_NODE = """
import json, os, pathlib, socket, sys, time
from dl2pa import envvars
report = {"host": os.environ.get(envvars.NODE_NAME) or socket.gethostname(), "time": time.time()}
report["shared"] = pathlib.Path(sys.argv[1]).exists()
if os.environ.get(envvars.TRACKING_URI, "").startswith("http"):
    from dl2pa.commands.finding import server_health
    report["mlflow"] = server_health(os.environ[envvars.TRACKING_URI])
print(json.dumps(report))
"""


def findings(*, on_node: bool, partition: str | None) -> list[Finding]:
    """Run all checks of the cluster; a single finding if there is no cluster.

    Args:
        on_node: also run checks on a compute node, in a job of one task.
        partition: partition of that job; None for the default one.
    """
    if shutil.which("sbatch") is None:
        return [Finding("slurm", False, "sbatch not found", "Only needed to submit jobs.", needed=on_node)]
    settings = _settings()
    if not settings:
        answer = _run("scontrol", "ping") or "no answer"
        remedy = "SLURM's controller does not answer; ask the administrators of the cluster."
        return [Finding("slurm", False, answer, remedy, needed=on_node)]
    results = [
        Finding("slurm", True, settings.get("SLURM_VERSION", "answers")),
        _partitions(),
        _names(),
        _network(),
        _preemption(settings),
        _time_to_save(settings),
        _accounts(),
    ]
    if on_node:
        return results + _check_on_node(partition)
    seen = "not checked: clock, shared folder, tracking server"
    return [*results, Finding("from a node", False, seen, "Run dl2pa doctor --cluster.", needed=False)]


def _settings() -> dict[str, str]:
    """Return the settings that `scontrol show config` prints."""
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
    ask, no_gpus = (
        "Ask the administrators of the cluster.",
        "No partition offers gres/gpu: use --gpus-per-node 0.",
    )
    return Finding(
        "partitions", has_gpus, "; ".join(shown) or "none", no_gpus if lines else ask, needed=False
    )


def _names() -> Finding:
    """Check that the name of every node resolves here; the processes of a job connect to its first node by name."""
    names = _nodes()
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
    """Check that a job on several nodes has no public address, because its store has no authentication."""
    addresses: set[str] = set()
    for name in _nodes()[:_MAX_NAMES]:
        with contextlib.suppress(OSError):
            addresses |= {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    public = sorted(a for a in addresses if ipaddress.ip_address(a.partition("%")[0]).is_global)
    shown = ", ".join(sorted(addresses)[:2]) or "no known address"
    seen = f"the processes of several nodes connect to {shown}"
    remedy = "A trusted network is needed: close ports 10000 to 29999 to others, or set DL2PA_HEAD (docs/security.md)."
    return Finding("network", not public, seen, remedy, needed=False)


def _nodes() -> list[str]:
    return sorted(set(_run("sinfo", "-h", "-N", "-o", "%N").split()))


def _preemption(settings: dict[str, str]) -> Finding:
    """Check that SLURM sends the job's own signal on preemption; report the grace time."""
    sends = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    grace = re.findall(r"PartitionName=(\S+).*? GraceTime=(\d+)", _run("scontrol", "show", "partition", "-o"))
    shown = ", ".join(f"{name} {seconds} s" for name, seconds in grace)
    seen = f"preempt_send_user_signal {'on' if sends else 'off'}; grace {shown or 'unknown'}"
    remedy = "Preempted jobs get only TERM, and no signal if the grace is 0: set checkpoint.every_steps."
    return Finding("preemption", sends, seen, remedy, needed=False)


def _time_to_save(settings: dict[str, str]) -> Finding:
    """Compare the time to write a checkpoint here with SLURM's time between TERM and KILL."""
    match = re.match(r"\d+", settings.get("KillWait", ""))
    kill_wait = int(match[0]) if match else 0
    folder = run_folder()
    try:
        seconds = _probe_seconds(folder) * _STATE_MIB / _PROBE_MIB
    except OSError as error:
        seen = f"{folder}: {error.strerror}"
        return Finding("time to save", False, seen, "Choose another --run-dir.", needed=False)
    writing = f"writing {_STATE_MIB} MiB to {folder.absolute()} takes about {seconds:.0f} s"
    seen = f"KillWait {kill_wait} s; {writing}"
    remedy = f"Give at least --stop-before {seconds + 60:.0f}, and set checkpoint.every_steps."
    return Finding("time to save", seconds < kill_wait, seen, remedy, needed=False)


def _probe_seconds(folder: Path) -> float:
    """Measure the seconds to write and sync a test file."""
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(_PROBE_MIB):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _accounts() -> Finding:
    from launcher.jobs import has_accounting

    available = has_accounting()
    remedy = "Without it, `dl2pa jobs` shows the state of ended jobs only by their run directories."
    return Finding("accounting", available, "sacct answers" if available else "none", remedy, needed=False)


def _check_on_node(partition: str | None) -> list[Finding]:
    folder = run_folder()
    try:
        return _check_on_node_with(folder, partition)
    except OSError as error:
        remedy = "Choose another --run-dir."
        return [Finding("shared folder", False, f"{folder.absolute()}: {error.strerror}", remedy)]


def _check_on_node_with(folder: Path, partition: str | None) -> list[Finding]:
    """Run `_ON_NODE` on a node with a temporary file in `folder`, and evaluate its report."""
    options = ["--nodes=1", "--ntasks=1", "--time=1", f"--immediate={_NODE_WAIT_S}", "--quiet"]
    options += [f"--partition={partition}"] if partition else []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as shared:
        program = [sys.executable, "-P", "-c", _ON_NODE, str(Path(shared.name).absolute())]
        start = time.time()
        try:
            done = subprocess.run(
                ["srun", *options, *program],
                capture_output=True,
                text=True,
                timeout=2 * _NODE_WAIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [Finding("from a node", False, "no node answered in time", "Try another --partition.")]
        end = time.time()
    report: dict[str, object] = {}
    with contextlib.suppress(ValueError, IndexError):
        report = json.loads(done.stdout.strip().splitlines()[-1])
    if not report:
        return [Finding("from a node", False, done.stderr.strip() or "no answer", "Try another --partition.")]
    node_time = float(str(report["time"]))
    skew = max(0.0, start - node_time, node_time - end)
    host = str(report["host"])
    seen = f"{folder.absolute()} {'is' if report['shared'] else 'is not'} visible on {host}"
    remedy = "Put --run-dir on a file system that all nodes share."
    results = [
        Finding("clock", skew < _MAX_SKEW_S, f"{host} differs by at least {skew:.1f} s", "Ask for NTP."),
        Finding("shared folder", bool(report["shared"]), seen, remedy),
    ]
    if "mlflow" in report:
        health = str(report["mlflow"])
        remedy = "Set tracking.uri=none: the job spools its events; send them with `dl2pa sync` from here."
        seen = f"{host}: {health}"
        results.append(Finding("mlflow from node", health == SERVER_ANSWERS, seen, remedy, needed=False))
    return results


def _run(*command: str) -> str:
    """Return the standard output of a command; empty if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
