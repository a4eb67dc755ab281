"""Draft of a site file from the partitions that sinfo and scontrol report."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass

from dl2pa.config.yaml_core import value_text
from dl2pa.errors import UserError
from launcher.partition import count_gpus, partition_fields, records
from launcher.request import seconds_of

_SINFO = ["sinfo", "--noheader", "--exact", "--format=%R|%a|%D|%c|%m|%l|%G"]


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that have the same resources, one line of sinfo."""

    partition: str
    is_up: bool
    count: int
    cpus: str
    memory_mib: str
    limit: str
    gres: str

    @property
    def gpus(self) -> str:
        """GPUs of a node, `N` or `TYPE:N`; the type only if the node has one type."""
        count = count_gpus(self.gres)
        types = set(re.findall(r"(?:^|,)gpu:([A-Za-z][\w.-]*)", self.gres))
        return f"{types.pop()}:{count}" if count and len(types) == 1 else str(count)


def draft_site() -> str:
    """Return a site file with one profile per partition of this cluster.

    Raises:
        UserError: there is no SLURM here, or it does not answer.
    """
    nodes = _nodes()
    default = partition_fields(None).get("PartitionName", nodes[0].partition)
    partitions = list(dict.fromkeys(node.partition for node in nodes))
    lines = [
        f"# Site file of {_cluster_name()}, drafted on {time.strftime('%Y-%m-%d')} by `dl2pa doctor`.",
        "# Check it, then move it to ~/.config/dl2pa/cluster.yaml, or set DL2PA_CLUSTER. docs/slurm.md lists the keys.",
        "# Options of the command line replace those of the profile, and these the defaults.",
        "defaults:",
        f"  partition: {value_text(default)}",
        *_resources(next(node for node in _best_first(nodes) if node.partition == default), "  "),
        "  cpus_per_gpu: auto   # the cores per GPU of the partition; site: request none",
        "  # account: NAME",
        "  # sbatch: {mail-type: END, mail-user: NAME}",
        *[f"  # reservation {name}: sbatch: {{reservation: {name}}}" for name in _reservations()],
        "  # setup: [module load cuda]",
        "  # environment: {NCCL_SOCKET_IFNAME: ib0}",
        "  # container: /images/dl2pa.sif",
        "profiles:",
    ]
    for partition in partitions:
        kinds = [node for node in nodes if node.partition == partition]
        lines.append(f"  {value_text(re.sub(r'[^A-Za-z0-9_.-]', '_', partition))}:")
        lines += [f"    # {_describe(node)}" for node in kinds]
        lines += [f"    partition: {value_text(partition)}", *_resources(_best_first(kinds)[0], "    ")]
    return "\n".join(lines) + "\n"


def _nodes() -> list[Nodes]:
    try:
        done = subprocess.run(_SINFO, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        remedy = "Call it on a SLURM host."
        raise UserError("--write-profile", None, f"sinfo cannot be called ({error})", remedy) from None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    nodes = [Nodes(r[0], r[1] == "up", int(r[2]), *r[3:]) for r in rows if len(r) == 7 and r[2].isdecimal()]
    if not nodes:
        reason = done.stderr.strip() or "it lists no partition"
        raise UserError("--write-profile", None, f"sinfo: {reason}", "Call it while SLURM answers.")
    return nodes


def _best_first(nodes: list[Nodes]) -> list[Nodes]:
    """Sort by availability, then the number of GPUs of a node."""
    return sorted(nodes, key=lambda node: (not node.is_up, -count_gpus(node.gres)))


def _resources(nodes: Nodes, indent: str) -> list[str]:
    limit = seconds_of(nodes.limit)
    lines = [f"{indent}gpus_per_node: {nodes.gpus}"]
    return [
        *lines,
        f'{indent}time: "{nodes.limit}"   # the longest' if limit else f"{indent}time: null   # no limit",
    ]


def _describe(nodes: Nodes) -> str:
    gpus = "no GPUs" if nodes.gres == "(null)" else nodes.gres
    state = "" if nodes.is_up else "not up; "
    return f"{state}{nodes.count} node(s): {nodes.cpus} CPUs, {nodes.memory_mib} MiB, {gpus}; limit {nodes.limit}"


def _cluster_name() -> str:
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    match = re.search(r"^ClusterName\s*=\s*(\S+)", done.stdout, re.MULTILINE)
    return "this cluster" if match is None else f"cluster {match[1]}"


def _reservations() -> list[str]:
    return [fields["ReservationName"] for fields in records("reservation") if "ReservationName" in fields]
