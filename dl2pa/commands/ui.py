"""`dl2pa ui`: MLflow's pages on the runs of this machine."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import signal
import socket
import tempfile
from pathlib import Path
from types import FrameType

from dl2pa.commands.options import nonempty_path, nonempty_text
from dl2pa.commands.output import note
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=nonempty_path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of the runs (default: runs)",
    )
    parser.add_argument("--uri", help="another local store: sqlite:///FILE, postgresql://…")
    parser.add_argument(
        "--host", type=nonempty_text, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--allow-others",
        type=nonempty_text,
        metavar="NAMES",
        help="comma-separated host names that other machines use; required if --host is not a loopback address",
    )
    parser.add_argument("--port", type=int, default=5000, help="0 selects any free port (default: 5000)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.config.tracking import check_uri
    from dl2pa.tracking import sqlite_file
    from dl2pa.tracking.local import LocalServer, ServerFailed

    store = args.uri or _store_of(args.runs)
    check_uri("--uri", store)
    if store.startswith("http"):
        raise UserError("--uri", store, "is a server that runs already", "Open it in a browser.")
    database = sqlite_file(store)
    if database is not None and not database.is_file():
        raise UserError(
            "--uri", store, "there is no such file", "Give the store that the runs were recorded in."
        )
    names = _names(args.host, args.allow_others)
    port = _free(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="dl2pa-ui-") as folder:
        log = Path(folder) / "log"
        server = LocalServer(store, log, args.runs.absolute() / "mlartifacts", args.host, port, names)
        # A shell starts what it puts in the background with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            note("starting MLflow …")
            server.start()
            if args.json:
                print(json.dumps({"url": server.uri, "store": _shown(store)}), flush=True)  # noqa: T201
            if names:
                note(
                    "warning: everyone who can reach this machine can read and change all runs; there is no sign-in"
                )
            note(f"MLflow shows {_shown(store)} at {server.uri}   (Ctrl-C ends it)")
            code = server.wait()
            note(
                f"MLflow ended by itself ({code}): {log.read_text(encoding='utf-8', errors='replace')[-500:]}"
            )
            return EXIT_FAILURE
        except ServerFailed as error:
            raise UserError(
                "store", _shown(store), f"MLflow does not open it: {error}", _remedy(error)
            ) from None
        except KeyboardInterrupt:
            note("ended")
            return EXIT_DONE
        finally:
            server.stop()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _store_of(runs: Path) -> str:
    from dl2pa.tracking import local_uri

    if not (runs / "mlflow.db").is_file():
        message = "holds no mlflow.db: no run was recorded there"
        remedy = "Give --runs DIR; `dl2pa sync --all DIR --uri sqlite:///DIR/mlflow.db` fills one from spooled runs."
        raise UserError("--runs", str(runs), message, remedy)
    return local_uri(runs)


def is_loopback(host: str) -> bool:
    """Whether an address or host name is on the loopback interface."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # an unknown host: `_free` reports it
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _names(host: str, others: str | None) -> tuple[str, ...]:
    """The names by which others may reach the server; none where it listens on loopback.

    Raises:
        UserError: others are let in without being meant, or a name that is none.
    """
    if is_loopback(host):
        if others is not None:
            raise UserError("--allow-others", others, "needs an address for others", "Give --host too.")
        return ()
    if others is None:
        message = "lets everyone who can reach this machine read and change all runs: there is no sign-in"
        remedy = "Use a tunnel (ssh -L 5000:localhost:5000), or add --allow-others NAME, the host name that others use."
        raise UserError("--host", host, message, remedy)
    names = tuple(others.split(","))
    bad = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", name)), None)
    if bad is not None:
        raise UserError("--allow-others", bad, "is no host name", "Write names with commas between.")
    return names


def _free(host: str, port: int) -> int:
    """The port, or any free one for 0.

    Raises:
        UserError: somebody listens there, or it cannot be listened at.
    """
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        remedy = "Give a name or an address of this machine."
        raise UserError("--host", host, f"is unknown ({error.strerror})", remedy) from None
    try:
        with socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ) as probe:
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = (
            "is taken by another program" if getattr(error, "errno", 0) == 98 else f"cannot be used ({error})"
        )
        raise UserError("--port", port, reason, "Give another, or --port 0 for any free one.") from None


def _shown(store: str) -> str:
    from dl2pa.redaction import redact

    return redact(store)


def _remedy(error: Exception) -> str:
    if "out-of-date" in str(error):
        return "`mlflow db upgrade STORE` brings it to this version; keep a copy."
    return "See that it is a store of this MLflow's version and can be read and written."
