"""Scenarios of ranks that share the weights of one model (FSDP2), run by :mod:`tests.integration.ranks`.

With one rank a scenario runs without any strategy: that is what the others are held against.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here once, and not in each rank at its first pass of shards
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

from lightning_slt import LeimkuhlerMatthews, RMSpropSGLD, SLTMonitor, TransitionMonitor
from lightning_slt.callbacks import distribution
from lightning_slt.sampling import calibration
from tests.integration import models
from tests.integration.ddp_parts import Firing, Unreadable
from tests.integration.harness import Scenario, TrainingTrace, assert_same, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation
from tests.integration.scripted import Scripted, jump

LIMITS: dict[str, float] = {}
Result = dict[str, Any]


def shards_of(world: int, tensor_parallel: int = 1, **kwargs: Any) -> Callable[[], dict[str, Any]]:
    """A trainer whose ``world`` ranks hold a part of the weights each; of one process without a strategy where it is
    1."""

    def make() -> dict[str, Any]:
        if world == 1:
            return dict(kwargs)
        sizes = {"data_parallel_size": world // tensor_parallel, "tensor_parallel_size": tensor_parallel}
        strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo")
        return {"devices": world, "strategy": strategy, **kwargs}

    return make


def shard(module: Any, **settings: Any) -> None:
    """Each layer of ``module.net`` alone, and what is left; nothing without a mesh."""
    mesh = module._device_mesh
    if mesh is None:
        return
    for layer in module.net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh["data_parallel"], **settings)
    fully_shard(module.net, mesh=mesh["data_parallel"], **settings)


class Sharded(Net):
    """BatchNorm, dropout, Adam, a scheduler."""

    def configure_model(self) -> None:
        shard(self)


class Held(Sharded):
    """Weights and statistics that stay where they began: the same on any number of ranks, whose batches differ."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net[1].momentum = 0.0


def shard_in_two(module: Any) -> None:
    """The first two layers together, and the last one: fewer collectives a step, where there are many steps."""
    mesh = module._device_mesh
    if mesh is not None:
        fully_shard([module.net[0], module.net[1]], mesh=mesh["data_parallel"])
        fully_shard(module.net, mesh=mesh["data_parallel"])


class ShardedInTwo(Sharded):
    def configure_model(self) -> None:
        shard_in_two(self)


class HeldInTwo(Held):
    def configure_model(self) -> None:
        shard_in_two(self)


def said(monitor: SLTMonitor, trace: TrainingTrace, **more: Any) -> Result:
    return {
        "estimates": [e.state_dict() for e in monitor.estimates],
        "num_batches": trace.num_batches,
        "displacements": monitor._course.memory.displacements,
        **more,
    }


SHORT = 8
"""Draws where what is particular about a scenario is there at each step: those of :func:`fixed_step` are more."""


def _held(
    folder: Path, world: int, make: Callable[[], Any] = Held, trainer: dict[str, Any] | None = None, **settings: Any
) -> Result:
    monitor = tiny_monitor(**{"at_steps": [0], "num_chains": 3, "num_draws": 20, **settings})
    scenario = Scenario(make, loaders, shards_of(world, max_epochs=1, **(trainer or {})))
    return said(monitor, scenario.run(folder, monitor))


def fixed_step(folder: Path, world: int) -> Result:
    return _held(folder, world)


def restricted(folder: Path, world: int) -> Result:
    """Only the last layer moves; its gradients alone are computed. Draws of steps enough to tell a slope."""
    return _held(folder, world, restrict="net.4.*", num_draws=SHORT, num_steps_bw_draws=10)


def within_layers(folder: Path, world: int) -> Result:
    """Of what is gathered together some moves and some does not; training is the same."""
    restrict = ["net.0.weight", "net.4.bias"]
    if world > 1:
        monitor = tiny_monitor(every_n_train_steps=2, restrict=restrict)
        Scenario(Sharded, loaders, shards_of(world)).assert_undisturbed(folder / "net", monitor)
    return _held(folder / "held", world, restrict=restrict, num_draws=SHORT)


