"""The report in a headless Chromium: charts, selectors, hostile texts, no request. Pictures are kept in artefacts/."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_slt.publish.html import write_report
from tests.publish import browser
from tests.publish.helpers import make_estimate
from tests.publish.recorded import COMPONENTS, write_run

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
ARTEFACTS = Path(__file__).parents[2] / "artefacts"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def page(driver: Any, report: Path) -> Any:
    browser.open_report(driver, report)
    return driver


def until(said: Callable[[], Any]) -> Any:
    """What a page says as soon as it says anything."""
    end = time.monotonic() + 20
    while not (found := said()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def choose(page: Any, selector: str, value: str, event: str) -> None:
    script = "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
    page.execute_script(script + "e.dispatchEvent(new Event(arguments[2]));", selector, value, event)


def test_every_chart_is_drawn_and_nothing_is_complained_of_or_fetched(page: Any, report: Path) -> None:
    places = "[...document.querySelectorAll('.chart')]"
    assert page.execute_script(f"return {places}.length") >= 8
    assert page.execute_script(f"return {places}.filter(e => !e.querySelector('svg path')).length") == 0
    assert browser.console(page) == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [report.resolve().as_uri()]
    browser.picture(page, ARTEFACTS / "report.png")


def test_an_estimate_that_is_not_valid_looks_otherwise(page: Any) -> None:
    marks = "[...document.querySelectorAll('[data-chart=curve] .mark-symbol path')]"
    looks = page.execute_script(f"return {marks}.map(e => e.getAttribute('stroke') + ' ' + e.getAttribute('fill'))")
    assert "#c24e00 #ffffff" in looks and "#0072b2 #0072b2" in looks


def test_the_selector_of_chains_shows_the_chosen_firing(page: Any) -> None:
    verdict = "return document.querySelector('#chains .verdict').textContent"
    assert page.execute_script(verdict).startswith("At step 500:")
    before = page.execute_script("return document.querySelector('#chains .chart').innerHTML")
    choose(page, "#chains input[type=range]", "3", "input")
    changed = "return document.querySelector('#chains .chart').innerHTML !== arguments[0]"
    assert until(lambda: page.execute_script(changed, before))
    assert page.execute_script(verdict).startswith("At step 400:")
    assert page.execute_script("return document.querySelector('#chains .verdict').classList.contains('bad')")
    page.execute_script("document.querySelector('#chains .back').click()")
    assert page.execute_script(verdict).startswith("At step 300:")
    assert browser.console(page) == []


def test_a_chain_that_diverged_ends_there_and_does_not_set_the_scale(driver: Any, tmp_path: Path) -> None:
    """Chain 3 of 4 climbs to 1e6 and is gone after half of its 100 draws; the others stay around 12."""
    from lightning_slt.record import RunRecord

    estimate = make_estimate(bad_chains=1)
    trace = estimate.trace.clone()
    trace[3, 40:50] = 1e6
    RunRecord(tmp_path / "slt").append(estimate.replace(trace=trace))
    browser.open_report(driver, write_report(tmp_path))
    ends = (
        "return [...document.querySelectorAll('#chains .chart .mark-line path')].map(e => e.getBBox().x + e.getBBox()"
        ".width)"
    )
    first, *_, last = driver.execute_script(ends)
    assert last == pytest.approx(first * 49 / 99, rel=0.02)  # draws from 0 to 99
    ticks = "return [...document.querySelectorAll('#chains .chart .role-axis-label text')].map(e => e.textContent)"
    heights = [float(text.replace(",", "").replace("−", "-")) for text in driver.execute_script(ticks)]
    assert max(heights) < 200  # of both axes: the draws go to 100


def test_the_selector_of_monitors_shows_the_chains_of_a_component(page: Any) -> None:
    names = page.execute_script("return [...document.querySelectorAll('#chains select.monitor option')].map(o=>o.text)")
    assert names[1:] == list(COMPONENTS)
    choose(page, "#chains select.monitor", "1", "change")
    verdict = "return document.querySelector('#chains .verdict').textContent"
    assert until(lambda: "LLC 7.0" in page.execute_script(verdict))


def test_hostile_texts_are_shown_as_texts(page: Any) -> None:
    assert page.title != "taken"
    assert page.execute_script("return document.querySelectorAll('img, [onerror]').length") == 0
    shown = page.execute_script("return document.querySelector('.gallery .sample p').textContent")
    assert "</script><img src=x onerror=" in shown


def test_a_dark_page_is_drawn_in_its_own_colours(page: Any) -> None:
    page.execute_script("document.getElementById('theme').click()")
    light = "return document.querySelector('[data-chart=curve] svg').outerHTML.includes('#56b4e9')"
    assert until(lambda: page.execute_script(light))
    assert browser.console(page) == []
    browser.picture(page, ARTEFACTS / "report_dark.png")


@pytest.mark.parametrize(
    ("mean", "se", "loss"),
    [
        (2.098765e9, 3.4e7, 4.5e8),
        (2.0987e7, 3400.0, 4.5678e7),
        (2.0987654e7, 340.0, 4.5e8),
        (1.5e-9, 3e-11, 4.5e-9),
        (9.87654e6, 1234.5, 0.25),
    ],
)
def test_large_and_tiny_numbers_stay_in_their_tiles(
    driver: Any, tmp_path: Path, mean: float, se: float, loss: float
) -> None:
    from lightning_slt.record import RunRecord

    RunRecord(tmp_path / "slt").append(make_estimate(mean=mean, se=se, init_loss=loss, step=100))
    path = write_report(tmp_path)
    numbers = "return [...document.querySelectorAll('.tile b')]"
    try:
        for width in (1280, 600, 400):
            screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            browser.open_report(driver, path)
            assert driver.execute_script(f"{numbers}.filter(e => e.scrollWidth > e.clientWidth).length") == 0
            # 1.50e-09 is not broken at its sign
            parts = "[...document.querySelectorAll('.tile i')]"
            assert driver.execute_script(f"return Math.max(...{parts}.map(e => e.getClientRects().length))") == 1
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_run_without_one_valid_estimate_is_drawn_without_complaint(driver: Any, tmp_path: Path) -> None:
    from lightning_slt.record import RunRecord

    for step in (10, 20):
        RunRecord(tmp_path / "slt").append(make_estimate(step=step, bad_chains=4, mean=float("nan"), se=float("nan")))
    browser.open_report(driver, write_report(tmp_path))
    assert browser.console(driver) == []
    browser.picture(driver, ARTEFACTS / "report_nothing_valid.png")
