"""What is searched, and what is found: both channels by point, and a step in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.evidence import REACH, ROUNDING, Array, scatter, without_spikes

_WITNESS = 3.0  # standard errors by which the loss falls faster over the newest two points than over the two before
_NEAR = 16  # points around the smallest loss whose scatter is taken
_LEAST_SHARE = 1e-200  # of the largest loss: below it a share is no number that can be worked with


@dataclass(frozen=True)
class Step:
    """A step found: places are fractional indices of points."""

    score: float
    onset: float
    centre: float
    end: float
    height: float
    height_se: float
    late: float = 0.0  # points by which all three places are later than the loss alone puts them

    @property
    def places(self) -> tuple[float, float, float]:
        """Onset, centre and end by both channels."""
        return self.onset + self.late, self.centre + self.late, self.end + self.late


@dataclass(frozen=True)
class Curve:
    """Both channels by point, with the scatter around each point.

    Attributes:
        steps: of training.
        llc: spikes removed.
        llc_scatter: of it.
        loss: as it was given: what is told of a step.
        loss_scatter: of it.
        fall: the loss as steps are looked for in it, see :func:`in_proportion`.
        fall_scatter: of it.
        persistence: autocorrelation of the noise of ``llc``.
    """

    steps: Array
    llc: Array
    llc_scatter: Array
    loss: Array
    loss_scatter: Array
    fall: Array
    fall_scatter: Array
    persistence: float = 0.0

    @property
    def has_proportion(self) -> bool:
        """``fall`` is another than ``loss``."""
        return self.fall is not self.loss


def in_proportion(loss: Array) -> Array:
    """``log(loss / min loss)`` of one that is positive throughout; any other as it is.

    A loss falls by orders of magnitude in a run, and each stage takes a share of what is left: the last ones are small
    beside the first, on whose tail they lie. Shares of what is within the scatter of the smallest losses say nothing,
    so it is ``log(1 + (loss - min loss) / floor)``, with three times that scatter for a floor where it is more than
    the smallest loss.

    Example:
        >>> in_proportion(np.array([100.0, 10.0, 1.0])).round(3), in_proportion(np.array([1.0, 0.0, -1.0]))
        (array([4.605, 2.303, 0.   ]), array([ 1.,  0., -1.]))
    """
    if loss.size == 0 or not loss.min() > 0:
        return loss
    lowest = int(np.argmin(loss))
    first = min(max(0, lowest - _NEAR // 2), max(0, loss.size - _NEAR))
    noise = scatter(loss[first : first + _NEAR]) if loss.size >= _NEAR else 0.0
    least = float(loss[lowest])
    floor = max(least, 3.0 * noise)
    if not floor > _LEAST_SHARE * float(loss.max()):
        return loss
    # not the difference of two logarithms: of a loss with a large constant in it these are one number
    return np.log1p((loss - least) / floor)


def fall_of(loss: Array, scatter_of: Callable[[Array], Array]) -> tuple[Array, Array]:
    """``Curve.fall`` and its scatter: in proportion no less than what rounding leaves of a constant loss.

    Args:
        loss: ``[n]``.
        scatter_of: the scatter ``[n]`` around each point of values ``[n]``.
    """
    fall = in_proportion(loss)
    around = scatter_of(fall)
    return fall, around if fall is loss else np.maximum(around, ROUNDING)


def newest_as_seen(llc: Array, sigma: float, fall: Array, fall_sigma: float) -> Array:
    """The coefficient online, spikes removed: at the newest edge a rise is held back until three points stand on its
    far side, or two of three where the loss falls faster than it did before: beside a spike it goes on as it was.

    Args:
        llc: ``[n]``.
        sigma: its scatter.
        fall: ``[n]``, the loss in proportion.
        fall_sigma: its scatter.
    """
    seen = without_spikes(llc, sigma).copy()
    if llc.size < 5:
        return seen
    now, then = fall[-3] - fall[-1], fall[-5] - fall[-3]
    # of two differences that share a point the error is sqrt(6) of that of a point
    if not now > max(then, 0.0) + _WITNESS * np.sqrt(6.0) * fall_sigma:
        return seen
    highest = float(np.median(llc[-3:])) + REACH * sigma
    seen[-2:] = np.maximum(seen[-2:], np.minimum(llc[-2:], highest))
    return seen
