"""MLflow's pages in headless Chromium, on trained runs.

Screenshots go to build/browser.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.commands import run_here
from support.paths import REPOSITORY
from support.runs import Program, config_with
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("servers")
pytest.importorskip("mlflow")
PICTURES = REPOSITORY / "build/browser"
SEEDS = (0, 1)
MODE = "?workflowType=machine_learning"


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one recipe, recorded in the local store beside them."""
    folder = tmp_path_factory.mktemp("reviewed")
    changes = {"tracking": {"experiment": "digits", "figures": True}, "train": {"epochs": 4}}
    config = config_with(folder, digits, changes)
    for seed in SEEDS:
        command = ["train", config, f"train.seed={seed}", "tracking.uri=null"]
        done = run_here(*command, "--run-dir", folder / f"runs/{seed}", env={"MLFLOW_TRACKING_URI": ""})
        assert done.code == 0, done.error
    return folder / "runs"


@pytest.fixture(scope="module")
def ui(runs: Path) -> Iterator[str]:
    """The address of `dl2pa ui`, which leaves nothing behind after Ctrl-C."""
    program = Program(runs.parent / "ui")
    started = program.start("ui", "--runs", runs, "--port", "0", "--json")
    try:
        eventually(lambda: started.output or not started.running(), "MLflow answers")
        assert started.running(), started.error
        url = json.loads(started.output.splitlines()[-1])["url"]
        yield url
        os.kill(started.pid, signal.SIGINT)
        assert started.wait(60) == 0, started.error
        with pytest.raises(OSError), socket.create_connection(address_of(url), 1):
            pass
    finally:
        program.close()


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


class Browser:
    """Headless Chromium, restarted when it stops answering, which happens on a busy machine."""

    answer_s, attempts = 30, 4

    def __init__(self, webdriver: Any, programs: list[str]) -> None:
        self._webdriver, self._programs = webdriver, programs
        self.first_steps: Callable[[Any], None] = lambda driver: None
        self._driver: Any = None

    def see(self, look: Callable[[Any], str]) -> str:
        """Page text as `look` reads it from the driver."""
        from selenium.common.exceptions import WebDriverException
        from urllib3.exceptions import HTTPError

        for attempt in range(1, self.attempts + 1):
            try:
                return look(self._running())
            except (WebDriverException, HTTPError):
                self.kill()
                if attempt == self.attempts:
                    raise
        raise AssertionError("not reached")

    def _running(self) -> Any:
        if self._driver is None:
            options = self._webdriver.ChromeOptions()
            options.binary_location = self._programs[0]
            options.page_load_strategy = "none"
            for flag in (
                "headless=new",
                "no-sandbox",
                "disable-gpu",
                "disable-background-networking",
                "disable-dev-shm-usage",
                "window-size=1500,950",
            ):
                options.add_argument(f"--{flag}")
            self._service = self._webdriver.ChromeService(
                self._programs[1], popen_kw={"start_new_session": True}
            )
            self._driver = self._webdriver.Chrome(options, self._service)
            self._driver.command_executor.client_config.timeout = self.answer_s
            self.first_steps(self._driver)
        return self._driver

    def kill(self) -> None:
        if self._driver is not None:
            os.killpg(self._service.process.pid, signal.SIGKILL)
            self._service.process.wait()
            self._driver = None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install -c constraints.txt -e '.[dev]'"
    )
    started = Browser(webdriver, _find_or_install("chromium", "chromedriver"))
    yield started
    started.kill()


def _find_or_install(*names: str) -> list[str]:
    """The programs of Debian's packages chromium and chromium-driver, installed first where root may."""
    if None in (found := [shutil.which(name) for name in names]):
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip(
                "chromium and chromium-driver are not installed, and only root can install them by apt-get"
            )
        for command in (
            ["update"],
            ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"],
        ):
            options = ["-q", "-o", "DPkg::Lock::Timeout=300"]
            done = subprocess.run(["apt-get", *options, *command], capture_output=True, text=True)
        found = [shutil.which(name) for name in names]
        if None in found:
            pytest.skip(f"apt-get could not install chromium: {done.stderr[-300:]}")
    return [str(path) for path in found]


@pytest.fixture(scope="module")
def look(browser: Browser, ui: str) -> Callable[..., str]:
    """Open a page, wait until it shows all of some texts, keep a picture; returns its text, or a link's address."""

    def first_steps(driver: Any) -> None:
        driver.get(ui)
        # The assistant's panel opens by itself at a browser's first visit.
        seen = {
            "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
            "mlflow.assistant.panelOpen_v1": "false",
        }
        eventually(lambda: driver.current_url.startswith(ui), "MLflow's page is there", 60, poll_s=0.3)
        for key, value in seen.items():
            driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)

    browser.first_steps = first_steps
    PICTURES.mkdir(parents=True, exist_ok=True)

    def look_at(place: str, picture: str, *texts: str, charts: int = 0, link: str | None = None) -> str:
        def at(driver: Any) -> str:
            driver.get("about:blank")
            driver.get(f"{ui}/#{place}")

            def shown() -> str | None:
                text = driver.find_element("tag name", "body").text
                drawn = driver.find_elements("css selector", ".js-plotly-plot .main-svg")
                return text if all(t in text for t in texts) and len(drawn) >= charts else None

            try:
                text = eventually(shown, f"{place} shows {texts}", 120, poll_s=0.3)
            finally:
                driver.save_screenshot(str(PICTURES / f"{picture}.png"))
            return driver.find_element("css selector", link).get_attribute("href") if link else text

        return browser.see(at)

    return look_at


