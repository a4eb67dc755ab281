"""A pseudo-terminal, and the screen that a terminal shows for what is written to it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

_SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Za-z])")
COLUMNS, LINES = 100, 24


class Screen:
    """The lines that a terminal shows. Knows the control sequences that dl2pa and tqdm use; others fail."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        position = 0
        while position < len(text):
            match = _SEQUENCE.match(text, position)
            if match is not None:
                self._control(match[2], int(match[1] or 1))
                position = match.end()
                continue
            self._put(text[position])
            position += 1

    def _control(self, name: str, count: int) -> None:
        if name in "AF":
            self._row = max(0, self._row - count)
            self._column = 0 if name == "F" else self._column
        elif name == "J":
            self.lines[self._row] = self.lines[self._row][: self._column]
            del self.lines[self._row + 1 :]
        elif name == "K":
            self.lines[self._row] = self.lines[self._row][: self._column]
        else:
            raise AssertionError(f"unexpected control sequence {name}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
            if self._row == len(self.lines):
                self.lines.append("")
        else:
            assert character.isprintable(), f"unexpected control character {character!r}"
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1
            assert self._column <= COLUMNS, "a line is wider than the terminal and would wrap"

    def text(self) -> list[str]:
        """The lines without white space at their end and without empty ones."""
        return [line.rstrip() for line in self.lines if line.strip()]


class Terminal:
    """A pseudo-terminal.

    Attributes:
        stream: what a program writes to.
    """

    def __init__(self, master: int, stream: TextIO) -> None:
        self.master = master
        self.stream = stream
        self.raw = ""
        self._screen = Screen()

    def screen(self) -> list[str]:
        """The lines on the screen after everything that was written."""
        self.stream.flush()
        while select.select([self.master], [], [], 0)[0]:
            text = os.read(self.master, 65536).decode().replace("\r\n", "\n\r")
            self.raw += text
            self._screen.write(text)
        return self._screen.text()


@contextmanager
def terminal() -> Generator[Terminal]:
    """Open a pseudo-terminal of `COLUMNS` times `LINES` characters."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8", buffering=1) as stream:
        yield Terminal(master, stream)
    os.close(master)
