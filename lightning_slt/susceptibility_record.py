"""Susceptibilities as plain data, and their files: ``susceptibility/step_*.npz`` in the folder of the run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from lightning_slt.durable import write_whole
from lightning_slt.record import UNREADABLE, finite_or_none

log = logging.getLogger(__name__)

FOLDER = "susceptibility"


@dataclass(frozen=True, eq=False)
class SusceptibilityEstimate:
    """Susceptibility of K components to a shift of the data, ``-Cov(nbeta (L(w) - L(w*)), Delta L(w))``.

    Baker et al. 2025, arXiv 2504.18274; :mod:`lightning_slt.functional.susceptibility` has the conventions. In units of
    the loss. Negative: more of the shifted data raises the loss where the component's own loss is high, so that its
    learning coefficient falls.

    Attributes:
        components: names of the K components.
        chi, se: ``[K]`` float64, of the whole shift, and its Monte-Carlo standard error.
        per_chain: ``[K, num_chains]``; NaN for a chain that was left out.
        matrix, matrix_se: ``[K, m]``, towards each sample of the shifted data alone; its mean over samples is ``chi``.
        sample_index: ``[m]`` long, which sample each column is.
        groups: names of the groups of samples, empty where there are none.
        group_chi, group_se: ``[K, len(groups)]``, of the shift towards a group.
        llc: ``[K]``, mean of the integrand on the same draws: the component's learning coefficient, roughly.
        nbeta: inverse temperature times n.
        localization: gamma of each component.
        num_weights: weights of each component.
        num_samples: n.
        num_chains, num_draws: chains, and readings of each.
        valid: whether the numbers may be read; ``reasons`` says why not, naming the component.
        reasons: sentences.
        notes: what is to be known otherwise.
        step, x, epoch, monitor: of the trainer; None and empty outside of one.
        seconds: wall-clock.
    """

    components: tuple[str, ...]
    chi: Tensor
    se: Tensor
    per_chain: Tensor
    matrix: Tensor
    matrix_se: Tensor
    sample_index: Tensor
    groups: tuple[str, ...]
    group_chi: Tensor
    group_se: Tensor
    llc: Tensor
    nbeta: float
    localization: tuple[float, ...]
    num_weights: tuple[int, ...]
    num_samples: Optional[int]
    num_chains: int
    num_draws: int
    valid: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    step: Optional[int] = None
    x: Optional[int] = None
    epoch: Optional[int] = None
    monitor: str = ""
    seconds: float = math.nan

    @property
    def response(self) -> Tensor:
        """``[K]``, ``nbeta chi``: the derivative of the component's LLC by the share of the shift."""
        return self.nbeta * self.chi

    def replace(self, **changes: Any) -> SusceptibilityEstimate:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only, so that a checkpoint that holds it loads with ``weights_only=True``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SusceptibilityEstimate:
        """The inverse of :meth:`state_dict`; keys of a newer version are passed over. None, as files have NaN, is NaN
        again."""
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items() if k in kinds}
        for name, value in values.items():
            if kinds[name] == "float" and value is None:
                values[name] = math.nan
            elif kinds[name] == "tuple[float, ...]":
                values[name] = tuple(math.nan if v is None else v for v in value)
        return cls(**values)


class SusceptibilityRecord:
    """The susceptibilities of a run, one file a firing.

    Args:
        folder: the run's own.

    Example:
        >>> import tempfile
        >>> list(SusceptibilityRecord(tempfile.mkdtemp()).read())
        []
    """

    def __init__(self, folder: Union[str, os.PathLike[str]]) -> None:
        self.folder = Path(folder) / FOLDER

    def path(self, step: Optional[int]) -> Path:
        return self.folder / f"step_{step or 0:09d}.npz"

    def save(self, estimate: SusceptibilityEstimate) -> None:
        """Write it, whole or not at all.

        Raises:
            OSError: where the folder cannot be written.
        """
        state = estimate.state_dict()
        arrays: dict[str, Any] = {k: v.numpy(force=True) for k, v in state.items() if isinstance(v, Tensor)}
        plain = json.dumps(finite_or_none({k: v for k, v in state.items() if k not in arrays}), allow_nan=False)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, plain=np.array(plain), **arrays)

        write_whole(self.path(estimate.step), write)

    def read(self) -> Iterator[SusceptibilityEstimate]:
        """In order of steps. A file that cannot be read is passed over; the log names it."""
        for path in sorted(self.folder.glob("step_*.npz")):
            try:
                with np.load(path) as arrays:
                    state = json.loads(str(arrays["plain"]))
                    state |= {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "plain"}
                estimate = SusceptibilityEstimate.from_state_dict(state)
            except (*UNREADABLE, TypeError) as error:
                log.warning(
                    f"{path}: cannot be read ({type(error).__name__}: {error}), and is left out. Restore the file from "
                    "a copy, or delete it."
                )
                continue
            yield estimate

    def drop_after(self, step: int) -> None:
        """Forget what was measured after ``step``: a resumed run measures those steps again."""
        for path in self.folder.glob("step_*.npz"):
            number = path.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                path.unlink()
