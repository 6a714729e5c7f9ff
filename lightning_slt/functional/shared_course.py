r"""Whether chains are on their way together: a course that all of them take is no scatter of the posterior.

Covariances over draws take such a course for scatter. Chains that begin far from the posterior's mean, in its own
widths, go there along one way, and the losses of single samples rise and fall with it, whatever their mean does. With
``x̄_t`` the mean over C independent chains at reading t, each about its own mean, and W the variance within chains,

.. math:: E[\mathrm{var}_t\, \bar x_t] = W / C

at stationarity, whatever the chains' memory is. With a course of variance D that all take it is ``D + (W - D) / C``.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_COURSE = 0.1
"""Share of the variance below which a course is left in it: covariances are too large by about as much."""
SHUFFLES = 200
"""Rotations of the chains in time that show what chance makes: a course is one that is larger than all of them, of
stationary chains at most one in 200."""
LEAST_CHAINS = 4
"""Fewer are as good as alike in some of the rotations."""
MOST_READS = 64
"""Readings that are told apart; of more, the means of stretches."""


def shared_course(trace: Tensor) -> float:
    """Share of the variance within chains that is a course all of them take together.

    Args:
        trace: ``[num_chains, reads, n]``, such as the losses of n samples; those that are not finite are left out.

    Returns:
        In [0, 1]; 0 where it is below :data:`LEAST_COURSE` or no more than chance makes, and where it cannot be known
        (fewer than four chains or readings).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(8, 20, 5, generator=g)
        >>> way = 3 * torch.exp(-torch.arange(20) / 4)[:, None]
        >>> shared_course(x), round(shared_course(x + way), 1)
        (0.0, 0.4)
    """
    chains, reads = trace.shape[:2]
    if chains < LEAST_CHAINS or reads < 4:
        return 0.0
    x = trace[:, :, torch.isfinite(trace).all(dim=1).all(dim=0)].double()
    x = x - x.mean(dim=1, keepdim=True)
    within = float(x.square().sum()) / (chains * (reads - 1))
    if within <= 0:
        return 0.0
    if reads > MOST_READS:
        x = torch.stack([part.mean(dim=1) for part in x.tensor_split(MOST_READS, dim=1)], dim=1)
        x, reads = x - x.mean(dim=1, keepdim=True), MOST_READS
    rows = x.reshape(chains * reads, -1)
    products = (rows @ rows.T).reshape(chains, reads, chains, reads)

    def together(turned: Tensor) -> float:
        """The variance of the chains' mean, each turned in time by so many readings."""
        time = (torch.arange(reads, device="cpu") + turned[:, None]) % reads
        which = torch.arange(chains, device="cpu")
        at = products[which[:, None, None], time[:, None], which[None, :, None], time[None, :]]
        return float(at.sum()) / (chains**2 * (reads - 1))

    found = together(torch.zeros(chains, dtype=torch.long, device="cpu"))
    alone = float(x.square().sum()) / (chains**2 * (reads - 1))
    share = (found - alone) / within * chains / (chains - 1)
    if share < LEAST_COURSE:
        return 0.0
    g = torch.Generator().manual_seed(0)
    chance = max(together(torch.randint(reads, (chains,), generator=g, device="cpu")) for _ in range(SHUFFLES))
    return min(share, 1.0) if found > chance else 0.0
