"""Two ranks on the CPU (gloo) with a part of the weights each: the chains are those of the whole model, and training
is what it is without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_slt.record import Estimate
from tests.integration.fsdp import RUNS
from tests.integration.ranks import Results, launched_once, results_of

TIMEOUT = 600.0
"""Seconds for all the scenarios; each has a limit of its own, see :mod:`tests.integration.ranks`."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results."""
    return launched_once(tmp_path_factory, "fsdp", "fsdp", RUNS, TIMEOUT)


def estimates_of(result: Results) -> list[Estimate]:
    return [Estimate.from_state_dict(state) for state in result["estimates"]]


def assert_ranks_agree(results: list[Results], steps: list[int]) -> list[Estimate]:
    """Every rank has the same estimates, at ``steps``, to the last bit."""
    first, *others = (estimates_of(result) for result in results)
    assert [e.step for e in first] == steps
    for other in others:
        assert [e.step for e in other] == steps
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.trace, b.trace) and torch.equal(a.per_chain, b.per_chain)
            assert (a.mean, a.se, a.init_loss, a.step_size, a.x) == (b.mean, b.se, b.init_loss, b.step_size, b.x)
            assert a.trace.isfinite().all()
    return first


@pytest.mark.parametrize(("name", "world"), [("fixed_step", 2), ("fixed_step", 4), ("restricted", 2), ("defaults", 2)])
def test_the_chains_are_those_of_the_model_in_one_piece(name: str, world: int, folder: Path) -> None:
    """Four ranks are more than some weights have rows: some of their shards are empty."""
    (shared,) = assert_ranks_agree(results_of(folder, name, world), [0])
    (alone,) = estimates_of(results_of(folder, name, 1)[0])
    scale = float(alone.trace.abs().max())
    assert scale > 0
    tolerance = 1e-5 if name == "defaults" else 1e-6  # a step found to the last bit but one moves all that follows
    torch.testing.assert_close(shared.trace, alone.trace, rtol=0.0, atol=tolerance * scale)
    assert (shared.num_weights, shared.num_burnin_steps) == (alone.num_weights, alone.num_burnin_steps)
    assert shared.num_weights == (18 if name == "restricted" else 74)
    for field in ("step_size", "init_loss", "localization", "virial", "step_bias"):
        assert getattr(shared, field) == pytest.approx(getattr(alone, field), rel=1e-5, abs=1e-7), field
    assert shared.mean == pytest.approx(alone.mean, abs=tolerance * scale)


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


def test_each_shard_has_its_part_of_the_noise_of_the_whole(folder: Path) -> None:
    """4,000 weights of two chains on two ranks: half of them each, not correlated, and those of one process."""
    first, second = (r["displacements"].double() for r in results_of(folder, "noise", 2))
    (alone,) = results_of(folder, "noise", 1)
    whole = alone["displacements"].double()
    assert first.shape == second.shape == (2, 2800) and whole.shape == (2, 5600)
    correlations = torch.corrcoef(torch.cat([first, second]))
    assert float((correlations - torch.eye(4)).abs().max()) < 5 / 2800**0.5
    assert float(first.std()) == pytest.approx((6e-4) ** 0.5, rel=0.05)
    sizes, parts = (3200, 800, 1600), [[], []]
    for row in whole:
        pieces = row.split(list(sizes))
        for rank in range(2):
            parts[rank].append(torch.cat([piece.chunk(2)[rank] for piece in pieces]))
    torch.testing.assert_close(first, torch.stack(parts[0]), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(second, torch.stack(parts[1]), rtol=0.0, atol=1e-7)
