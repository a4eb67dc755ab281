"""Delivery of a message to a webhook and to a program, each within a time limit."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from dl2pa import __version__, envvars
from dl2pa.config.schema import NotifyConfig
from dl2pa.errors import printable
from dl2pa.redaction import HIDDEN, redact, without_path

_WAITS_S = (1.0, 3.0)
"""Pauses before the message is sent again to a server that has not accepted it."""
_TOO_MANY_REQUESTS, _FIRST_SERVER_ERROR = 429, 500


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET, or send the message to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def deliver(
    notify: NotifyConfig, message: Mapping[str, Any], waits_s: Sequence[float] = _WAITS_S
) -> list[str]:
    """Send a message; returns a problem for each setting by which it could not be delivered. Raises nothing."""
    problems: list[str] = []
    if notify.url is not None and (problem := _post(notify.url, message, notify.timeout_s, waits_s)):
        problems.append(f"notify.url ({without_path(notify.url)}): {problem}")
    if notify.command and (problem := _run(notify.command, message, notify.timeout_s)):
        problems.append(f"notify.command: {problem}")
    return [printable(redact(problem)) for problem in problems]


def longest_delivery_s(notify: NotifyConfig) -> float:
    """Longest time that `deliver` takes."""
    return (len(_WAITS_S) + 2) * notify.timeout_s + sum(_WAITS_S)


def _post(url: str, message: Mapping[str, Any], timeout_s: float, waits_s: Sequence[float]) -> str | None:
    """POST the message; sent again only if the server cannot have accepted it."""
    if HIDDEN in url:
        return "its path was removed from the recorded configuration; set notify.url again"
    problem, again = None, True
    for wait in (0.0, *waits_s):
        if not again:
            break
        time.sleep(wait)
        problem, again = _limited(lambda: _post_once(url, message, timeout_s), timeout_s)
    return problem


def _limited(work: Callable[[], tuple[str | None, bool]], timeout_s: float) -> tuple[str | None, bool]:
    """Result of the work, or a problem after the time limit: the timeout of a socket limits only each packet."""
    results: list[tuple[str | None, bool]] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return results[0] if results else (f"no answer within {timeout_s:g} s", False)


def _post_once(url: str, message: Mapping[str, Any], timeout_s: float) -> tuple[str | None, bool]:
    """Problem of one POST, None if it was accepted; and whether to send it again."""
    parts = urlsplit(url)
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")),
        data=json.dumps(message).encode(),
        headers={"Content-Type": "application/json", "User-Agent": f"dl2pa/{__version__}"},
    )
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s):
            return None, False
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}", error.code == _TOO_MANY_REQUESTS or error.code >= _FIRST_SERVER_ERROR
    except urllib.error.URLError as error:
        return str(error.reason), not isinstance(error.reason, TimeoutError)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__, False


def _run(command: str | Sequence[str], message: Mapping[str, Any], timeout_s: float) -> str | None:
    """Run the program with the message on its standard input; a problem if it fails or exceeds the time limit."""
    words = ["sh", "-c", command] if isinstance(command, str) else list(command)
    values = (message["event"], message.get("run_dir") or "", message["message"])
    environment = {**os.environ, **dict(zip(envvars.NOTIFY, map(str, values), strict=True))}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        given.write(json.dumps(message).encode() + b"\n")
        given.seek(0)
        try:
            process = subprocess.Popen(
                words,
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"cannot be started ({error})"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {timeout_s:g} s (notify.timeout_s)"
        errors.seek(0)
        lines = errors.read(65536).decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
    return None if code == 0 else f"exit code {code}" + (f": {last[:200]}" if last else "")
