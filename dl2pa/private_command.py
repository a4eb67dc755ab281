"""`python -m dl2pa.private_command WORD...`: the command `dl2pa` with arguments from its standard input.

Other users of a machine can read the arguments of a process; overrides can contain secrets. The words describe the
process in lists of processes and are not used. See `dl2pa.process.private_command`.
"""

from __future__ import annotations

import json
import os
import sys

from dl2pa import cli


def main() -> int:
    """Run the command as if it had been called with the arguments, which a run records."""
    sys.argv[1:] = json.load(sys.stdin.buffer)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
