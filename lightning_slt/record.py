"""What was measured, as plain data: the result of one firing, and its files on disk.

Everything above (callbacks, publishers, reports) exchanges :class:`Estimate` objects; nothing here knows a sampler, a
trainer or a logger. On disk a run is one folder:

========================  ==============================================================================================
``estimates.jsonl``       one JSON object a line, one line an estimate, appended and flushed at every firing
``traces/step_*.npz``     the chains of that firing: ``trace`` and ``per_chain`` (NumPy, float32 / float64)
``figures/``              the pictures (written by :mod:`lightning_slt.publish`)
========================  ==============================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import torch
from torch import Tensor

from lightning_slt.durable import write_whole
from lightning_slt.functional.convergence import surely
from lightning_slt.reasons import UNSETTLED

log = logging.getLogger(__name__)

UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
"""What an empty, cut or overwritten ``.npz`` file may raise."""

RECORD_FILE = "estimates.jsonl"
MAY_BE_INFINITE, INFINITE = ("rhat",), "inf"
"""What says something where it is infinite (chains that stand still, apart from each other), and how JSON has it."""
TRACE_FOLDER = "traces"
MUCH_SLOPE = 0.1
"""Share of an estimate by which it may be less than at a minimum without a word."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """The local learning coefficient of one set of weights, with what is needed to trust it or not.

    The number is ``llc = nbeta * (E_w[L_n(w)] - L_n(w*))`` (Lau et al. 2023, arXiv 2308.12108), the expectation taken
    over the local posterior ``p(w) ∝ exp(-nbeta L_n(w) - localization/2 |w - w*|²)``.

    Attributes:
        mean: The estimate: the mean over the good chains (NaN where there is none).
        se: Standard error of ``mean``, ``sqrt(chain_se² + owed² + lean² + unsure_heat²)``: the Monte-Carlo error, which
            counts the autocorrelation within chains, the spread between them, and how few they are
            (:func:`lightning_slt.functional.standard_error`), what the directions reached last may still owe, the lean
            of the step, and what is not sure of its heat.
        per_chain: ``[num_chains]`` float64, the mean of each chain; NaN for a chain that was left out.
        trace: ``[num_chains, num_draws]`` float32; entry ``[c, t]`` is the mean over the ``num_steps_bw_draws`` steps
            of draw ``t`` of ``nbeta * (L_B(w) - L_B(w*))``, both losses on the same minibatch, corrected for step size.
        rhat: Rank-normalised split R-hat over the good chains (1 is mixed).
        ess: Bulk effective sample size over the good chains, in draws.
        valid: Whether the number may be read as a learning coefficient; ``reasons`` says why not.
        reasons: Sentences, each a reason why ``valid`` is false.
        kinds: Of each of them, the name of its :class:`~lightning_slt.reasons.Kind`; empty where none is known, as in
            older records.
        nbeta: ``n * beta``, the inverse temperature times the number of samples.
        localization: gamma, the strength of the quadratic pull to ``w*``.
        init_loss: ``L_n(w*)``, the mean loss at the weights under study on the chains' minibatches.
        chain_loss: Mean loss over the chains, ``init_loss + mean / nbeta``.
        num_samples: n, the number of training samples behind ``nbeta`` (None where ``nbeta`` was given without n).
        num_weights: d, the number of weights that moved.
        step_size: The sampler's step (``eps`` of the SGLD update).
        step_bias: What the finite step adds to ``mean``, in LLC units; it has been taken off.
        virial: ``(nbeta E[grad.(w-w*)] + gamma E|w-w*|²) / d`` with the heat of the step taken off: 1 at stationarity,
            below where flat directions have not been reached yet; over the second half of the draws.
        owed: What directions that have not reached their width may still add to ``mean``, or those that are beyond it
            have in it too much, in LLC units: by how much the virial ratio of all the draws is from 1 beyond its error
            (:func:`lightning_slt.functional.owed.owed_by`). It is in ``se``, and nearly the same at neighbouring
            firings, which start from the same displacements.
        lean: What the step of SGLD adds by keeping chains away from steep weights, in LLC units
            (:func:`lightning_slt.sampling.lean.lean_of`): a part of ``step_bias``, and in ``se`` as well, since it is
            known to first order; in ``se`` alone of a sampler that has none at first order, and where it is below zero
            (the loss is higher at steep weights). 0 where it is not seen.
        unsure_heat: Of what is taken off for the minibatches' noise (a part of ``step_bias``), in LLC units, what may
            be too much or too little: a third of it, less where the loss is nearly a square. It is in ``se``.
        slope: How far ``w*`` is from a minimum, ``-nbeta/2 grad L_n(w*) . E[w - w*]`` in LLC units: by about as much
            ``mean`` is less than it is at the minimum beside (:mod:`lightning_slt.sampling.slope`). 0 at one; NaN where
            it was not measured. It is not in ``se``.
        slope_se: Standard error of ``slope``.
        acceptance: Acceptance rate, for samplers that have one.
        finite_share: Share of chains whose every loss was finite.
        num_bad_chains: Chains left out: non-finite or diverged.
        num_chains: Chains that were run.
        num_draws: Draws of each chain.
        num_burnin_steps: Steps of each chain before the first draw.
        num_steps_bw_draws: Steps a draw.
        batch_size: Samples in a minibatch.
        seed: Seed of the chains.
        method: How the chains were computed: ``"sequential"`` or ``"batched"``.
        method_reason: Why so.
        step: Optimiser steps done when the weights were taken (None outside a trainer).
        epoch: Epoch at that moment.
        x: The logger's own step at that moment, the x-axis of the loss curve.
        seconds: Wall-clock time of the firing.
        overhead: Share of the wall-clock since the start of fit that went into firings, this one included.
        credit_seconds: What the overhead budget had saved up for this firing (NaN without a budget).
        predicted_seconds: What it expected the firing to take (NaN without a budget).
        firing_size: Chain-steps that the firing was allowed, as a share of a full one's (NaN without a budget).
        skipped: Steps that were to be measured and were left out since the firing before (None without a budget).
        component: Name of the monitor, where several run.
    """

    mean: float
    se: float
    per_chain: Tensor
    trace: Tensor
    rhat: float
    ess: float
    valid: bool
    reasons: tuple[str, ...]
    nbeta: float
    localization: float
    init_loss: float
    chain_loss: float
    num_samples: Optional[int]
    num_weights: int
    step_size: float
    step_bias: float = 0.0
    virial: float = math.nan
    owed: float = 0.0
    lean: float = 0.0
    unsure_heat: float = 0.0
    slope: float = math.nan
    slope_se: float = math.nan
    acceptance: Optional[float] = None
    finite_share: float = 1.0
    num_bad_chains: int = 0
    num_chains: int = 0
    num_draws: int = 0
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    batch_size: int = 0
    seed: int = 0
    method: str = "sequential"
    method_reason: str = ""
    step: Optional[int] = None
    epoch: Optional[int] = None
    x: Optional[int] = None
    seconds: float = math.nan
    overhead: float = math.nan
    component: str = ""
    credit_seconds: float = math.nan
    predicted_seconds: float = math.nan
    firing_size: float = math.nan
    skipped: Optional[int] = None
    kinds: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether the number may stand in a curve with others: it is valid, or is not for what the weights are at.

        At a saddle chains run downhill: they drift, disagree, and the number is negative. It may not be read as a
        learning coefficient; but it is a state of its own that the next minimum is told from. Chains that diverged, or
        a step size that was wrong, say nothing of the weights.
        """
        finite = math.isfinite(self.mean) and math.isfinite(self.init_loss)
        saddle = bool(self.reasons) and all(r.startswith(UNSETTLED) for r in self.reasons)
        return finite and (self.valid or saddle)

    @property
    def beside_minimum(self) -> bool:
        """Whether ``mean`` is clearly less than at the minimum beside: by more than :data:`MUCH_SLOPE` of it, and more
        than the errors would make of nothing."""
        return self.slope > max(MUCH_SLOPE * abs(self.mean), self.se) and self.sure_of_slope

    @property
    def sure_of_slope(self) -> bool:
        """Whether ``slope`` is above zero beyond chance (:func:`lightning_slt.functional.surely`)."""
        return surely(self.slope, self.slope_se, self.num_chains - self.num_bad_chains) > 0

    @property
    def heat_share(self) -> float:
        """What the heat of the step added and was taken off, without the lean, as a share of the estimate before; NaN
        where that is not above zero."""
        before = self.mean + self.step_bias
        return max(self.step_bias - max(self.lean, 0.0), 0.0) / before if before > 0 else math.nan

    @property
    def chain_se(self) -> float:
        """The Monte-Carlo part of ``se``: what moves from point to point of a curve, where the others stay."""
        bias = math.hypot(self.owed, self.lean, self.unsure_heat)
        return math.sqrt(max(self.se**2 - bias**2, 0.0)) if bias else self.se

    @property
    def interval(self) -> tuple[float, float]:
        """``mean -/+ 1.96 se``: the 95 % band that is drawn."""
        return self.mean - 1.96 * self.se, self.mean + 1.96 * self.se

    def replace(self, **changes: Any) -> Estimate:
        """A copy with some fields changed; reasons that are given without their kinds have none."""
        if "reasons" in changes:
            changes.setdefault("kinds", ())
        return dataclasses.replace(self, **changes)

    def scalars(self) -> dict[str, Any]:
        """The estimate without its trace, as types that JSON knows (NaN stays NaN; see :meth:`RunRecord.append`)."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "trace":
                continue
            if isinstance(value, Tensor):
                value = [float(v) for v in value]
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, np.generic):
                value = value.item()
            out[f.name] = value
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only, so that a checkpoint that holds it loads with ``weights_only=True``."""
        return {**self.scalars(), "trace": self.trace.detach().to("cpu", torch.float32).clone()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Estimate:
        """The inverse of :meth:`state_dict`; keys of a newer version are passed over.

        Raises:
            KeyError, TypeError, ValueError: where it is no estimate.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in state.items() if k in names}
        values |= {k: math.inf for k in MAY_BE_INFINITE if values.get(k) == INFINITE}
        values["per_chain"] = torch.tensor(
            [math.nan if v is None else v for v in values["per_chain"]], dtype=torch.float64, device="cpu"
        )
        for name in ("reasons", "kinds"):
            values[name] = tuple(values.get(name) or ())
        if "trace" not in values:
            values["trace"] = torch.empty(len(values["per_chain"]), 0, device="cpu")
        for f in dataclasses.fields(cls):
            if f.type in ("float",) and values.get(f.name) is None and f.name in values:
                values[f.name] = math.nan
            if f.name in values and f.type in ("int", "float", "Optional[int]", "Optional[float]"):
                values[f.name] = _number(f.name, values[f.name], f.type)
        return cls(**values)

    def __str__(self) -> str:
        where = f"step {self.step}: " if self.step is not None else ""
        beside = f"  beside a minimum, at which it is about {self.slope:.3g} higher" if self.beside_minimum else ""
        state = beside if self.valid else f"  NOT VALID: {'; '.join(self.reasons)}"
        return (
            f"{where}LLC {self.mean:.3g} ± {self.se:.2g}  (loss {self.init_loss:.4g}, R-hat {self.rhat:.2f}, "
            f"ESS {self.ess:.0f}, {self.num_chains} chains x {self.num_draws} draws){state}"
        )

    def __repr__(self) -> str:
        return f"Estimate(mean={self.mean:.6g}, se={self.se:.3g}, valid={self.valid}, step={self.step})"


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: it becomes null, so that any reader can parse the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(v) for v in value]
    return value


def _number(name: str, value: Any, kind: str) -> Any:
    """A number of a record, which another tool may have written as text, or a whole one with a point.

    Raises:
        TypeError, ValueError: where it is none.
    """
    if value is None and kind.startswith("Optional"):
        return None
    number = float(value) if "float" in kind or isinstance(value, float) else int(value)
    if "int" not in kind:
        return number
    if number != number // 1:  # NaN and infinity too
        raise ValueError(f"{name}={value!r} is no whole number")
    return int(number)


def _is_cut_off(file: BinaryIO) -> bool:
    """Whether the last line of a file has no end. One byte is read: a record of many firings is long."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


class RunRecord:
    """The local record of one run: appended at each firing, readable while the run is alive and after it died.

    Args:
        folder: The run's own folder; made at the first :meth:`append`.

    Example:
        >>> import tempfile
        >>> record = RunRecord(tempfile.mkdtemp())
        >>> list(record.read())
        []
    """

    def __init__(self, folder: Union[str, os.PathLike[str]]) -> None:
        self.folder = Path(folder)

    @property
    def path(self) -> Path:
        return self.folder / RECORD_FILE

    def trace_path(self, estimate: Estimate) -> Path:
        return self.folder / TRACE_FOLDER / f"step_{estimate.step or 0:09d}.npz"

    def append(self, estimate: Estimate) -> None:
        """Add one estimate; the line is on disk when this returns.

        Raises:
            OSError: where the folder cannot be written.
            ValueError: for a second estimate without a step, whose chains would take the place of the first one's.
        """
        if estimate.step is None and self.trace_path(estimate).exists():
            raise ValueError(
                f"step=None: {self.folder} has an estimate without a step already. Give each its own: "
                "estimate.replace(step=...)."
            )
        self._write_traces(estimate)
        scalars = estimate.scalars()
        infinite = {k: INFINITE for k in MAY_BE_INFINITE if scalars[k] == math.inf}
        line = json.dumps({**finite_or_none(scalars), **infinite}, allow_nan=False)
        with open(self.path, "a+b") as file:
            # a crash may have cut the last line off: it must not swallow this one
            file.write((b"\n" if _is_cut_off(file) else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_traces(self, estimate: Estimate) -> None:
        arrays: dict[str, Any] = {
            "trace": estimate.trace.numpy(force=True).astype(np.float32),
            "per_chain": estimate.per_chain.numpy(force=True),
        }

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)

        write_whole(self.trace_path(estimate), write)

    def drop_after(self, step: int) -> None:
        """Forget what was recorded after ``step``: a resumed run measures those steps again."""
        if not self.path.exists():
            return
        lines = list(self._lines())
        for _, estimate in lines:
            if (estimate.step or 0) > step:
                self.trace_path(estimate).unlink(missing_ok=True)
        kept = [line for line, estimate in lines if (estimate.step or 0) <= step]
        text = "".join(line + "\n" for line in kept)
        write_whole(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def read(self, traces: bool = True) -> Iterator[Estimate]:
        """The estimates in order of writing. A line that was cut off by a crash is passed over, and so are one that
        is no estimate and a file of traces that cannot be read; the log names these."""
        for _, estimate in self._lines():
            path = self.trace_path(estimate)
            if traces and path.exists():
                try:
                    with np.load(path) as arrays:
                        estimate = estimate.replace(trace=torch.from_numpy(arrays["trace"]))
                except UNREADABLE as error:
                    log.warning(
                        f"{path}: cannot be read ({type(error).__name__}: {error}), so the chains of step "
                        f"{estimate.step} are left out. Restore the file from a copy, or delete it."
                    )
            yield estimate

    def _lines(self) -> Iterator[tuple[str, Estimate]]:
        """The lines that are estimates, and what they say."""
        if not self.path.exists():
            return
        # what is no text is no line of ours; another tool may have put its mark at the beginning
        with open(self.path, encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                line = line.rstrip("\n")
                try:
                    found = json.loads(line)
                except ValueError:  # also of a number of thousands of digits
                    continue
                if not isinstance(found, dict):
                    continue
                try:
                    estimate = Estimate.from_state_dict(found)
                except (KeyError, TypeError, ValueError) as error:
                    said = f"{type(error).__name__}: {error}"
                    log.warning(f"{self.path}: a line is no estimate and is passed over ({said}).")
                    continue
                yield line, estimate
