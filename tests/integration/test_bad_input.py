"""Bad input: refused before training with the argument and the remedy, or a firing skipped with a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import TensorDataset

from lightning_slt import MALA, KineticLangevin, TransitionMonitor
from tests.integration import models
from tests.integration.harness import SGLD, TINY, Scenario, SLTMonitor, tiny_monitor
from tests.integration.models import Plain, loaders

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no draws": ({"num_draws": 0}, r"num_draws=0.*at least 1"),
    "no chains": ({"num_chains": 0}, r"num_chains=0.*at least 1"),
    "negative burn-in": ({"num_burnin_steps": -1}, r"num_burnin_steps=-1.*at least 0"),
    "no steps a draw": ({"num_steps_bw_draws": 0}, r"num_steps_bw_draws=0.*at least 1"),
    "negative nbeta": ({"nbeta": -1.0}, r"nbeta=-1.0.*positive"),
    "negative localization": ({"localization": -1.0}, r"localization=-1.0.*negative"),
    "no batch": ({"batch_size": 0}, r"batch_size=0.*at least 1"),
    "one sample": ({"num_samples": 1}, r"num_samples=1.*at least 2"),
    "schedule of nothing": ({"every_n_train_steps": 0}, r"every_n_train_steps=0.*at least 1"),
    "negative steps": ({"at_steps": [-1]}, r"at_steps=.*negative"),
    "unknown policy": ({"on_failure": "ignore"}, r"on_failure='ignore'.*'warn' or 'raise'"),
    "unknown method": ({"method": "fast"}, r"method='fast'.*'sequential' or 'batched'"),
    "name that is no key": ({"name": "My Run"}, r"name='My Run'.*lower-case"),
    "an address for a folder": ({"dirpath": "s3://bucket/slt"}, r"dirpath='s3://bucket/slt'.*path of a folder"),
    "no seconds to wait": ({"max_wait": float("nan")}, r"max_wait=nan: must not be negative"),
    "sampler of another kind": ({"sampler": {"step": 1e-4}}, r"sampler.*step.*lr"),
    "no steps at all": (
        {"at_steps": []},
        r"^at_steps=\[\]: names no step, .*such as \[0, 100, 1000\], or .*None",
    ),
    "no steps, and a budget": ({"at_steps": (), "max_overhead": 0.05}, r"^at_steps=\[\]: names no step"),
    "nothing to move": ({"restrict": []}, r"^restrict is empty: leave it None to move every weight, or name param"),
    "a component of nothing": (
        {"probe": True, "measures": {"name": "susceptibility", "components": {"head": []}}},
        r"^measures: components\['head'\] is empty: leave it None to move every weight",
    ),
    "an unknown measure": (
        {"measures": ["loss"]},
        r"^measures: there is no 'loss'; there are llc, influence, susceptibility\.$",
    ),
    "a measure misspelt": (
        {"measures": "influenc", "probe": True},
        r"'influenc' \(did you mean 'influence'\?\)",
    ),
    "influence of nothing": (
        {"measures": ["influence"]},
        r"^measures: 'influence' needs samples to look at: give",
    ),
    "components beside training": (
        {"execution": "background", "measures": ["llc", "susceptibility"], "probe": 4},
        r"^execution='background': measures=\['susceptibility'\] is measured inside .* use execution='inline'\.$",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        SLTMonitor(**arguments)


class OfAllData(SGLD):
    full_batch = True


BESIDE = {"execution": "background"}
OF_ANOTHER_KIND: dict[str, tuple[dict[str, Any], str]] = {
    "text for chains": ({"num_chains": "2"}, r"num_chains='2': expected a whole number, got str"),
    "a float for draws": ({"num_draws": 20.0}, r"num_draws=20\.0: expected a whole number, got float"),
    "text for a batch": ({"batch_size": "10"}, r"batch_size='10': expected a whole number, got str"),
    "text for a cadence": ({"every_n_train_steps": "5"}, r"every_n_train_steps='5': expected a whole number, got str"),
    "a float for a cadence": ({"every_n_train_steps": 1.5}, r"every_n_train_steps=1\.5: expected a whole number"),
    "a bool for a cadence": ({"every_n_epochs": True}, r"every_n_epochs=True: expected a whole number, got bool"),
    "one step for steps": ({"at_steps": 5}, r"at_steps=5: expected a list of steps, such as"),
    "text for steps": ({"at_steps": "5,10"}, r"at_steps='5,10': expected a list of steps, such as"),
    "half a step": ({"at_steps": [2, 1.5]}, r"at_steps=\[2, 1\.5\]: expected whole numbers, got 1\.5.*float"),
    "a sampler's name": ({"sampler": "SGLD"}, r"sampler='SGLD': .*SGLD\(\)"),
    "a sampler's class": ({"sampler": SGLD}, r"sampler=SGLD: is a class.*SGLD\(\)"),
    "text for a budget": ({"max_overhead": "a"}, r"max_overhead='a': expected a number, got str.*float"),
    "text for samples": ({"num_samples": "a"}, r"num_samples='a': expected a whole number, got str.*None"),
    "a number for a name": ({"name": 3}, r"name=3: expected text, got int.*'run_3'"),
    "a number for a folder": ({"dirpath": 3}, r"dirpath=3: expected the path of a folder, got int"),
    "text for snapshots": ({**BESIDE, "max_pending": "a"}, r"max_pending='a': expected a whole number, got str"),
    "text for seconds": ({**BESIDE, "max_wait": "a"}, r"max_wait='a': expected a number, got str"),
    "no seconds": ({**BESIDE, "max_wait": None}, r"max_wait=None: expected a number"),
    "a number of devices": ({**BESIDE, "devices": 3}, r"devices=3: expected a list of names, got int.*\['cuda:1'\]"),
    "text for warm chains": ({"warm_start": "a"}, r"warm_start='a': expected True or False, got str.*bool"),
    "nothing for warm chains": ({"warm_start": None}, r"warm_start=None: expected True or False"),
    "a tensor for nbeta": ({"nbeta": torch.ones(2)}, r"nbeta=tensor.*expected a number, got Tensor"),
    "a tensor for a budget": ({"max_overhead": torch.ones(2)}, r"max_overhead=tensor.*expected a number, got Tensor"),
    "text for snapshots inside": ({"max_pending": "a"}, r"max_pending='a': expected a whole number, got str"),
    "text for a loss": ({"loss_fn": "mse"}, r"loss_fn='mse': expected a function of the module and a batch"),
    "text for groups": ({"probe": True, "group_fn": "a"}, r"group_fn='a': expected a callable of \(sample\), got str"),
    "a number to render": ({"probe": True, "render": 3}, r"render=3: expected a callable of \(sample\), got int"),
    "a mapping for steps": ({"at_steps": {5: 1}}, r"at_steps=\{5: 1\}: expected a list of steps"),
    "a mapping to restrict": ({"restrict": {"a": 1}}, r"restrict=\{'a': 1\}: got dict"),
    "a number for measures": ({"measures": 3}, r"measures=3: expected a list, got int.*'susceptibility'"),
    "a number in measures": ({"measures": ["llc", 3]}, r"measures=\['llc', 3\]: got 3 in it, which is int.*llc, infl"),
    "a measure without a name": ({"measures": [{}]}, r"measures=.*a mapping without a name.*Give a list of names"),
    "a list of components": (
        {"probe": True, "measures": {"name": "susceptibility", "components": ["fc"]}},
        r"components=\['fc'\]: expected a mapping, got list. Give \{'name'",
    ),
    "a number for a component": (
        {"probe": True, "measures": {"name": "susceptibility", "components": {"head": 3}}},
        r"restrict=3: got int",
    ),
    "a tensor to restrict": ({"restrict": torch.zeros(3, 2)}, r"restrict: got a Tensor.*name of the parameter"),
}


@pytest.mark.parametrize(("arguments", "message"), OF_ANOTHER_KIND.values(), ids=OF_ANOTHER_KIND)
def test_argument_of_another_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SLTMonitor(**arguments)


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (MALA(), "needs the loss of all the data"),
        (OfAllData(), "needs the loss of all the data"),
        (KineticLangevin(), "minibatches heat its chains"),
    ],
    ids=["full batches", "one's own", "momenta"],
)
def test_samplers_that_minibatches_do_not_suit(sampler: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler={type(sampler).__name__}\(\): {reason}.*SGNHT here"):
        SLTMonitor(every_n_train_steps=1, sampler=sampler)


@pytest.mark.parametrize("lr", [-1e-4, 0.0, float("nan"), float("inf")])
def test_step_size_out_of_range(lr: float) -> None:
    with pytest.raises(ValueError, match=r"lr=.*positive"):
        SGLD(lr=lr)


@pytest.mark.parametrize("lr", ["a", True, [1e-4], torch.ones(2)], ids=repr)
def test_step_size_of_another_kind(lr: Any) -> None:
    with pytest.raises(TypeError, match=r"lr=.*: expected a number, got .*Give a float"):
        SGLD(lr=lr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pin_checkpoints": "no"}, r"pin_checkpoints='no': expected True or False, got str"),
        ({"alert": 3}, r"alert=3: expected True or False, got int"),
        ({"saddles": None}, r"saddles=None: expected True or False"),
        ({"on_transition": 3}, r"on_transition=3: expected a callable of \(transition, trainer, module\)"),
    ],
    ids=["pins", "alert", "saddles", "hook"],
)
def test_argument_of_another_kind_for_transitions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TransitionMonitor(**arguments)


def test_no_steps_beside_a_cadence_are_none() -> None:
    assert SLTMonitor(every_n_epochs=2, at_steps=[])._asked.describe()["at_steps"] == []


@pytest.mark.parametrize("measures", ["llc", {"name": "llc"}, ["llc"]], ids=repr)
def test_one_measure_need_not_be_in_a_list(measures: Any) -> None:
    monitor = SLTMonitor(measures=measures)
    assert monitor._asked.measures.describe() == (measures if isinstance(measures, list) else [measures])


REFUSED: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str]] = {
    "restriction that matches nothing": ({"restrict": "body.*"}, loaders, r"'body\.\*' matches no.*net\.weight"),
    "one of two restrictions matches nothing": ({"restrict": ["net.*", "head"]}, loaders, r"'head' matches no"),
    "no samples to look at": ({"probe": models.tensors(0)}, loaders, r"probe: the dataset is empty.*with samples"),
    "n = 1": ({}, lambda: loaders(1), r"num_samples=1.*nbeta"),
    "stream without length": ({}, lambda: loaders(dataset=models.Stream()), r"length.*num_samples=.*nbeta="),
}


@pytest.mark.parametrize("policy", ["warn", "raise"])
@pytest.mark.parametrize(("settings", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_first_batch(
    settings: dict[str, Any], data: Callable[[], dict[str, Any]], message: str, policy: str, tmp_path: Path
) -> None:
    module = Plain()
    with pytest.raises(MisconfigurationException, match=message):
        Scenario(lambda: module, data).run(tmp_path, tiny_monitor(on_failure=policy, **settings))
    assert module.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0


@pytest.mark.parametrize("restrict", [None, "net"])
def test_module_with_nothing_to_move_is_refused(restrict: Any, tmp_path: Path) -> None:
    def frozen() -> Plain:
        module = Plain()
        module.net.requires_grad_(False)
        return module

    with pytest.raises(MisconfigurationException, match="requires_grad"):
        Scenario(frozen, loaders).run(tmp_path, tiny_monitor(restrict=restrict))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"every_n_train_steps": 500}, "every_n_train_steps=500"),
        ({"at_steps": [50, 100], "every_n_epochs": 9}, r"every_n_epochs=9, at_steps=\[50, 100\]"),
        ({"at_steps": [50], "max_overhead": 0.05}, r"at_steps=\[50\]"),
    ],
    ids=["cadence", "steps", "budget"],
)
def test_a_run_that_is_over_before_its_first_firing_says_so(
    schedule: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=rf"SLTMonitor\({said}\): nothing was measured: .* at step 4, .*spread over"):
        trace = Scenario(Plain, loaders, lambda: {"max_steps": 4}).run(tmp_path, SLTMonitor(**schedule, **TINY))
    assert trace.trainer.global_step == 4


def test_a_run_whose_firings_failed_is_not_said_to_have_had_none(tmp_path: Path) -> None:
    def fails(module: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("no loss today")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Plain, loaders, lambda: {"max_steps": 4}).run(
            tmp_path, SLTMonitor(at_steps=[2], loss_fn=fails, **TINY)
        )
    texts = [str(warning.message) for warning in caught]
    assert any("no loss today" in text for text in texts)
    assert not any("nothing was measured" in text for text in texts)


def test_no_data_leaves_the_run_to_lightning(tmp_path: Path) -> None:
    """Lightning itself trains on nothing without an error: there is nothing to measure either."""
    empty = TensorDataset(torch.empty(0, models.IN), torch.empty(0, dtype=torch.long))
    monitor = tiny_monitor()
    trace = Scenario(Plain, lambda: loaders(dataset=empty, shuffle=False)).run(tmp_path, monitor)
    assert trace.num_batches == 0
    assert monitor.estimates == []


class SkipsEven(Plain):
    """Two losses in turn often look like this, one of them with an optimiser of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


