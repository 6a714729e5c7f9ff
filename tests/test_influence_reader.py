"""What readings along chains are made into, number by number: made up, of samples whose gradients are known."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt.functional.between_chains import between_share, factor_of
from lightning_slt.functional.block_errors import mean_and_error
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.influence import probe_set, reader
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.kinetic import KineticSampling
from lightning_slt.sampling.metric import Curvature
from lightning_slt.sampling.objective import Objective
from tests.influences import squares, token_losses
from tests.sampling.helpers import Tied, gen, next_token, seeded, tokens

TRAIN, QUERIES, D = 8, 4, 4
POSTERIOR = LocalPosterior(10.0, 2.0)
SAMPLING = KineticSampling.of(POSTERIOR, Curvature(torch.zeros(0), torch.zeros(D, 0), 0.5))


def data(n: int, seed: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, D - 1, generator=gen(seed)), torch.randn(n, 1, generator=gen(seed + 1)))


def reader_of(queries: bool = True, loss_fn: Any = squares, seed: int = 0) -> InfluenceReader:
    objective = Objective(seeded(lambda: nn.Linear(D - 1, 1)), loss_fn, None, torch.device("cpu"))
    query = DatasetSource(data(QUERIES, 3), QUERIES) if queries else None
    return InfluenceReader(objective, probe_set(DatasetSource(data(TRAIN, 1), TRAIN), query, None, None, 0), seed)


def gradients() -> Tensor:
    """``2 (w x + b - y) (x, 1)``, of the training samples and of the queries after them."""
    net = seeded(lambda: nn.Linear(D - 1, 1))
    x, y = (torch.cat(both) for both in zip(data(TRAIN, 1).tensors, data(QUERIES, 3).tensors, strict=True))
    return (2 * (net(x) - y) * torch.cat([x, torch.ones(len(x), 1)], dim=1)).detach()


def read(reader: InfluenceReader, trace: Tensor, shrinkage: Optional[float] = 1.0) -> InfluenceEstimate:
    return reader.read(trace, torch.ones(len(trace), dtype=torch.bool), POSTERIOR, 100, shrinkage)


def random_trace(chains: int, draws: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(chains, draws, columns, generator=gen(seed), dtype=torch.float64)


@pytest.mark.parametrize(("queries", "n"), [(True, TRAIN + QUERIES), (False, TRAIN)])
def test_gradients_of_all_samples_are_taken_where_they_are_not_too_many_numbers(
    queries: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both sides count; what is handed on is those of training."""
    for most, fits in ((n * D, True), (n * D - 1, False)):
        monkeypatch.setattr(reader, "MAX_GRADIENTS", most)
        made = reader_of(queries)
        found = made.take_gradients()
        if fits:
            assert found is not None
            torch.testing.assert_close(found, gradients()[:TRAIN])
        else:
            assert found is None
        made.control_with(SAMPLING)
        assert made.wants_gradients is fits
        notes = read(made, random_trace(4, 30, n * 3 if fits else n)).notes
        assert [note.startswith("no control variates: the gradients of all samples") for note in notes] == [True] * (
            not fits
        )


def test_a_reading_has_the_losses_and_both_of_their_linear_parts() -> None:
    """``l(w) - l(w*)``, ``g . delta`` and ``g . M s`` of the training samples first; zeros where no slope is known."""
    made = reader_of()
    weights = made._anchor + 0.1 * torch.randn(3, D, generator=gen(5))
    slopes = torch.randn(3, D, generator=gen(6))
    alone = made(weights, slopes)
    assert alone.shape == (3, TRAIN + QUERIES) and not made.wants_gradients
    assert torch.equal(alone[:, :TRAIN], made.train_losses(weights))
    made.take_gradients()
    made.control_with(SAMPLING)
    assert SAMPLING.sampler.metric is not None
    delta, scale = weights - made._anchor, SAMPLING.sampler.metric.scale
    losses, direct, pulled = made(weights, slopes).split(TRAIN + QUERIES, dim=1)
    assert torch.equal(losses, alone)
    torch.testing.assert_close(direct, delta @ gradients().T)
    force = POSTERIOR.nbeta * slopes + POSTERIOR.localization * delta
    torch.testing.assert_close(pulled, scale**2 * force @ gradients().T)
    assert torch.equal(made(weights)[:, TRAIN + QUERIES :], torch.zeros(3, 2 * (TRAIN + QUERIES)))


