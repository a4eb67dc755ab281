"""Job of a search: a batch script that runs one command on one core and requeues itself at its time limit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import jobs
from launcher.request import Request

STOP_BEFORE_S = 60
_SCRIPT = """\
set +eu # lines of a site file may have set these; the code below tests exit codes itself
trap - ERR
ended='' child=''
trap 'ended=limit; kill -TERM "$child" 2>/dev/null' USR2
trap 'ended=cancelled; kill -TERM "$child" 2>/dev/null' TERM
{command} &
child=$!
[[ -z $ended ]] || kill -TERM "$child" # a signal came before its number was known
while :; do # a trapped signal ends `wait` early
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break
done
if [[ $ended == limit && $code != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def script(request: Request, name: str, log: Path, command: Sequence[str], options: Mapping[str, str]) -> str:
    """Return the batch script of a command that may be stopped by TERM and repeated.

    Args:
        request: resources of the trials; partition, account, QOS, time and setup are used.
        log: the job log, appended to by every attempt.
        options: further options of sbatch, which replace the others.
    """
    taken = {name: getattr(request, name) for name in ("partition", "account", "qos", "time")}
    lines = {
        "job-name": name,
        "comment": jobs.COMMENT,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": "1",
        "mem": "2G",
        **{key: value for key, value in taken.items() if value is not None},
        "signal": f"B:USR2@{STOP_BEFORE_S}",
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "requeue": "",
        "chdir": str(Path.cwd()),
        **options,
    }
    header = [
        f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"
        for key, value in lines.items()
    ]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in request.setup.environment.items()]
    setup = ["trap '' USR2", *exports, *request.setup.lines]
    return "\n".join(["#!/bin/bash", *header, *setup, _SCRIPT.format(command=shlex.join(command))])
