"""Training with the monitor is bit for bit training without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision

from lightning_slt import RMSpropSGLD
from tests.integration import models
from tests.integration.harness import SGLD, Scenario, SLTMonitor, assert_same, steps_of, tiny_monitor
from tests.integration.models import Net, loaders, uneven, with_validation


def trainer_with(**kwargs: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(kwargs)


def scaled() -> dict[str, Any]:
    """float16 autocast with a loss scale that grows every other step, so that the scaler's state moves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def ema() -> Callback:
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    return callbacks.EMAWeightAveraging(decay=0.5)


def averaged() -> dict[str, Any]:
    return {"callbacks": [ema()]}


def swa() -> dict[str, Any]:
    return {"callbacks": [StochasticWeightAveraging(1e-3, swa_epoch_start=1)]}


MODULES: dict[str, Scenario] = {
    "mlp with BatchNorm and dropout": Scenario(Net, with_validation),
    "torchmetrics logged per epoch": Scenario(models.WithMetric, with_validation),
    "frozen BatchNorm": Scenario(models.FrozenNorm, with_validation),
    "frozen layer": Scenario(models.FrozenLayer, loaders),
    "random numbers in the step": Scenario(models.OwnRandomness, loaders),
    "plateau scheduler": Scenario(models.Plateau, with_validation),
    "recurrent net": Scenario(models.Recurrent, loaders),
    "forward hooks": Scenario(models.Hooked, loaders),
    "sparse buffer": Scenario(models.Graph, loaders),
    "compiled module": Scenario(models.compiled_module, loaders),
    "compiled submodule": Scenario(models.compiled_submodule, loaders),
    "module compiled in place": Scenario(models.compiled_in_place, loaders),
    "validation within the epoch": Scenario(Net, with_validation, trainer_with(val_check_interval=2)),
    "gradient clipping": Scenario(Net, loaders, trainer_with(gradient_clip_val=0.1)),
    "fp16 with a scaler": Scenario(Net, loaders, scaled),
    "bf16-mixed": Scenario(Net, loaders, trainer_with(precision="bf16-mixed")),
    "bf16-true": Scenario(Net, loaders, trainer_with(precision="bf16-true")),
    "16-true": Scenario(models.Plain, loaders, trainer_with(precision="16-true")),
    "64-true": Scenario(Net, loaders, trainer_with(precision="64-true")),
    "EMA": Scenario(Net, with_validation, averaged),
    "stochastic weight averaging": Scenario(Net, loaders, swa),
    "deterministic": Scenario(Net, loaders, trainer_with(deterministic=True)),
}
"""Each takes 12 steps: 2 epochs of 6 batches."""


@pytest.fixture(autouse=True)
def _restore_determinism() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scenario", MODULES.values(), ids=MODULES)
def test_training_is_the_same(scenario: Scenario, tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=4)
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.num_batches >= 12  # SWA adds an epoch
    assert steps_of(monitor) == [4, 8, 12]
    assert all(e.trace.shape == (2, 4) and e.trace.isfinite().all() and e.init_loss > 0 for e in monitor.estimates)


SETTINGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "at the end of epochs": ({"every_n_epochs": 1}, [6, 12]),
    "before training and at named steps": ({"at_steps": [0, 1, 7]}, [0, 1, 7]),
    "log-spaced": ({"log_spaced": 3}, [1, 3, 12]),
    "by steps and by epochs": ({"every_n_train_steps": 5, "every_n_epochs": 1}, [5, 6, 10, 12]),
    "calibrated step size and burn-in": (
        {"every_n_train_steps": 12, "sampler": None, "num_burnin_steps": None, "num_steps_bw_draws": None},
        [12],
    ),
    "the faster method, tried": ({"method": "auto"}, [4, 8, 12]),
    "batched chains": ({"method": "batched"}, [4, 8, 12]),
    "restricted to a layer": ({"restrict": "net.4.*"}, [4, 8, 12]),
    "a batch size of its own": ({"batch_size": 24}, [4, 8, 12]),
    "a loss of its own": ({"loss_fn": models.loss_of_net}, [4, 8, 12]),
    "diverging chains": ({"nbeta": 1e8, "localization": 1.0}, [4, 8, 12]),
}


