"""What readings of a component's chains say: the errors of subsets of the data, and chains that lie apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_slt.functional import LocalPosterior
from lightning_slt.functional.between_chains import factor_of
from lightning_slt.functional.susceptibility import error_of_parts, susceptibility
from lightning_slt.sampling.segment import Segment
from lightning_slt.susceptibility.reading import read_component


def test_what_subsets_of_the_data_add_to_the_error() -> None:
    """Of what the other subsets would give, the share that is unread: with both subsets' errors A and B it is
    ``u (A² + B²) + 2 (1 - u) A B``, where what one subset has too much of the other lacks."""
    g, nbeta, k = torch.Generator().manual_seed(0), 3.0, 4
    losses, of_observed, of_base = (torch.randn(3, 40, n, generator=g, dtype=torch.float64) for n in (3, k, k))
    losses[:, :, 0] += torch.tensor([[0.0], [1.0], [2.0]])  # chains have missed a part of the variance
    still = torch.zeros_like(of_base)

    def added(unread: float, *parts: Tensor) -> float:
        """To the square of the error, by both subsets."""
        row = torch.cat([losses, *parts], dim=2)
        zero = torch.zeros(3, 40, dtype=torch.float64)
        shown = Segment([0, 1, 2], zero, zero, zero, zero, {}, read=row)
        found, alone = (
            read_component("a", replace(shown, read=read), LocalPosterior(nbeta, 1.0), 5, torch.tensor([0]), None, m, u)
            for read, m, u in ((row, k, unread), (losses, 0, 0.0))
        )
        return float(found.whole.se[0] ** 2 - alone.whole.se[0] ** 2)

    phi, base, shifted = nbeta * losses[:, :, 0], losses[:, :, 1:2], losses[:, :, 2:]
    whole = factor_of(susceptibility(phi, shifted - base).share, 40)
    assert whole > 1.1
    a = whole * nbeta * float(error_of_parts(of_observed, shifted - base))
    b = whole * float(error_of_parts(of_base, phi.unsqueeze(2)))
    for u in (0.5, 0.75):
        assert added(u, of_observed, still) == pytest.approx(u * a**2)
        assert added(u, still, of_base) == pytest.approx(u * b**2)
        assert added(u, of_observed, of_base) == pytest.approx(u * (a**2 + b**2) + 2 * (1 - u) * a * b)


def test_chains_whose_integrands_lie_apart_are_said_not_to_have_mixed() -> None:
    losses = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(3, 40, dtype=torch.float64)
    for apart, share in ((0.0, 0.0), (10.0, 0.99)):
        read = losses + apart * torch.arange(3)[:, None, None] * torch.tensor([1.0, 0.0, 0.0])
        shown = Segment([0, 1, 2], zero, zero, zero, zero, {}, read=read)
        found = read_component("a", shown, LocalPosterior(3.0, 1.0), 5, torch.tensor([0]), None)
        assert found.whole.share == pytest.approx(share, abs=0.03)
        said = f"a: {found.whole.share:.0%} of the integrand's variance lies between chains: not mixed"
        assert found.reasons == ((said,) if apart else ())
