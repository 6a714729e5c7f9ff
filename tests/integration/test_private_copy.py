"""What a copy of the module may still share with the live one, and what the chains make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_slt import SGLD, SLTMonitor, estimate_llc
from lightning_slt.sampling import steps
from tests.integration.harness import quiet_trainer, tiny_monitor


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Closure(Base):
    """An attribute is a function bound to the live module: deepcopy does not re-bind it."""

    def __init__(self) -> None:
        super().__init__()
        self.apply_net = lambda x: self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.apply_net(batch[0]) - batch[1]).square().mean()


class Hooked(Base):
    """A hook writes to a list that no copy has."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self.net.register_forward_hook(lambda module, args, output: calls.append(1))


class Penalised(Base):
    """The loss has a penalty on an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))  # type: ignore[assignment]
        self.kept: dict[str, Any] = {}

    def penalty(self, x: Tensor) -> Tensor:
        return self.kept["h"].square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.penalty(batch[0])


class Direct(Penalised):
    def penalty(self, x: Tensor) -> Tensor:
        return self.net[0](x).square().mean()


class ByClosure(Penalised):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, output: self.kept.update(h=output))


class ByDefault(Penalised):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, output, kept=self.kept: kept.update(h=output))


class ByInnerFunction(Penalised):
    def __init__(self) -> None:
        super().__init__()

        def keep(output: Tensor) -> None:
            self.kept["h"] = output

        self.net[0].register_forward_hook(lambda module, args, output: keep(output))


class ByMethod(Penalised):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["h"] = output


class Cleared(ByMethod):
    """What is kept is there within a step alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.kept.clear()
        return loss


class Extractor:
    """An object of its own that keeps the output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.output = torch.zeros(())
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.output = output


class ByObject(Penalised):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = Extractor(self.net[0])

    def penalty(self, x: Tensor) -> Tensor:
        return self.extractor.output.square().mean()


class Pops(Base):
    """The step takes its batch apart, and changes it in place."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        y = batch.pop("y")
        batch["x"].mul_(0.5)
        return (self.net(batch["x"]) - y).square().mean()


class Gathers(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.all_gather(super().training_step(batch, batch_idx)).mean()


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"x": x.clone(), "y": y}


def data(n: int = 48) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(n, 1, generator=g))


def fit(module: LightningModule, dataset: Any, folder: Path, **settings: Any) -> SLTMonitor:
    torch.manual_seed(0)
    monitor = SLTMonitor(every_n_train_steps=3, num_chains=2, num_draws=6, num_burnin_steps=4, **settings)
    trainer = Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(module, DataLoader(dataset, 8))
    return monitor


def test_a_closure_over_the_live_module_neither_hides_the_weights_nor_gets_gradients(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = Base()
    closure = Closure()
    closure.load_state_dict(plain.state_dict())
    settings: dict[str, Any] = {"sampler": SGLD(lr=1e-3), "num_draws": 20, "num_burnin_steps": 5, "localization": 1.0}
    expected = estimate_llc(plain, data(), method="sequential", **settings)
    closure.net.weight.grad = torch.full_like(closure.net.weight, 7.0)
    found = estimate_llc(closure, data(), **settings)
    assert torch.allclose(found.trace, expected.trace, rtol=1e-4, atol=1e-5)
    assert bool((closure.net.weight.grad == 7.0).all()) and closure.net.bias.grad is None
    assert all(torch.equal(a, b) for a, b in zip(closure.parameters(), plain.parameters(), strict=True))


class LoggingClosure(Closure):
    """With BatchNorm behind the closure, and a value logged in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.apply_net = lambda x: self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


def test_a_closure_is_measured_inside_a_trainer_and_training_is_the_same(tmp_path: Path) -> None:
    def train(callbacks: list[SLTMonitor]) -> tuple[dict[str, Tensor], float]:
        torch.manual_seed(3)
        module = LoggingClosure()
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[*callbacks],
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), 8))
        return module.state_dict(), float(trainer.callback_metrics["loss"])

    monitor = SLTMonitor(
        every_n_train_steps=3, num_chains=2, num_draws=6, num_burnin_steps=4, on_failure="raise", seed=1
    )
    alone, watched = train([]), train([monitor])
    assert [e.step for e in monitor.estimates] == [3, 6]
    assert alone[1] == watched[1]
    assert all(torch.equal(alone[0][k], watched[0][k]) for k in alone[0])


class Uncopyable(Base):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a socket cannot be copied")


@pytest.mark.parametrize("module", [Uncopyable, Closure])
def test_that_chains_run_in_place_is_said_once_a_run(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at every firing; and again in the next run of the same monitor. One call without a trainer says it too."""
    monitor = tiny_monitor(every_n_train_steps=1)
    said = lambda: sum("in place instead" in record.message for record in caplog.records)  # noqa: E731
    for runs in (1, 2):
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
        trainer.fit(module(), DataLoader(data(), 8))
        assert len(monitor.estimates) >= 3 and said() == runs
    estimate_llc(module(), data(), num_chains=1, num_draws=4, num_burnin_steps=2, sampler=SGLD(lr=1e-4))
    assert said() == 3


def test_a_hook_is_called_once_a_firing_not_once_a_step(tmp_path: Path) -> None:
    calls: list[int] = []
    monitor = fit(Hooked(calls), data(), tmp_path, on_failure="raise")
    assert len(monitor.estimates) == 2
    assert len(calls) == 6 + 2  # the six steps of training, and one look for each of two firings


@pytest.mark.parametrize("method", ["sequential", "auto"])
@pytest.mark.parametrize("kept", [ByClosure, ByDefault, ByInnerFunction, ByMethod, ByObject, Cleared])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_an_activation_that_a_hook_keeps_is_that_of_the_chains_weights(
    kept: type[Penalised], method: str, trained: bool, tmp_path: Path
) -> None:
    """Bit for bit the chains of the module that computes it in the step, whatever an earlier step has left behind."""
    traces = []
    for kind in (Direct, kept):
        module = kind()
        if trained:
            quiet_trainer(tmp_path, max_epochs=1).fit(module, DataLoader(data(), 8))
        before = {name: value.clone() for name, value in module.state_dict().items()}
        settings: dict[str, Any] = {"sampler": SGLD(lr=1e-3), "num_burnin_steps": 4, "method": method}
        traces.append(estimate_llc(module, data(), num_chains=3, num_draws=8, batch_size=8, **settings).trace)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.allclose(*traces, rtol=1e-4, atol=1e-5)
    assert float(traces[0].std()) > 0


def test_a_step_that_changes_its_batch_gets_a_copy_each_time(tmp_path: Path) -> None:
    monitor = fit(Pops(), Rows(data()), tmp_path, on_failure="raise")
    assert [e.step for e in monitor.estimates] == [3, 6]
    assert all(bool(torch.isfinite(e.trace).all()) for e in monitor.estimates)
    # halved once at every call, never again and again
    assert abs(monitor.estimates[0].init_loss) > 0.1


def test_a_step_that_gathers_across_ranks_is_refused_with_the_remedy() -> None:
    module = Gathers()
    steps.mute(module)
    with pytest.raises(ValueError, match=r"all_gather.*loss_fn"):
        module.training_step([torch.zeros(2, 3), torch.zeros(2, 1)], 0)
