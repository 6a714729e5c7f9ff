"""Susceptibility while a model trains: training and the learning coefficient are the same, and it is kept."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import SLTMonitor
from lightning_slt.callbacks import component_firings
from lightning_slt.config import load
from lightning_slt.sampling.paths import choose_engine
from lightning_slt.susceptibility import firing
from lightning_slt.susceptibility.shift import ShiftReader
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import Holds, Net, Plain, Stream, loaders, tensors, with_validation

BESIDE = ["llc", {"name": "susceptibility", "components": {"all": ["*"]}}]


def test_training_is_the_same_and_every_firing_is_recorded(tmp_path: Path) -> None:
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16)
    Scenario(Net, with_validation).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.susceptibilities) == len(monitor.estimates) >= 2 and not monitor.influences
    assert all(found.matrix.shape == (1, 5) and found.chi.isfinite().all() for found in monitor.susceptibilities)
    assert monitor.folder is not None
    recorded = list(SusceptibilityRecord(monitor.folder).read())
    assert [r.step for r in recorded] == [e.step for e in monitor.estimates]
    assert all(torch.equal(a.chi, b.chi) for a, b in zip(recorded, monitor.susceptibilities, strict=True))


def test_a_checkpoint_brings_the_history_back() -> None:
    from tests.test_susceptibility import measured

    found = measured(num_chains=2, num_draws=16).replace(step=3)
    monitor = tiny_monitor(probe=True, measures=BESIDE)
    monitor.susceptibilities.append(found)
    other = tiny_monitor(probe=True, measures=BESIDE)
    other.load_state_dict(monitor.state_dict())
    assert torch.equal(other.susceptibilities[0].matrix, found.matrix) and other.susceptibilities[0].step == 3
    assert other.susceptibilities[0].components == found.components


class Validates(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def without_order() -> dict[str, Any]:
    """Six batches an epoch, all alike: Lightning begins an epoch anew when it is resumed in the middle."""
    x, y = tensors(4).tensors
    data = TensorDataset(x.repeat(6, 1), y.repeat(6))
    return {**loaders(dataset=data, shuffle=False), "val_dataloaders": DataLoader(tensors(8), batch_size=4)}


def assert_same_measurement(a: SusceptibilityEstimate, b: SusceptibilityEstimate) -> None:
    """To the last bit, but for the seconds."""
    ours, theirs = (found.replace(seconds=0.0).state_dict() for found in (a, b))
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == theirs[name], name


COMPONENTS = [{"name": "susceptibility", "components": {"weight": ["*.weight"], "bias": ["*.bias"]}}]


@pytest.mark.parametrize("check_val_every_n_epoch", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("stopped", "saved"), [(5, 5), (7, 5), (6, 6)], ids=["stopped", "crashed", "between epochs"])
def test_a_run_that_is_resumed_measures_what_an_uninterrupted_one_does(
    stopped: int, saved: int, check_val_every_n_epoch: int, tmp_path: Path
) -> None:
    """History and record, step by step: what came after the checkpoint is measured again and stands there once. The
    queries are the same ones too, although Lightning leaves the sanity check out, and with it the validation data,
    where it resumes."""

    def monitor(name: str) -> Any:
        settings = {"probe": 7, "query": 5, "measures": ["influence", *COMPONENTS], "num_draws": 16}
        return tiny_monitor(every_n_train_steps=2, dirpath=str(tmp_path / name), localization=None, **settings)

    def trainer(steps: int, name: str) -> Any:
        folder = tmp_path / f"checkpoints of {name}"
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
        settings = {"max_epochs": -1, "max_steps": steps, "check_val_every_n_epoch": check_val_every_n_epoch}
        return lambda: {**settings, "enable_checkpointing": True, "callbacks": [saver]}

    whole, first, again = monitor("whole"), monitor("cut"), monitor("cut")
    Scenario(Validates, without_order, trainer(10, "whole")).run(tmp_path, whole)
    Scenario(Validates, without_order, trainer(stopped, "cut")).run(tmp_path, first)
    checkpoint = str(tmp_path / "checkpoints of cut" / f"step={saved}.ckpt")
    Scenario(Validates, without_order, trainer(10, "again")).run(tmp_path, again, ckpt_path=checkpoint)
    assert steps_of(again) == steps_of(whole) == [2, 4, 6, 8, 10]
    assert len(again.susceptibilities) == len(whole.susceptibilities) == 5
    for ours, theirs in zip(again.susceptibilities, whole.susceptibilities, strict=True):
        assert_same_measurement(ours, theirs)
    for one, other in zip(again.influences, whole.influences, strict=True):
        assert torch.equal(one.query_index, other.query_index) and torch.equal(one.init_loss, other.init_loss)
    recorded = {name: list(SusceptibilityRecord(tmp_path / name).read()) for name in ("whole", "cut")}
    for ours, theirs, kept in zip(recorded["cut"], recorded["whole"], again.susceptibilities, strict=True):
        assert_same_measurement(ours, theirs)
        assert_same_measurement(ours, kept)


@pytest.mark.parametrize("method", ["sequential", "auto"])
def test_chains_of_components_go_one_after_another_where_those_of_the_coefficient_do(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which path is faster is known to the clock only, and they round otherwise: a trial at each firing would make a
    run that is resumed differ in the last bits."""
    asked: list[str] = []

    def choose(objective: Any, window: Any, num_chains: int, method: str = "auto") -> Any:
        asked.append(method)
        return choose_engine(objective, window, num_chains, "sequential")  # as the clock would have it here

    monkeypatch.setattr("lightning_slt.sampling.chains.choose_engine", choose)
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16, method=method)
    Scenario(Net, with_validation).run(tmp_path, monitor)
    assert len(monitor.susceptibilities) == len(monitor.estimates) == 3
    first, *others = asked
    assert first == method and others and set(others) == {"sequential"}


