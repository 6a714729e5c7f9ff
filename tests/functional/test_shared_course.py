"""A course that all chains take is told from what chance makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.shared_course import LEAST_COURSE, MOST_READS, shared_course
from tests.functional.test_influence import autocorrelated


def way(reads: int, height: float) -> Tensor:
    """``[reads, 1]``, a fifth of the readings long."""
    return height * torch.exp(-5 * torch.arange(reads) / reads)[:, None]


@pytest.mark.parametrize(("chains", "reads", "n", "memory"), [(16, 20, 1, 0.5), (16, 20, 40, 0.3), (4, 25, 20, 0.9)])
def test_chance_is_no_course(chains: int, reads: int, n: int, memory: float) -> None:
    """400 repetitions: at most 1 % are taken for one (0.5 % are expected where chains are not as long as their
    memory, and fewer where the share of chance is below a tenth)."""
    found = [shared_course(autocorrelated(chains, reads, n, memory, seed)) for seed in range(400)]
    assert sum(share > 0 for share in found) <= 4


@pytest.mark.parametrize(("reads", "height"), [(20, 4.0), (20, 2.0), (500, 4.0)])
def test_the_share_is_that_of_the_course(reads: int, height: float) -> None:
    """Of 16 chains; samples of either sign, whose mean does not move. More readings are taken in stretches."""
    both = torch.tensor([1.0, -1.0]).repeat(10)
    course = way(reads, height) * both
    wanted = float(course.var(dim=0).mean()) / (1 + float(course.var(dim=0).mean()))
    scatter = [torch.randn(16, reads, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    found = torch.tensor([shared_course(x + course) for x in scatter])
    assert wanted > LEAST_COURSE and float((found - wanted).abs().max()) < 0.05
    assert reads > MOST_READS or reads == 20


def test_what_cannot_tell_says_nothing() -> None:
    x = way(20, 9.0) + torch.randn(8, 20, 3, generator=torch.Generator().manual_seed(0))
    assert shared_course(x) > 0.5
    lost = x.clone()
    lost[2, 3, 1] = float("nan")
    assert shared_course(lost) > 0.5  # one sample without a loss says nothing of the others
    for nothing in (x[:3], x[:, :3], x[:, :, :0], torch.full_like(x, float("nan")), torch.ones_like(x)):
        assert shared_course(nothing) == 0.0


@pytest.mark.parametrize("reads", [20, 100])
def test_chains_that_are_all_alike_are_nothing_but_a_course(reads: int) -> None:
    """Of few chains as of many, up to what the means of stretches leave out: 64 of 100 readings, of two or of one."""
    course = way(reads, 4.0) * torch.tensor([1.0, -2.0, 0.5])
    kept = torch.stack([part.mean(dim=0) for part in course.tensor_split(min(reads, MOST_READS))])
    wanted = float(kept.double().var(dim=0).sum() / course.double().var(dim=0).sum())
    for chains in (4, 16):
        found = shared_course(course.expand(chains, -1, -1))
        assert found == pytest.approx(wanted, rel=1e-6) and found <= 1.0
