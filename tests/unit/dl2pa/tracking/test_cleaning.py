import pytest

from dl2pa.tracking.cleaning import (
    MAX_NAME,
    MAX_PARAM,
    clean_name,
    clean_params,
    has_hidden_credentials,
    redact,
    redact_lines,
)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:s3cret@host:5000/path",
        "postgresql://me:p@s3cret@db/mlflow",
        "https://s3cret@host",
        "https://host/?a=1&token=s3cret&b=2",
        "https://host/?access_token=s3cret",
        "https://bucket.host/file?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret",
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dl2pa train c.yaml --token abc123 lr=1", "dl2pa train c.yaml --token *** lr=1"),
        ("+password = 'hunter2 and more'", "+password = ***"),
        ("AWS_SECRET_ACCESS_KEY=abc/def+g", "AWS_SECRET_ACCESS_KEY=***"),
        ('{"password": "abc"}', '{"password": ***}'),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("x = hf_" + "a" * 24, "x = ***"),
        ("https://me:pw@host/x", "https://***@host/x"),
        *((same, same) for same in ("the token is expired", "if token == other:", "max_tokens=5")),
        *((same, same) for same in ("def f(token: str) -> None:", "+token = next(tokens)", "password=None")),
    ],
)
def test_a_command_or_diff_loses_its_secrets_and_nothing_else(text: str, expected: str) -> None:
    assert redact_lines(text) == expected


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-77")
    assert redact_lines("-  open('swordfish-77')") == "-  open('***')"
