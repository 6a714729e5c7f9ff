"""A headless Chromium of the system: opens a page, and says what went wrong in it.

As a program, a picture of a report: ``python -m tests.publish.browser report.html report.png [height]``.
"""

from __future__ import annotations

import base64
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

WIDTH, HEIGHT = 1280, 1000
PATIENCE = 60.0


def missing() -> Optional[str]:
    """Why there is no browser here; None where there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install -e '.[dev]')"
    if _binary() is None or shutil.which("chromedriver") is None:
        return "no Chromium with its driver (Debian: apt-get install chromium chromium-driver)"
    return None


def _binary() -> Optional[str]:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window, that keeps its console and its requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(_binary())
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [LIGHT]})
        yield driver
    finally:
        driver.quit()


LIGHT = {"name": "prefers-color-scheme", "value": "light"}


def open_report(driver: Any, path: Path) -> float:
    """Open it and wait until everything is drawn; milliseconds from the start of the page until then."""
    driver.get_log("browser"), driver.get_log("performance")  # those of an earlier page
    driver.get(path.resolve().as_uri())
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ready = driver.execute_script("return document.documentElement.dataset.ready")
        if ready:
            return float(ready)
        time.sleep(0.02)
    raise AssertionError(f"{path.name} was not drawn in {PATIENCE:.0f} s: {driver.get_log('browser')}")


def console(driver: Any) -> list[str]:
    """What the page wrote to its console, warnings included."""
    return [entry["message"] for entry in driver.get_log("browser")]


def picture(driver: Any, path: Path, height: Optional[int] = None) -> None:
    """The whole page, or its first ``height`` pixels, as PNG."""
    whole = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": min(height or whole, whole), "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    with chromium() as browser:
        open_report(browser, Path(sys.argv[1]))
        picture(browser, Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