GOES_ON: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], str]] = {
    "non-finite starting loss": (models.NaNInChain, loaders, r"step 4 failed.*loss at the current weights is nan"),
    "step for training mode": (
        models.SecondHead,
        loaders,
        r"step 4 failed.*ValueError: too many values to unpack.*In training mode the step gives a loss.*loss_fn",
    ),
    "step that skips every other batch by its number": (
        SkipsEven,
        loaders,
        r"step 4 failed.*returned None.*batch_idx only, which is 2 for.*Give loss_fn\(module, batch\)",
    ),
    "step that always returns None": (models.AlwaysNone, loaders, r"step \d+ failed.*returned None"),
}


@pytest.mark.parametrize(("module", "data", "message"), GOES_ON.values(), ids=GOES_ON)
def test_firing_is_skipped_with_a_warning_and_training_ends_well(
    module: Callable[[], Any], data: Callable[[], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    monitor = SLTMonitor(every_n_train_steps=4, on_failure="warn", sampler=SGLD(lr=1e-4), **TINY)
    scenario = Scenario(module, data)
    with pytest.warns(UserWarning, match=message):
        trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.num_batches == 12
    assert monitor.estimates == []


class FailsInChains(Plain):
    """In one way up to the eighth batch, in another one after it; ``global_step`` counts the batches before."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.training:
            raise RuntimeError("one way" if self.trainer.global_step <= 8 else "another way")
        return super().training_step(batch, batch_idx)


def test_the_same_failure_is_explained_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A step that fails in chains fails at every firing, and a line each is enough; the last one counts them."""
    monitor = SLTMonitor(every_n_train_steps=2, **TINY)
    with caplog.at_level("INFO", logger="lightning.pytorch"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(FailsInChains, loaders).run(tmp_path, monitor)
    said = [str(w.message) for w in caught if " failed and is left out" in str(w.message)]
    assert [int(re.findall(r"at step (\d+) failed", text)[0]) for text in said] == [2, 4, 6, 8, 10, 12]
    assert [k for k, text in enumerate(said) if "RuntimeError" in text] == [0, 4]
    assert "RuntimeError: one way" in said[0] and "RuntimeError: another way" in said[4]
    assert said[1].endswith("at step 4 failed and is left out, for the reason given at step 2; training goes on.")
    assert "reason given at step 10;" in said[5]
    assert caplog.messages[-1] == "SLTMonitor: no estimates: all 6 measurements failed; why was said at step 2"


class DivergesInTraining(Plain):
    """A learning rate that makes the weights NaN after a few batches."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (torch.inf if self.trainer.global_step >= 5 else 1.0)


def test_training_that_diverges_is_measured_until_then(tmp_path: Path) -> None:
    monitor = tiny_monitor(on_failure="warn")
    with pytest.warns(UserWarning, match="step 8 failed.*no minimum"):
        Scenario(DivergesInTraining, loaders).assert_undisturbed(tmp_path, monitor)
    assert [e.step for e in monitor.estimates] == [4]


def test_chains_that_diverge_are_not_averaged(tmp_path: Path) -> None:
    """A step size far too large: no finite number may come out as valid."""
    monitor = tiny_monitor(sampler=SGLD(lr=1e6), num_draws=40)
    Scenario(Plain, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3
    assert not any(e.valid for e in monitor.estimates)
    assert all(e.reasons for e in monitor.estimates)
