"""A step of the loss between slopes: one stage ends and another begins while the loss goes on falling.

Stages that follow each other closely leave the loss no plateau: it still falls from the last one, or already towards
the next. So here both sides of the ramp have the same slope, ``y = a + b x + c sigmoid((x - m) / s)``, and b falls as c
does, or is level. A wide ramp beside a slope bends as a cubic does; so a cubic competes, by point and by training step,
with the smooth courses of :mod:`lightning_slt.transitions.evidence`. Offline only: while a ramp still goes on a slope
explains it as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.evidence import SHAPE_ERROR, Array, bank

_DEGREE = 3
_PRICE = 4.0  # evidence that a slope finds in noise, at the most in 95 of 100 windows: chi-square of one parameter


@dataclass(frozen=True)
class Slopes:
    """What a window of one size is fitted with; all orthogonal to constants."""

    cubic: Array  # [3, size], orthonormal: the rising line, then what bends
    ramps: Array  # [num_ramps, size], unit vectors: the ramps of the bank without their slope
    along: Array  # [num_ramps]: slope of each step of height one
    scales: Array  # [num_ramps]: fitted coefficient times this = height of the step


@functools.cache
def slopes(size: int) -> Slopes:
    """Those of the :func:`~lightning_slt.transitions.evidence.bank` of that size; computed once."""
    b = bank(size)
    cubic = _polynomials(np.arange(size, dtype=np.float64)[None])[0]
    along = b.ramps @ cubic[0]
    ramps = b.ramps - along[:, None] * cubic[0]
    norms = np.maximum(np.linalg.norm(ramps, axis=1), 1e-6)
    return Slopes(cubic, ramps / norms[:, None], along / b.scales, b.scales / norms)


def _polynomials(x: Array) -> Array:
    """Orthonormal polynomials without a constant ``[num_windows, 3, size]`` at places ``[num_windows, size]``."""
    span = x[:, -1:] - x[:, :1]
    unit = 2 * (x - x[:, :1]) / np.where(span > 0, span, 1.0) - 1
    basis = np.linalg.qr(unit[:, :, None] ** np.arange(_DEGREE + 1))[0][:, :, 1:].transpose(0, 2, 1)
    return np.asarray(basis * np.where(basis[:, :, -1:] < 0, -1.0, 1.0))


def between_slopes(loss: Array, noise: Array, rest: Array, s: Slopes, steps: Array | None = None) -> Array:
    """Evidence ``[num_windows, num_ramps]`` for a fall between slopes; ``-inf`` where they rise.

    Args:
        loss: ``[num_windows, size]``.
        noise: ``[num_windows]``, the least variance of a point.
        rest: ``[num_windows]``, sum of squares that the best smooth course leaves of each window.
        s: what it is fitted with.
        steps: ``[num_windows, size]`` training steps, where they are unevenly spaced.
    """
    centred = loss - loss.mean(axis=1, keepdims=True)
    total = (centred**2).sum(axis=1)
    by_cubic = centred @ s.cubic.T
    rest = np.minimum(rest, total - (by_cubic**2).sum(axis=1))
    if steps is not None:
        in_steps = np.einsum("ws,wks->wk", centred, _polynomials(steps))
        rest = np.minimum(rest, total - (in_steps**2).sum(axis=1))
    line, ramp = by_cubic[:, :1], centred @ s.ramps.T
    left = np.maximum(total[:, None] - line**2 - ramp**2, 0.0)
    height = ramp * s.scales
    variance = np.maximum(np.maximum(noise[:, None], (SHAPE_ERROR * height) ** 2), left / (loss.shape[1] - 5))
    falls = (height < 0) & (line - height * s.along <= 0)
    return np.where(falls, (np.maximum(rest, 0.0)[:, None] - left) / variance - _PRICE, -np.inf)
