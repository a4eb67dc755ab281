"""What one check of `dl2pa doctor` found, and the check that is made both here and on a cluster's node."""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: whether it is fine, what was seen, what to do if not. Only `needed` ones fail the command."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""
    needed: bool = True


def server_health(uri: str) -> str:
    """`the server answers`, or why it does not; without the credentials that `uri` may hold."""
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
            return "the server answers"
    except urllib.error.HTTPError as error:
        return f"{host} answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