class Frozen(Held):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)
        self.net[4].bias.requires_grad_(False)


def frozen(folder: Path, world: int) -> Result:
    """A layer that does not train, and a part of one."""
    if world > 1:
        scenario = Scenario(Frozen, loaders, shards_of(world))
        scenario.assert_undisturbed(folder / "net", tiny_monitor(every_n_train_steps=2))
    return _held(folder / "held", world, Frozen, num_draws=SHORT)


def defaults(folder: Path, world: int) -> Result:
    """Two short chains whose step, burn-in and length are found."""
    monitor = SLTMonitor(at_steps=[0], on_failure="raise", num_chains=2, num_draws=12)
    return said(monitor, Scenario(HeldInTwo, loaders, shards_of(world, max_epochs=1)).run(folder, monitor))


def _short_search() -> None:
    """A metric of a fifth of the steps: each rank's part has its moments from the first of them on."""
    calibration.METRIC_ROUNDS = (5, 5, 10, 10)


def preconditioned(folder: Path, world: int) -> Result:
    """A metric learnt from the gradients of the chains, each rank's part on that rank."""
    _short_search()
    return _held(folder, world, HeldInTwo, sampler=RMSpropSGLD(lr=1e-4), num_burnin_steps=24, num_draws=SHORT)


def shared_noise(folder: Path, world: int) -> Result:
    """Each rank's part of the noise of two steps."""
    return _held(folder, world, sampler=LeimkuhlerMatthews(lr=1e-4), num_draws=SHORT)


def moments_of_the_optimiser(folder: Path, world: int) -> Result:
    """The metric begins as that of training's Adam, whose state is sharded as the weights are; some shards are
    empty."""
    _short_search()
    # a seed whose chain does not run downhill: nothing would be kept of that one
    monitor = tiny_monitor(at_steps=[1], num_chains=1, sampler=RMSpropSGLD(lr=1e-4), seed=1)
    trace = Scenario(ShardedInTwo, loaders, shards_of(world, max_epochs=1)).assert_undisturbed(folder, monitor)
    return said(monitor, trace, preconditioner=monitor._course.memory.preconditioner)


def one_shard(folder: Path, world: int) -> Result:
    """The strategy with a single rank: DTensors in one piece."""
    os.environ.update(LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    return _held(folder, world, trainer={"strategy": strategy, "devices": 1})


class Split(Plain):
    """Two layers, cut along their hidden width over the ranks of a tensor-parallel group, then sharded."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def configure_model(self) -> None:
        if self._device_mesh is None:
            return
        mesh = self._device_mesh["tensor_parallel"]
        if mesh.size() > 1:
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if self._device_mesh["data_parallel"].size() > 1:
            shard(self)


def tensor_parallel(folder: Path, world: int) -> Result:
    """Two ranks: tensor-parallel alone; four: sharded as well."""
    return _held(folder, world, Split, {"tensor_parallel": 2} if world > 1 else {}, num_draws=SHORT)


def _precision(folder: Path, world: int, precision: Any, make: Any = Sharded, held: Any = Held) -> Result:
    """Training is the same on two ranks; what is handed back is of weights that stay where they began."""
    if world > 1:
        scenario = Scenario(make, loaders, shards_of(world, precision=precision))
        scenario.assert_undisturbed(folder / "net", tiny_monitor(every_n_train_steps=4))
    return _held(folder / "held", world, held, {"precision": precision})


def bf16_mixed(folder: Path, world: int) -> Result:
    return _precision(folder, world, "bf16-mixed")


def bf16_true(folder: Path, world: int) -> Result:
    return _precision(folder, world, "bf16-true")


def fp16_true(folder: Path, world: int) -> Result:
    """Not with Adam, whose epsilon is zero in float16."""
    return _precision(folder, world, "16-true", lambda: Split(lr=0.1), Split)


class HeldInBfloat16(Held):
    """Casts, so that in one piece too it is computed in bfloat16, on weights that are rounded from float32 ones."""

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0].bfloat16()), batch[1])


class SplitInFloat16(Split):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0].half()), batch[1])


def bf16_masters(folder: Path, world: int) -> Result:
    return _held(folder, world, HeldInBfloat16, {"precision": "bf16-true"})


def fp16_masters(folder: Path, world: int) -> Result:
    return _held(folder, world, SplitInFloat16, {"precision": "16-true"})


class Draws(Held):
    """Adds noise to its input: on every rank the same numbers in a step of a chain."""

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0] + torch.randn_like(batch[0])), batch[1])


def draws(folder: Path, world: int) -> Result:
    return _held(folder, world, Draws, num_draws=SHORT)


class Policy(Plain):
    """The shards in float32, products and gathered weights in bfloat16: ``fully_shard``'s own way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def configure_model(self) -> None:
        shard(self, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32), reshard_after_forward=False)


