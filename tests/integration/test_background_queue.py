"""Firings beside training: a queue that keeps its word, failures that are told, and what is refused before."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt.callbacks.background.travel import (
    CannotTravelError,
    main_script,
)
from tests.integration.background_runs import (  # noqa: F401 - the fixture is for all tests here
    Stalled,
    _no_process_is_left,
    beside,
)
from tests.integration.harness import Scenario, SLTMonitor, steps_of
from tests.integration.models import Net, loaders

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(("when_full", "max_wait"), [pytest.param("skip", 60.0, marks=pytest.mark.slow), ("wait", 0.0)])
def test_a_firing_beyond_the_queue_is_left_out(when_full: str, max_wait: float, tmp_path: Path) -> None:
    """At once, or after the time that it may wait; what is in the queue comes at the end."""
    monitor = beside(every_n_train_steps=1, max_pending=2, when_full=when_full, max_wait=max_wait)
    assert monitor._late is not None
    stalled = Stalled(monitor)
    if when_full == "wait":
        # the end of fit has a limit of its own here: only the wait in training is without time
        late = monitor._late._beside
        stalled.on_train_end = lambda *_: (stalled._signal(signal.SIGCONT), setattr(late, "max_wait", 60.0))  # type: ignore[method-assign]
    with pytest.warns(
        UserWarning, match=r"the firing at step 3 is left out, since 2 snapshots are out and max_pending=2"
    ):
        Scenario(Net, loaders).run(tmp_path, stalled, monitor)
    assert steps_of(monitor) == [1, 2]
    assert monitor._reporting.history.skipped == 10


def test_the_end_of_fit_waits_no_longer_than_it_says(tmp_path: Path) -> None:
    """The worker never answers: training ends, the points are named, and the worker is gone."""
    monitor = beside(every_n_train_steps=4, max_pending=3, max_wait=0.5)
    with pytest.warns(UserWarning, match=r"the results of steps \[4, 8, 12\] did not come within max_wait=0.5 s"):
        trace = Scenario(Net, loaders).run(tmp_path, Stalled(monitor, go_on=False), monitor)
    assert trace.num_batches == 12
    assert monitor.estimates == []


# ------------------------------------------------------------------------------------------------------ what goes wrong


class FailsInChains(Net):
    """Its step fails in a worker at the second snapshot, and never in training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training and 4 < self.trainer.global_step < 12:
            raise RuntimeError("the step failed inside a chain")
        return super().training_step(batch, batch_idx)


def test_a_failure_in_a_worker_is_reported_and_the_next_firing_is_measured(tmp_path: Path) -> None:
    monitor = beside(on_failure="warn")
    with pytest.warns(
        UserWarning, match=r"step 8 failed and is left out; training goes on\. RuntimeError: the step fai"
    ):
        Scenario(FailsInChains, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 12]


CANNOT_START = (
    "import json, sys; from multiprocessing.connection import Connection; "
    "word = json.dumps({'failed': 'ImportError: no such thing'}).encode(); "
    "Connection(json.loads(sys.argv[1])['pipe']).send_bytes(word)"
)


class WaitsForTheNews(Callback):
    """Goes on with the first batch when what the workers have said is heard."""

    def __init__(self, monitor: SLTMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.monitor._late is not None
        beside, until = self.monitor._late._beside, time.monotonic() + 10.0
        while beside.broken is None and time.monotonic() < until:
            assert beside.take() == []
            time.sleep(0.02)


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_workers_that_cannot_start_are_reported_where_nothing_was_sent_yet(
    on_failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_slt.callbacks.background.pool._LIFE", CANNOT_START)
    monitor = beside(on_failure=on_failure)
    said = r"at step 4 .*a worker could not start: ImportError: no such thing"
    if on_failure == "raise":
        with pytest.raises(RuntimeError, match=said):
            Scenario(Net, loaders).run(tmp_path, WaitsForTheNews(monitor), monitor)
        return
    with pytest.warns(UserWarning, match=said) as told:
        trace = Scenario(Net, loaders).run(tmp_path, WaitsForTheNews(monitor), monitor)
    assert len([w for w in told if "ImportError: no such thing" in str(w.message)]) == 1
    assert trace.num_batches == 12 and monitor.estimates == []


def lambda_module() -> Net:
    net = Net()
    net.scale = lambda x: x
    return net


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (lambda_module, {}, r"Net\.scale cannot be pickled .* execution='inline'"),
        (Net, {"loss_fn": lambda m, b: m.loss(b)}, r"loss_fn cannot be pickled .* execution='inline'"),
        (Net, {"devices": ["cuda:77"]}, r"devices='cuda:77': this machine shows \d+ GPUs"),
        (Net, {"devices": ["cpu:4095"]}, r"devices='cpu:4095': there is no core 4095"),
    ],
)
def test_what_cannot_be_done_beside_training_is_said_before_it(
    module: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Scenario(module, loaders).run(tmp_path, beside(**changes))


@pytest.mark.parametrize(("names", "said"), [({"Net"}, "Net is defined in"), ({"Net", "DS"}, "DS, Net are defined in")])
def test_what_a_worker_cannot_import_is_named(
    names: set[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of a notebook, and of a script that importing would start again."""
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(CannotTravelError, match=f"{said} a notebook .* execution='inline'"):
        main_script(names)
    script = tmp_path / "train.py"
    script.write_text("trainer.fit(net)\n")
    main.__file__ = str(script)
    with pytest.raises(CannotTravelError, match=f"{said} train.py, .* if __name__ == '__main__'"):
        main_script(names)
    script.write_text("if __name__ == '__main__':\n    trainer.fit(net)\n")
    assert main_script(names) == {"path": str(script)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": "aside"}, r"execution='aside': must be 'inline' or 'background'"),
        ({"execution": "inline"}, r"devices=\['cpu'\]: chains inside training run where training does"),
        ({"devices": "cpu"}, r"devices='cpu': give a list, such as \['cpu'\]"),
        ({"devices": []}, r"devices=\[\]: name at least one"),
        ({"devices": ["gpu:0"]}, r"devices='gpu:0': expected 'cuda:1'"),
        ({"max_pending": 0}, r"max_pending=0: must be at least 1"),
        ({"when_full": "drop"}, r"when_full='drop': must be 'skip' or 'wait'"),
        ({"max_wait": -1.0}, r"max_wait=-1\.0: must not be negative"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTMonitor(**{"execution": "background", "devices": ["cpu"], **changes})
