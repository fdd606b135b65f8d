"""In a real browser: the report, and MLflow's UI used as a person would to find the best trial."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axe_core_python.selenium import Axe
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from study.report.report import report
from study.selection import best_trials
from study.tracking.results import load_results
from study.tracking.runs import default_uri

from ...patience import PATIENCE_S
from ..conftest import Finished
from ..sequences_store import WITH_RIVALS, add_rivals, sequences_store
from ..store import MUSIC

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no chromium with its driver"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1500,1000",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_script_timeout(300)
    yield driver
    driver.quit()


def shown(browser: Chrome, width: int, scheme: str) -> None:
    """A window of this width, on a system with this colour scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_the_report_loads_whole_and_is_accessible(finished: Finished, browser: Chrome, tmp_path: Path) -> None:
    """Every image, nothing said on the console or asked of the network, and axe finds no fault.

    Axe takes seconds, so it reads the light page alone; what differs in the dark are colours, held by test_report.py.
    """
    page = shutil.copy(finished.home / "reports" / "tiny" / "report.html", tmp_path)
    for width, scheme in ((1280, "light"), (390, "dark")):
        shown(browser, width, scheme)
        browser.get(Path(page).as_uri())
        images = "return [...document.images].map(e => e.complete && e.naturalWidth > 100)"
        loaded = browser.execute_script(images)  # type: ignore[no-untyped-call]
        assert len(loaded) == len(list((finished.home / "reports" / "tiny" / "figures").glob("*.png")))
        assert all(loaded)
        asked = "return performance.getEntriesByType('resource').map(e => e.name).filter(e => !e.startsWith('data:'))"
        assert browser.execute_script(asked) == []  # type: ignore[no-untyped-call]
        wide = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(wide) <= 0, "the page itself never scrolls sideways"  # type: ignore[no-untyped-call]
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
        if scheme == "light":
            found = Axe().run(browser)
            assert len(found["passes"]) > 20
            assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]] == []


def test_the_table_of_all_rows_needs_no_scrolling(browser: Chrome, tmp_path: Path) -> None:
    """Four metrics, two protocols, rivals with what they read and a note, and the whole printed table, at 1,280 pixels."""
    store = sequences_store(tmp_path, users=300)
    add_rivals(store, users=300)
    made = report(store.uri, store.experiment, WITH_RIVALS, tmp_path / "out")
    shown(browser, 1280, "light")
    browser.get(made.page.as_uri())
    tables = "[...document.querySelectorAll('#tables > .scroll')].slice(0, 2)"
    wide = f"return {tables}.map(e => e.scrollWidth - e.clientWidth)"
    assert browser.execute_script(wide) == [0, 0]  # type: ignore[no-untyped-call]
    rows = f"return {tables}[0].querySelectorAll('tbody tr').length"
    assert browser.execute_script(rows) == 4 + 2 * (3 + 16 + 1) + 2 * (3 + 4)  # type: ignore[no-untyped-call]


@pytest.fixture
def mlflow_ui(finished: Finished, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow ui` on a copy of the finished study's store."""
    store = shutil.copy(finished.home / "mlflow.db", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["ui", "--backend-store-uri", f"sqlite:///{store}", "--port", str(port), "--workers", "1"]
    with (tmp_path / "ui.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "mlflow", *words], stdout=log, stderr=log)
    try:
        until(lambda: answers(port), (tmp_path / "ui.log").read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


def answers(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def until(happened: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, said()
        time.sleep(0.5)


@pytest.mark.slow
def test_the_best_trial_is_found_in_mlflow(finished: Finished, browser: Chrome, mlflow_ui: str) -> None:
    results = load_results(default_uri(finished.home), "tiny", MUSIC)
    best = best_trials(results.validation(), MUSIC.selection)
    cell, key = "books->movies@0.5", ("music", "books->movies@0.5")
    names = {
        trial["run_id"]: f"{trial['cell']} search {trial['row']} {trial['name']}"
        for _, trial in results.finished("search").iterrows()
    }

    def text() -> str:
        return browser.find_element(By.TAG_NAME, "body").text

    def wait(*words: str) -> None:
        until(lambda: all(word in text() for word in words), lambda: f"{words} not in {text()}")

    def click(label: str) -> None:
        (link, *_) = WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.LINK_TEXT, label))
        target = str(link.get_attribute("href"))  # type: ignore[no-untyped-call]
        browser.get("about:blank")  # links of a description open a new tab, which this stands for
        browser.get(target)

    def rows() -> list[str]:
        links = browser.find_elements(By.CSS_SELECTOR, "[role=row] a[href*='/runs/']")
        return [link.text for link in sorted(links, key=lambda link: link.location["y"]) if link.text]

    browser.get(f"{mlflow_ui}/#/experiments/1/runs")
    wait("Training runs", "Best trial of each cell")

    # By the views that the description links to.
    click("Best trial of each cell")
    wait("2 matching runs")
    assert rows() == [names[best["music", each].run_id] for each in ("books->movies@0.2", cell)]
    click("All search trials")
    wait("4 matching runs")
    ordered = results.finished("search").sort_values("metrics.val_rmse")["run_id"]
    assert rows() == [names[run_id] for run_id in ordered]
    click("Scores on test users")
    wait("8 matching runs", "test_rmse")

    # By hand: a filter typed, and sorted by a click on a column.
    browser.get("about:blank")
    browser.get(f"{mlflow_ui}/#/experiments/1/runs?orderByKey=metrics.%60val_rmse%60&orderByAsc=true")
    wait("Training runs")
    (box, *_) = WebDriverWait(browser, 60).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, "[data-testid=search-box]")
    )
    box.send_keys(f"tags.\"study.part\" = 'search' AND tags.\"study.cell\" = '{cell}'", Keys.ENTER)
    wait("2 matching runs")
    assert rows()[0] == names[best[key].run_id]

    # Its page, its command and its configuration.
    click(names[best[key].run_id])
    wait("study.command", f"study rerun {best[key].run_id}")
    browser.get(f"{mlflow_ui}/#/experiments/1/runs/{best[key].run_id}/artifacts/config.yaml")
    wait("task_dir", "trainable: trainables.trial:run")
    blocks = [e.get_attribute("textContent") for e in browser.find_elements(By.TAG_NAME, "pre")]  # type: ignore[no-untyped-call]
    (document,) = [yaml.safe_load(block) for block in blocks if block.startswith("model: music")]
    assert document == results.config(best[key].run_id)

    # All trials of the cell side by side.
    browser.get("about:blank")
    browser.get(f"{mlflow_ui}/#/experiments/1/runs?viewStateShareKey=cell-1&compareRunsMode=CHART")
    wait("Parallel Coordinates", "2 matching runs")
    lines = WebDriverWait(browser, 60).until(
        lambda _: [e.text for e in browser.find_elements(By.CSS_SELECTOR, "svg .axis-heading, svg text") if e.text]
    )
    assert {"lr", "val_rmse"} <= set(lines)

    # The registered model.
    browser.get(f"{mlflow_ui}/#/models")
    wait("tiny.books-to-movies.0.2", "tiny.books-to-movies.0.5", "@ best")
    click("tiny.books-to-movies.0.5")
    wait("Best configuration of MuSiC in books->movies@0.5", "mlflow.pyfunc.load_model")
    said: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    severe = {entry["message"] for entry in said if entry["level"] == "SEVERE"}
    # MLflow's UI asks its own server for what only other installations have.
    assert {
        text for text in severe if not re.search(r"/ajax-api/\S+ - Failed to load .* 404 \(Not Found\)$", text)
    } == set()
