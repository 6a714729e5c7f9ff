"""Firings beside training: the same numbers as inside, a queue that keeps its word, and workers that may die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import TensorDataset

from lightning_slt import RMSpropSGLD
from lightning_slt.callbacks.background.bench import plugin_on
from lightning_slt.callbacks.background.travel import (
    CannotTravelError,
    StillTrainer,
    flat_weights,
    main_script,
    read_pickled,
    write_pickled,
)
from lightning_slt.callbacks.background.worker import FOLDER
from lightning_slt.callbacks.folder import claim, give_back
from lightning_slt.record import RunRecord
from lightning_slt.sampling.objective import Objective
from tests.integration import models
from tests.integration.beside import STEPS, data, monitor_of
from tests.integration.harness import Scenario, SLTMonitor, assert_same, steps_of, tiny_monitor
from tests.integration.models import CLASSES, Net, Plain, loaders, tensors

pytestmark = pytest.mark.timeout(240)


def children(of: Optional[int] = None) -> list[int]:
    """Process ids of the children that live, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended since
        if int(parent) == (of or os.getpid()) and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = set(children())
    yield
    assert set(children()) <= before


def beside(**changes: Any) -> SLTMonitor:
    """A tiny monitor in the background that leaves no firing out."""
    settings: dict[str, Any] = {"devices": ["cpu"], "when_full": "wait", "max_wait": 120.0, **changes}
    return tiny_monitor(execution="background", **settings)


def workers_of(monitor: SLTMonitor) -> list[int]:
    assert monitor._late is not None and monitor._late._beside._pool is not None
    return monitor._late._beside._pool.processes


def assert_same_estimates(ours: SLTMonitor, theirs: SLTMonitor, atol: float = 0.0) -> None:
    """The same points, to the last bit where nothing else is said."""
    assert steps_of(ours) == steps_of(theirs)
    for a, b in zip(ours.estimates, theirs.estimates, strict=True):
        torch.testing.assert_close(a.trace, b.trace, rtol=0.0, atol=atol)
        assert a.mean == pytest.approx(b.mean, rel=0.0, abs=atol)
        assert (a.x, a.epoch, a.init_loss, a.step_size) == (b.x, b.epoch, b.init_loss, b.step_size)


class Adam(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Parametrised(Net):
    """A weight of its own under a parametrisation, and one of a layer."""

    put_on: Any = staticmethod(parametrizations.weight_norm)

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.eye(CLASSES) + 0.1)
        self.put_on(self.net[0])
        self.put_on(self, "own")

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x) @ self.own, y)


class SpectralNorm(Parametrised):
    put_on = staticmethod(parametrizations.spectral_norm)


class Orthogonal(Parametrised):
    put_on = staticmethod(parametrizations.orthogonal)