def by_hand(trace: Tensor, left: list[int], right: list[int], n: int, whole: float) -> tuple[Tensor, Tensor]:
    """``[right, left]``: the covariance less that of the linear parts, and what is known of those; a pair at a time."""
    losses, direct, pulled = (part - part.mean(dim=1, keepdim=True) for part in trace.split(n, dim=2))
    down = (losses * direct).sum(dim=(0, 1)) / direct.square().sum(dim=(0, 1))
    across = (losses * pulled).sum(dim=(0, 1)) / pulled.square().sum(dim=(0, 1))
    assert SAMPLING.sampler.metric is not None
    moved = (gradients().double() * SAMPLING.sampler.metric.scale)[:n]
    rest, known = torch.empty(2, len(right), len(left), dtype=torch.float64)
    for row, q in enumerate(right):
        for column, i in enumerate(left):
            a, b = down[i] * across[q], across[i] * down[q]
            parts = a * (direct[..., i] * pulled[..., q]).sum() + b * (pulled[..., i] * direct[..., q]).sum()
            product = (losses[..., i] * losses[..., q]).sum() - parts / 2
            rest[row, column] = whole * product / (trace.shape[0] * (trace.shape[1] - 1))
            known[row, column] = (a + b) / 2 * (moved[i] @ moved[q])
    return rest, known


def linear_trace(n: int) -> Tensor:
    """Losses that have something of both of their linear parts, and something that they share beside these."""
    noise, direct, pulled = random_trace(4, 30, 3 * n).split(n, dim=2)
    up = torch.linspace(1, 2, n, dtype=torch.float64)
    return torch.cat(
        [noise + random_trace(4, 30, 1, seed=1) + up * direct + up.flip(0) * pulled, direct, pulled], dim=2
    )


@pytest.mark.parametrize("shrinkage", [1.0, 1.25, None])
def test_control_variates_are_those_of_each_pair(shrinkage: Optional[float]) -> None:
    """With a sample of each side left out, whose loss is not finite in one draw."""
    made, n = reader_of(), TRAIN + QUERIES
    made.take_gradients()
    made.control_with(SAMPLING)
    trace = linear_trace(n)
    kept, asked = [0, 1, 3, 4, 5, 6, 7], [TRAIN, TRAIN + 2, TRAIN + 3]
    losses = trace[:, :, :n].clone()
    trace[1, 3, 2] = trace[2, 5, TRAIN + 1] = torch.inf
    found = read(made, trace, shrinkage)
    assert found.train_index.tolist() == kept and found.query_index.tolist() == [0, 2, 3]
    assert [(d.kind, d.index) for d in found.dropped] == [("train", 2), ("query", 1)]
    trace[:, :, :n] = losses
    whole = factor_of(between_share(losses[:, :, kept]), 30)
    assert abs(whole - 1) > 1e-4
    rest, known = by_hand(trace, kept, asked, n, whole)
    own, own_query = (
        torch.tensor([float(sum(by_hand(trace, [i], [i], n, whole))) for i in side]).double() for side in (kept, asked)
    )
    torch.testing.assert_close(found.self_influence, own, rtol=1e-6, atol=0)
    rho = (rest + known) / own_query.sqrt()[:, None] / own.sqrt()
    torch.testing.assert_close(found.correlation, rho.clamp(-1, 1), rtol=1e-5, atol=1e-6)
    weight = found.rest_weight
    assert (weight == 1.0) is (shrinkage is not None) and weight > 0.1
    matrix = weight * rest + known
    if shrinkage == 1.25:
        matrix = matrix * found.correlation.abs().pow(0.25)
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-5, atol=1e-6)
    assert found.notes == (("shrunk with power 1.25: no longer the plain covariance",) if shrinkage == 1.25 else ())
    mean, error = mean_and_error(losses[:, :, kept])
    torch.testing.assert_close(found.mean_loss, found.init_loss + mean)
    torch.testing.assert_close(found.mean_loss_se, error)
    torch.testing.assert_close(found.query_mean_loss, found.query_init_loss + losses[:, :, asked].mean(dim=(0, 1)))
    assert float(found.init_loss.abs().min()) > 0 and float(found.query_init_loss.abs().min()) > 0
    assert found.between_share == between_share(losses[:, :, kept]) and not found.queries_are_train


def test_training_samples_that_are_their_own_queries_have_their_variance_on_the_diagonal() -> None:
    """What is not known to first order counts in full there, also where it is weighted elsewhere."""
    made = reader_of(queries=False)
    made.take_gradients()
    made.control_with(SAMPLING)
    trace = linear_trace(TRAIN)
    trace[0, 0, 4] = torch.inf
    found = read(made, trace, None)
    assert found.queries_are_train and len(found.dropped) == 1 and found.rest_weight < 1
    assert torch.equal(found.matrix.diagonal(), found.self_influence)
    torch.testing.assert_close(found.correlation.diagonal(), torch.ones(TRAIN - 1).double(), rtol=1e-9, atol=0)


