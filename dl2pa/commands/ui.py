"""`dl2pa ui`: run an MLflow server on the store of the local runs."""

from __future__ import annotations

import argparse
import errno
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
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError, printable
from dl2pa.redaction import redact

_MAX_LINKS = 10
_NO_SIGN_IN = "everyone who can reach this machine can read and change all runs, because there is no sign-in"


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
        raise UserError("--uri", store, "is a running server", "Open it in a browser.")
    database = sqlite_file(store)
    if database is not None and not database.is_file():
        raise UserError("--uri", store, "the file does not exist", "Give the store that contains the runs.")
    names = _names(args.host, args.allow_others)
    port = _free(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="dl2pa-ui-") as folder:
        log = Path(folder) / "log"
        server = LocalServer(store, log, args.runs.absolute() / "mlartifacts", args.host, port, names)
        # A shell starts background processes with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            note("starting MLflow …")
            server.start()
            links = _links(server.uri)
            if args.json:
                content = {"url": server.uri, "store": redact(store), "experiments": links}
                print(json.dumps(content), flush=True)  # noqa: T201
            if names:
                note(f"warning: {_NO_SIGN_IN}")
            note(f"MLflow serves {redact(store)} at {server.uri}   (stop it with Ctrl-C)")
            for name, link in list(links.items())[:_MAX_LINKS]:
                note(f"runs of {printable(name)}: {link}")
            code = server.wait()
            output = log.read_text(encoding="utf-8", errors="replace")
            note(f"MLflow exited with code {code}: {output[-500:]}")
            return EXIT_FAILURE
        except ServerFailed as error:
            message = f"cannot be opened by MLflow: {error}"
            raise UserError("store", redact(store), message, _remedy(error)) from None
        except KeyboardInterrupt:
            note("stopped")
            return EXIT_DONE
        finally:
            server.stop()


def _links(server: str) -> dict[str, str]:
    """Addresses of the runs of each experiment; none if MLflow does not list them."""
    from dl2pa.tracking.server import connect, set_client_defaults
    from dl2pa.tracking.views import experiment_links

    set_client_defaults()
    try:
        return experiment_links(connect(server)[0], server)
    except Exception as error:  # any error of MLflow or its transport
        note(f"the experiments could not be listed: {type(error).__name__}")
        return {}


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _store_of(runs: Path) -> str:
    from dl2pa.tracking import local_uri

    if not (runs / "mlflow.db").is_file():
        message = "contains no mlflow.db, so no run was sent to a store there"
        remedy = "Give --runs DIR. `dl2pa sync --all DIR --uri sqlite:///DIR/mlflow.db` creates one from spooled runs."
        raise UserError("--runs", str(runs), message, remedy)
    return local_uri(runs)


def is_loopback(host: str) -> bool:
    """Return whether an address or host name is on the loopback interface."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # an unknown host: `_free` reports it
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _names(host: str, others: str | None) -> tuple[str, ...]:
    """Host names under which other machines may reach the server; none if it listens on a loopback address.

    Raises:
        UserError: `host` and `others` contradict each other, or a name is invalid.
    """
    if is_loopback(host):
        if others is not None:
            remedy = "Give an address that others can reach."
            raise UserError("--allow-others", others, "requires --host", remedy)
        return ()
    if others is None:
        remedy = "Use a tunnel (ssh -L 5000:localhost:5000), or give the host name that others use in --allow-others."
        raise UserError("--host", host, _NO_SIGN_IN, remedy)
    names = tuple(others.split(","))
    bad = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", name)), None)
    if bad is not None:
        raise UserError("--allow-others", bad, "is not a valid host name", "Give names separated by commas.")
    return names


def _free(host: str, port: int) -> int:
    """Return the port if it is free, or any free port for 0.

    Raises:
        UserError: the host is unknown, or the port cannot be used.
    """
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        remedy = "Give a name or address of this machine."
        raise UserError("--host", host, f"is unknown ({error.strerror})", remedy) from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        message = "is in use by another program" if in_use else f"cannot be used ({error})"
        raise UserError("--port", port, message, "Give another port, or 0 for any free one.") from None


def _remedy(error: Exception) -> str:
    if "out-of-date" in str(error):
        return "Copy the store, then upgrade it with `mlflow db upgrade STORE`."
    return "Check that the store is readable, writable and of this MLflow version."
