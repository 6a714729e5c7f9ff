"""What the report and publishing cost: a run of 50 firings with 1,000 probe samples of 28 x 28 pixels.

    python benchmarks/report.py                    # --firings, --samples, --draws for other sizes; --skip-browser

Printed: the size of the page, how long writing it takes, how long Chromium takes from the start of it to the first
chart and until everything is drawn (best and median of ``--repeats``, each anew), and what one firing's publishing
to an offline wandb run and the local record takes in the training process: seconds of the clock and of the processor,
median and largest. While a firing is published, every connection of the process is counted that leaves this machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the runs and the browser are those of the tests

from lightning_slt.publish import RunPublisher  # noqa: E402
from lightning_slt.publish.html import write_report  # noqa: E402
from tests.publish import browser, recorded  # noqa: E402
from tests.publish.helpers import make_estimate, make_influence, pictures_of  # noqa: E402


def page(folder: Path, settings: argparse.Namespace) -> None:
    """Size and time of the page."""
    recorded.write_run(folder, settings.firings, settings.samples, settings.draws, pictures=True)
    start = time.perf_counter()
    path = write_report(folder)
    print(f"report.html: {path.stat().st_size / 1e6:.2f} MB, written in {time.perf_counter() - start:.2f} s")
    if settings.skip_browser or browser.missing():
        print(f"not opened: {browser.missing() or 'as asked for'}")
        return
    first, ready = [], []
    with browser.chromium() as driver:
        for _ in range(settings.repeats):
            ready.append(browser.open_report(driver, path) / 1000)
            first.append(float(driver.execute_script("return document.documentElement.dataset.first")) / 1000)
        print(f"console: {browser.console(driver) or 'nothing'}")
    for name, seconds in (("first chart", first), ("everything drawn", ready)):
        print(f"{name}: best {min(seconds):.2f} s, median {statistics.median(seconds):.2f} s")


@contextmanager
def outgoing() -> Iterator[list[Any]]:
    """Addresses on other machines that this process connects to, or asks for by name."""
    seen: list[Any] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def counted(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            seen.append(address)
        return connect(self, address)

    def asked(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "localhost"):
            seen.append(host)
        return lookup(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = counted, asked  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        socket.socket.connect, socket.getaddrinfo = connect, lookup  # type: ignore[method-assign]


def publishing(folder: Path, settings: argparse.Namespace) -> None:
    """Seconds of one firing's publishing."""
    os.environ.update({"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder / "data")})
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    publisher = RunPublisher([WandbLogger(save_dir=folder, project="benchmark")], folder / "slt")
    publisher.start({})
    clock, processor, estimates = [], [], []
    with outgoing() as seen:
        for k in range(settings.firings):
            step = 100 * (k + 1)
            estimate = make_estimate(step=step, x=step - 1, num_draws=settings.draws)
            influence = make_influence(n=settings.samples, num_queries=100, classes=10, step=step)
            rendered = pictures_of(influence)
            began, used = time.perf_counter(), time.process_time()
            publisher.estimate(estimate)
            publisher.influence(influence, rendered)
            clock.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
            estimates.append(estimate)
    began = time.perf_counter()
    publisher.finish(estimates, "finished")
    end = time.perf_counter() - began
    wandb.finish()
    for name, seconds in (("clock", clock), ("processor", processor)):
        print(
            f"publishing a firing, {name}: median {statistics.median(seconds):.3f} s, largest {max(seconds):.3f} s, "
            f"the first {seconds[0]:.3f} s"
        )
    print(f"the end of the run, report included: {end:.2f} s")
    print(f"connections to other machines while firings were published: {seen or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--firings", type=int, default=50)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=200, help="of each of 4 chains")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-browser", action="store_true")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page(Path(folder) / "page", settings)
        (Path(folder) / "published").mkdir()
        publishing(Path(folder) / "published", settings)


if __name__ == "__main__":
    main()
