"""Limits and cores of a SLURM partition, as `scontrol` reports them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

CPUS_PER_GPU = 8
"""Cores per GPU if SLURM does not tell how many each GPU of the partition has."""


def partition_fields(name: str | None) -> dict[str, str]:
    """Fields of a partition, or of the default one; empty if unknown."""
    for fields in records("partition"):
        if fields.get("PartitionName") == name or (name is None and fields.get("Default") == "YES"):
            return fields
    return {}


def default_cpus_per_process(name: str | None, gpus: int, processes: int, needed: int) -> int:
    """Cores per process that a job requests by default.

    On GPUs, the cores that each GPU of the partition has, or the site's own default (DefCpuPerGPU). On CPUs, the
    needed ones, as far as the nodes have them.

    Args:
        name: partition, or several separated by commas; None is the default partition.
        gpus: GPUs per node; 0 is a job on CPUs.
        processes: processes per node.
        needed: cores that a process on CPUs uses.
    """
    partition = partition_fields(name)
    names = set((name or partition.get("PartitionName", "")).split(","))
    nodes = [
        (int(fields.get("CPUEfctv") or fields.get("CPUTot") or 0), count_gpus(fields.get("Gres", "")))
        for fields in records("node")
        if names & set(fields.get("Partitions", "").split(","))
    ]
    limit = partition.get("MaxCPUsPerNode", "")
    most = [int(limit)] if limit.isdecimal() and int(limit) else []
    if not gpus:
        most += [max((cores for cores, _ in nodes), default=needed * processes)]
        return max(1, min(needed, *(cores // processes for cores in most)))
    site = re.search(r"DefCpuPerGPU=(\d+)", partition.get("JobDefaults", ""))
    ratios = [cores // count for cores, count in nodes if count >= gpus]
    cores = int(site[1]) if site else min(ratios, default=CPUS_PER_GPU)
    return max(1, min(cores, *(limit // gpus for limit in most)) if most else cores)


def records(kind: str) -> Iterator[dict[str, str]]:
    """Records of `scontrol show`, one line each; none if SLURM does not answer."""
    command = ["scontrol", "show", kind, "-o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        yield dict(word.split("=", 1) for word in line.split() if "=" in word)


def count_gpus(resources: str) -> int:
    """GPUs in a list of generic resources, such as `gpu:a100:8(S:0-1)` or `gpu:2`."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]*)??(?::(\d+))?(?=[,(]|$)", resources)
    return sum(int(count or 1) for count in counts)