@pytest.fixture(scope="module")
def recorded(ui: str) -> list[Any]:
    """MLflow's own account of the two runs, by seed."""
    import mlflow

    client = mlflow.MlflowClient(ui)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == len(SEEDS)
    return sorted(found, key=lambda run: run.data.tags["seed"])


def test_run_list_opens_with_the_experiment_columns(look: Callable[..., str], recorded: list[Any]) -> None:
    experiment = recorded[0].info.experiment_id
    place = f"/experiments/{experiment}/runs?viewStateShareKey=dl2pa-runs&workflowType=machine_learning"
    text = look(place, "runs", "val/top1", "val/ece", "train/loss", "2 matching runs", "Mean over seeds")
    for run in recorded:
        assert run.info.run_name in text
        assert str(run.data.metrics["val/top1"])[:6] in text


def test_seeds_of_a_recipe_are_grouped_with_their_mean(look: Callable[..., str], recorded: list[Any]) -> None:
    experiment = recorded[0].info.experiment_id
    assert recorded[0].data.tags["group"] == recorded[1].data.tags["group"]
    mean = sum(run.data.metrics["val/top1"] for run in recorded) / 2
    place = f"/experiments/{experiment}/runs?viewStateShareKey=dl2pa-seeds&workflowType=machine_learning"
    assert str(mean)[:6] in look(place, "seeds", "Group: dl2pa d=5")


def test_run_page_shows_description_result_and_related_runs(
    look: Callable[..., str], recorded: list[Any]
) -> None:
    run = recorded[0]
    place = f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{MODE}"
    what, how = "dl2pa (squared_cosine, dynamic) on imagefolder", f"{run.data.metrics['val/top1']:.2f}"
    siblings = look(place, "run", what, how, "Finished", link="a[href*='tags.group']")
    look(siblings.partition("#")[2], "siblings", "2 matching runs")


def test_run_page_shows_curves_and_files(look: Callable[..., str], recorded: list[Any]) -> None:
    run = recorded[0]
    place = f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    look(f"{place}/model-metrics{MODE}", "charts", "compactness", "moved", charts=3)
    look(
        f"{place}/artifacts/pictures/curves.png{MODE}",
        "artifacts",
        "config.yaml",
        "validation.json",
        "curves.png",
    )


def test_compare_page_shows_runs_in_columns(look: Callable[..., str], recorded: list[Any]) -> None:
    ids = json.dumps([run.info.run_id for run in recorded])
    place = f'/compare-runs?runs={ids}&experiments=["{recorded[0].info.experiment_id}"]'
    text = look(place, "compare", "Comparing 2 Runs", "train.seed", "match/compactness")
    assert all(run.info.run_id in text for run in recorded)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("{0}", 200),
        ("localhost:{1}", 200),
        ("10.attacker.example", 403),
        ("10.attacker.example:{1}", 403),
        ("192.168.attacker.example:{1}", 403),
        ("127.0.0.1.attacker.example:{1}", 403),
        ("localhost.attacker.example:{1}", 403),
        ("attacker.example", 403),
    ],
)
def test_ui_refuses_foreign_host_names(ui: str, host: str, status: int) -> None:
    """Without this check a page of another site could read every run by DNS rebinding."""
    place = ui.removeprefix("http://")
    request = urllib.request.Request(f"{ui}/api/2.0/mlflow/experiments/search?max_results=1")
    request.add_header("Host", host.format(place, place.partition(":")[2]))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == status
    except urllib.error.HTTPError as error:
        assert error.code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_ui_accepts_other_hosts_only_when_configured(runs: Path, host: str) -> None:
    refused = run_here("ui", "--runs", runs, "--host", host)
    assert refused.code == 2 and "--allow-others" in refused.error
    assert run_here("ui", "--runs", runs, "--allow-others", "name").code == 2
    assert run_here("ui", "--runs", runs, "--host", host, "--allow-others", "*").code == 2


def test_ui_refuses_a_taken_port_and_a_folder_without_runs(runs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_here("ui", "--runs", runs, "--port", port)
    assert refused.code == 2
    assert f"{port}: is in use" in refused.error
    refused = run_here("ui", "--runs", tmp_path)
    assert refused.code == 2
    assert "contains no mlflow.db" in refused.error


def test_pages_are_self_contained_and_fit_a_phone(
    recorded: list[Any], browser: Browser, ui: str, tmp_path: Path
) -> None:
    """The pages among a run's artifacts, fetched from MLflow and opened without it."""
    import mlflow

    pages = {
        "summary.html": ("Run checks", "Curves", "Accuracy and confusions per class"),
        "per_class.html": ("Click a column", "most confused with"),
        "confusion.html": ("359 images", "confused pairs"),
        "nearest.html": ("359 validation images", "same class", "correct"),
    }
    loaded = (
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    )
    broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth == 0).length"
    for page, texts in pages.items():
        file = mlflow.artifacts.download_artifacts(
            run_id=recorded[0].info.run_id, artifact_path=page, dst_path=str(tmp_path), tracking_uri=ui
        )

        def at(driver: Any, file: str = file, page: str = page, texts: tuple[str, ...] = texts) -> str:
            driver.get(Path(file).as_uri())

            def whole() -> str | None:
                text = driver.find_element("tag name", "body").text
                return text if all(t in text for t in texts) and driver.execute_script(broken) == 0 else None

            shown = eventually(whole, f"{page} shows {texts} and its pictures", 60, poll_s=0.3)
            assert driver.execute_script(loaded) == []
            driver.save_screenshot(str(PICTURES / f"{Path(page).stem}.png"))
            phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            width = "return document.documentElement.scrollWidth"
            eventually(lambda: driver.execute_script(width) <= 390, f"{page} fits a phone", 30, poll_s=0.3)
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            return shown

        browser.see(at)
