"""Closed forms of the (local) learning coefficient.

Every function states the formula and its source. `lambda` is the learning coefficient (real log canonical threshold)
and `m` its multiplicity, so that with ``nbeta = n * beta`` the expectation of the loss under the (tempered) posterior
is ``nbeta * E[L - L(w*)] = lambda - (m - 1) / log(nbeta) + ...`` as nbeta grows (Watanabe 2009, "Algebraic Geometry and
Statistical Learning Theory", the state density t^(lambda-1) (-log t)^(m-1)). At finite nbeta only the regular form is
exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

__all__ = ["deep_linear_llc", "normal_crossing_llc", "reduced_rank_llc", "regular_llc"]


def regular_llc(eigenvalues: Iterable[float], nbeta: float, gamma: float) -> float:
    r"""Exact finite-n value of a quadratic loss: ``1/2 sum_i h_i nbeta / (h_i nbeta + gamma)``.

    With L(w) = L(w*) + 1/2 (w - w*)' H (w - w*) the local posterior is N(w*, (nbeta H + gamma I)^-1), hence
    nbeta E[L - L(w*)] = nbeta/2 tr H (nbeta H + gamma I)^-1. Without localisation (gamma = 0) it is rank(H) / 2, the
    learning coefficient of a regular model (local posterior: Lau et al. 2023, arXiv 2308.12108).
    """
    return 0.5 * sum(h * nbeta / (h * nbeta + gamma) for h in map(float, eigenvalues) if h != 0.0)


def normal_crossing_llc(powers: Sequence[int]) -> tuple[float, int]:
    r"""(lambda, m) of L(w) = prod_i w_i^(2 k_i): lambda = min_i 1 / (2 k_i), m = how many i attain it.

    The poles of zeta(z) = int L(w)^z dw are at z = -(2 j + 1) / (2 k_i), j = 0, 1, ...; the largest is -lambda and its
    order m (Watanabe 2009, section 2; parameters with power 0 do not enter).
    """
    active = [k for k in powers if k > 0]
    if not active:
        raise ValueError("at least one power must be positive")
    largest = max(active)
    return 1.0 / (2 * largest), active.count(largest)


def reduced_rank_llc(input_dim: int, hidden_dim: int, output_dim: int, rank: int) -> tuple[float, int]:
    r"""(lambda, m) of reduced-rank regression y = B A x + noise with a true map of the given rank.

    Aoyagi & Watanabe 2005, "Stochastic complexities of reduced rank regression in Bayesian estimation", Neural Networks
    18(7), with M = input, H = hidden, N = output, r = rank of the truth:

    1. N + r <= M + H, M + r <= N + H, H + r <= M + N:
       lambda = (-(H + r)^2 - M^2 - N^2 + 2 (H + r) M + 2 (H + r) N + 2 M N [+ 1]) / 8,
       m = 1 when M + H + N + r is even, and m = 2 with the bracketed + 1 when it is odd.
    2. M + H < N + r: lambda = (H M - H r + N r) / 2, m = 1.
    3. N + H < M + r: lambda = (H N - H r + M r) / 2, m = 1.
    4. M + N < H + r: lambda = M N / 2, m = 1.
    """
    m, h, n, r = input_dim, hidden_dim, output_dim, rank
    if min(m, h, n) < 1 or not 0 <= r <= min(m, h, n):
        raise ValueError(f"no rank {r} map in widths {m}-{h}-{n}")
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    if m + n < h + r:
        return m * n / 2, 1
    odd = (m + h + n + r) % 2
    numerator = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * m + 2 * (h + r) * n + 2 * m * n
    return (numerator + odd) / 8, 1 + odd


def deep_linear_llc(widths: Sequence[int], rank: int) -> tuple[float, int]:
    r"""(lambda, m) of a deep linear network W_L ... W_1 x with a true map of the given rank.

    Aoyagi 2024, "Consideration on the learning efficiency of multiple-layered neural networks with linear units",
    Neural Networks 172 (in the form of Lau et al. 2023, arXiv 2308.12108, and Furman & Lau 2024, arXiv 2402.03698).
    With D_s = widths[s] - rank for s = 0..L there is a unique subset S of the layers (input and output included), l =
    |S| - 1 >= 1, with

        max D_S < min D_(not S),   sum_S D >= l max D_S,   sum_S D < l min D_(not S),

    and with T = sum_S D, c = ceil(T / l), a = T - (c - 1) l:

        lambda = (rank (widths[0] + widths[-1]) - rank^2) / 2 + a (l - a) / (4 l) - (l - 1) / (4 l) T^2
                 + 1/2 sum_(i<j in S) D_i D_j,
        m = a (l - a) + 1.

    (The published -l (l - 1) / 4 (T / l)^2 is -(l - 1) / (4 l) T^2.) It is the value at the deepest point of the set
    of true parameters, where every layer has exactly the rank of the truth.
    """
    if len(widths) < 2 or not 0 <= rank <= min(widths):
        raise ValueError(f"no rank {rank} map in widths {list(widths)}")
    excess = sorted(width - rank for width in widths)
    chosen: list[int] | None = None
    for size in range(2, len(excess) + 1):
        inside, outside = excess[:size], excess[size:]
        count, total = size - 1, sum(inside)
        if total < count * inside[-1]:
            continue
        if outside and not (inside[-1] < outside[0] and total < count * outside[0]):
            continue
        chosen = inside
        break
    if chosen is None:
        raise AssertionError("Aoyagi's theorem guarantees a subset")
    count, total = len(chosen) - 1, sum(chosen)
    a = total - (math.ceil(Fraction(total, count)) - 1) * count
    pairs = Fraction(total**2 - sum(value**2 for value in chosen), 2)
    value = (
        Fraction(rank * (widths[0] + widths[-1]) - rank**2, 2)
        + Fraction(a * (count - a), 4 * count)
        - Fraction(count - 1, 4 * count) * total**2
        + pairs / 2
    )
    return float(value), a * (count - a) + 1
