"""Form of the settings of messages, checked before a run without sending anything."""

from __future__ import annotations

from collections.abc import Iterator

from dl2pa.config.gather import gathered
from dl2pa.config.schema import NotifyConfig
from dl2pa.config.tracking import server_problem
from dl2pa.errors import UserError
from dl2pa.redaction import without_path


@gathered
def check_notify(notify: NotifyConfig) -> Iterator[UserError]:
    """Check the form of the webhook's address and of the command.

    Raises:
        UserError: for notify.url or notify.command; only the host of the address is shown.
    """
    if notify.url is not None:
        scheme = notify.url.partition("://")[0].lower()
        message = server_problem(notify.url) if scheme in ("http", "https") else "is not an http(s) address"
        if message:
            shown, remedy = without_path(notify.url), "Give the address of a webhook: https://HOST/PATH."
            yield UserError("notify.url", shown, message, remedy)
    command = notify.command
    words = command if isinstance(command, tuple) else (command,)
    if command is not None and (
        not words or not (words[0] or "").strip() or "\0" in "".join(map(str, words))
    ):
        remedy = "Give a program with its arguments, for instance [mail, -s, dl2pa, me@example.org]."
        yield UserError("notify.command", command, "names no program", remedy)
