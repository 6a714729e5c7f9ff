"""What a stretch of steps showed, chain by chain: joined in time, merged over ranks, cut to its end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATS_EVERY = 4
"""Steps between readings of |grad|², grad.(w - w*) and |w - w*|²: three passes over the weights each."""

NOISE_EVERY = 48
"""Steps between second gradients at the same weights, on another minibatch: what the minibatches' own noise is."""
NOISE_LAG = NOISE_EVERY // 2
"""Steps before the first of them; the other minibatch is that of so many steps before, where the window has them."""

READINGS = ("grad_square", "grad_dot", "square", "pulled_dot", "pulled_square")


@dataclass(frozen=True, eq=False)
class Segment:
    """What a stretch of steps showed, chain by chain.

    Attributes:
        chains: the numbers of the chains, ascending; every tensor has one row for each.
        difference: ``[chains, steps]`` float64, ``L_B(w_t) - L_B(w*)`` on the minibatch of step t.
        grad_square, grad_dot, square: ``[chains, steps / STATS_EVERY]`` float64: ``grad.P grad``, ``grad.(w - w*)``,
            ``|w - w*|²``, with grad that of the minibatch's mean loss and P the sampler's preconditioner (1 if none).
        anchors: ``L_B(w*)`` of the minibatches used, by (rank where ranks have data of their own, window, number).
        pulled_dot, pulled_square: ``grad.P (w - w*)`` and ``(w - w*).P (w - w*)``; None where P is 1.
        acceptance: ``[chains]``, share of the proposals accepted; None for a sampler that does not reject.
        noise_square: ``[chains, steps / NOISE_EVERY]``, whose mean is that of ``xi.P xi``, xi the part of a gradient
            that is its minibatch's own; NaN where there is none, None for a sampler that has no use for it, or
            where all the data is one batch.
        read: ``[chains, steps / read_every, n]`` float32, what a
            :data:`~lightning_slt.sampling.weight_reader.WeightReader` made of the weights; None without one.
        read_every: steps between those.
        shares: what the minibatches of ``anchors`` weigh in the mean over their samples; those that are not here, 1.
    """

    chains: list[int]
    difference: Tensor
    grad_square: Tensor
    grad_dot: Tensor
    square: Tensor
    anchors: dict[tuple[int, int, int], float]
    pulled_dot: Tensor | None = None
    pulled_square: Tensor | None = None
    acceptance: Tensor | None = None
    read: Tensor | None = None
    read_every: int = 1
    noise_square: Tensor | None = None
    shares: dict[tuple[int, int, int], float] = dataclasses.field(default_factory=dict)

    @staticmethod
    def merge(parts: Sequence[Segment]) -> Segment:
        """The parts of several ranks as one, in order of the chains' numbers; nothing is counted twice."""
        chains = [number for part in parts for number in part.chains]
        order = torch.tensor(sorted(range(len(chains)), key=chains.__getitem__), dtype=torch.long, device="cpu")

        tables: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])[order]
            for name in ("difference", *READINGS, "acceptance", "read")
            if getattr(parts[0], name) is not None
        }
        tables |= {"anchors": _all(parts, "anchors"), "shares": _all(parts, "shares")}
        noise = _noise_of(parts)
        tables["noise_square"] = noise[order] if noise is not None else None
        return Segment(sorted(chains), read_every=parts[0].read_every, **tables)

    @staticmethod
    def join(pieces: Sequence[Segment]) -> Segment:
        """Stretches of the same chains, one after another, as one."""
        tables: dict[str, Any] = {
            name: torch.cat([getattr(piece, name) for piece in pieces], dim=1)
            for name in ("difference", *READINGS, "read")
            if getattr(pieces[0], name) is not None
        }
        known = [piece.noise_square for piece in pieces if piece.noise_square is not None]
        tables["noise_square"] = torch.cat(known, dim=1) if known else None
        acceptance = None
        if pieces[0].acceptance is not None:
            shares = [piece.acceptance for piece in pieces if piece.acceptance is not None]
            steps = torch.tensor([piece.steps for piece in pieces], dtype=torch.float64, device="cpu")
            acceptance = (torch.stack(shares, dim=1) * (steps / steps.sum())).sum(dim=1)
        tables |= {"anchors": _all(pieces, "anchors"), "shares": _all(pieces, "shares"), "acceptance": acceptance}
        return Segment(pieces[0].chains, read_every=pieces[0].read_every, **tables)

    def last(self, steps: int) -> Segment:
        """The last ``steps`` of it; a multiple of :data:`STATS_EVERY` keeps every reading with its steps."""
        tables: dict[str, Any] = {"difference": self.difference[:, self.steps - steps :]}
        readings = -(-steps // STATS_EVERY)
        for name in READINGS:
            value = getattr(self, name)
            if value is not None:
                tables[name] = value[:, value.shape[1] - readings :]
        if self.noise_square is not None:
            count = self.noise_square.shape[1]
            tables["noise_square"] = self.noise_square[:, count - math.ceil(count * steps / max(self.steps, 1)) :]
        if self.read is not None:
            tables["read"] = self.read[:, max(self.read.shape[1] - (-(-steps // self.read_every)), 0) :]
        return dataclasses.replace(self, **tables)

    def second_half(self) -> Segment:
        """Where the chains have arrived, without how they came there."""
        return self.last(self.steps - self.steps // 2)

    @property
    def anchor_loss(self) -> float:
        """The loss at ``w*``, a mean over the minibatches used."""
        weights = [self.shares.get(key, 1.0) for key in self.anchors]
        return sum(w * loss for w, loss in zip(weights, self.anchors.values(), strict=True)) / sum(weights)

    @property
    def steps(self) -> int:
        return self.difference.shape[1]

    @property
    def finite(self) -> Tensor:
        """``[chains]`` bool: every loss and every reading finite."""
        readings = torch.isfinite(torch.cat([self.grad_square, self.grad_dot, self.square], dim=1)).all(dim=1)
        return torch.isfinite(self.difference).all(dim=1) & readings


def _noise_of(parts: Sequence[Segment]) -> Tensor | None:
    """Of the chains of all parts; NaN where a part has fewer readings, as ranks have whose windows are of another
    length."""
    known = [part.noise_square for part in parts if part.noise_square is not None]
    if not known:
        return None
    most, tables = max(table.shape[1] for table in known), []
    for part in parts:
        own = part.noise_square if part.noise_square is not None else known[0].new_empty(len(part.chains), 0)
        tables.append(torch.nn.functional.pad(own, (0, most - own.shape[1]), value=math.nan))
    return torch.cat(tables)


def _all(pieces: Sequence[Segment], name: str) -> dict[tuple[int, int, int], float]:
    """What each of them has of minibatches, together."""
    every: dict[tuple[int, int, int], float] = {}
    for piece in pieces:
        every.update(getattr(piece, name))
    return every
