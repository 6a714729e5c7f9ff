"""Rises out of a dip: chains at a saddle run downhill, and the coefficient falls before it rises."""

from __future__ import annotations

import math

import numpy as np

from lightning_slt.transitions.curve import Curve, Step
from lightning_slt.transitions.evidence import Array, Bank

_TURN = 0.03  # of the range of a stretch: the least depth of a dip that counts


def rises(values: Array, sigma: Array | float) -> Array:
    """Evidence ``[..., size]`` for a rise from each place of a window to its end: a line against no change.

    0 for a fall and for less than three points. ``sigma`` is the scatter, one for all or one a window ``[..., 1]``.
    """
    back = values[..., ::-1] - values[..., -1:]
    x = np.arange(values.shape[-1], dtype=np.float64)
    count = x + 1
    sum_x, sum_xx = np.cumsum(x), np.cumsum(x * x)
    sum_y, sum_xy = np.cumsum(back, axis=-1), np.cumsum(x * back, axis=-1)
    covered = np.maximum(sum_xx - sum_x**2 / count, 1e-9)
    slope = (sum_xy - sum_x * sum_y / count) / covered
    found = np.where((slope < 0) & (count >= 3), slope**2 * covered / np.maximum(sigma, 1e-150) ** 2, 0.0)
    return found[..., ::-1]


def first_half(b: Bank) -> tuple[Array, Array]:
    """First and last point of the stretch from the onset to the centre of each ramp."""
    onset = np.maximum(np.floor(b.centres - b.widths / 2), 0).astype(int)
    return onset, np.maximum(np.floor(b.centres).astype(int), onset)


def largest_between(values: Array, first: Array, last: Array) -> Array:
    """Largest of ``values [..., size]`` from each ``first`` to each ``last``, both counted: ``[..., num_pairs]``."""
    tables = [values]
    while 2 ** len(tables) <= int(np.max(last - first)) + 1:
        half = 2 ** (len(tables) - 1)
        tables.append(np.maximum(tables[-1][..., :-half], tables[-1][..., half:]))
    level = np.floor(np.log2(last - first + 1)).astype(int)
    out = np.empty((*values.shape[:-1], first.size))
    for k, table in enumerate(tables):
        at = np.flatnonzero(level == k)
        out[..., at] = np.maximum(table[..., first[at]], table[..., last[at] - 2**k + 1])
    return out


def turn(curve: Curve, lo: int, hi: int) -> Step | None:
    """A negative coefficient that fell and rises again at the newest points while the loss falls: a saddle left.

    The dip is that below zero of which depth and rise since are both largest; both must stand out of the scatter and
    of the range of the stretch.
    """
    llc, sigma = curve.llc[lo:hi], float(curve.llc_scatter[hi - 1])
    depth, risen = np.maximum.accumulate(llc) - llc, llc[-1] - llc
    negative = llc <= -3 * sigma
    if not negative.any():
        return None
    dip = int(np.argmax(np.where(negative, np.minimum(depth, risen), -math.inf)))
    least = max(5 * sigma, _TURN * float(np.ptp(llc)))
    rise, seen = float(risen[dip]), llc.size - 1 - dip
    if seen < 2 or depth[dip] < least or rise < least:
        return None
    falls = rises(-curve.fall[lo + dip : hi], float(curve.fall_scatter[hi - 1]))[0]
    score = min(float(rises(llc[dip:], sigma)[0]), float(falls))
    place = float(lo + dip)
    return Step(score, place, place + seen / 2, place + seen, rise, sigma * math.sqrt(2.0))
