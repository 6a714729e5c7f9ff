"""What chains hold at once, in copies of the weights and beside the user's module: the profiler's own record."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import estimate_llc
from lightning_slt.sampling import chains as chains_module
from lightning_slt.sampling import chunk, paths
from lightning_slt.sampling.engines import BatchedEngine, SequentialEngine, sequential_engine
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.gradients import IN_PARTS
from lightning_slt.sampling.layout import BLOCK
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import GRADIENT_BUDGET, choose_engine, chunk_width, observe
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.step_size import largest_step_of_chains
from lightning_slt.sampling.window import Window
from tests.sampling.helpers import make_chains, mean_squared, regression

WIDTH, DEPTH, LARGE = 256, 8, 16
DRAWS: dict[str, Any] = {"num_draws": 8, "num_burnin_steps": 4, "num_steps_bw_draws": 1, "batch_size": 2}


def module(depth: int, width: int) -> nn.Module:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


def peak_copies(chains: int, method: str, sampler: SGLD | None, depth: int = DEPTH, width: int = WIDTH) -> float:
    """Allocations larger than the activations of a batch, added up as they come and go."""
    torch.manual_seed(0)
    net, data = module(depth, width), TensorDataset(torch.randn(8, width), torch.randn(8, width))
    return peak_of(
        lambda: estimate_llc(
            net, data, mean_squared, sampler=sampler, num_chains=chains, localization=1.0, method=method, **DRAWS
        ),
        net,
        least=2 * chains * width * 4,
    )


def peak_of(work: Callable[[], object], net: nn.Module, least: int) -> float:
    """What ``work`` allocates and holds at once in pieces of more bytes than ``least``, in copies of the weights."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes() if abs(event.nbytes()) > least else 0
        peak = max(peak, now)
    return peak / sum(p.numel() * p.element_size() for p in net.parameters())


def one_layer(depth: int = DEPTH, width: int = WIDTH) -> float:
    """The gradient that backward makes of one parameter before it is added."""
    return width / (depth * (width + 1))


def block(depth: int = DEPTH) -> float:
    """The noise of a block of weights."""
    weights = depth * (WIDTH * WIDTH + WIDTH)
    return min(BLOCK["cpu"], weights) / weights


@pytest.mark.parametrize(
    ("chains", "sampler"), [(2, SGLD(lr=1e-7)), (5, SGLD(lr=1e-7)), (2, None)], ids=["2", "5", "calibrated"]
)
def test_chains_one_after_another_hold_two_copies_beside_their_own(chains: int, sampler: SGLD | None) -> None:
    """``w*`` and one gradient; nothing more while the step is looked for."""
    assert peak_copies(chains, "sequential", sampler) <= chains + 2 + one_layer() + block() + 0.02


@pytest.mark.parametrize(
    ("chains", "more", "sampler"),
    [
        pytest.param(4, 0.0, SGLD(lr=1e-7), id="4-given"),
        pytest.param(2, 0.0, SGLD(lr=1e-7), id="2-given"),
        pytest.param(2, 0.0, None, id="2-calibrated", marks=pytest.mark.slow),
        pytest.param(1, one_layer(LARGE), SGLD(lr=1e-7), id="1-given"),
        pytest.param(1, one_layer(LARGE), None, id="1-calibrated"),
    ],
)
def test_large_weights_are_held_no_more_than_twice_beside_the_chains_own(
    chains: int, more: float, sampler: SGLD | None
) -> None:
    """``w*`` and one gradient, and two blocks of 128 KiB. A single chain has no other's memory to look for its step in,
    nor for the line to where it is: the gradient of one parameter more."""
    assert DEPTH * (WIDTH * WIDTH + WIDTH) * 4 < IN_PARTS <= LARGE * (WIDTH * WIDTH + WIDTH) * 4
    assert peak_copies(chains, "sequential", sampler, LARGE) <= chains + 2 + more + 2 * block(LARGE) + 0.01


@pytest.mark.parametrize(
    ("depth", "width", "num_chains"), [(DEPTH, WIDTH, 2), (LARGE, WIDTH, 1), (LARGE, WIDTH, 3), (1, 5 * WIDTH, 2)]
)
def test_the_search_for_a_step_around_chains_takes_two_copies_of_the_weights(
    depth: int, width: int, num_chains: int
) -> None:
    """Beside the chains, which stay where they are, ``w*`` and the gradient of small weights, whose memory it takes."""
    torch.manual_seed(0)
    net = module(depth, width)
    chains = make_chains(net, regression(4, width, width), mean_squared, num_chains=num_chains, batch_size=2)
    chains.advance(2, 1e-7)
    before = chains.weights.clone()
    peak = peak_of(lambda: largest_step_of_chains(chains, 0), net, least=4 * width * 4)
    assert 2.0 <= peak <= 2 + one_layer(depth, width) + 0.01
    assert torch.equal(chains.weights, before)


