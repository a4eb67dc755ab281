import pytest

from dl2pa.tracking.sanitize import MAX_NAME, MAX_PARAM, clean_name, clean_params


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
