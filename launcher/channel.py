"""Messages between two nodes that meet: lines of JSON, authenticated if the nodes share a secret.

With a secret, each side first sends a random nonce. Every message then carries an HMAC over both nonces, the direction,
its number and its text, so that one of another connection, of the other side or out of order is not accepted.
Messages are authenticated, not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
import time
from typing import Any

ANSWER_S = 10.0
"""Time that a node waits for an answer."""
_MAX_LINE = 1000
_NONCE = re.compile("[0-9a-f]{64}")


class NotAuthentic(ConnectionError):
    """The other side does not know the secret."""


class Channel:
    """One connection between node 0 and another node.

    Args:
        secret: None: messages are not authenticated.
        is_head: this is node 0.
    """

    def __init__(self, connection: socket.socket, secret: bytes | None, *, is_head: bool) -> None:
        self._connection = connection
        self._secret = secret
        self._is_head = is_head
        self._nonces = ""
        self._sent = self._received = 0

    def open(self, timeout_s: float = ANSWER_S) -> None:
        """Exchange nonces, if there is a secret.

        Raises:
            NotAuthentic: the other side sends none.
            OSError: the connection has ended, or there was no answer.
        """
        if self._secret is None:
            return
        own = secrets.token_hex(32)
        self._send_line({"nonce": own})
        answer = self._receive_line(timeout_s)
        if not answer:
            raise ConnectionError("the other side sent no message")
        other = answer.get("nonce")
        if not isinstance(other, str) or not _NONCE.fullmatch(other):
            raise NotAuthentic("the other side uses no secret")
        self._nonces = f"{own} {other}" if self._is_head else f"{other} {own}"

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: the connection has ended.
        """
        if self._secret is not None:
            text = json.dumps(message)
            message = {"text": text, "mac": self._mac(text, self._sent, from_head=self._is_head)}
            self._sent += 1
        self._send_line(message)

    def receive(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Return the next message; empty at the end of the connection and for anything that is not a message.

        Raises:
            NotAuthentic: the message does not have the right HMAC.
        """
        message = self._receive_line(timeout_s)
        if self._secret is None or not message:
            return message
        text, mac = str(message.get("text")), str(message.get("mac"))
        expected = self._mac(text, self._received, from_head=not self._is_head)
        if not self._nonces or not hmac.compare_digest(mac.encode(errors="surrogatepass"), expected.encode()):
            raise NotAuthentic("the other side has another secret")
        self._received += 1
        return _parse(text)

    def close(self) -> None:
        self._connection.close()

    def _mac(self, text: str, number: int, *, from_head: bool) -> str:
        assert self._secret is not None
        content = f"dl2pa {self._nonces} {from_head} {number} {text}"
        # JSON may contain half of a surrogate pair, which UTF-8 does not.
        return hmac.new(self._secret, content.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()

    def _send_line(self, content: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(content).encode() + b"\n")

    def _receive_line(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        line = bytearray()
        while len(line) < _MAX_LINE:
            try:
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if (left := deadline - time.monotonic()) <= 0:  # of the line, not of each byte
                    return {}
                self._connection.settimeout(left)
                byte = self._connection.recv(1)
            except OSError:
                return {}
            if byte in (b"", b"\n"):
                break
            line += byte
        return _parse(line)


def _parse(text: str | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