@pytest.mark.parametrize(("settings", "steps"), SETTINGS.values(), ids=SETTINGS)
def test_whatever_is_asked_of_the_chains(settings: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    monitor = tiny_monitor(**settings)
    Scenario(Net, with_validation).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == steps


@pytest.mark.parametrize(("scheduling", "steps"), [({1: 3}, [1, 3, 8]), ({0: 2, 1: 1}, [1, 3, 9])])
def test_log_spaced_steps_end_with_the_run_where_accumulation_changes(
    scheduling: dict[int, int], steps: list[int], tmp_path: Path
) -> None:
    scenario = Scenario(Net, with_validation, lambda: {"callbacks": [GradientAccumulationScheduler(dict(scheduling))]})
    scenario.assert_undisturbed(tmp_path, monitor := tiny_monitor(log_spaced=3))
    assert steps_of(monitor) == steps


@pytest.mark.parametrize("scheduling", [None, {0: 2, 1: 3}], ids=["plain", "accumulating"])
@pytest.mark.parametrize(("module", "adds_epoch"), [(Net, True), (models.Plain, False)], ids=["BatchNorm", "without"])
def test_log_spaced_steps_end_where_weights_are_trained_last(
    scheduling: Any, module: Any, adds_epoch: bool, tmp_path: Path
) -> None:
    """Averaged weights get BatchNorm statistics in an epoch more, which counts a step or two and trains nothing."""
    accumulates = [GradientAccumulationScheduler(dict(scheduling))] if scheduling else []
    scenario = Scenario(module, loaders, lambda: {"callbacks": [*swa()["callbacks"], *accumulates]})
    trace = scenario.run(tmp_path, monitor := tiny_monitor(log_spaced=3))
    last = 5 if scheduling else 12
    assert (trace.trainer.global_step > last) == adds_epoch
    assert steps_of(monitor) == ([1, 2, 5] if scheduling else [1, 3, 12])


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"every_n_train_steps": 1}, list(range(1, 13))),
        ({"every_n_epochs": 1}, [6, 12]),
        ({"at_steps": [11, 13]}, [11]),
    ],
    ids=str,
)
def test_the_epoch_of_batch_norm_after_averaging_is_not_measured(
    schedule: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    """The module holds the mean of the weights then, and Lightning counts a step at its end."""
    monitor = tiny_monitor(**schedule)
    trace = Scenario(Net, loaders, swa).assert_undisturbed(tmp_path, monitor)
    assert trace.trainer.global_step == 13 and steps_of(monitor) == steps


@pytest.mark.parametrize("changes", [{}, {"probe": 7, "num_draws": 20, "measures": ["influence", "susceptibility"]}])
def test_torchscript_is_compiled_by_the_calls_of_training_only(changes: dict[str, Any], tmp_path: Path) -> None:
    """A copy shares the count of calls after which it is optimised: chains before training must not move it on."""
    monitor = tiny_monitor(at_steps=[0, 1, 2], **changes)
    Scenario(models.ScriptedNet, loaders).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [0, 1, 2]
    assert all(e.trace.abs().max() > 0 for e in monitor.estimates)
    assert torch._C._get_graph_executor_optimize()


def finetuned() -> dict[str, Any]:
    return {"callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1)]}


def test_weights_that_are_unfrozen_midway_move_from_then_on(tmp_path: Path) -> None:
    """Until then the last layer and BatchNorm train: 18 weights and 16."""
    monitor = tiny_monitor(every_n_epochs=1, sampler=RMSpropSGLD(lr=1e-4))
    Scenario(models.WithBackbone, loaders, finetuned).assert_undisturbed(tmp_path, monitor)
    assert [(e.step, e.num_weights) for e in monitor.estimates] == [(6, 34), (12, 74)]
    assert all(e.trace.isfinite().all() for e in monitor.estimates)


class FrozenInTurn(Net):
    """Its first layer trains at every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.net[0].requires_grad_(batch_idx % 2 == 0)
        return super().training_step(batch, batch_idx)


def test_weights_that_are_frozen_in_turn_are_said_to_be_once(tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(FrozenInTurn, loaders).assert_undisturbed(tmp_path, monitor)
    assert [e.num_weights for e in monitor.estimates] == [74, 34] * 6
    said = [text for text in (str(w.message) for w in caught) if "weights move, before it" in text]
    assert [text.split(": what")[0] for text in said] == [
        "SLTMonitor: from step 2 on 34 weights move, before it 74 did",
        "SLTMonitor: from step 3 on 74 weights move, before it 34 did",
    ]


def test_a_lazy_module_is_measured_from_its_first_batch_on(tmp_path: Path) -> None:
    monitor = tiny_monitor(at_steps=[0, 2], on_failure="warn")
    with pytest.warns(UserWarning, match=r"step 0 failed .* net\.0\.weight has no shape yet: a lazy module"):
        Scenario(models.Lazy, loaders).assert_undisturbed(tmp_path, monitor)
    assert [(e.step, e.num_weights) for e in monitor.estimates] == [(2, 74)]


def pruned() -> dict[str, Any]:
    """From the end of the first epoch on ``weight`` is ``weight_orig`` under a mask."""
    names = {"parameter_names": ["weight"], "use_lottery_ticket_hypothesis": False}
    return {"callbacks": [ModelPruning("l1_unstructured", amount=0.3, **names)]}


@pytest.mark.parametrize(
    ("restrict", "weights"), [(None, 74), ("net.0.weight", 32), ("net.[04].weight", 48), ("net.0", 40)]
)
def test_weights_that_are_pruned_midway_are_measured_on(restrict: Any, weights: int, tmp_path: Path) -> None:
    monitor = tiny_monitor(restrict=restrict)
    trace = Scenario(Net, loaders, pruned).assert_undisturbed(tmp_path, monitor)
    assert int((trace.module.net[0].weight == 0).sum()) >= 9  # at the end the masks are made permanent
    assert [(e.step, e.num_weights) for e in monitor.estimates] == [(4, weights), (8, weights), (12, weights)]


@pytest.mark.parametrize(
    ("window", "data", "steps"),
    [
        (2, loaders, [1, 2, 3, 4, 5, 6]),
        (4, loaders, [1, 2, 3, 4]),
        (2, uneven, [1, 2, 3, 4, 5, 6, 7, 8]),
        (4, uneven, [1, 2, 3, 4]),
    ],
)
def test_accumulation_fires_once_per_optimiser_step(
    window: int, data: Callable[[], dict[str, Any]], steps: list[int], tmp_path: Path
) -> None:
    monitor = tiny_monitor(every_n_train_steps=1)
    scenario = Scenario(Net, data, trainer_with(accumulate_grad_batches=window))
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.trainer.global_step == len(steps)
    assert steps_of(monitor) == steps


class FiresMidWindow(Callback):
    """Has the monitor measure where gradients have been accumulated and not been used yet."""

    def __init__(self, monitor: SLTMonitor) -> None:
        self.monitor = monitor
        self.gradients: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if i == 1:
            self.gradients.append(float(pl_module.net[0].weight.grad.abs().sum()))
            self.monitor.on_train_epoch_end(trainer, pl_module)


def test_firing_in_the_middle_of_an_accumulation_window(tmp_path: Path) -> None:
    scenario = Scenario(Net, loaders, trainer_with(accumulate_grad_batches=4))
    monitor = tiny_monitor(every_n_epochs=1)
    midway = FiresMidWindow(monitor)
    without = scenario.run(tmp_path / "without")
    with_monitor = scenario.run(tmp_path / "with", monitor, midway)
    assert_same(without, with_monitor)
    assert len(midway.gradients) == 2 and min(midway.gradients) > 0
    assert steps_of(monitor) == [0, 2, 4]  # in the second window the weights are those of step 2 still


@pytest.mark.parametrize("compiled", [models.compiled_module, models.compiled_submodule, models.compiled_in_place])
def test_chains_of_a_compiled_module_move_their_own_weights(compiled: Callable[[], Any], tmp_path: Path) -> None:
    """The copy's loss responds to the copy's weights: it is what the same module gives without the compiler."""
    plain, monitored = tiny_monitor(), tiny_monitor()
    Scenario(Net, loaders).run(tmp_path / "plain", plain)
    Scenario(compiled, loaders).run(tmp_path / "compiled", monitored)
    assert steps_of(monitored) == [4, 8, 12]
    for a, b in zip(plain.estimates, monitored.estimates, strict=True):
        assert a.trace.abs().min() > 0
        torch.testing.assert_close(a.trace, b.trace, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ema_first", [True, False])
def test_chains_see_the_raw_weights_beside_ema(ema_first: bool, tmp_path: Path) -> None:
    def measured(*others: Callback) -> SLTMonitor:
        monitor = tiny_monitor(every_n_epochs=1)
        both = [*others, monitor] if ema_first else [monitor, *others]
        Scenario(Net, with_validation).run(tmp_path / str(len(others)), *both)
        return monitor

    raw, beside = measured(), measured(ema())
    assert steps_of(beside) == [6, 12]
    for a, b in zip(raw.estimates, beside.estimates, strict=True):
        assert a.init_loss == b.init_loss
        assert torch.equal(a.trace, b.trace)


def test_frozen_weights_do_not_count(tmp_path: Path) -> None:
    whole, frozen = tiny_monitor(), tiny_monitor()
    Scenario(Net, loaders).run(tmp_path, whole)
    Scenario(models.FrozenLayer, loaders).run(tmp_path, frozen)
    in_first_layer = 8 * models.IN + 8
    assert {e.num_weights for e in whole.estimates} == {in_first_layer + 16 + 8 * 2 + 2}
    assert {e.num_weights for e in frozen.estimates} == {16 + 8 * 2 + 2}


def test_bf16_true_chains_keep_float32_weights(tmp_path: Path) -> None:
    """At weights of 1 a bf16 step of 1e-3 is rounded away: the noise that arrives would be a third of it."""
    steps, lr = 500, 1e-6
    monitor = tiny_monitor(
        every_n_train_steps=6,
        sampler=SGLD(lr=lr),
        num_chains=1,
        num_burnin_steps=0,
        num_draws=steps + 1,  # the last loss is taken before the last move
        nbeta=1.0,
        localization=1e-6,
        method="sequential",
    )
    scenario = Scenario(models.Flat, loaders, trainer_with(precision="bf16-true", max_epochs=1))
    scenario.run(tmp_path, monitor)
    assert steps_of(monitor) == [6]
    (weights,) = models.CHAIN_SAW
    assert weights.sub(1).var().item() == pytest.approx(steps * lr, rel=0.02)
