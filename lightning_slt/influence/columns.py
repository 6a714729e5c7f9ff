"""The samples whose losses can be read in every draw, and those that are left out, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.influence_record import Dropped
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.samples import Samples


@dataclass(frozen=True, eq=False)
class Columns:
    """Losses of the samples of one side that are finite at ``w*`` and in every draw.

    Attributes:
        losses: ``[chains, reads, kept]``.
        keep: ``[n]`` bool, which samples of the probe they are.
        probe: that has read them.
        dropped: the others.
    """

    losses: Tensor
    keep: Tensor
    probe: Probe
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not bool(self.keep.any())

    @property
    def anchor(self) -> Tensor:
        """``[kept]``, the losses at ``w*``."""
        return self.probe.anchor[self.keep]

    @property
    def index(self) -> Tensor:
        """``[kept]`` long, which samples of the dataset they are."""
        return self.probe.index[self.keep]

    @property
    def token(self) -> Tensor:
        """``[kept]`` long, which token of the sample each one is."""
        return self.probe.token[self.keep]

    def groups(self, groups: Optional[list[Optional[str]]], samples: Optional[Samples]) -> Optional[tuple[str, ...]]:
        """The group of each; a sample without one is in the group ``""``."""
        if groups is None or samples is None:
            return None
        of = dict(zip(samples.index, groups, strict=True))
        return tuple(of[i] or "" for i in self.index.tolist())


def usable(kind: str, losses: Tensor, probe: Probe) -> Columns:
    """Those of ``[chains, reads, n]`` losses of a kind of samples (``"train"`` or ``"query"``) that can be used."""
    at_anchor = torch.isfinite(probe.anchor)
    along = torch.isfinite(losses).all(dim=1).all(dim=0) if len(losses) else torch.zeros_like(at_anchor)
    keep = at_anchor & along
    dropped = [Dropped(kind, i, "the step gives no loss for it") for i in probe.without]
    if len(losses):
        for k in (~keep).nonzero().flatten().tolist():
            where = "along the chains" if bool(at_anchor[k]) else "at the current weights"
            dropped.append(Dropped(kind, int(probe.index[k]), f"its loss is not finite {where}"))
    return Columns(losses[:, :, keep], keep, probe, dropped)
