"""On a GPU: training that is not touched, chains that repeat, agree with the references and do not wait on the host.

Left out where torch sees no GPU. Run them with ``CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m pytest tests/gpu``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import MALA, SGLD, LeimkuhlerMatthews, RMSpropSGLD, estimate_influence, estimate_llc
from lightning_slt.sampling.rng import preserve_rng
from tests.cases.make_references import load_references
from tests.cases.problems import CASES
from tests.integration import fsdp, models
from tests.integration.harness import Scenario, assert_same, steps_of, tiny_monitor
from tests.integration.models import Net, loaders, with_validation

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.timeout(300),
]

CALIBRATED: dict[str, Any] = {"sampler": None, "num_burnin_steps": None, "num_steps_bw_draws": None}


def on_gpu(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"accelerator": "gpu", "devices": 1, **changes}


def one_shard() -> dict[str, Any]:
    return on_gpu(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))()


@pytest.fixture(autouse=True)
def _launched_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of ranks that is one rank."""
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Convolutions(models.Net):
    """A convnet on 4 numbers seen as a 2 x 2 image, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(32, models.CLASSES),
        ).to(memory_format=torch.channels_last)  # fmt: skip


class Steady(models.Recurrent):
    """Without dropout: that of cuDNN has a state of its own which no seed sets back, so that no run repeats another."""

    def __init__(self) -> None:
        super().__init__()
        self.net.dropout = 0.0


TRAINING: dict[str, tuple[Any, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "32-true": (Net, on_gpu(), {}),
    "64-true": (Net, on_gpu(precision="64-true"), {}),
    "bf16-mixed": (Net, on_gpu(precision="bf16-mixed"), {}),
    "16-mixed": (Net, on_gpu(precision="16-mixed"), {}),
    "bf16-true": (Net, on_gpu(precision="bf16-true"), {}),
    "16-true": (models.Plain, on_gpu(precision="16-true"), {}),
    "deterministic": (Net, on_gpu(deterministic=True), {}),
    "convnet": (Convolutions, on_gpu(deterministic=True), {}),
    "recurrent": (Steady, on_gpu(), {}),
    "compiled submodule": (models.compiled_submodule, on_gpu(), {}),
    "random numbers in the step": (models.OwnRandomness, on_gpu(), {}),
    "batched": (Net, on_gpu(), {"method": "batched"}),
    "the faster method": (Net, on_gpu(), {"method": "auto"}),
    "calibrated": (Net, on_gpu(), {**CALIBRATED, "method": "auto"}),
    "calibrated bf16-mixed": (Net, on_gpu(precision="bf16-mixed"), {**CALIBRATED, "method": "auto"}),
    "preconditioned": (Net, on_gpu(), {"sampler": RMSpropSGLD(lr=1e-4)}),
    "influence": (Net, on_gpu(), {"probe": 8, "num_draws": 20}),
    "influence and susceptibility": (
        Net, on_gpu(), {"probe": 8, "num_draws": 20, "measures": ["influence", "susceptibility"]},
    ),
    "DDP of one rank": (Net, on_gpu(strategy="ddp"), {}),
    "FSDP2 of one rank": (fsdp.Sharded, one_shard, {}),
}  # fmt: skip


@pytest.mark.parametrize(("module", "trainer", "settings"), TRAINING.values(), ids=TRAINING)
def test_training_is_the_same(
    module: Any, trainer: Callable[[], dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    monitor = tiny_monitor(every_n_train_steps=4, **settings)
    scenario = Scenario(module, with_validation, trainer)
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.trainer.strategy.root_device.type == "cuda"
    assert steps_of(monitor) == [4, 8, 12]
    assert all(e.trace.isfinite().all() and e.init_loss > 0 for e in monitor.estimates)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_chains_in_a_process_of_their_own(device: str, precision: str, tmp_path: Path) -> None:
    """On the GPU that trains they give the numbers of chains inside training; on the CPU, others of the same size."""
    scenario = Scenario(Net, loaders, on_gpu(precision=precision))
    inline = tiny_monitor()
    beside = tiny_monitor(execution="background", devices=[device], when_full="wait", max_wait=120.0)
    assert_same(scenario.run(tmp_path / "inline", inline), scenario.run(tmp_path / "beside", beside))
    assert steps_of(beside) == steps_of(inline) == [4, 8, 12]
    for a, b in zip(beside.estimates, inline.estimates, strict=True):
        assert a.init_loss == pytest.approx(b.init_loss, rel=1e-2 if precision == "bf16-mixed" else 1e-5)
        if device == "cuda:0":
            torch.testing.assert_close(a.trace, b.trace, rtol=0.0, atol=0.0)


def test_warm_chains_go_on_after_a_resume(tmp_path: Path) -> None:
    """Data without an order to lose: the firing after a resume is that of the run in one piece."""

    def ordered() -> dict[str, Any]:
        return loaders(shuffle=False)

    whole, again = (tiny_monitor(every_n_epochs=1, **CALIBRATED) for _ in range(2))
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    Scenario(models.Plain, ordered, on_gpu(enable_checkpointing=True, callbacks=[kept])).run(tmp_path, whole)
    Scenario(models.Plain, ordered, on_gpu()).run(tmp_path, again, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert steps_of(whole) == steps_of(again) == [6, 12]
    torch.testing.assert_close(again.estimates[1].trace, whole.estimates[1].trace, rtol=0.0, atol=0.0)


# ------------------------------------------------------------------------------------------------------- the estimates


def gpu_case(name: str) -> tuple[Any, nn.Module]:
    case = CASES[name]()
    return case, copy.deepcopy(case.module).cuda()


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_the_same_seed_gives_the_same_numbers(method: str) -> None:
    case, module = gpu_case("digits-mlp-gamma100")
    settings: dict[str, Any] = {"num_draws": 20, "num_chains": 4, "method": method, "localization": case.gamma}
    before = torch.cuda.get_rng_state()
    first = estimate_llc(module, case.dataset, case.loss_fn, **settings)
    second = estimate_llc(module, case.dataset, case.loss_fn, **settings)
    torch.testing.assert_close(first.trace, second.trace, rtol=0.0, atol=0.0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert next(module.parameters()).is_cuda


def test_the_two_paths_agree_chain_by_chain() -> None:
    case, module = gpu_case("transformer")
    fixed: dict[str, Any] = {
        "sampler": SGLD(lr=1e-5), "num_draws": 20, "num_chains": 4, "num_burnin_steps": 0, "num_steps_bw_draws": 1,
        "localization": case.gamma,
    }  # fmt: skip
    alone = estimate_llc(module, case.dataset, case.loss_fn, method="sequential", **fixed)
    batched = estimate_llc(module, case.dataset, case.loss_fn, method="batched", **fixed)
    assert (alone.method, batched.method) == ("sequential", "batched")
    torch.testing.assert_close(alone.trace, batched.trace, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["digits-mlp-gamma100", "transformer", "convnet-gamma100"])
def test_a_valid_estimate_within_two_standard_errors_of_the_reference(name: str) -> None:
    case, module = gpu_case(name)
    reference = load_references()[name]
    e = estimate_llc(module, case.dataset, case.loss_fn, localization=case.gamma)
    z = (e.mean - reference["mean"]) / math.hypot(e.se, reference["se"])
    what = f"{name}: {e.mean:.4g} +- {e.se:.2g} for {reference['mean']:.4g}, {z:+.1f}, {e.method}, {e.reasons}"
    print(what)
    assert abs(z) <= 2, what
    assert e.valid, what


def test_mala_accepts_and_agrees_with_the_truth() -> None:
    case, module = gpu_case("rrr-8-4-8-r2")
    reference = load_references()["rrr-8-4-8-r2"]
    e = estimate_llc(module, case.dataset, case.loss_fn, sampler=MALA(), localization=case.gamma, full_batch=True)
    assert abs(e.mean - reference["mean"]) <= 2 * math.hypot(e.se, reference["se"])


def test_influence_is_that_of_the_cpu_up_to_its_noise() -> None:
    """Other noise on another device. Between seeds on the CPU the rank correlation of self-influence is 0.996."""
    case, module = gpu_case("digits-mlp-gamma100")
    data = TensorDataset(*[tensor[:200] for tensor in case.data])
    there = estimate_influence(module, data, None, case.loss_fn).self_influence
    here = estimate_influence(case.module, data, None, case.loss_fn).self_influence
    ranks = torch.stack([there.cpu().argsort().argsort(), here.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.98


# ------------------------------------------------------------------------------------------------------ what it costs


def waits(work: Callable[[], object]) -> list[str]:
    """Where the host waited for the GPU, as torch warns of it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, preserve_rng():
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


