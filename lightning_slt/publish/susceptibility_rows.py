"""Susceptibility as the report and the terminal have it: cells of a table, and the rows of its course."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from lightning_slt.influence_record import MIN_Z
from lightning_slt.publish.phrases import with_error
from lightning_slt.publish.specs.parts import (
    ABOVE,
    BELOW,
    INVALID,
    VALID,
    widened,
)
from lightning_slt.publish.tables import thinned
from lightning_slt.susceptibility_record import SusceptibilityEstimate

WHOLE_SHIFT = "the whole shift"
"""What the mean over all samples of the shifted data is called beside those of its groups."""
LINES = 6
"""Groups that have a line in the picture of the course: those that stand out most of their errors."""
MAX_COURSE_ROWS = 6_000

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Susceptibility of one component to one group.

    Attributes:
        component, group: names; the group is None for the whole shift.
        chi, se: in units of the loss.
    """

    component: str
    group: Optional[str]
    chi: float
    se: float

    @property
    def clear(self) -> bool:
        """Whether it is further than three standard errors from zero."""
        return abs(self.chi) > MIN_Z * self.se

    @property
    def stands_out(self) -> float:
        """Distance from zero in standard errors; 0 where it is not known."""
        return abs(self.chi) / self.se if math.isfinite(self.chi) and self.se > 0 else 0.0


def cells(estimate: SusceptibilityEstimate) -> list[list[Cell]]:
    """A row for the whole shift and for each group, with a cell for each component."""
    return [
        [_cell(estimate, row, column) for row in range(len(estimate.components))]
        for column in (None, *range(len(estimate.groups)))
    ]


def _cell(estimate: SusceptibilityEstimate, row: int, column: Optional[int]) -> Cell:
    name = estimate.components[row]
    if column is None:
        return Cell(name, None, float(estimate.chi[row]), float(estimate.se[row]))
    chi, se = float(estimate.group_chi[row, column]), float(estimate.group_se[row, column])
    return Cell(name, estimate.groups[column], chi, se)


def few(rows: Sequence[list[Cell]], most: int) -> list[list[Cell]]:
    """The row of the whole shift, and so many of the groups that stand out most, in their order."""

    def out(place: int) -> float:
        return max((cell.stands_out for cell in rows[place]), default=0.0)

    kept = set(sorted(range(1, len(rows)), key=out, reverse=True)[:most])
    return [row for place, row in enumerate(rows) if place == 0 or place in kept]


def step_at(history: Sequence[SusceptibilityEstimate], place: int) -> int:
    step = history[place].step
    return step if step is not None else place


def drawn(history: Sequence[SusceptibilityEstimate]) -> list[SusceptibilityEstimate]:
    """Of a long history so many, evenly taken, that the rows of the course fit into a page."""
    lines = max(len(found.components) * (1 + min(len(found.groups), LINES)) for found in history)
    return thinned(history, max(2, MAX_COURSE_ROWS // max(lines, 1)))


def course(
    history: Sequence[SusceptibilityEstimate], component: str, group: Optional[str]
) -> Iterator[tuple[int, Cell, bool]]:
    """Step, cell and whether it is valid, of each firing that measured this."""
    for place, found in enumerate(history):
        if component not in found.components or (group is not None and group not in found.groups):
            continue
        column = found.groups.index(group) if group is not None else None
        cell = _cell(found, found.components.index(component), column)
        if math.isfinite(cell.chi):
            yield step_at(history, place), cell, found.valid


def course_rows(history: Sequence[SusceptibilityEstimate]) -> list[Row]:
    """Each component's susceptibility over training: to the whole shift with its band, and to a few groups.

    What is not valid is a point off the line; far beyond what is valid, it is on the frame and its state says so.
    """
    rows: list[Row] = []
    for component in dict.fromkeys(name for found in history for name in found.components):
        last = next(found for found in reversed(history) if component in found.components)
        lines = [row[0].group for row in few(cells(last), LINES)]
        points = {group: list(course(history, component, group)) for group in lines}
        low, high = _frame(points)
        for group, found in points.items():
            segment = 0
            for step, cell, valid in found:
                segment += not valid
                if not valid and group is not None:
                    continue  # the point of the whole shift says that this firing is not valid
                state = VALID if valid else BELOW if cell.chi < low else ABOVE if cell.chi > high else INVALID
                bottom, top = _band(cell)
                name = WHOLE_SHIFT if group is None else group
                words = f"Step {step:,}: {component} to {name} {with_error(cell.chi, cell.se)}"
                row = {"component": component, "line": name, "whole": group is None, "step": step, "state": state}
                numbers = {"chi": cell.chi, "low": bottom, "high": top}
                row |= {k: float(f"{min(max(v, low), high):.5g}") for k, v in numbers.items()}
                rows.append({**row, "segment": str(segment), "words": words + ("" if valid else " (not valid)")})
    return rows


def _band(cell: Cell) -> tuple[float, float]:
    width = 1.96 * cell.se if math.isfinite(cell.se) else 0.0
    return cell.chi - width, cell.chi + width


def _frame(points: dict[Optional[str], list[tuple[int, Cell, bool]]]) -> tuple[float, float]:
    """The heights between which points of a component are drawn."""
    good = [_band(cell) for found in points.values() for _, cell, valid in found if valid]
    bad = [cell.chi for _, cell, valid in points[None] if not valid]
    if not good:
        return min(bad, default=0.0), max(bad, default=0.0)
    return widened(min(low for low, _ in good), max(high for _, high in good), bad)


def line_names(rows: Sequence[Row]) -> list[str]:
    """The lines of a picture in the order of its legend, the whole shift first."""
    return list(dict.fromkeys([WHOLE_SHIFT, *(row["line"] for row in rows)]))


__all__ = [
    "LINES",
    "WHOLE_SHIFT",
    "Cell",
    "cells",
    "course",
    "course_rows",
    "drawn",
    "few",
    "line_names",
]