@pytest.mark.parametrize(("depth", "width", "more", "blocks"), [(LARGE, WIDTH, 0.0, 2), (1, 5 * WIDTH, 0.5, 5)])
def test_the_noise_of_minibatches_takes_no_more(
    depth: int, width: int, more: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a copy for one gradient, and the other as it comes: with it told at every step the peak is no higher. Where
    one parameter is all there is, its gradient is there with half a copy of it, and three blocks between them."""
    monkeypatch.setattr(chunk, "NOISE_EVERY", 2)
    monkeypatch.setattr(chunk, "NOISE_LAG", 1)
    monkeypatch.setattr(chains_module, "NOISE_LAG", 1)
    few = blocks * BLOCK["cpu"] / (depth * width * (width + 1))
    assert peak_copies(2, "sequential", SGLD(lr=1e-7), depth, width) <= 4 + more + few + 0.015


@pytest.mark.parametrize(("chains", "sampler"), [(4, SGLD(lr=1e-7)), (2, None)], ids=["given", "calibrated"])
def test_a_batched_chunk_holds_its_gradients_once_and_no_second_copy_of_the_anchor(
    chains: int, sampler: SGLD | None
) -> None:
    width = min(chains, 3)  # of 2.1 MB each
    assert peak_copies(chains, "batched", sampler) <= chains + width + 1 + width * (one_layer() + block()) + 0.02


@pytest.mark.parametrize("through", ["backward", "grad"])
def test_an_engine_that_is_given_up_leaves_at_once(through: str) -> None:
    """With the chains' weights, and the frozen ones of its module: no collector of cycles runs between two trials."""

    def mean(net: nn.Module, batch: Any) -> Tensor:
        return net(batch).square().mean()

    objective, window = Objective(nn.Linear(4, 4), mean), Window([torch.ones(2, 4), torch.zeros(2, 4)])
    gc.collect()
    gc.disable()
    try:
        engine = BatchedEngine(objective, 2, through)
        weights = objective.anchor.repeat(2, 1)
        engine.bind(weights, torch.empty_like(weights))
        engine(window, torch.tensor([0, 1]))
        held = weakref.ref(engine)
        del engine
        assert held() is None
    finally:
        gc.enable()


def test_what_is_observed_of_a_step_is_not_held_by_its_own_graph() -> None:
    """An output that its node had saved, and that had the node, stayed for good, and a copy of the weights with it."""
    objective = Objective(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), mean_squared)
    assert observe(objective, tuple(t[:16] for t in regression().tensors)).saved_bytes >= 16 * (4 + 3) * 4
    held = [weakref.ref(parameter) for parameter in objective.parameters()]
    del objective
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