def policy(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2)
    return said(monitor, Scenario(Policy, loaders, shards_of(world)).assert_undisturbed(folder, monitor))


def undisturbed(folder: Path, world: int) -> Result:
    """Three firings, of which the later ones start from the chains of the first."""
    monitor = tiny_monitor(every_n_train_steps=2)
    trace = Scenario(Sharded, with_validation, shards_of(world)).assert_undisturbed(folder, monitor)
    metrics = {k: float(v) for k, v in trace.trainer.callback_metrics.items() if k.startswith("slt")}
    return said(monitor, trace, metrics=metrics)


def accumulation(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=1)
    trainer = shards_of(world, accumulate_grad_batches=3, max_epochs=1)
    trace = Scenario(Sharded, lambda: loaders(28), trainer).assert_undisturbed(folder, monitor)
    return said(monitor, trace, global_step=trace.trainer.global_step)


class Fails(nn.Module):
    """Between the layers, in chains, when it is told to."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed and not self.training and x.requires_grad:
            raise RuntimeError("failed between the layers")
        return x


class FailsInChain(Sharded):
    """On all ranks: between two sharded layers at the first firing, in the loss at the second, in the backward pass at
    the third; the fourth is well."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, Fails())

    def loss(self, batch: Any) -> Tensor:
        step = self.trainer.global_step
        in_chain = not self.training and torch.is_grad_enabled()
        self.net[3].armed = in_chain and step == 2
        loss = super().loss(batch)
        if in_chain and step == 4:
            raise RuntimeError("failed in the loss")
        if in_chain and step == 6:
            loss.register_hook(_fail)
        return loss


def _fail(_: Tensor) -> None:
    raise RuntimeError("failed on the way back")