# ------------------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        pytest.param(Net, {}, id="BatchNorm and dropout"),
        pytest.param(Net, {"devices": ["cpu:0", "cpu"], "num_chains": 3}, id="two workers share three chains"),
        pytest.param(Net, {"probe": 8, "num_draws": 20}, id="influence"),
        pytest.param(Adam, {"sampler": RMSpropSGLD(lr=1e-4)}, id="second moments of Adam"),
        pytest.param(Net, {"sampler": None, "num_burnin_steps": None, "num_steps_bw_draws": None}, id="calibrated"),
        pytest.param(Parametrised, {}, id="weight norm"),
        pytest.param(SpectralNorm, {}, id="spectral norm"),
        pytest.param(Orthogonal, {}, id="orthogonal"),
    ],
)
def test_results_are_those_of_firings_inside_training(module: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, under the step of their snapshot; and training is the same."""
    scenario = Scenario(module, loaders)
    inline = tiny_monitor(**{k: v for k, v in changes.items() if k != "devices"})
    background = beside(**changes)
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert steps_of(inline) == [4, 8, 12]
    assert_same_estimates(background, inline)
    assert len(background.influences) == len(inline.influences) == (3 if "probe" in changes else 0)
    for a, b in zip(background.influences, inline.influences, strict=True):
        assert (a.step, a.x) == (b.step, b.x)
        torch.testing.assert_close(a.self_influence, b.self_influence, rtol=0.0, atol=0.0)


def scaled() -> dict[str, Any]:
    """float16 autocast on the CPU, which Lightning has by a plugin only; the scaler's state moves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


PRECISIONS: dict[str, tuple[Any, Any]] = {
    "16-mixed": (Net, scaled),
    **{name: (Net, lambda name=name: {"precision": name}) for name in ("bf16-mixed", "bf16-true", "64-true")},
    "16-true": (models.Plain, lambda: {"precision": "16-true"}),  # not with Adam, whose epsilon is zero in float16
    "bf16-true with casts": (models.CastsToHalf, lambda: {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_results_are_those_of_firings_inside_training_in_every_precision(name: str, tmp_path: Path) -> None:
    """Bit for bit: the worker autocasts as training does, has the batches that training has, and the same masters."""
    module, trainer = PRECISIONS[name]
    scenario = Scenario(module, loaders, trainer)
    settings: dict[str, Any] = {"probe": 8, "num_draws": 20, "every_n_train_steps": 6}
    inline, background = tiny_monitor(**settings), beside(**settings)
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert steps_of(inline) == [6, 12] and all(e.trace.abs().max() > 0 for e in inline.estimates)
    assert_same_estimates(background, inline)
    for a, b in zip(background.estimates, inline.estimates, strict=True):
        assert (a.localization, a.num_weights, a.method) == (b.localization, b.num_weights, b.method)
    for a, b in zip(background.influences, inline.influences, strict=True):
        torch.testing.assert_close(a.tensors(), b.tensors(), rtol=0.0, atol=0.0, equal_nan=True)


def test_a_worker_on_another_kind_of_device_autocasts_there() -> None:
    """Training on a GPU in bfloat16, and chains on the CPU: autocast of a GPU would be none."""
    plugin = MixedPrecision("bf16-mixed", "cuda")
    with plugin_on(plugin, torch.device("cpu")).train_step_context():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert plugin.device == "cuda"


def test_gamma_of_mixed_weights_is_that_of_the_chains() -> None:
    """Float32 beside float64: chains move float32 weights, and gamma is that of these."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1).double())
    flat = flat_weights(module, None)
    assert flat.dtype == torch.float32
    assert torch.equal(flat, Objective(module, lambda m, b: b, None).anchor)


def unreadable(sample: Any) -> str:
    raise KeyError("no such field")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"probe": TensorDataset(tensors().tensors[0])}, "probe: its samples give the step", id="the step"),
        pytest.param({"probe": 6, "group_fn": unreadable}, "group_fn failed on sample", id="reading them"),
    ],
)
def test_samples_that_fail_leave_influence_out_and_nothing_else(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """In a worker, or before; said once, and the learning coefficient is that of firings inside training."""
    inline, background = (make(on_failure="warn", num_draws=20, **changes) for make in (tiny_monitor, beside))
    for name, monitor in (("inline", inline), ("background", background)):
        with pytest.warns(UserWarning, match=f"influence is left out of this run.*{message}") as caught:
            Scenario(Net, loaders).run(tmp_path / name, monitor)
        assert sum("influence is left out" in str(w.message) for w in caught) == 1
    assert_same_estimates(background, inline)
    assert steps_of(background) == [4, 8, 12] and background.influences == []
    with pytest.raises((RuntimeError, ValueError), match=message):
        Scenario(Net, loaders).run(tmp_path / "raises", beside(num_draws=20, **changes))


def test_batches_that_training_saw_travel_with_the_snapshot(tmp_path: Path) -> None:
    scenario = Scenario(Net, lambda: loaders(dataset=models.Stream()))
    inline, background = tiny_monitor(num_samples=24), beside(num_samples=24)
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert len(inline.estimates) == 3
    assert_same_estimates(background, inline)


@pytest.mark.parametrize("execution", ["background", "inline"])
def test_snapshots_in_the_folder_of_a_run_that_goes_on_are_not_said_to_be_gone(execution: str, tmp_path: Path) -> None:
    """Another live run holds the folder of the checkpoint; or the run that is resumed measures inside training."""
    settings: dict[str, Any] = {"every_n_train_steps": 4, "dirpath": str(tmp_path / "slt"), "name": "a"}
    first, path = beside(**settings), tmp_path / "last.ckpt"
    Scenario(Net, loaders, lambda: {"max_steps": 4}).run(tmp_path, first).trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"][first.state_key]["pending"] = [{"step": 2, "x": 1, "epoch": 0, "data": None}]
    torch.save(checkpoint, path)
    folder = first.folder
    assert folder is not None and claim(folder)
    said = r"firings at steps \[2\] .* and this monitor measures inside training .*left out"
    if execution == "background":
        (folder / FOLDER).mkdir(exist_ok=True)
        said = rf"firings at steps \[2\] .* their snapshots lie in {folder}, which another run holds \(resume after"
    resumed = (beside if execution == "background" else tiny_monitor)(**settings)
    try:
        with pytest.warns(UserWarning, match=rf"^SLTMonitor \(slt_a\): the {said}") as caught:
            Scenario(Net, loaders, lambda: {"max_steps": 6}).run(tmp_path / "b", resumed, ckpt_path=str(path))
    finally:
        give_back(folder)
    assert not any("are gone" in str(warning.message) for warning in caught)
    assert resumed.folder is not None and resumed.folder.name == "slt_a_run1" and steps_of(resumed) == [4]


# ----------------------------------------------------------------------------------------------------------- the queue


class Stalled(Callback):
    """Stops the workers while training goes on; to stand before the monitor, so that its end of training comes first.

    Args:
        monitor: whose workers.
        go_on: at the end of training, before the monitor waits for its results.
    """

    def __init__(self, monitor: SLTMonitor, go_on: bool = True) -> None:
        self.monitor, self.go_on = monitor, go_on

    def _signal(self, which: signal.Signals) -> None:
        for pid in workers_of(self.monitor):
            os.kill(pid, which)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self._signal(signal.SIGSTOP)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.go_on:
            self._signal(signal.SIGCONT)


@pytest.mark.parametrize(("when_full", "max_wait"), [("skip", 60.0), ("wait", 0.0)])
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


class DiesInChains(Net):
    """The process ends in the step, as where memory runs out; never that of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training and 4 < self.trainer.global_step < 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_snapshot_that_kills_its_worker_twice_is_given_up(tmp_path: Path) -> None:
    monitor = beside(on_failure="warn")
    with pytest.warns(
        UserWarning, match=r"step 8 failed .* 2 background workers died at it, the last one killed by sig"
    ):
        Scenario(DiesInChains, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 12]


class Killer(Callback):
    """Kills the workers at a random moment after each of the first ten batches."""

    def __init__(self, monitor: SLTMonitor, seed: int) -> None:
        self.monitor, self.random, self.kills = monitor, random.Random(seed), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.kills < 10 and workers_of(self.monitor):
            # long enough for all of a worker's life: starting, reading, chains, writing, waiting
            time.sleep(self.random.uniform(0.0, 5.0))
            os.kill(self.random.choice(workers_of(self.monitor)), signal.SIGKILL)
            self.kills += 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_workers_killed_at_ten_random_moments(devices: list[str], tmp_path: Path) -> None:
    """Every firing is reported or named as failed, none twice, and what is reported is right to the last bit."""
    scenario = Scenario(Net, lambda: loaders(56))
    settings: dict[str, Any] = {"every_n_train_steps": 1, "num_draws": 40, "warm_start": False}
    inline = tiny_monitor(**settings)
    without = scenario.run(tmp_path / "inline", inline)
    monitor = beside(devices=devices, on_failure="warn", max_pending=4, **settings)
    killer = Killer(monitor, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(without, scenario.run(tmp_path / "background", monitor, killer))
    assert killer.kills == 10
    failed = [
        int(str(w.message).split("at step ")[1].split()[0]) for w in caught if "failed and is left" in str(w.message)
    ]
    assert sorted(steps_of(monitor) + failed) == steps_of(inline) == list(range(1, 29))
    assert len(failed) <= 5  # each costs two workers
    by_step = {e.step: e for e in inline.estimates}
    for estimate in monitor.estimates:
        assert torch.equal(estimate.trace, by_step[estimate.step].trace)


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


# ------------------------------------------------------------------------------------------------------------- 200 fold


class Counts(Callback):
    """What training and its worker hold, each time a batch is done."""

    def __init__(self, monitor: SLTMonitor) -> None:
        self.monitor = monitor
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        [worker] = workers_of(self.monitor)
        self.seen.append(
            {
                "processes": len(children()),
                "workers": worker,
                **{f"files of {n}": len(os.listdir(f"/proc/{p}/fd")) for n, p in (("us", os.getpid()), ("it", worker))},
                **{f"MiB of {n}": resident(p) for n, p in (("us", os.getpid()), ("it", worker))},
                "files in the folder": sum(1 for _ in Path(str(self.monitor.folder)).glob("background/*")),
            }
        )


def resident(pid: int) -> int:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def test_two_hundred_firings_leave_nothing_behind(tmp_path: Path) -> None:
    monitor = beside(every_n_train_steps=1, max_pending=1)
    counts = Counts(monitor)
    scenario = Scenario(models.Plain, lambda: loaders(400), lambda: {"max_epochs": 2})
    scenario.run(tmp_path, monitor, counts)
    assert steps_of(monitor) == list(range(1, 201))
    early, late = counts.seen[50], counts.seen[-1]
    for name in ("processes", "workers", "files of us"):
        assert late[name] == early[name], name
    # it may be in the middle of a file when we look: one that leaked at each firing would be 150
    assert abs(late["files of it"] - early["files of it"]) <= 2
    assert late["files in the folder"] <= early["files in the folder"] + 2
    assert late["MiB of it"] - early["MiB of it"] <= 16
    # the history itself: 200 estimates with their traces, and what the test keeps of training
    assert late["MiB of us"] - early["MiB of us"] <= 32


# ------------------------------------------------------------------------------------------------- training is killed


def start(folder: Path, *arguments: float) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.integration.beside", str(folder), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": root}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=root, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def wait_for_the_end_of(pids: Iterable[int]) -> None:
    """Until none is there any more; the test's own timeout ends it."""
    while any(_is_alive(pid) for pid in pids):
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_told(folder: Path) -> set[int]:
    return {int(line) for line in (folder / "workers.txt").read_text().split()}


@pytest.mark.slow
def test_training_killed_and_resumed_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """Three times, at random moments after random steps; the record is that of a run that nobody killed."""
    moments = random.Random(0)
    for last in sorted(moments.sample(range(2, STEPS), 3)):
        process = start(tmp_path, last, moments.uniform(0.0, 8.0))
        assert process.wait() == -signal.SIGKILL
        reported = {e.step: e.trace for e in RunRecord(tmp_path / "slt").read()}
        wait_for_the_end_of(workers_told(tmp_path))
    assert start(tmp_path).wait() == 0
    wait_for_the_end_of(workers_told(tmp_path))
    record = list(RunRecord(tmp_path / "slt").read())
    assert sorted(e.step or 0 for e in record) == list(range(1, STEPS + 1))
    inline = monitor_of(tmp_path / "inline")
    Scenario(models.Plain, data).run(tmp_path, inline)
    expected = {e.step: e.trace for e in inline.estimates}
    for estimate in record:
        assert torch.equal(estimate.trace, expected[estimate.step])
    for step, trace in reported.items():
        assert torch.equal(trace, expected[step])
    left = {path.name.split("_")[0] for path in (tmp_path / "slt" / "background").glob("*")}
    assert left <= {"result"}  # those that the last checkpoints wait for


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_training(how: signal.Signals, tmp_path: Path) -> None:
    """A signal to the whole group, as Ctrl-C sends it, or to training alone, as a scheduler does."""
    process = start(tmp_path, -1, 0.5)
    while not (tmp_path / "trains").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = workers_told(tmp_path)
    assert len(workers) == 1 and all(map(_is_alive, workers))
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.wait()
    wait_for_the_end_of(workers)


def test_a_step_in_a_worker_may_ask_for_the_rate_of_its_optimiser() -> None:
    module = Plain()
    module._trainer = StillTrainer({"rates": [[0.25]]}, None, torch.device("cpu"))  # type: ignore[assignment]
    assert module.optimizers().param_groups[0]["lr"] == 0.25  # type: ignore[union-attr]


def test_a_python_module_goes_by_its_name(tmp_path: Path) -> None:
    held = [torch.nn.functional, warnings]
    write_pickled(models.Holds(lambda _: held), tmp_path / "module", "module")
    assert all(a is b for a, b in zip(read_pickled(tmp_path / "module").held, held, strict=True))
    with pytest.raises(CannotTravelError, match=r"Holds\.held.*cannot pickle 'module' object"):
        write_pickled(models.Holds(lambda _: ModuleType("of no file")), tmp_path / "other", "Holds")


def test_a_parametrised_module_is_of_such_a_class_again(tmp_path: Path) -> None:
    """With both parametrisations of a tensor and a way to set it, and without what its class does not let travel."""
    net = Parametrised()
    parametrize.register_parametrization(net.net[0], "weight", nn.Softplus(), unsafe=True)
    net.__dict__["_trainer"] = object()
    write_pickled(net, tmp_path / "net", "net")
    found = read_pickled(tmp_path / "net")
    assert parametrize.type_before_parametrizations(found) is Parametrised and found._trainer is None
    assert type(found.net[0]).__name__ == "ParametrizedLinear" and found.net[0].extra_repr() == net.net[0].extra_repr()
    assert list(found.state_dict()) == list(net.state_dict())
    assert torch.equal(found.net[0].weight, net.net[0].weight) and torch.equal(found.own, net.own)
    found.own = 2 * torch.eye(CLASSES)
    torch.testing.assert_close(found.own, 2 * torch.eye(CLASSES))
    parametrize.register_parametrization(found, "own", models.Holds(lambda _: ModuleType("of no file")), unsafe=True)
    with pytest.raises(CannotTravelError, match=r"net\.parametrizations\.own\.1\.held cannot be pickled"):
        write_pickled(found, tmp_path / "other", "net")
