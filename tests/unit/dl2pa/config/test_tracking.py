"""Form of the tracking settings, refused before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa import envvars
from dl2pa.config import parse_config
from dl2pa.config.tracking import check_experiment, check_tracking, check_uri, sync_command
from dl2pa.errors import UserError

VALID = (
    "http://localhost:5000",
    "https://me:secret@mlflow.example/path",
    "http://[::1]:5000",
    "sqlite:///mlflow.db",
    "sqlite:////scratch/mlflow.db?timeout=5",
    "postgresql+psycopg2://me@host:5432/runs",
    "mssql+pyodbc:///?odbc_connect=x",
)
INVALID = {
    "": "not the URI",
    "./mlruns": "not the URI",
    "file:///tmp/mlruns": "not the URI",
    "localhost:5000": "not the URI",
    "http://": "no host",
    "http:localhost": "no host",
    "http://:5000": "no host",
    "http://host:port": "malformed",
    "http://host:99999": "malformed",
    "http://[::1:5000": "malformed",
    "http://host :5000": "white space",
    "http://host/a\x01b": "control character",
    "sqlite://": "no database file",
    "sqlite:///": "no database file",
    "sqlite:///:memory:": "no database file",
    "postgresql:host": "lacks ://",
}


@pytest.mark.parametrize("uri", VALID)
def test_valid_uris_are_accepted(uri: str) -> None:
    check_uri("tracking.uri", uri)


@pytest.mark.parametrize("uri", INVALID)
def test_malformed_uris_are_refused_with_a_remedy(uri: str) -> None:
    with pytest.raises(UserError, match=INVALID[uri]) as refused:
        check_uri("tracking.uri", uri)
    assert refused.value.remedy.startswith("Give ")


def test_refusal_shows_no_password() -> None:
    with pytest.raises(UserError) as refused:
        check_uri("tracking.uri", "http://me:s3cret@host:port")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 501])
def test_names_that_mlflow_refuses_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.experiment"):
        check_experiment("tracking.experiment", name)


def test_settings_and_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envvars.TRACKING_URI, "mlruns")
    with pytest.raises(UserError) as refused:
        check_tracking(parse_config({}).tracking)
    assert refused.value.field == envvars.TRACKING_URI
    for tracking in ({"uri": "none"}, {"enabled": False}, {"uri": "http://host"}):
        check_tracking(parse_config({"tracking": tracking}).tracking)
    with pytest.raises(UserError, match=r"tracking\.uri"):
        check_tracking(parse_config({"tracking": {"uri": "mlruns"}}).tracking)


@pytest.mark.parametrize(("uri", "options"), [(None, ""), ("http://host", ""), ("none", " --uri SERVER")])
def test_the_command_that_sends_later_names_a_server_where_it_needs_one(
    uri: str | None, options: str
) -> None:
    assert sync_command(uri, Path("runs/a")) == f"dl2pa sync runs/a{options}"
    assert sync_command(uri, Path("runs"), every_run=True) == f"dl2pa sync --all runs{options}"