def test_a_module_that_cannot_be_copied_is_measured_in_place(tmp_path: Path) -> None:
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16)
    Scenario(lambda: Holds(lambda _: (i for i in range(3))), with_validation).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12] and len(monitor.susceptibilities) == 3
    assert all(found.chi.isfinite().all() for found in monitor.susceptibilities)


def test_gamma_is_chosen_at_the_first_firing_and_kept(tmp_path: Path) -> None:
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16, localization=None)
    Scenario(Net, with_validation).run(tmp_path, monitor)
    (first, *others) = monitor.susceptibilities
    assert others and all(found.localization == first.localization for found in others)


def test_a_failure_leaves_training_and_the_learning_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(component_firings, "measure_beside", fails)
    monitor = tiny_monitor(probe=7, measures=BESIDE, on_failure="warn")
    with pytest.warns(UserWarning, match="susceptibility at step 4 failed .*RuntimeError: no memory"):
        Scenario(lambda: Plain(lr=0.0), loaders).run(tmp_path, monitor)
    assert len(monitor.estimates) >= 1 and not monitor.susceptibilities


def test_a_signal_breaks_off_the_chains_of_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is answered then, not when they have ended, which may take minutes: a scheduler kills what goes on."""
    read: list[bool] = []
    answered: list[int] = []

    class Signalled(ShiftReader):
        def __call__(self, *args: Any) -> Any:
            read.append(True)
            if len(read) == 1:
                signal.raise_signal(signal.SIGUSR1)
            return super().__call__(*args)

    monkeypatch.setattr(firing, "ShiftReader", Signalled)
    monitor = tiny_monitor(probe=7, measures=BESIDE, num_draws=16, on_failure="warn")
    before = signal.signal(signal.SIGUSR1, lambda *_: answered.append(len(read)))
    try:
        with pytest.warns(
            UserWarning, match=r"susceptibility at step 4 failed .* is kept\. BrokenOffError: SIGUSR1 came"
        ):
            Scenario(Net, loaders).run(tmp_path, monitor)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert answered == [1]  # at the first reading of the first firing
    assert steps_of(monitor) == [4, 8, 12] and [found.step for found in monitor.susceptibilities] == [8, 12]


@pytest.mark.parametrize(
    ("measures", "probe", "message"),
    [
        (["susceptability"], True, "there is no 'susceptability' .did you mean 'susceptibility'"),
        (["susceptibility"], None, "'susceptibility' needs samples to look at: give probe="),
        ([{"name": "susceptibility", "component": {}}], True, "'susceptibility' has no component"),
        ([{"name": "susceptibility", "components": {"A b": "*"}}], True, "component 'A b'"),
    ],
)
def test_wrong_measures_are_refused_at_once(measures: list[object], probe: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTMonitor(measures=measures, probe=probe)  # type: ignore[arg-type]


def test_a_component_of_no_weight_is_refused_before_training(tmp_path: Path) -> None:
    components = {"all": ["*"], "head": ["fc.*"]}
    monitor = SLTMonitor(measures=[{"name": "susceptibility", "components": components}], probe=True)
    message = r"SLTMonitor: measures: components\['head'\]: 'fc\.\*' matches no parameter.*net\.0\.weight"
    with pytest.raises(MisconfigurationException, match=message):
        Scenario(Net, loaders).run(tmp_path, monitor)


def test_a_component_that_has_been_frozen_since_is_named(tmp_path: Path) -> None:
    class Freezes(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.net[0].requires_grad_(False)  # type: ignore[index, union-attr]

    components = {"first": ["net.0.*"], "rest": ["net.4.*"]}
    monitor = tiny_monitor(probe=7, measures={"name": "susceptibility", "components": components}, on_failure="warn")
    with pytest.warns(UserWarning, match=r"measures: components\['first'\]: every parameter matched .* is frozen"):
        Scenario(Freezes, loaders).run(tmp_path, monitor)
    assert len(monitor.estimates) == 3 and not monitor.susceptibilities


def test_data_without_an_index_is_refused_before_training(tmp_path: Path) -> None:
    monitor = tiny_monitor(measures=BESIDE, probe=tensors(5), num_samples=24)
    with pytest.raises(MisconfigurationException, match=r"'susceptibility' reads .* train on a map-style Dataset"):
        Scenario(Plain, lambda: loaders(dataset=Stream())).run(tmp_path, monitor)
    assert monitor.estimates == []


def test_a_mapping_as_from_yaml_builds_it() -> None:
    config = load({"probe": True, "measures": ["llc", {"name": "susceptibility", "components": {"head": ["fc.*"]}}]})
    built = config.build()
    assert built._asked.measures.components == {"head": ["fc.*"]} and not built._asked.measures.influence
