"""Two ranks on the CPU (gloo) with a part of the weights each: the chains are those of the whole model, and training
is what it is without them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_slt import RMSpropSGLD
from tests.integration.fsdp import RUNS
from tests.integration.ranks import assert_ranks_agree, estimates_of, launched_once, results_of

TIMEOUT = 900.0
"""Seconds for all the scenarios; each has a limit of its own, see :mod:`tests.integration.ranks`."""

Shapes = tuple[tuple[int, ...], ...]
"""Of the moving parameters, in order."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results."""
    return launched_once(tmp_path_factory, "fsdp", "fsdp", RUNS, TIMEOUT)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        *(
            (name, 2)
            for name in ("fixed_step", "restricted", "within_layers", "frozen", "preconditioned", "shared_noise")
        ),
        *((name, 2) for name in ("defaults", "bf16_mixed", "draws")),
        *((name, world) for name in ("tensor_parallel",) for world in (2, 4)),
        ("fixed_step", 4),
    ],
)
def test_the_chains_are_those_of_the_model_in_one_piece(name: str, world: int, folder: Path) -> None:
    """Four ranks are more than some weights have rows: some of their shards are empty."""
    (shared,) = assert_ranks_agree(results_of(folder, name, world), [0])
    assert (shared.method, shared.num_chains) == ("sequential", 2 if name == "defaults" else 3)
    (alone,) = estimates_of(results_of(folder, name, 1)[0])
    scale = float(alone.trace.abs().max())
    assert scale > 0
    # a step found to the last bit but one moves all that follows; tensor-parallel sums are in another order
    tolerance = 1e-5 if name in ("defaults", "tensor_parallel") else 1e-6
    torch.testing.assert_close(shared.trace, alone.trace, rtol=0.0, atol=tolerance * scale)
    assert (shared.num_weights, shared.num_burnin_steps) == (alone.num_weights, alone.num_burnin_steps)
    moving = {"restricted": 18, "within_layers": 34, "frozen": 32, "tensor_parallel": 58}
    assert shared.num_weights == moving.get(name, 74)
    for field in ("step_size", "init_loss", "localization", "virial", "step_bias"):
        assert getattr(shared, field) == pytest.approx(getattr(alone, field), rel=1e-5, abs=1e-7), field
    # most of these draws are too short for it
    assert shared.slope == pytest.approx(alone.slope, rel=1e-3, abs=1e-5, nan_ok=True)
    assert math.isnan(shared.slope) is (name != "restricted")
    assert shared.mean == pytest.approx(alone.mean, abs=tolerance * scale)


def shards(whole: Tensor, shapes: Shapes, rank: int, world: int) -> Tensor:
    """What a rank has of flat vectors ``[n, d]``: of each parameter, its part of the rows."""
    parts = []
    for piece, shape in zip(whole.split([math.prod(shape) for shape in shapes], dim=1), shapes, strict=True):
        rows = piece.reshape(len(whole), *shape).chunk(world, dim=1)
        parts.append(rows[rank].reshape(len(whole), -1) if rank < len(rows) else whole[:, :0])
    return torch.cat(parts, dim=1)


HELD: Shapes = ((8, 4), (8,), (8,), (8,), (2, 8), (2,))
SPLIT: Shapes = ((8, 4), (8,), (2, 8), (2,))


