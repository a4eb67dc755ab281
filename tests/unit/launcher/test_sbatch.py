"""Options passed through to sbatch, with a fake sbatch."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.errors import UserError
from launcher import sbatch
from launcher.sbatch import check_options, gpus_of_gres, parse_options, without_gpus

SBATCH = """#!/bin/sh
case "$1" in
  --help) cat <<'TEXT'
Parallel run options:
  -A, --account=name          charge job to specified account
      --gres=list             required generic resources
      --mail-type=type        notify on state change
  -p, --partition=partition   partition requested
  -w, --nodelist=hosts...     request a specific list of hosts
      --reservation=name      allocate resources from named reservation
TEXT
  ;;
  --hidden=1) echo 1;;
  *) echo "sbatch: unrecognized option '$1'" >&2; exit 255;;
esac
"""


@pytest.fixture(autouse=True)
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "sbatch"
    file.write_text(SBATCH)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["reservatoin=x"],
            r"--sbatch='reservatoin=x': is not an option of this.*Did you mean reservation\?",
        ),
        (["zzz"], "is not an option of this cluster's sbatch. See `sbatch --help`"),
        (["partition=x"], "is set by dl2pa. Use --partition"),
        (["p=x"], "is set by dl2pa. Use --partition"),
        (["w=n1"], "is a short option. Use nodelist"),
        (["array=0-3%2"], "is set by dl2pa. Use `dl2pa sweep --slurm --parallel N`"),
        (["gres=a", "no-requeue"], "no-requeue.*the job requeues itself"),
        (["gres=$(id)"], "contains characters"),
        (["gres=a\nb"], "contains characters"),
        (["=x"], "Write KEY=VALUE"),
        (["gres="], "Write KEY=VALUE"),
    ],
)
def test_invalid_options_are_refused_with_a_remedy(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(words)


def test_options_of_the_help_and_others_that_sbatch_accepts_are_passed(fake_sbatch: Path) -> None:
    check_options(["gres=gpu:h100:8", "mail_type=END,FAIL", "--reservation=a", "nodelist=n[1-3]", "hidden=2"])
    fake_sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.help_text.cache_clear()
    check_options(["anything=1"])
    with pytest.raises(UserError, match="is set by dl2pa"):
        check_options(["partition=x"])


@pytest.fixture(autouse=True)
def no_cached_help() -> None:
    sbatch.help_text.cache_clear()


def test_the_last_value_of_an_option_wins() -> None:
    assert parse_options(["nice", "gres=a", "nice=3", "mail_user=a=b"]) == {
        "gres": "a",
        "nice": "3",
        "mail-user": "a=b",
    }


@pytest.mark.parametrize(
    ("gres", "gpus", "rest"),
    [
        ("gpu:h100:8", 8, {}),
        ("gpu:4,nvme:2", 4, {"gres": "nvme:2"}),
        ("nvme:2,gpu", 1, {"gres": "nvme:2"}),
        ("gres/gpu:a100:2", 2, {}),
        ("gpu:a100:2,gpu:l4:1", 3, {}),
        ("gpu_mem:2", None, {"gres": "gpu_mem:2"}),
    ],
)
def test_gpus_in_gres_are_counted(gres: str, gpus: int | None, rest: dict[str, str]) -> None:
    assert gpus_of_gres({"gres": gres}) == gpus
    assert without_gpus({"gres": gres, "nice": ""}) == {"nice": "", **rest}
