import pytest

from dl2pa.tracking.cleaning import (
    MAX_NAME,
    MAX_PARAM,
    clean_name,
    clean_params,
    has_hidden_credentials,
    redact,
)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:s3cret@host:5000/path",
        "postgresql://me:p@s3cret@db/mlflow",
        "https://s3cret@host",
        "https://host/?a=1&token=s3cret&b=2",
        "ConnectionError: http://me:s3cret@host:5000 refused",
        "Invalid header value b'Bearer from-the-environment'",
    ],
)
def test_secrets_are_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "from-the-environment")
    assert "s3cret" not in redact(text)
    assert "from-the-environment" not in redact(text)


def test_addresses_without_secrets_stay_as_they_are() -> None:
    for uri in ["sqlite:////runs/mlflow.db", "http://host:5000", "https://host/a@b?step=3"]:
        assert redact(uri) == uri
        assert not has_hidden_credentials(redact(uri))
    assert has_hidden_credentials(redact("http://me:pw@host"))


def test_secret_params_are_hidden() -> None:
    params = clean_params({"tracking": {"uri": "http://me:s3cret@h", "token": "s3cret"}, "num_tokens": 5})
    assert params == {"tracking.uri": "http://***@h", "tracking.token": "***", "num_tokens": "5"}


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("val/top-1", "val/top-1"),
        ("per class: größe", "per class: größe"),
        ("loss(%)", "loss___"),
        ("/abs//path/", "abs/path"),
        ("../up", "up"),
        ("", "unnamed"),
        ("x" * 300, "x" * MAX_NAME),
    ],
)
def test_names_become_what_the_server_accepts(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_long_params_are_cut_visibly() -> None:
    value = clean_params({"classes": "n" * 7000})["classes"]
    assert len(value) == MAX_PARAM
    assert value.endswith("n…")
