"""What the redactor hides, and what it leaves."""

import pytest

from dl2pa.redaction import has_hidden_credentials, redact
from support.secrets import FORMS, SECRET, in_environment


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
def test_secrets_are_redacted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "from-the-environment")
    assert "s3cret" not in redact(text)
    assert "from-the-environment" not in redact(text)


def test_addresses_without_secrets_are_unchanged() -> None:
    for uri in ["sqlite:////runs/mlflow.db", "http://host:5000", "https://host/a@b?step=3"]:
        assert redact(uri) == uri
        assert not has_hidden_credentials(redact(uri))
    assert has_hidden_credentials(redact("http://me:pw@host"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dl2pa train c.yaml --token abc123 lr=1", "dl2pa train c.yaml --token *** lr=1"),
        ("+password = 'hunter2 and more'", "+password = '***'"),
        ("AWS_SECRET_ACCESS_KEY=abc/def+g", "AWS_SECRET_ACCESS_KEY=***"),
        ('{"password": "abc"}', '{"password": "***"}'),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("x = hf_" + "a" * 24, "x = ***"),
        ("https://me:pw@host/x", "https://***@host/x"),
        *((same, same) for same in ("the token is expired", "if token == other:", "max_tokens=5")),
        *((same, same) for same in ("def f(token: str) -> None:", "+token = next(tokens)", "password=None")),
    ],
)
def test_only_secrets_of_a_command_or_diff_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_values_of_secret_variables_are_redacted_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-77")
    assert redact("-  open('swordfish-77')") == "-  open('***')"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_redacted_and_redaction_is_idempotent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_environment(monkeypatch)
    once = redact(FORMS[name])
    assert SECRET not in once.replace("/", "").replace("%2F", ""), once
    assert redact(once) == once


@pytest.mark.parametrize("text", ["." * 200_000, "a." * 100_000, "x-.5.25" * 30_000])
def test_long_text_without_spaces_is_searched_once(text: str) -> None:
    assert redact(text) == text  # otherwise the time limit of a test ends it


@pytest.mark.parametrize(
    "text", ["x.pass=abc", "see...password=abc", "db.secret.key: abc", "a.b --token abc"]
)
def test_names_with_dots_are_recognized(text: str) -> None:
    assert redact(text) == text.replace("abc", "***")
