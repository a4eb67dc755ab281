"""Messages about runs: content, delivery to a webhook on loopback and to a program, and one message per event."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config import Config, fingerprint, load_config, parse_config
from dl2pa.config.load import dump_config
from dl2pa.config.schema import NotifyConfig
from dl2pa.config.validate import validate
from dl2pa.errors import EXIT_STOPPED, TakenOver, TrainingFailure, UserError
from dl2pa.notify.deliver import deliver
from dl2pa.notify.events import announce
from dl2pa.notify.message import run_message
from dl2pa.notify.stall import StallWatch
from dl2pa.notify.supervised import train_announced
from dl2pa.notify.sweep import announce_sweep
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from support.paths import REPOSITORY
from support.secrets import SECRET, holders_of_secrets
from support.webhooks import Receiver, receiver

MESSAGE = {"event": "finished", "run_dir": "/runs/a", "message": "top-1 50.00 %", "text": "dl2pa: a finished"}
DONE: dict[str, Any] = {"top1": 61.5, "top1_best": 62.25, "epoch_last": 9, "epoch_best": 7, "step": 90}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as received:
        yield received


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "it's a run")
    run.root.mkdir()
    run.write_status(
        state="running", attempt=1, started=1000.0, attempt_started=1200.0, total_steps=100, **DONE
    )
    return run


def config_of(hook: Receiver, **more: Any) -> Config:
    return parse_config({"notify": {"url": hook.url, **more}, "tracking": {"run_name": "mine"}})


# ---- content ----


def test_a_message_has_event_run_accuracy_times_and_a_text_for_slack(run: RunDirectory) -> None:
    message = run_message(run, "finished", "", "mine", "finished-1")
    assert (message["event"], message["run"], message["run_dir"]) == ("finished", "mine", str(run.root))
    assert message["accuracy"] == {"top1": 61.5, "top1_best": 62.25, "epoch_last": 9, "epoch_best": 7}
    assert message["times"]["started"] == "1970-01-01T00:16:40+00:00" and message["times"]["seconds"] > 1e9
    assert message["message"] == "top-1 61.50 %, best 62.25 % in epoch 7"
    assert message["text"].startswith("dl2pa: mine finished: top-1 61.50 %, best 62.25 % in epoch 7 (after ")
    assert message["id"].endswith(":finished-1")
    json.dumps(message, allow_nan=False)


def test_a_message_contains_no_secrets_and_no_control_characters(run: RunDirectory) -> None:
    detail = f"<!channel> http://me:{SECRET}@host/ \x1b[2J\nsecond line"
    message = run_message(run, "failed", detail, "name \x07", "failed-1")
    text = json.dumps(message)
    assert SECRET not in text and "\x1b" not in message["message"] and "\n" not in message["message"]
    assert "&lt;!channel&gt;" in message["text"], "Slack would call everyone"
    assert all(str(value).isprintable() for value in message.values())
    assert len(run_message(run, "failed", "x" * 9999, "a", "k")["message"]) < 600


def test_a_message_about_a_damaged_run_can_be_sent(run: RunDirectory) -> None:
    run.status_file.write_text("{")
    assert "finished" in run_message(run, "finished", "", "a", "k")["text"]
    run.status_file.write_text('{"state": "running", "started": 1e300, "top1": NaN}')
    assert run_message(run, "stalled", "x", "a", "k")["times"]["started"] is None


# ---- delivery ----


def test_a_webhook_gets_the_message_as_json(hook: Receiver) -> None:
    assert deliver(NotifyConfig(url=hook.url.replace("//", "//me:pa%20ss@")), MESSAGE) == []
    assert hook.messages == [MESSAGE]
    assert hook.headers[0]["content-type"] == "application/json"
    assert hook.headers[0]["authorization"] == "Basic bWU6cGEgc3M=", "me:pa ss"


@pytest.mark.parametrize(
    ("codes", "count", "problem"),
    [
        ([503, 200], 2, None),
        ([520, 200], 2, None),
        ([500, 429, 502, 500], 3, "HTTP 502"),
        ([404, 200], 1, "HTTP 404"),
        ([302, 200], 1, "HTTP 302"),
    ],
)
def test_only_a_message_that_was_not_accepted_is_sent_again(
    hook: Receiver, codes: list[int | None], count: int, problem: str | None
) -> None:
    hook.codes = codes
    problems = deliver(NotifyConfig(url=hook.url), MESSAGE, waits_s=(0.0, 0.0))
    assert len(hook.messages) == count
    assert [p.rpartition(": ")[2] for p in problems] == ([problem] if problem else [])


def test_a_webhook_that_does_not_answer_is_given_up(hook: Receiver) -> None:
    hook.codes = [None]
    problems = deliver(NotifyConfig(url=f"{hook.url}?key={SECRET}", timeout_s=0.2), MESSAGE, waits_s=(0.0,))
    assert len(problems) == 1 and ("no answer within 0.2 s" in problems[0] or "timed out" in problems[0])
    assert len(hook.messages) == 1, "it may have accepted the message"
    assert SECRET not in problems[0] and "services" not in problems[0]


def test_problems_do_not_contain_the_path_of_the_address() -> None:
    for url in (f"http://127.0.0.1:1/{SECRET}", f"https://no-such-host.invalid/{SECRET}"):
        (problem,) = deliver(NotifyConfig(url=url), MESSAGE, waits_s=())
        assert SECRET not in problem and problem.startswith("notify.url (http") and "\n" not in problem


@pytest.mark.parametrize("shell", [False, True])
def test_a_program_gets_the_message_on_its_input_and_in_its_environment(tmp_path: Path, shell: bool) -> None:
    code = "import sys, os; sys.stdout = open(sys.argv[1], 'w'); print(os.environ['DL2PA_EVENT'], sys.stdin.read())"
    words = [sys.executable, "-c", code, str(tmp_path / "a; $HOME")]
    command = f"cat > '{tmp_path}/a; $HOME' && test $DL2PA_EVENT = finished" if shell else tuple(words)
    assert deliver(NotifyConfig(command=command), MESSAGE) == []
    text = (tmp_path / "a; $HOME").read_text()
    assert json.loads(text.removeprefix("finished ")) == MESSAGE


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("/no/such/program",), "cannot be started"),
        ("echo first >&2; echo 'api_key=abcdefgh12' >&2; exit 3", "exit code 3: api_key=***"),
        (("sleep", "600"), "ended after 0.2 s"),
        ("sleep 600 & sleep 600", "ended after 0.2 s"),
    ],
)
def test_a_failing_program_is_described_in_one_line(command: Any, problem: str) -> None:
    (text,) = deliver(
        NotifyConfig(command=command, timeout_s=0.2 if "sleep" in str(command) else 30.0), MESSAGE
    )
    assert text.startswith(f"notify.command: {problem}") and "\n" not in text


# ---- one message per event ----


def test_an_event_is_announced_once(run: RunDirectory, hook: Receiver) -> None:
    notify = NotifyConfig(url=hook.url)
    for _ in range(3):
        assert announce(run, notify, "finished", "", "mine", "finished-1") == []
    announce(run, notify, "finished", "", "mine", "finished-2")
    assert [message["id"].rpartition(":")[2] for message in hook.messages] == ["finished-1", "finished-2"]
    record = json.loads((run.notifications / "finished-1.json").read_text())
    assert record["outcome"] == "delivered"


def test_a_crash_during_the_delivery_does_not_repeat_it(
    run: RunDirectory, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> list[str]:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dl2pa.notify.events.deliver", killed)
        with pytest.raises(Killed):
            announce(run, NotifyConfig(url=hook.url), "failed", "x", "mine", "failed-1")
    assert announce(run, NotifyConfig(url=hook.url), "failed", "x", "mine", "failed-1") == []
    assert hook.messages == [], "the message is lost, not repeated"


def test_without_a_place_for_the_record_nothing_is_sent(run: RunDirectory, hook: Receiver) -> None:
    run.notifications.write_text("a file")
    (problem,) = announce(run, NotifyConfig(url=hook.url), "finished", "", "mine", "finished-1")
    assert "cannot be written" in problem and hook.messages == []


def test_a_stall_is_reported_once_per_halt(run: RunDirectory) -> None:
    now = [0.0]
    watch = StallWatch(run, 60.0, lambda: now[0])
    now[0] = 59.0
    assert watch.check() is None
    run.write_status(step=91)
    now[0] = 70.0
    assert watch.check() is None, "the run goes on"
    now[0] = 131.0
    assert watch.check() == 61.0
    now[0] = 500.0
    assert watch.check() is None, "reported"
    run.write_status(step=92)
    assert watch.check() is None
    now[0] = 600.0
    assert watch.check() == 100.0
    run.write_status(state="finished")
    watch.check()
    now[0] = 900.0
    assert watch.check() is None
    assert StallWatch(run, 0.0, lambda: now[0]).check() is None


# ---- supervisor of a run on this machine: real processes ----


def test_the_end_of_each_training_is_announced_once(run: RunDirectory, hook: Receiver) -> None:
    """Finished, failed and refused trainings, and one stopped on request."""
    attempt = [1]

    def training(state: str, error: Exception | None = None, code: int = 0) -> Callable[[], int]:
        def train() -> int:
            if state:
                attempt[0] += 1
                run.write_status(state=state, attempt=attempt[0])
            if error is not None:
                raise error
            return code

        return train

    config = config_of(hook)
    taken = TakenOver("was taken over")
    refused = UserError("run-dir", "x", "in use", "Wait.")
    assert train_announced(config, run, training("stopped", code=EXIT_STOPPED)) == EXIT_STOPPED
    for error, state in (
        (refused, ""),
        (taken, "running"),
        (TrainingFailure(f"loss is nan\nat {SECRET}="), "failed"),
    ):
        with pytest.raises(type(error)):
            train_announced(config, run, training(state, error))
    assert train_announced(config, run, training("running", code=1)) == 1
    assert train_announced(config, run, training("finished")) == 0
    assert hook.events() == ["failed", "failed", "finished"]
    assert [message["progress"]["attempt"] for message in hook.messages] == [4, 5, 6]
    assert hook.messages[0]["message"].startswith("loss is nan at ")
    assert {message["run"] for message in hook.messages} == {"mine"}


def test_without_settings_no_process_is_started(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from dl2pa.commands import train as command

    monkeypatch.setattr("dl2pa.notify.supervised.train_announced", lambda *_: pytest.fail("started"))
    plan: Any = type("Plan", (), {"config": Config(), "directory": run})
    node: Any = type("Node", (), {"index": 0})
    assert command._announced(plan, node, lambda: 5) == 5  # pyright: ignore[reportPrivateUsage]


def test_failing_to_notify_changes_nothing(
    run: RunDirectory, hook: Receiver, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.codes = [404]
    assert train_announced(config_of(hook), run, lambda: 0) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"dl2pa: the message 'finished' was not delivered: notify.url ({hook.url[:-14]}/***): HTTP 404"
    ]
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert train_announced(config_of(hook), run, lambda: 7) == 7


def start_notifier(run: RunDirectory, config: Config) -> subprocess.Popen[bytes]:
    """Start the process of a supervisor on this machine that this test plays."""
    command = [sys.executable, "-m", "dl2pa.notify", "--local", "--run-dir", str(run.root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    first = {"config": config.model_dump(mode="json"), "attempt": 0}
    process.stdin.write(json.dumps(first).encode() + b"\n")
    process.stdin.flush()
    return process


def test_stall_and_death_of_the_supervisor_are_announced(run: RunDirectory, hook: Receiver) -> None:
    process = start_notifier(run, config_of(hook, stalled_after_s=0.1))
    assert process.stdin is not None
    try:
        while not hook.messages:
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        process.stdin.close()  # as when the supervisor is killed
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert hook.events() == ["stalled", "failed"]
    assert hook.messages[0]["message"].startswith("no progress for 0 seconds, at step 90 of 100")
    assert "its process ended without an error message" in hook.messages[1]["message"]
    assert process.stderr is not None and process.stderr.read() == b""


# ---- configuration ----


@pytest.mark.parametrize(
    ("notify", "field"),
    [
        ({"url": f"ftp://host/{SECRET}"}, "notify.url"),
        ({"url": f"hooks.example.org/{SECRET}"}, "notify.url"),
        ({"url": f"https://:80/{SECRET}"}, "notify.url"),
        ({"url": f"https://host:port/{SECRET}"}, "notify.url"),
        ({"url": f"https://host/a {SECRET}"}, "notify.url"),
        ({"command": []}, "notify.command"),
        ({"command": ""}, "notify.command"),
        ({"command": ["a\0b"]}, "notify.command"),
        ({"stalled_after_s": -1}, "notify.stalled_after_s"),
        ({"timeout_s": 0}, "notify.timeout_s"),
        ({"stall_after_s": 5}, "notify.stall_after_s"),
    ],
)
def test_wrong_settings_are_refused_in_one_message(
    tmp_path: Path, notify: dict[str, Any], field: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"notify": notify}))
    with pytest.raises(UserError) as error:
        validate(load_config(file), 1)
    assert error.value.field == field and len(error.value.problems) == 1
    assert SECRET not in str(error.value) + json.dumps(error.value.as_dict())


def test_settings_change_neither_the_name_nor_the_record_of_a_run(hook: Receiver) -> None:
    url = f"https://hooks.example.org/{SECRET}?a=1"
    config = parse_config({"notify": {"url": url, "command": ["mail", "me"], "stalled_after_s": 5}})
    assert fingerprint(config) == fingerprint(Config())
    assert url in dump_config(config), "a submitted configuration, which only its owner can read"
    recorded = dump_config(config, redacted=True)
    assert SECRET not in recorded and "url: https://hooks.example.org/***" in recorded
    again = parse_config(yaml.safe_load(recorded))
    (problem,) = deliver(NotifyConfig(url=again.notify.url), MESSAGE)
    assert "set notify.url again" in problem


def test_the_address_is_hidden_wherever_it_is_printed() -> None:
    url = f"https://hooks.example.net/x/{SECRET}"
    assert redact(f"train c.yaml notify.url={url} optim.lr=1") == (
        "train c.yaml notify.url=https://hooks.example.net/*** optim.lr=1"
    ), "before the configuration is loaded"
    assert SECRET in redact(f"see {url}")
    parse_config({"notify": {"url": url}})
    hidden = redact(f"see {url}")
    assert hidden == "see https://hooks.example.net/***" and redact(hidden) == hidden


def test_the_record_of_a_message_contains_no_secret(run: RunDirectory, hook: Receiver) -> None:
    notify = NotifyConfig(url=f"{hook.url}/{SECRET}", command=f"echo token={SECRET} >&2; exit 1")
    hook.codes = [404]
    assert len(announce(run, notify, "failed", f"password={SECRET}", "mine", "failed-1")) == 2
    assert holders_of_secrets(run.root) == []
    assert SECRET not in json.dumps(hook.messages) and hook.paths == [f"/services/hook/{SECRET}"]


def test_a_sweep_sends_one_summary(hook: Receiver) -> None:
    def record(seed: int, outcome: str, best: float | None) -> dict[str, Any]:
        swept = [f"train.seed={seed}"]
        return {"outcome": outcome, "swept": swept, "run_dir": "d", "top1_best": best, "top1_last": best}

    records = [record(0, "finished", 50.0), record(1, "failed", None), record(2, "finished", 61.5)]
    assert announce_sweep(NotifyConfig(url=hook.url), "tag-1", records, 1000.0) == []
    (message,) = hook.messages
    assert message["event"] == "sweep_ended" and message["counts"] == {"finished": 2, "failed": 1}
    assert message["message"] == "2 finished, 1 failed; best top-1 61.50 % (train.seed=2)"
    assert message["text"].startswith("dl2pa: sweep tag-1 ended: 2 finished")
