"""`python -m dl2pa.private_command WORD...`: the command `dl2pa` with arguments from its standard input.

Other users of a machine can read the arguments of a process; overrides can contain secrets. The words describe the
process in lists of processes and are not used.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
"""Beginning of an override, `key=value`."""


def shown_words(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that other users may read: all except overrides."""
    return [word for word in arguments if not OVERRIDE.match(word)]


def private_command(arguments: Sequence[str]) -> list[str]:
    """Command line of a process that runs `dl2pa` with the arguments; its input is `private_input(arguments)`."""
    return [sys.executable, "-m", "dl2pa.private_command", *shown_words(arguments)]


@contextmanager
def private_input(arguments: Sequence[str]) -> Generator[int]:
    """Yield a file descriptor for the standard input of the process; the file is in memory and has no name."""
    descriptor = os.memfd_create("dl2pa")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(json.dumps(list(arguments)).encode())
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def main() -> int:
    """Run the command as if it had been called with the arguments, which a run records."""
    from dl2pa.cli import main as run

    sys.argv[1:] = json.load(sys.stdin.buffer)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return run()


if __name__ == "__main__":
    sys.exit(main())