@pytest.mark.parametrize(("name", "shapes"), [("bf16_true", HELD), ("fp16_true", SPLIT)])
def test_half_precision_shards_follow_float32_masters(name: str, shapes: Shapes, folder: Path) -> None:
    """In one piece the module computes in float32, on shards as it trains: the losses are rounded, the noise is not.

    After 22 steps of 0.01 the chains are where the others are to 1e-5; bfloat16 weights could not tell less than 1e-3.
    """
    results = results_of(folder, name, 2)
    (shared,) = assert_ranks_agree(results, [0])
    (alone,) = estimates_of(results_of(folder, name, 1)[0])
    # nbeta (10) times the rounding of a loss of about 1, over the root of the losses in the mean: three of those errors
    rounding = torch.finfo(torch.bfloat16 if name.startswith("bf16") else torch.float16).eps
    assert shared.mean == pytest.approx(alone.mean, abs=1.25 * rounding)
    assert shared.init_loss == pytest.approx(alone.init_loss, rel=1e-3)
    whole = results_of(folder, name, 1)[0]["displacements"]
    for rank, result in enumerate(results):
        expected = shards(whole, shapes, rank, 2)
        assert float(expected.std()) == pytest.approx(0.01 * 22**0.5, rel=0.2)
        assert float((result["displacements"] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(("name", "shapes"), [("bf16_masters", HELD), ("fp16_masters", SPLIT)])
def test_half_precision_shards_have_the_chains_of_half_precision_in_one_piece(
    name: str, shapes: Shapes, folder: Path
) -> None:
    """The same arithmetic on both sides: every loss of every chain is the same, far below the rounding of a half."""
    results = results_of(folder, name, 2)
    (shared,) = assert_ranks_agree(results, [0])
    (alone,) = estimates_of(results_of(folder, name, 1)[0])
    scale = float(alone.trace.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(shared.trace, alone.trace, rtol=0.0, atol=1e-6 * scale)
    torch.testing.assert_close(shared.per_chain, alone.per_chain, rtol=0.0, atol=1e-6 * scale)
    assert shared.init_loss == pytest.approx(alone.init_loss, rel=1e-6)
    assert shared.mean == pytest.approx(alone.mean, abs=1e-6 * scale)
    whole = results_of(folder, name, 1)[0]["displacements"]
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["displacements"], shards(whole, shapes, rank, 2), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("world", [2, 4])
def test_the_metric_of_shards_has_one_scale(world: int, folder: Path) -> None:
    results = results_of(folder, "moments_of_the_optimiser", world)
    assert_ranks_agree(results, [1])
    parts = [r["preconditioner"] for r in results]
    assert sum(len(part) for part in parts) == 74
    whole = torch.cat(parts)
    # P = (1 + kappa) s / (sqrt(v) + kappa s), where s is that of all the shards: its mean square over them is known
    kappa = RMSpropSGLD(lr=1e-4).kappa
    relative = (1 + kappa) / whole.double() - kappa  # sqrt(v) / s
    assert float(relative.square().mean()) == pytest.approx(1.0, rel=1e-3)
    assert float(whole.std()) > 0.1


def test_a_single_rank_has_the_whole_model_in_one_shard(folder: Path) -> None:
    (sharded,) = estimates_of(results_of(folder, "one_shard", 1)[0])
    (plain,) = estimates_of(results_of(folder, "fixed_step", 1)[0])
    torch.testing.assert_close(sharded.trace, plain.trace, rtol=0.0, atol=1e-6 * float(plain.trace.abs().max()))
    assert sharded.step == plain.step == 0


def test_a_mixed_precision_policy_and_layers_that_stay_gathered(folder: Path) -> None:
    """What ``fully_shard`` itself can be told; training is the same."""
    results = results_of(folder, "policy", 2)
    assert_ranks_agree(results, [2, 4, 6])
    assert [r["num_batches"] for r in results] == [6, 6]


def test_a_chain_has_one_minibatch_on_all_ranks_whatever_each_trains_on(folder: Path) -> None:
    """That of the first rank."""
    results = results_of(folder, "data_of_its_own", 2)
    (shared,) = assert_ranks_agree(results, [6])
    (whole,) = results_of(folder, "data_of_its_own", 1)
    (alone,) = estimates_of(whole)
    assert len(set(whole["seen"])) >= 6
    assert results[0]["seen"] == results[1]["seen"]
    assert set(results[0]["seen"]) == set(whole["seen"])
    torch.testing.assert_close(shared.trace, alone.trace, rtol=0.0, atol=1e-6 * float(alone.trace.abs().max()))


def test_resume_of_sharded_training(folder: Path) -> None:
    results = results_of(folder, "resume", 2)
    estimates = assert_ranks_agree(results, [2, 4, 6])
    assert torch.equal(estimates[0].trace, results[0]["before"][0]["trace"])


def test_the_weights_of_a_transition_are_kept_whole(folder: Path) -> None:
    """By the first rank, as plain tensors, which a machine without any ranks can read."""
    first, second = results_of(folder, "transitions", 2)
    assert set(first["checkpoints"]) == {"before", "onset", "after", "flag"} and second["checkpoints"] == {}
    kept = torch.load(first["checkpoints"]["flag"], weights_only=True)["state_dict"]
    assert {name: tuple(w.shape) for name, w in kept.items()} == {n: tuple(w.shape) for n, w in first["whole"].items()}
    assert not torch.equal(kept["net.0.weight"], first["whole"]["net.0.weight"])  # training went on
    ring = Path(first["checkpoints"]["flag"]).parents[1] / "snapshots"
    last = torch.load(max(ring.glob("step_*.pt")), weights_only=True)
    assert last["step"] == 30
    for name, weight in first["whole"].items():
        assert torch.equal(last["state_dict"][name], weight), name


def test_training_is_the_same_and_the_ranks_agree(folder: Path) -> None:
    results = results_of(folder, "undisturbed", 2)
    estimates = assert_ranks_agree(results, [2, 4, 6])
    assert [r["num_batches"] for r in results] == [6, 6]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["metrics"]["slt/llc/mean"] == pytest.approx(estimates[-1].mean)
    assert estimates[0].method_reason == "asked for"


def test_accumulation(folder: Path) -> None:
    results = results_of(folder, "accumulation", 2)
    assert_ranks_agree(results, [1, 2])
    assert [(r["num_batches"], r["global_step"]) for r in results] == [(4, 2), (4, 2)]


def test_a_chain_that_fails_leaves_weights_and_training_as_they_were(folder: Path) -> None:
    """Between two layers, in the loss, on the way back: what the module's hooks were at is undone."""
    results = results_of(folder, "fails_in_chain", 2)
    assert_ranks_agree(results, [8])
    assert [r["num_batches"] for r in results] == [9, 9]
    said = results[0]["warnings"]
    assert [("layers" in t, "loss" in t, "way back" in t) for t in said] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_a_chain_that_fails_on_one_rank_alone_ends_the_run_on_both(folder: Path) -> None:
    """The other one waits for it inside the module's own collectives: training cannot go on, and nobody hangs."""
    for result in results_of(folder, "fails_alone", 2):
        assert result["raised"].startswith("RankLostError")
        assert "training cannot go on" in result["raised"]


def test_data_that_one_rank_cannot_read_leaves_the_firing_out_on_both(folder: Path) -> None:
    results = results_of(folder, "unreadable_on_one_rank", 2)
    assert [r["num_batches"] for r in results] == [6, 6]
    assert [r["estimates"] for r in results] == [[], []]
    first, *later = results[0]["warnings"]
    assert "rank 1 failed: OSError" in first and "only this rank fails" in first
    assert len(later) == 2 and all("for the reason given at step 2" in warning for warning in later)


@pytest.mark.parametrize("precision", ["64-true", "16-mixed"])
def test_precisions_that_lightning_has_not_for_shards(precision: str) -> None:
    with pytest.raises(ValueError, match=f"ModelParallelStrategy.*{precision}"):
        Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), precision=precision)


def test_each_shard_has_its_part_of_the_noise_of_the_whole(folder: Path) -> None:
    """5,600 weights of two chains: half of them on each of two ranks, not correlated; and on four
    ranks, two of which have no row of the last layer."""
    (alone,) = results_of(folder, "noise", 1)
    whole = alone["displacements"].double()
    first, second = (r["displacements"].double() for r in results_of(folder, "noise", 2))
    assert first.shape == second.shape == (2, 2800) and whole.shape == (2, 5600)
    correlations = torch.corrcoef(torch.cat([first, second]))
    assert float((correlations - torch.eye(4)).abs().max()) < 5 / 2800**0.5
    assert float(first.std()) == pytest.approx((6e-4) ** 0.5, rel=0.05)
    for world in (2, 4):
        for rank, result in enumerate(results_of(folder, "noise", world)):
            expected = shards(whole, ((800, 4), (800,), (2, 800)), rank, world)
            torch.testing.assert_close(result["displacements"].double(), expected, rtol=0.0, atol=1e-7)