def test_without_anything_known_to_first_order_nothing_is_weighted() -> None:
    trace = random_trace(4, 30, TRAIN + QUERIES)
    found, plain = (read(reader_of(), trace, shrinkage) for shrinkage in (None, 1.0))
    assert found.rest_weight == 1.0 and torch.equal(found.matrix, plain.matrix)


@pytest.mark.parametrize(("chains", "draws", "reason"), [(4, 3, None), (3, 3, "few"), (8, 1, "few"), (0, 30, "finite")])
def test_a_covariance_has_eight_degrees_of_freedom_at_the_least(chains: int, draws: int, reason: Optional[str]) -> None:
    found = read(reader_of(), random_trace(chains, draws, TRAIN + QUERIES))
    said = {
        None: (),
        "few": (f"{draws} readings of {chains} chains are too few",),
        "finite": ("no chain has stayed finite and local", "no sample has finite losses"),
    }
    assert found.reasons == said[reason] and found.valid is (reason is None)
    assert found.matrix.shape == ((QUERIES, TRAIN) if draws > 1 and chains else (0, 0))
    assert found.queries_are_train is False


def test_chains_have_mixed_where_the_training_samples_losses_have() -> None:
    trace = random_trace(4, 30, TRAIN + QUERIES)
    trace[:, :, TRAIN:] += 10 * torch.arange(4.0)[:, None, None]
    assert read(reader_of(), trace).reasons == ()
    share = f"{between_share(trace[:, :, TRAIN:]):.0%}"
    moved = trace.roll(QUERIES, dims=2)
    moved[:, :, QUERIES:TRAIN] += 10 * torch.arange(4.0)[:, None, None]
    found = read(reader_of(), moved)
    assert found.reasons == (f"{share} of the losses' variance lies between chains: they have not mixed",)
    assert share in ("98%", "99%")


@pytest.mark.parametrize("silent", ["train", "query"])
def test_a_side_without_a_finite_loss_is_nothing(silent: str) -> None:
    trace = random_trace(4, 30, TRAIN + QUERIES)
    trace[0, 7, slice(TRAIN) if silent == "train" else slice(TRAIN, None)] = torch.nan
    found = read(reader_of(), trace)
    assert found.reasons == ("no sample has finite losses",) and found.matrix.shape == (0, 0)
    assert {d.kind for d in found.dropped} == {silent} and not found.queries_are_train


def test_tokens_are_told_where_rows_are_tokens() -> None:
    source = DatasetSource(tokens(n=6), 6)
    for loss_fn, per_token in ((next_token, False), (token_losses, True)):
        objective: Any = Objective(seeded(Tied), loss_fn, None, torch.device("cpu"))
        made = InfluenceReader(objective, probe_set(source, source, None, 2, 0, per_token=per_token), 0)
        rows = 2 * (made._query.token.max().item() + 1 if per_token else 1)  # type: ignore[union-attr]
        found = read(made, random_trace(4, 30, 6 + int(rows)))
        assert (found.query_token is not None) is per_token and len(found.query_index) == rows
        assert (rows > 2) is per_token


def test_what_the_step_draws_hangs_on_the_seed_and_is_the_same_at_every_reading() -> None:
    def noisy(module: nn.Module, batch: Any) -> Tensor:
        return squares(module, batch) * (1 + torch.rand(()))

    readings = []
    for seed in (0, 0, 1):
        made = reader_of(loss_fn=noisy, seed=seed)
        weights = made._anchor + 0.1 * torch.randn(3, D, generator=gen(5))
        readings.append(made(weights))
        assert torch.equal(made(weights), readings[-1])
        readings[-1] = torch.cat([readings[-1], made._train.anchor[None].expand(3, -1)], dim=1)
    first, again, other = readings
    assert torch.equal(first, again)
    assert not (first[:, TRAIN:-TRAIN] == other[:, TRAIN:-TRAIN]).any()
    assert not (first[:, -TRAIN:] == other[:, -TRAIN:]).any()


@pytest.mark.parametrize(("chains", "draws", "noted"), [(1, 511, True), (1, 512, False), (2, 511, False)])
def test_what_one_chain_of_few_readings_cannot_say_is_noted(chains: int, draws: int, noted: bool) -> None:
    notes = read(reader_of(), random_trace(chains, draws, TRAIN + QUERIES)).notes
    assert [f"{draws} readings of one chain" in note for note in notes] == [True] * noted
