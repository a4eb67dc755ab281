"""Pictures of `docs/pictures`: MLflow's pages of some runs and a page of one run, in headless Chromium.

Serve the runs with `dl2pa ui --runs RUNS --port 8765`, then
`PYTHONPATH=.:tests python -m support.docs_pictures http://127.0.0.1:8765 EXPERIMENT RUNS/RUN OUT`; RUN is shown alone.
The runs of the present pictures: configs/quickstart.yaml with `model.embedding_dim=3 data.loader=resident
data.crop=pad launch.nproc=1 launch.threads=1`, seeds 0 to 2 of dl2pa, of `method.name=hpn`, and of
`method.name=psc method.loss=cross_entropy method.scale=14 optim.lr=0.05`.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

MODE = "workflowType=machine_learning"
_SIZE = (1500, 950)
_SEEN = {"mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true", "mlflow.assistant.panelOpen_v1": "false"}
"""Local storage after which MLflow's assistant does not open by itself."""


_UNCOVER = """
document.querySelectorAll('.modebar').forEach(e => e.style.display = 'none');
let e = document.elementFromPoint(innerWidth - 37, innerHeight - 36);
while (e && getComputedStyle(e).position !== 'fixed') e = e.parentElement;
if (e) e.style.display = 'none';
"""
"""Hides the tools of the charts and the button of the assistant, which cover parts of the page."""


def _open_browser() -> Any:
    from selenium import webdriver

    options: Any = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    size = ",".join(map(str, _SIZE))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"window-size={size}"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def _wait(ready: Callable[[], Any], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > ends:
            raise TimeoutError("the page does not show what is expected")
        time.sleep(0.3)


class Pages:
    """MLflow's pages of a server.

    Args:
        out: folder of the pictures.
    """

    def __init__(self, driver: Any, server: str, out: Path) -> None:
        self._driver, self._server, self._out = driver, server, out
        driver.get(server)
        _wait(lambda: driver.current_url.startswith(server))
        for key, value in _SEEN.items():
            driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)

    def show(self, place: str, *texts: str, charts: int = 0) -> None:
        """Open a page and wait until it shows the texts and a number of charts."""
        driver = self._driver
        driver.get("about:blank")
        driver.get(f"{self._server}/#{place}")

        def shown() -> bool:
            body = driver.find_element("tag name", "body").text
            drawn = driver.find_elements("css selector", ".js-plotly-plot .main-svg")
            return all(text in body for text in texts) and len(drawn) >= charts

        try:
            _wait(shown)
        except TimeoutError:
            self.save("timeout")
            raise
        time.sleep(2.0)  # charts are animated
        driver.execute_script(_UNCOVER)

    def press(self, label: str) -> None:
        """Press the button with an accessible name."""
        element = self._driver.find_element("css selector", f"button[aria-label='{label}']")
        self._driver.execute_script("arguments[0].click()", element)
        time.sleep(1.0)

    def search(self, pattern: str) -> None:
        """Show only the charts whose names match."""
        field = self._driver.find_element("css selector", "input[placeholder='Search metric charts']")
        field.send_keys(pattern)
        time.sleep(3.0)
        self._driver.execute_script(_UNCOVER)

    def scroll_to(self, text: str) -> None:
        """Scroll until the element with exactly this text is at the top."""
        element = self._driver.find_element("xpath", f"//*[normalize-space(text())='{text}']")
        self._driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)
        time.sleep(1.0)

    def save(self, name: str) -> None:
        """Write the picture with at most 128 colors, which is a third of the size."""
        picture = Image.open(io.BytesIO(self._driver.get_screenshot_as_png())).convert("RGB")
        picture.quantize(128).save(self._out / f"{name}.png", optimize=True)


def main(server: str, experiment_name: str, run: Path, out: Path) -> None:
    """Make all pictures."""
    import mlflow

    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None
    number = experiment.experiment_id
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    run_id = result["mlflow_run_id"]
    best = client.search_runs([number], "metrics.`val/top1` > 0", order_by=["metrics.`val/top1` DESC"])
    tags = client.get_run(run_id).data.tags
    other = next(
        r for r in best if r.data.tags["method"] != tags["method"] and r.data.tags["seed"] == tags["seed"]
    )
    driver = _open_browser()
    try:
        pages = Pages(driver, server, out)
        place = f"/experiments/{number}/runs?viewStateShareKey=dl2pa-seeds&compareRunsMode=CHART&{MODE}"
        pages.show(place, "val/top1", charts=3)
        pages.save("runs")
        of_run = f"/experiments/{number}/runs/{run_id}"
        pages.show(f"{of_run}?{MODE}", "Finished", "Top-1")
        pages.save("run")
        pages.show(f"{of_run}/model-metrics?{MODE}", charts=2)
        pages.search("train/|val/(top|ece$)")
        pages.save("charts")
        pages.show(f"{of_run}/artifacts/nearest.html?{MODE}", "summary.html")
        pages.save("artifacts")
        runs = json.dumps([run_id, other.info.run_id])
        pages.show(f'/compare-runs?runs={runs}&experiments=["{number}"]&{MODE}', "Comparing 2 Runs")
        pages.press("Parameters - Show diff only")
        pages.scroll_to("Run details")
        pages.save("compare")
        driver.get((run / "summary.html").absolute().as_uri())
        time.sleep(1.0)
        pages.save("summary")
    finally:
        driver.quit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
