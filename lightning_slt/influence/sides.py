"""Losses along the draws on both sides of a covariance, with the linear parts that are known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from lightning_slt.functional.influence import (
    Covariance,
    LinearParts,
    covariance,
    group_means,
    variance,
)
from lightning_slt.influence_record import in_order


@dataclass(frozen=True, eq=False)
class Sides:
    """Losses along the draws, of training samples (x) and queries (y), what they are to first order, and the known
    covariances of that."""

    x: Tensor
    y: Tensor
    x_parts: Optional[LinearParts] = None
    y_parts: Optional[LinearParts] = None
    known: Optional[Tensor] = None
    known_x: Optional[Tensor] = None
    known_y: Optional[Tensor] = None

    def rest(self, whole: float) -> Covariance:
        """The covariance, less what is known of it."""
        return covariance(self.x, self.y, x_parts=self.x_parts, y_parts=self.y_parts).scaled(whole)

    def covariance(self, whole: float) -> Covariance:
        """The plain one, without bias."""
        return self.rest(whole).plus(self.known)

    def variance(self, whole: float, of_train: bool) -> tuple[Tensor, Tensor]:
        """``[n]``, and its error."""
        losses, parts, known = (
            (self.x, self.x_parts, self.known_x) if of_train else (self.y, self.y_parts, self.known_y)
        )
        value, error = variance(losses, parts)
        return (value * whole if known is None else value * whole + known).clamp_(min=0), error * whole

    def by_group(self, train: tuple[str, ...], query: tuple[str, ...], names: tuple[str, ...]) -> Sides:
        """The same of the groups' mean losses."""
        known = self.known
        if known is not None:
            known = group_means(group_means(known[None], train, names).mT, query, names).mT[0]
        return Sides(
            group_means(self.x, train, names),
            group_means(self.y, query, names),
            self.x_parts.by_group(train, names) if self.x_parts is not None else None,
            self.y_parts.by_group(query, names) if self.y_parts is not None else None,
            known,
        )


def by_group(
    sides: Sides, train: Optional[tuple[str, ...]], query: Optional[tuple[str, ...]], whole: float
) -> tuple[tuple[str, ...], Optional[Tensor], Optional[Tensor]]:
    if train is None or query is None:
        return (), None, None
    names = in_order({*train, *query} - {""})
    if not 1 <= len(names) <= 100:
        return (), None, None
    result = sides.by_group(train, query, names).covariance(whole)
    return names, result.matrix, result.se
