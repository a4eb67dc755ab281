"""Progress of a training: lines in a log, and a bar on a real pseudo-terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dl2pa.console import SafeStream
from dl2pa.training.display import Display, RemainingTime, duration
from support.paths import REPOSITORY
from support.terminal import Terminal, terminal

LINE = r"epoch 1/3, step \d+/60: loss \d\.\d{4}, lr 0\.05, 1,234 images/s, ETA 1:01:05"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Root logger without pytest's handlers."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = []
    root.setLevel(logging.INFO)
    yield
    root.handlers = before
    root.setLevel(level)


@contextmanager
def on_terminal() -> Generator[Terminal]:
    """A terminal as standard error, as the command line sets it up. A fixture would be undone by pytest's capture."""
    with terminal() as opened, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "__stderr__", opened.stream)
        patch.setattr(sys, "stderr", SafeStream(opened.stream))
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        yield opened


def train(display: Display, steps: int = 20) -> None:
    """An epoch with a figure every five steps and a message in the log at step 12."""
    for step in range(1, steps + 1):
        if step % 5 == 0:
            display.logged(0, step, 0.5 + step / 100, 0.05, 1234.4, 3665.9)
        if step == 12:
            logging.getLogger("other").warning("slow read of a file")
        display.step(0, step, step)


def test_a_log_has_one_line_per_interval_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log, force=True)
    display = Display(True, 20, 3, 60)
    train(display)
    display.close()
    lines = log.getvalue().splitlines()
    assert [line for line in lines if not re.fullmatch(LINE, line)] == ["slow read of a file"]
    assert len(lines) == 5 and all(line.isprintable() for line in lines)


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    logging.basicConfig(level=logging.INFO, stream=log, force=True)
    display = Display(False, 20, 3, 60)
    display.logged(0, 5, 0.5, 0.05, 1.0, 1.0)
    display.step(0, 20, 20)
    assert log.getvalue() == ""


def test_the_bar_and_log_lines_do_not_overwrite_each_other() -> None:
    with on_terminal() as screen:
        display = Display(True, 20, 3, 60)
        train(display)
        display.validated(
            {"epoch": 1, "step": 20, "top1": 50.0, "top5": 90.0, "ece": 1.0, "num_validated": 9}
        )
        lines = screen.screen()
        assert lines[0] == "slow read of a file"
        assert lines[1].startswith("epoch 1/3, step 20: top-1 50.00 %")
        assert re.fullmatch(r"epoch 1/3 100%\|.+\| 20/20, loss 0\.7000, lr 0\.05, .* ETA 1:01:05", lines[2])
        assert len(lines) == 3, (
            "the bar is drawn once, below the lines, and shows the figures of the intervals"
        )
        display.close()
        assert screen.screen() == lines[:2]
        logging.getLogger("other").warning("after the run")
        assert screen.screen()[2:] == ["after the run"]


def test_the_bar_moves_in_every_epoch() -> None:
    with on_terminal() as screen:
        display = Display(True, 20, 3, 60)
        train(display)
        display.step(1, 20, 40)
        assert screen.screen()[-1].startswith("epoch 2/3 100%")
        display._drawn = 0.0  # pyright: ignore[reportPrivateUsage]
        display.step(2, 1, 41)
        assert screen.screen()[-1].startswith("epoch 3/3   5%")
        display.close()


def test_a_log_file_has_the_lines_that_the_bar_shows(tmp_path: Path) -> None:
    with on_terminal():
        file = logging.FileHandler(tmp_path / "log", encoding="utf-8")
        logging.getLogger().addHandler(file)
        display = Display(True, 20, 3, 60)
        train(display)
        display.close()
        file.close()
    assert len(re.findall(LINE, (tmp_path / "log").read_text())) == 4


def test_control_characters_in_a_log_line_do_not_reach_the_terminal() -> None:
    with on_terminal() as screen:
        display = Display(True, 20, 3, 60)
        logging.getLogger("other").warning("class \x1b[31mred")
        assert screen.screen()[0] == "class \\x1b[31mred"
        display.close()


def test_remaining_time_includes_what_happens_between_steps() -> None:
    now = iter([100.0, 110.0, 140.0])
    remaining = RemainingTime(50, lambda: next(now))
    assert remaining.estimate(10, 0.5) == pytest.approx(20.0), "before anything else is known"
    assert remaining.estimate(20, 0.5) == pytest.approx(30.0), "10 steps took 10 s"
    assert remaining.estimate(60, 0.5) == 0.0
    assert duration(3665.9) == "1:01:05"


def test_the_log_in_the_documentation_is_that_of_a_piped_run() -> None:
    page = (REPOSITORY / "docs/monitoring.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- piped log -->\n```text\n")[2].partition("\n```")[0].splitlines()
    assert all(line.isprintable() for line in lines), "no control characters"
    form = r"epoch (\d)/3, step (\d+)/87: loss \d\.\d{4}, lr [\d.]+, [\d,]+ images/s, ETA \d:\d\d:\d\d"
    steps = [int(match[2]) for line in lines if (match := re.fullmatch(form, line))]
    assert steps == list(range(10, 90, 10)), "train.log_every_steps of the quickstart is 10"
    form = r"epoch \d/3, step \d+: top-1 [\d.]+ %, top-5 [\d.]+ %, raw ECE [\d.]+ % on 359 images"
    assert len([line for line in lines if re.fullmatch(form, line)]) == 3
    form = r"temperature [\d.]+, fitted on 359 validation images: NLL raw [\d.]+, calibrated [\d.]+; ECE calibrated .*"
    assert re.fullmatch(form, lines[-1])
