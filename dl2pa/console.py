"""Standard output and standard error without secrets and terminal control characters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, TextIO

from dl2pa.errors import printable
from dl2pa.redaction import redact


class SafeStream:
    """Text stream that redacts and escapes what is written; other attributes are those of the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(redact(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class SafeFormatter(logging.Formatter):
    """Log formatter that removes secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


@contextmanager
def safe_output() -> Generator[None]:
    """Redirect standard output and standard error through ``SafeStream``."""
    before = sys.stdout, sys.stderr
    safe: Any = [stream and SafeStream(stream) for stream in before]
    sys.stdout, sys.stderr = safe
    try:
        yield
    finally:
        if sys.stdout is safe[0]:
            sys.stdout = before[0]
        sys.stderr = before[1]