@pytest.mark.parametrize("method", ["sequential", "batched"])
@pytest.mark.parametrize(
    "sampler",
    [SGLD(lr=1e-5), RMSpropSGLD(lr=1e-5), LeimkuhlerMatthews(lr=1e-5)],
    ids=["SGLD", "RMSpropSGLD", "shared noise"],
)
def test_no_step_waits_for_the_gpu(method: str, sampler: Any) -> None:
    """Twice the steps, and as many waits."""
    case, module = gpu_case("digits-mlp-gamma100")

    def firing(draws: int) -> Callable[[], object]:
        return lambda: estimate_llc(
            module, case.dataset, case.loss_fn, sampler=sampler, num_draws=draws, num_chains=2, num_burnin_steps=100,
            num_steps_bw_draws=1, localization=case.gamma, method=method,
        )  # fmt: skip

    firing(100)()
    few, many = waits(firing(100)), waits(firing(300))
    assert few, "the warnings were not seen"
    extra = sorted(set(many) - set(few))
    assert len(many) == len(few), (len(few), len(many), extra, {place: many.count(place) for place in set(many)})


class Wide(nn.Module):
    """16.8 million weights in 16 layers, so that weights and not activations fill the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(16) for m in (nn.Linear(1024, 1024), nn.Tanh())])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mean_square(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize(("rows", "method"), [(4, "batched"), (16384, "sequential")])
def test_chains_share_their_calls_where_calls_are_what_takes_the_time(rows: int, method: str) -> None:
    """A GPU that is busy with the products of one chain is not asked to hold those of several."""
    torch.manual_seed(0)
    module, x = Wide().cuda(), torch.randn(2 * rows, 1024)
    e = estimate_llc(
        module, TensorDataset(x, x), mean_square, sampler=SGLD(lr=1e-7), num_chains=2, num_draws=4, num_burnin_steps=0,
        num_steps_bw_draws=1, batch_size=rows, localization=1.0,
    )  # fmt: skip
    assert e.method == method


@pytest.mark.parametrize("chains", [1, 4, 8])
def test_chains_one_after_another_hold_two_copies_beside_their_own(chains: int) -> None:
    """``w*``, one gradient and the noise of 2^24 weights; half a copy for activations and what backward is at."""
    torch.manual_seed(0)
    module, x = Wide().cuda(), torch.randn(64, 1024)
    size = 4 * sum(p.numel() for p in module.parameters())

    settings: dict[str, Any] = {"num_burnin_steps": 4, "num_steps_bw_draws": 1, "batch_size": 8, "localization": 1.0}
    mean_square(module, (x[:8].cuda(), x[:8].cuda())).backward()  # the workspace of cuBLAS, which stays
    module.zero_grad()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    estimate_llc(
        module, TensorDataset(x, x), mean_square, sampler=SGLD(lr=1e-7), num_chains=chains, num_draws=8,
        method="sequential", **settings,
    )  # fmt: skip
    copies = (torch.cuda.max_memory_allocated() - before) / size
    print(f"{chains} chains: {copies:.2f} copies")
    assert copies <= chains + 2 + 1.5
    assert torch.cuda.memory_allocated() - before < 0.1 * size


def test_a_monitor_leaves_no_memory_behind(tmp_path: Path) -> None:
    """What chains held is free again: what training holds grows as it does without a monitor."""
    held: list[int] = []

    class Look(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            held.append(torch.cuda.memory_allocated())

    scenario = Scenario(Look, loaders, on_gpu(max_epochs=4))
    scenario.run(tmp_path / "without")
    scenario.run(tmp_path / "with", tiny_monitor(every_n_train_steps=1))
    assert len(held) == 48
    assert held[47] - held[27] == held[23] - held[3] > 0  # the trace of the run itself, and nothing else
