"""The local posterior's constants and their ranges."""

from __future__ import annotations

import math

import pytest

from lightning_slt.functional import LocalPosterior, default_nbeta


@pytest.mark.parametrize("n", [2, 1000, 60_000])
def test_default_nbeta_is_n_over_log_n(n: int) -> None:
    assert default_nbeta(n) == pytest.approx(n / math.log(n), rel=1e-15)


@pytest.mark.parametrize("n", [1, 0, -3])
def test_default_nbeta_needs_two_samples(n: int) -> None:
    with pytest.raises(ValueError, match=rf"num_samples={n}: .*at least 2.*set nbeta"):
        default_nbeta(n)


@pytest.mark.parametrize("nbeta", [0.0, -1.0, math.nan, math.inf])
def test_nbeta_out_of_range(nbeta: float) -> None:
    with pytest.raises(ValueError, match=r"nbeta=.*positive and finite.*None"):
        LocalPosterior(nbeta, 1.0)


@pytest.mark.parametrize("gamma", [-1e-9, math.nan, math.inf])
def test_localization_out_of_range(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"localization=.*not negative"):
        LocalPosterior(10.0, gamma)


def test_no_localization_is_allowed() -> None:
    assert LocalPosterior(10.0, 0.0).localization == 0.0
