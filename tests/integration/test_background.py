"""Firings beside training: the same numbers as inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
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
    read_pickled,
    write_pickled,
)
from lightning_slt.callbacks.background.worker import FOLDER
from lightning_slt.callbacks.folder import claim, give_back
from lightning_slt.sampling.objective import Objective
from tests.integration import models
from tests.integration.background_runs import (  # noqa: F401 - the fixture is for all tests here
    _no_process_is_left,
    assert_same_estimates,
    beside,
)
from tests.integration.harness import Scenario, assert_same, steps_of, tiny_monitor
from tests.integration.models import CLASSES, Net, Plain, loaders, tensors

pytestmark = pytest.mark.timeout(240)


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


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        pytest.param(Net, {}, id="BatchNorm and dropout"),
        pytest.param(Net, {"devices": ["cpu:0", "cpu"], "num_chains": 3}, id="two workers share three chains"),
        pytest.param(Net, {"probe": 8, "num_draws": 20}, id="influence", marks=pytest.mark.slow),
        pytest.param(Adam, {"sampler": RMSpropSGLD(lr=1e-4)}, id="second moments of Adam", marks=pytest.mark.slow),
        pytest.param(
            Net,
            {"sampler": None, "num_burnin_steps": None, "num_steps_bw_draws": None},
            id="calibrated",
            marks=pytest.mark.slow,
        ),
        pytest.param(Parametrised, {}, id="weight norm", marks=pytest.mark.slow),
        pytest.param(SpectralNorm, {}, id="spectral norm", marks=pytest.mark.slow),
        pytest.param(Orthogonal, {}, id="orthogonal", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if k else ()) for k, name in enumerate(PRECISIONS)]
)
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
        pytest.param(
            {"probe": TensorDataset(tensors().tensors[0])},
            "probe: its samples give the step",
            id="the step",
            marks=pytest.mark.slow,
        ),
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


@pytest.mark.slow
def test_batches_that_training_saw_travel_with_the_snapshot(tmp_path: Path) -> None:
    scenario = Scenario(Net, lambda: loaders(dataset=models.Stream()))
    inline, background = tiny_monitor(num_samples=24), beside(num_samples=24)
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert len(inline.estimates) == 3
    assert_same_estimates(background, inline)


@pytest.mark.parametrize("execution", [pytest.param("background", marks=pytest.mark.slow), "inline"])
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
