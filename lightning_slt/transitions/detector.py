"""Online: transitions flagged while a run goes on, one point at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lightning_slt.kinds import check_number
from lightning_slt.transitions.curve import Curve, Step, fall_of, newest_as_seen
from lightning_slt.transitions.evidence import MIN_POINTS, SIZES, persistence, scatter
from lightning_slt.transitions.newest import newest_step
from lightning_slt.transitions.pauses import goes_on
from lightning_slt.transitions.reading import LOCAL, loss_change, rolling_scatter, transition_of
from lightning_slt.transitions.rises import rises, turn
from lightning_slt.transitions.search import best_step
from lightning_slt.transitions.settings import checked_min_change, checked_point, threshold_of
from lightning_slt.transitions.transition import Transition, kind_of

_HISTORY = SIZES[-1]
_SETTLE = 4  # points after a flag, at the least, before it is judged
_PLATEAU = 2  # points between a flag and the onset of the next in the same direction, or both are one
_BEFORE = 12  # points before an onset that its place is measured with
_JUDGED = -1.0  # in place of the point at which a flag is judged: it has been, and may still go on


class TransitionDetector:
    """Flags transitions of the local learning coefficient online. Feed the points in order of step.

    At each point the windows that end there, of 8 to 256 points, are searched for a step between two plateaus. The
    score is that of :mod:`lightning_slt.transitions.evidence` and :mod:`lightning_slt.transitions.search`, less for
    being asked at every point: 0.92 of the smaller of both channels' evidence where both move, 0.65 of the
    coefficient's alone. The first score above the threshold is a flag; the search then begins anew at the end of the
    step found, and of where it is placed once it has been judged, so that each transition is flagged once.

    A flag is "provisional". It is judged when as many points again as half its width (at least four) have followed,
    four of them beyond its end, and the newest (five, or more for a wide one) no longer move clearly in its direction.
    The level since its end is then compared with the level before its onset: at least half the change still there
    makes it "confirmed", otherwise it is "retracted". A step found later, to which the curve went on without a pause,
    is the rest of it and brings it up to date. Such changes are in :attr:`changes` (those of the last update) and in
    :attr:`transitions`; :meth:`update` returns only new flags.

    Args:
        false_alarms: tolerated false alarms in 100 points, on curves without a transition.
        min_change: smallest change of the LLC worth a flag, in its own units.
        at_boundary: transitions within which a boundary lies (see :meth:`boundary`) carry it ("annotate") or are not
            flagged ("suppress").

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> detector = TransitionDetector()
        >>> import numpy as np
        >>> noise = np.random.default_rng(0).normal(size=60)
        >>> for i in range(60):
        ...     level, loss = (10.0, 2.0) if i < 30 else (25.0, 1.5)
        ...     for t in detector.update(100.0 * i, level + noise[i], 1.0, loss):
        ...         print(t.kind, t.state, 2900 <= t.step <= 3100, t.known_at <= 3500)
        A provisional True True
        >>> [t.state for t in detector.transitions]
        ['confirmed']
    """

    def __init__(
        self,
        *,
        false_alarms: float = 0.05,
        min_change: float = 0.0,
        at_boundary: Literal["annotate", "suppress"] = "annotate",
    ) -> None:
        if at_boundary not in ("annotate", "suppress"):
            raise ValueError(f"at_boundary: expected 'annotate' or 'suppress', got {at_boundary!r}.")
        self.threshold = threshold_of(false_alarms)
        self.min_change = checked_min_change(min_change)
        self.at_boundary = at_boundary
        self._transitions: list[Transition] = []
        self._changes: list[Transition] = []
        self._boundaries: list[float] = []
        # the newest points that can be used: step, llc, llc_se, loss
        self._points: list[tuple[float, float, float, float]] = []
        self._dropped = 0  # usable points that came before those
        self._base = 0  # number of the point at which the search begins
        self._last_step = -math.inf
        self._open: list[dict[str, float]] = []  # what judging a flag takes: the provisional ones, and the last of all
        self._score = 0.0

    @property
    def transitions(self) -> list[Transition]:
        """All flags so far in their current state, in the order in which they became known."""
        return list(self._transitions)

    @property
    def changes(self) -> list[Transition]:
        """Transitions confirmed, retracted, or measured anew once confirmed, by the last :meth:`update`; by ``id``."""
        return list(self._changes)

    @property
    def score(self) -> float:
        """Highest score at the last usable point, 0 where nothing speaks for a step; compare :attr:`threshold`."""
        return self._score

    def boundary(self, step: float) -> None:
        """Tells of a known cause at ``step``: a learning-rate drop, another data mix.

        It counts for transitions flagged from now on; tell it before the point at that step.

        Raises:
            ValueError: not finite.
            TypeError: no number.
        """
        check_number("step", step, False, math.isfinite, "expected a finite training step.")
        self._boundaries.append(float(step))

    def update(self, step: float, llc: float, llc_se: float, loss: float, *, valid: bool = True) -> list[Transition]:
        """Takes one point; returns the transitions that it makes known for the first time (usually none).

        Args:
            step: training step, not below that of the point before.
            llc: local learning coefficient.
            llc_se: its standard error; only a floor of the scale. Not finite: unknown.
            loss: training loss at that step.
            valid: False leaves the point out, as a value that is not finite does.

        Raises:
            ValueError: the step is not finite or lies before the last one.
            TypeError: a value is no number, or ``valid`` neither True nor False.
        """
        checked_point(step, llc, llc_se, loss, valid)
        if not math.isfinite(step) or step < self._last_step:
            raise ValueError(
                f"step: expected a finite step from {self._last_step} on, got {step!r}; feed points in order of step, "
                "and begin a new run with a new detector."
            )
        self._last_step = float(step)
        self._changes = []
        if not (valid and math.isfinite(llc) and math.isfinite(loss)):
            return []
        self._points.append((float(step), float(llc), float(llc_se), float(loss)))
        if len(self._points) > _HISTORY:
            del self._points[0]
            self._dropped += 1
        self._score = 0.0
        steps, llcs, errors, losses = np.array(self._points, dtype=np.float64).T
        n, lo = steps.size, max(0, self._base - self._dropped)
        # the newest points give the scale: it may change in the course of a run
        sigma = float(rolling_scatter(llcs[-LOCAL:], errors[-LOCAL:])[-1])
        fall, fall_scatter = fall_of(losses, lambda values: np.full(n, scatter(values[-LOCAL:])))
        curve = Curve(
            steps=steps,
            llc=newest_as_seen(llcs, sigma, fall, float(fall_scatter[-1])),
            llc_scatter=np.full(n, sigma),
            loss=losses,
            loss_scatter=np.full(n, scatter(losses[-LOCAL:])),
            fall=fall,
            fall_scatter=fall_scatter,
            persistence=persistence(llcs),
        )
        self._judge(curve, steps, llcs)
        if n - lo < MIN_POINTS:
            return []
        found = newest_step(curve, lo, n, self.min_change)
        if found is None or found.score <= self.threshold:
            back = turn(curve, lo, n)
            if back is not None and back.height >= self.min_change and (found is None or back.score > found.score):
                found = back
        if found is None:
            return []
        self._score = found.score
        if found.score <= self.threshold:
            return []
        self._base = self._dropped + math.floor(found.end)
        new = transition_of(
            found,
            curve,
            steps,
            self._boundaries,
            number=len(self._transitions),
            state="provisional",
            known_at=float(step),
        )
        if new.boundary is not None and self.at_boundary == "suppress":
            return []
        if self._goes_on(new, found, curve, steps):
            return []
        first, width = max(0, math.floor(found.onset)), found.end - found.onset
        self._transitions.append(new)
        self._open.append(
            {
                "id": new.id,
                "flagged_at": self._dropped + n,
                "width": math.ceil(width),
                "before": float(np.median(curve.llc[max(lo, first - 7) : first + 1])),
                "loss_before": float(np.median(losses[max(lo, first - 4) : first + 1])),
                "after": self._dropped + math.ceil(found.end),
                "judged_at": self._dropped
                + max(n + max(_SETTLE, math.ceil(width / 2)), math.ceil(found.end) + _SETTLE),
            }
        )
        return [new]

    def _goes_on(self, new: Transition, found: Step, curve: Curve, steps: np.ndarray) -> bool:
        """Whether the last flag saw the beginning of this step only: then it is brought up to date, and none is new."""
        old = self._transitions[-1] if self._transitions else None
        if old is None or old.state == "retracted" or old.known_at < steps[0] or old.llc_change * new.llc_change < 0:
            return False
        index = np.arange(steps.size)
        start, end, known_at = (float(np.interp(step, steps, index)) for step in (old.onset, old.end, old.known_at))
        rest = (found.onset, min(found.end, steps.size - 1.0))
        if found.onset > known_at + _PLATEAU and not goes_on(curve, (start, end), rest):
            return False
        grown = replace(
            new,
            id=old.id,
            onset=min(old.onset, new.onset),
            known_at=old.known_at,
            state=old.state,
            boundary=old.boundary if old.boundary is not None else new.boundary,
        )
        for flag in self._open:
            if flag["id"] == old.id:
                # both parts of it, from the level before the first
                at = max(0, round(found.onset) - 1)
                llc, loss = (float(np.median(values[at : at + 3])) for values in (curve.llc, curve.loss))
                height = new.llc_change + llc - flag["before"]
                if height * new.llc_change > 0:
                    lower = new.loss_change + loss - flag["loss_before"]
                    kind = kind_of(height, lower, new.loss_change_se)
                    grown = replace(grown, llc_change=height, loss_change=lower, kind=kind)
                flag["after"] = self._base
                flag["judged_at"] = max(self._dropped + steps.size, self._base) + _SETTLE
        self._transitions[-1] = grown
        if old.state == "confirmed":
            self._changes = [t for t in self._changes if t.id != old.id] + [grown]
        return True

    def _judge(self, curve: Curve, steps: np.ndarray, llcs: np.ndarray) -> None:
        """Confirms or retracts the provisional flags whose time has come; places and changes are measured anew."""
        losses = curve.loss
        seen, waiting = self._dropped + llcs.size, []
        for flag in self._open:
            number = int(flag["id"])
            if flag["judged_at"] == _JUDGED:
                waiting += [flag] if number == len(self._transitions) - 1 else []
                continue
            # a second step soon after the first has its own level: the first is measured by what lies between
            later = number < len(self._transitions) - 1
            old = self._transitions[number]
            # an early flag saw the beginning of a ramp: what is left of it has no plateau yet to be judged by
            reach = max(_SETTLE + 1, int(min(flag["width"], (seen - flag["flagged_at"]) / 2)))
            newest = math.copysign(1.0, old.llc_change) * curve.llc[-reach:]
            if float(rises(newest, float(curve.llc_scatter[-1]))[0]) > self.threshold:
                flag["after"], flag["judged_at"] = max(flag["after"], seen - 1), max(flag["judged_at"], seen + _SETTLE)
            if seen < flag["judged_at"] and not later:
                waiting.append(flag)
                continue
            state: Literal["confirmed", "retracted"] = "confirmed"
            kept = 1.0
            place = max(0, int(flag["after"]) - self._dropped)
            if place < llcs.size and not later:
                height = float(np.median(llcs[place:])) - flag["before"]
                kept = height / old.llc_change
                state = "confirmed" if kept >= 0.5 or old.state == "confirmed" else "retracted"
                if kept >= 0.5:
                    lower = float(np.median(losses[place:])) - flag["loss_before"]
                    kind = kind_of(height, lower, old.loss_change_se)
                    old = replace(old, kind=kind, llc_change=height, loss_change=lower)
            if kept >= 0.5:  # one that was confirmed before and has fallen back since stays as it was measured
                old = self._placed(old, curve, steps)
                last = float(np.interp(old.end, steps, np.arange(steps.size)))
                self._base = max(self._base, self._dropped + math.ceil(last))
            self._transitions[number] = replace(old, state=state)
            self._changes.append(self._transitions[number])
            waiting += [{**flag, "judged_at": _JUDGED}] if not later else []
        self._open = waiting

    def _placed(self, old: Transition, curve: Curve, steps: np.ndarray) -> Transition:
        """The transition where the points since its flag put it: an early flag saw only the beginning of its ramp.

        It is looked for between the flags before and after it. A step that ends before it began is not it, nor is one
        that begins after it was flagged, unless it went on to that without a pause.
        """
        index = np.arange(steps.size)
        onset, end = (float(np.interp(step, steps, index)) for step in (old.onset, old.end))
        lo, hi = max(0, math.floor(onset) - _BEFORE), steps.size
        before = [other.end for other in self._transitions[: old.id] if other.state != "retracted"]
        after = [other.onset for other in self._transitions[old.id + 1 :]]
        if before:  # not above the onset: of that one only the beginning may have been seen
            lo = max(lo, math.ceil(min(onset, float(np.interp(before[-1], steps, index)))))
        if after:
            hi = max(math.ceil(end), math.floor(np.interp(after[0], steps, index))) + 1
        found = best_step(curve, lo, hi, SIZES, threshold=0.0, min_change=0.0)
        if found is None or found.height * old.llc_change < 0 or found.end < onset or found.onset > end + _SETTLE:
            return old
        began, step, ended = (float(np.interp(place, index, steps)) for place in found.places)
        if began >= old.known_at:
            if not goes_on(curve, (onset, end), (found.onset, found.end)):
                return old
            if not after:  # both levels have been seen; the flag saw some of the change that this lacks
                return replace(old, onset=began, step=step, end=ended)
        change, error = loss_change(curve.loss, curve.loss_scatter, found)
        return replace(
            old, onset=began, step=step, end=ended, kind=kind_of(found.height, change, error),
            llc_change=found.height, llc_change_se=found.height_se, loss_change=change, loss_change_se=error,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update needs, in plain types, for a checkpoint."""
        return {
            "version": 1,
            "transitions": [transition.as_dict() for transition in self._transitions],
            "boundaries": list(self._boundaries),
            "points": [list(point) for point in self._points],
            "dropped": self._dropped,
            "base": self._base,
            "last_step": self._last_step,
            "open": [dict(flag) for flag in self._open],
            "score": self._score,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken. The settings stay those of this detector.

        Raises:
            ValueError: the state is of another version.
        """
        if state.get("version") != 1:
            raise ValueError(f"state: expected version 1, got {state.get('version')!r}; pass what state_dict() gave.")
        self._transitions = [Transition.from_dict(values) for values in state["transitions"]]
        self._changes = []
        self._boundaries = [float(step) for step in state["boundaries"]]
        self._points = [(float(a), float(b), float(c), float(d)) for a, b, c, d in state["points"]]
        self._dropped, self._base = int(state["dropped"]), int(state["base"])
        self._last_step, self._score = float(state["last_step"]), float(state["score"])
        self._open = [
            {"flagged_at": 0.0, "width": 0.0, **{name: float(value) for name, value in flag.items()}}
            for flag in state["open"]
        ]
