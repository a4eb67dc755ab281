"""Result of a check of `dl2pa doctor`, and the server check, which also runs on compute nodes."""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

SERVER_ANSWERS = "the server answers"
"""Result of `server_health` for a healthy server."""


@dataclass(frozen=True)
class Finding:
    """Result of a check: success, observation, and remedy. Only `needed` checks fail the command."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""
    needed: bool = True


def run_folder() -> Path:
    """Folder of new run directories: `runs` if it exists, otherwise the working directory."""
    return Path("runs") if Path("runs").is_dir() else Path()


def server_health(uri: str) -> str:
    """Return `the server answers` or the reason why not, without credentials in `uri`."""
    host = ""
    try:
        parts = urllib.parse.urlsplit(uri)
        host = parts.netloc.rpartition("@")[2]
        address = parts._replace(netloc=host, path=parts.path.rstrip("/") + "/health", query="", fragment="")
        request = urllib.request.Request(address.geturl())
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
        with urllib.request.urlopen(request, timeout=5):
            return SERVER_ANSWERS
    except urllib.error.HTTPError as error:
        return f"{host} answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