def fails_in_chain(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = shards_of(world, max_epochs=3)
        trace = Scenario(FailsInChain, loaders, trainer).assert_undisturbed(folder, monitor)
    texts = [str(w.message) for w in caught if "failed" in str(w.message)]
    return said(monitor, trace, warnings=texts)


class FailsAlone(Sharded):
    """On the second rank only, between two layers that all ranks compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, Fails())

    def loss(self, batch: Any) -> Tensor:
        in_chain = not self.training and torch.is_grad_enabled()
        self.net[3].armed = in_chain and self.trainer.global_rank == 1
        return super().loss(batch)


def fails_alone(folder: Path, world: int) -> Result:
    """What each rank ends with, well before the minutes that a rank waits for another."""
    distribution.PATIENCE = timedelta(seconds=2)
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    try:
        Scenario(FailsAlone, loaders, shards_of(world)).run(folder, monitor)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"raised": ""}


def unreadable_on_one_rank(folder: Path, world: int) -> Result:
    """Outside the pass that needs all ranks, a failure of one is one of all, and training goes on."""
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario = Scenario(Sharded, lambda: loaders(dataset=Unreadable()), shards_of(world))
        trace = scenario.run(folder, Firing(True), monitor, Firing(False))
    return said(monitor, trace, warnings=[str(w.message) for w in caught if "is left out" in str(w.message)])


def resume(folder: Path, world: int) -> Result:
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    first, again = tiny_monitor(every_n_train_steps=2), tiny_monitor(every_n_train_steps=2)
    saving = shards_of(world, callbacks=[saver], enable_checkpointing=True, max_epochs=1)
    Scenario(Sharded, loaders, saving).run(folder, first)
    checkpoint = str(folder / "step=3.ckpt")
    without = Scenario(Sharded, loaders, shards_of(world)).run(folder, ckpt_path=checkpoint)
    with_monitor = Scenario(Sharded, loaders, shards_of(world)).run(folder, again, ckpt_path=checkpoint)
    assert_same(without, with_monitor)
    return said(again, with_monitor, before=[e.state_dict() for e in first.estimates])


class OwnData(torch.utils.data.IterableDataset):
    """Without numbers, so that batches that training saw are used again; other samples on each rank."""

    def __iter__(self) -> Any:
        samples = models.tensors(48)
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return iter([samples[i] for i in range(24 * rank, 24 * rank + 24)])


class SeesBatches(Held):
    def loss(self, batch: Any) -> Tensor:
        models.chain_saw(self, batch[0].sum())
        return super().loss(batch)


def data_of_its_own(folder: Path, world: int) -> Result:
    """Each rank trains on other samples; a chain has one minibatch on all of them."""
    monitor = tiny_monitor(at_steps=[6], num_draws=20, num_samples=24)
    scenario = Scenario(SeesBatches, lambda: loaders(dataset=OwnData()), shards_of(world, max_epochs=1))
    return said(monitor, scenario.run(folder, monitor), seen=[float(x) for x in models.CHAIN_SAW])


def transitions(folder: Path, world: int) -> Result:
    """The weights of a transition are kept whole."""
    monitor, watch = Scripted(lambda step: jump(step, at=16)), TransitionMonitor()
    trainer = shards_of(world, max_epochs=10)
    trace = Scenario(Sharded, loaders, trainer).assert_undisturbed(folder, watch, monitor)
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trace.module.state_dict().items()}
    return said(monitor, trace, checkpoints=dict(watch.reports[0].checkpoints), whole=whole)


class FlatLoss(Plain):
    """A loss that does not depend on the 4,000 weights: all that moves them is the noise."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net = nn.Sequential(nn.Linear(4, 800), nn.Linear(800, 2, bias=False))

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        models.chain_saw(self, torch.zeros(()))
        return 0.0 * self.net(batch[0]).sum() + batch[0].mean() ** 2


def noise(folder: Path, world: int) -> Result:
    """Where two chains are after 6 steps."""
    monitor = tiny_monitor(at_steps=[0], localization=0.0)
    return said(monitor, Scenario(FlatLoss, loaders, shards_of(world, max_epochs=1)).run(folder, monitor))


SCENARIOS: dict[str, Callable[[Path, int], Result]] = {
    f.__name__: f
    for f in (
        fixed_step,
        restricted,
        within_layers,
        frozen,
        defaults,
        preconditioned,
        shared_noise,
        moments_of_the_optimiser,
        tensor_parallel,
        one_shard,
        bf16_mixed,
        bf16_true,
        fp16_true,
        bf16_masters,
        fp16_masters,
        draws,
        policy,
        undisturbed,
        accumulation,
        fails_in_chain,
        fails_alone,
        unreadable_on_one_rank,
        resume,
        data_of_its_own,
        transitions,
        noise,
    )
}
ALONE = (
    "fixed_step", "restricted", "within_layers", "frozen", "defaults", "preconditioned", "shared_noise",
    "tensor_parallel", "one_shard", "bf16_mixed", "bf16_true",
    "fp16_true", "bf16_masters", "fp16_masters", "draws", "data_of_its_own", "noise",
)  # fmt: skip
"""Also in one process without a strategy, which the ranks are held against; ``one_shard`` with it."""
RUNS: tuple[tuple[str, int], ...] = (
    *((name, 2) for name in SCENARIOS if name != "one_shard"),
    *((name, 1) for name in ALONE),
    *((name, 4) for name in ("fixed_step", "tensor_parallel", "noise", "moments_of_the_optimiser")),
)