def test_the_gradients_of_a_chunk_stay_within_their_budget() -> None:
    def squares(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean()

    objective = Objective(nn.Linear(2**9, 2**9, bias=False), squares)  # 1 MiB
    assert GRADIENT_BUDGET == 2**23
    assert chunk_width(objective, 0, 32) == 8
    assert chunk_width(objective, 2**28, 32) == 1


def test_a_model_too_large_for_two_gradients_is_batched_where_that_is_asked_for_and_not_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)  # never "too slow to try" on a busy machine

    def squares(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean()

    objective = Objective(nn.Linear(2**11, 2**11, bias=False), squares)  # 16 MiB
    assert chunk_width(objective, 0, 8) == 1
    assert chunk_width(objective, 0, 8, least=2) == 2
    window = source_of(TensorDataset(torch.randn(4, 2**11), torch.randn(4, 1)), 2, objective.device, 0).window(0)
    alone = choose_engine(objective, window, 8)
    assert (alone.engine.method, alone.reason) == ("sequential", "two chains do not fit the memory budget")
    assert choose_engine(objective, window, 8, "batched").engine.width == 2


def test_the_twin_of_the_batched_path_takes_the_anchors_memory_and_none_of_training() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight  # tied
    objective = Objective(net, mean_squared, restrict=["0.weight", "0.bias"])
    sequential_engine(objective)
    twin = objective.copy_module()
    live = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert all(p.untyped_storage().data_ptr() not in live for p in twin.parameters())
    anchor = objective.anchor.untyped_storage().data_ptr()
    shared = {n for n, p in twin.named_parameters() if p.untyped_storage().data_ptr() == anchor}
    assert shared == {"0.weight", "0.bias"}
    assert twin[2].weight is twin[0].weight  # type: ignore[index]
    frozen = dict(objective.module.named_parameters())["2.bias"]
    assert dict(twin.named_parameters())["2.bias"].data_ptr() != frozen.data_ptr()


def on_a_clock(monkeypatch: pytest.MonkeyPatch, alone: float, together: Callable[[int, int], float]) -> list[int]:
    """A step of one chain takes ``alone``, the n-th of k chains at once ``together(k, n)``; how many there were in each
    of those."""
    clock, sizes = 0.0, []
    step, batched = SequentialEngine.step, BatchedEngine.__call__

    def one(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal clock
        clock += alone
        return step(self, *args, **kwargs)

    def several(self: Any, window: Any, indices: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal clock
        sizes.append(len(indices))
        clock += together(len(indices), len(sizes))
        return batched(self, window, indices, **kwargs)

    monkeypatch.setattr(SequentialEngine, "step", one)
    monkeypatch.setattr(BatchedEngine, "__call__", several)
    monkeypatch.setattr(paths, "_now", lambda device: clock)
    return sizes


@pytest.mark.parametrize(
    ("fixed", "each", "method", "tried"),
    [
        pytest.param(1.0, 0.05, "batched", [2, 8], id="calls are what takes the time"),
        pytest.param(0.0, 1.0, "sequential", [2], id="products are"),
        pytest.param(0.3, 0.9, "sequential", [2], id="two are faster by little, and more by no more"),
        pytest.param(1.9, 0.05, "batched", [2, 8], id="two are no faster, eight are"),
    ],
)
def test_two_chains_are_tried_before_as_many_as_fit_where_those_would_fill_a_gpu(
    fixed: float, each: float, method: str, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of k chains at once takes fixed + each k on this clock, one alone takes 1: 8 gain 8 / (fixed + 8 each)."""
    sizes = on_a_clock(monkeypatch, 1.0, lambda chains, calls: fixed + each * chains)
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)
    monkeypatch.setattr(paths, "FEW_FIRST", ("cpu",))
    objective = Objective(nn.Linear(4, 4), mean_squared)
    window = source_of(TensorDataset(torch.randn(8, 4), torch.randn(8, 4)), 2, objective.device, 0).window(0)
    choice = choose_engine(objective, window, 8)
    assert choice.engine.method == method
    assert sorted(set(sizes) - {1}) == tried
    if method == "batched":
        assert choice.reason.startswith(f"{8 / (fixed + 8 * each):.1f} times the speed")
    else:
        assert choice.reason == f"batched would be {8 / (fixed + 8 * each):.2f} times as fast, no gain"


@pytest.mark.parametrize(
    ("unit", "slow", "method", "timed"),
    [
        pytest.param(1e-4, 1, "batched", 4, id="a short step that had to wait is timed again"),
        pytest.param(1e-4, 9, "sequential", 4, id="short steps that are slow are not kept"),
        pytest.param(1.0, 9, "sequential", 1, id="a long step is not taken twice to see that it is hopeless"),
    ],
)
def test_a_machine_that_is_busy_for_a_moment_does_not_decide_the_path(
    unit: float, slow: int, method: str, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of one chain takes a unit on this clock, of two at once a unit too, but 20 for the first ``slow``."""
    # the first is compared with the other path, not timed
    sizes = on_a_clock(monkeypatch, unit, lambda chains, calls: 20 * unit if 1 < calls <= 1 + slow else unit)
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)
    objective = Objective(nn.Linear(4, 4), mean_squared)
    window = source_of(TensorDataset(torch.randn(8, 4), torch.randn(8, 4)), 2, objective.device, 0).window(0)
    assert choose_engine(objective, window, 2).engine.method == method
    assert len(sizes) == 1 + timed


@pytest.mark.parametrize(("each", "ratio"), [(14.2, "0.07"), (3.0, "0.33"), (1.5, None), (0.1, None)])
def test_several_chains_at_once_are_said_to_be_slow_where_they_were_asked_for(
    each: float, ratio: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step of k chains at once takes ``each`` k on this clock, one alone takes 1."""
    on_a_clock(monkeypatch, 1.0, lambda chains, calls: each * chains)
    net, data = nn.Linear(4, 4), regression(8, 4, 4)
    for method in ("batched", "auto", "sequential"):
        caplog.clear()
        make_chains(net, data, mean_squared, num_chains=4, method=method)
        said = [r.getMessage() for r in caplog.records if "speed" in r.getMessage()]
        assert len(said) == (method == "batched" and ratio is not None)
        assert all(f"have {ratio} times the speed of one after another. method='auto'" in text for text in said)


def _high_water() -> float:
    """Megabytes that the process has held at once since the mark was set to what it holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="of Linux: the high-water mark is set anew")
def test_what_is_read_off_the_chains_does_not_hold_the_heap_apart() -> None:
    """Products of 0.8 MB that each reading makes and drops: small tensors that were kept between them had held their
    places free, 2.5 MB a reading and 100 MB here."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    chains = make_chains(net, regression(64, 64, 10), mean_squared, num_chains=8, method="batched")
    chains.advance(20, 1e-6)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    segment = chains.advance(160, 1e-6)
    assert segment.grad_square.shape == (8, 40)
    assert _high_water() - before < 30.0
