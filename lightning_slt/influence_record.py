"""What was measured of the influence of samples at one set of weights, as a dataclass, and its files on disk.

``influence/step_*.safetensors`` holds the tensors and ``influence/step_*.json`` the rest: both are readable without
this package.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy import stats
from torch import Tensor

from lightning_slt.durable import write_whole

log = logging.getLogger(__name__)

INFLUENCE_FOLDER = "influence"
MIN_Z = 3.0
"""A single pair is shown where it is further than this many standard errors from zero."""


def in_order(groups: Iterable[str]) -> tuple[str, ...]:
    """Names of groups as a person sorts them: numbers by their value, before all others, and so the numbers in names.

    Example:
        >>> in_order({"class 10", "10", "class 2", "nan", "-1.5"})
        ('-1.5', '10', 'class 2', 'class 10', 'nan')
    """

    def place(name: str) -> tuple[int, float, list[Union[str, int]], str]:
        with suppress(ValueError):
            if math.isfinite(number := float(name)):
                return 0, number, [], name
        # text and numbers in turn; longer ones than these are no numbers to Python
        parts = re.split(r"([0-9]{1,99})", name)
        return 1, 0.0, [int(part) if k % 2 else part for k, part in enumerate(parts)], name

    return tuple(sorted(groups, key=place))


@dataclass(frozen=True, eq=False)
class Dropped:
    """A sample that was left out.

    Attributes:
        kind: ``"train"`` or ``"query"``.
        index: its number in its dataset.
        reason: why.
    """

    kind: str
    index: int
    reason: str


@dataclass(frozen=True, eq=False)
class InfluenceEstimate:
    """Local Bayesian influence of training samples on queries, ``Cov_w(l_i(w), l_q(w))`` over the local posterior.

    Kreer et al. 2025, arXiv 2509.26544, whose ``BIF = -Cov`` is the negative of ``matrix``: here a positive number says
    that more weight on training sample i *lowers* the loss of query q (helpful).

    Rows are queries, columns training samples; ``train_index`` and ``query_index`` say which samples of the datasets
    they are. Where no queries were given the training samples are the queries.

    Attributes:
        matrix: ``[n_query, n_train]`` float64, the covariance within chains, averaged over the chains.
        correlation: ``[n_query, n_train]``, the same divided by both standard deviations.
        se: ``[n_query, n_train]``, Monte-Carlo standard error of ``matrix``; counts autocorrelation.
        self_influence: ``[n_train]``, the variance of each sample's own loss.
        self_influence_se: ``[n_train]``; of few chains a variance that is too small has too small an error as well
            (docs/influence.md).
        init_loss: ``[n_train]``, the loss of each sample at ``w*``.
        mean_loss: ``[n_train]``, its mean over the posterior (of ``mean_nbeta`` and ``mean_localization``, where these
            are given: a hotter one, whose region is wide enough to leave what has been memorised); large for
            mislabelled samples, memorised or not.
        mean_loss_se: ``[n_train]``.
        query_init_loss, query_mean_loss: ``[n_query]``.
        train_index: ``[n_train]`` long.
        query_index: ``[n_query]`` long.
        query_token: ``[n_query]`` long, the token of the query that a row is of; None where rows are whole samples.
        train_group, query_group: the group (the class, by default) of each sample; None where there are none.
        groups: the names of the groups, in the order of ``group_matrix``.
        group_matrix: ``[n_groups, n_groups]``, covariance of the groups' mean losses (rows: groups of queries); NaN
            where a group has no sample on that side. None without groups.
        group_se: ``[n_groups, n_groups]``.
        nbeta, localization: of the posterior.
        num_samples: n, the number of training samples behind the posterior.
        num_chains: chains that were used (bad ones are left out).
        num_draws: readings of each chain.
        num_blocks: independent stretches of chains that the errors are from: blocks, or chains where these are short.
        between_share: share s of the samples' loss variance that lies between chains, averaged over samples: near 0
            where the chains have mixed. What chains of finite length miss within themselves for it is made good by the
            factor ``(n - 1) / n + s / (1 - s)``, n draws, the same for all pairs; above one half of s, ``valid`` is
            false instead.
        dropped: samples left out, with reasons.
        valid: whether the numbers may be read; ``reasons`` says why not, ``notes`` what else is to be known.
        mean_nbeta, mean_localization: of the posterior of ``mean_loss``; None where it is that of ``matrix``.
        shrinkage: the power p of ``sign(rho) |rho|^p s_i s_q``; 1 where ``matrix`` is the plain covariance.
        rest_weight: how much of what the draws say beyond first order is in ``matrix``, 0 to 1: the James-Stein factor
            that leaves the smallest error, near 1 for many draws; 1 where nothing is known to first order
            (no control variates). ``se`` is the error without it, or what it takes off an entry, where that is more.
        queries_are_train: the queries are samples of the training data.
        step, epoch, x, seconds, component: as in :class:`~lightning_slt.record.Estimate`.
        suspicion: ``[n_train]``, what :meth:`suspects` ranks by where the run has more than one firing, see
            :func:`suspicion_of`; None for ``mean_loss``.
        known_passing, known_max_abs: what the pairs said, where they are not kept; see :meth:`without_pairs`.
    """

    matrix: Tensor
    correlation: Tensor
    se: Tensor
    self_influence: Tensor
    self_influence_se: Tensor
    init_loss: Tensor
    mean_loss: Tensor
    mean_loss_se: Tensor
    query_init_loss: Tensor
    query_mean_loss: Tensor
    train_index: Tensor
    query_index: Tensor
    nbeta: float
    localization: float
    num_chains: int
    num_draws: int
    query_token: Optional[Tensor] = None
    train_group: Optional[tuple[str, ...]] = None
    query_group: Optional[tuple[str, ...]] = None
    groups: tuple[str, ...] = ()
    group_matrix: Optional[Tensor] = None
    group_se: Optional[Tensor] = None
    num_samples: Optional[int] = None
    num_blocks: int = 0
    between_share: float = math.nan
    dropped: tuple[Dropped, ...] = ()
    valid: bool = True
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mean_nbeta: Optional[float] = None
    mean_localization: Optional[float] = None
    shrinkage: float = 1.0
    rest_weight: float = 1.0
    queries_are_train: bool = False
    step: Optional[int] = None
    epoch: Optional[int] = None
    x: Optional[int] = None
    seconds: float = math.nan
    component: str = ""
    known_passing: float = math.nan
    known_max_abs: float = math.nan
    suspicion: Optional[Tensor] = None

    def replace(self, **changes: Any) -> InfluenceEstimate:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_verdict(self, reasons: Sequence[str], notes: Sequence[str] = ()) -> InfluenceEstimate:
        """A copy with more reasons why it is not valid, where there are any, and more notes."""
        every = (*self.reasons, *reasons)
        return self.replace(valid=not every, reasons=every, notes=(*self.notes, *notes))

    @property
    def z(self) -> Tensor:
        """``[n_query, n_train]``, ``matrix / se``: how far from zero, in standard errors."""
        return self.matrix / self.se.clamp_min(torch.finfo(self.se.dtype).tiny)

    @property
    def passing(self) -> float:
        """Share of the pairs of two samples that are further than 3 standard errors from zero; see :attr:`chance`.

        NaN where there are no pairs.
        """
        pairs = self.z[~self._same()]
        return float((pairs.abs() > MIN_Z).double().mean()) if len(pairs) else self.known_passing

    @property
    def chance(self) -> float:
        """Share of the pairs that would be further than 3 errors from zero if no sample had any influence.

        Student's t with ``num_blocks - 1`` degrees of freedom: 5.8 % for 4 short chains, 0.9 % for 16
        blocks, 0.27 % for many.
        """
        return float(2 * stats.t.sf(MIN_Z, max(self.num_blocks - 1, 1)))

    @property
    def per_sample_llc(self) -> Tensor:
        """``[n_train]``, ``nbeta (E[l_i] - l_i(w*))`` over the posterior of ``mean_loss``; its mean over all training
        samples is the LLC."""
        nbeta = self.nbeta if self.mean_nbeta is None else self.mean_nbeta
        return nbeta * (self.mean_loss - self.init_loss)

    @property
    def max_abs(self) -> float:
        """The largest ``|matrix|`` between two different samples."""
        values = self.matrix[~self._same()].abs()
        return float(values.max()) if len(values) else self.known_max_abs

    @property
    def top_share(self) -> float:
        """Share of all self-influence that the tenth of the samples with most of it have: 0.1 where all are alike."""
        total = float(self.self_influence.sum())
        count = max(1, round(len(self.self_influence) / 10))
        return float(self.self_influence.topk(count).values.sum()) / total if total > 0 else math.nan

    def top(self, query: int = 0, k: int = 10, min_z: float = 0.0) -> list[tuple[int, float, float]]:
        """The training samples that help a query most: ``(index in the training data, influence, error)``.

        Args:
            query: row of ``matrix``.
            k: how many at most.
            min_z: only pairs that are further than this many standard errors from zero; 3 leaves out what chance makes.

        Raises:
            IndexError: where there is no such row.
            ValueError: for a negative ``k``.
        """
        return self._ranked(query, k, min_z, descending=True)

    def bottom(self, query: int = 0, k: int = 10, min_z: float = 0.0) -> list[tuple[int, float, float]]:
        """The training samples that harm a query most; as :meth:`top`."""
        return self._ranked(query, k, min_z, descending=False)

    def suspects(self, k: int = 20) -> list[int]:
        """Columns of the likeliest mislabels and outliers: the ``k`` largest posterior mean losses, largest first; over
        all firings of a run so far, where there is ``suspicion``."""
        _check_number_of(k)
        score = self.mean_loss if self.suspicion is None else self.suspicion
        return score.argsort(descending=True, stable=True)[:k].tolist()

    def loss_rank(self) -> Tensor:
        """``[n_train]`` long: the place of each sample by its loss at ``w*``, 1 for the largest."""
        rank = torch.empty(len(self.init_loss), dtype=torch.long, device="cpu")
        rank[self.init_loss.argsort(descending=True, stable=True)] = torch.arange(1, len(rank) + 1, device="cpu")
        return rank

    def nearest(self, query: int = 0, k: int = 10) -> list[tuple[int, float]]:
        """The training samples most correlated with a query (near-duplicates): ``(index, correlation)``.

        The covariance finds large losses instead of duplicates, so it is not used here.
        """
        _check_number_of(k)
        row = self.correlation[self._row(query)].clone()
        row[self._same()[query]] = -math.inf
        order = row.argsort(descending=True, stable=True)[:k]
        return [(int(self.train_index[j]), float(row[j])) for j in order.tolist() if row[j] > -math.inf]

    def _row(self, query: int) -> int:
        if not 0 <= query < len(self.matrix):
            none = len(self.matrix) == 0
            why = f" The estimate is not valid: {'; '.join(self.reasons)}." if none and self.reasons else ""
            raise IndexError(f"query={query}: there are {len(self.matrix)} queries, numbered from 0.{why}")
        return query

    def _ranked(self, query: int, k: int, min_z: float, descending: bool) -> list[tuple[int, float, float]]:
        _check_number_of(k)
        row = self.matrix[self._row(query)]
        allowed = (row > 0 if descending else row < 0) & ~self._same()[query]
        allowed &= self.z[query].abs() >= min_z
        order = row.argsort(descending=descending, stable=True)
        chosen = [j for j in order.tolist() if allowed[j]][:k]
        return [(int(self.train_index[j]), float(row[j]), float(self.se[query, j])) for j in chosen]

    def _same(self) -> Tensor:
        """``[n_query, n_train]`` bool: the pair is one and the same sample, where queries are training samples."""
        if not self.queries_are_train or not self.matrix.numel():
            return torch.zeros(self.matrix.shape, dtype=torch.bool, device="cpu")
        return self.query_index[:, None] == self.train_index[None]

    def scalars(self) -> dict[str, Any]:
        """All but the tensors, as types that JSON knows."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                continue
            if f.name == "dropped":
                value = [dataclasses.asdict(d) for d in value]
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, float) and not math.isfinite(value):
                value = None
            out[f.name] = value
        return out

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; those of pairs in float32, which is far below their errors."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        return found | {k: found[k].float() for k in ("matrix", "correlation", "se")}

    def without_pairs(self) -> InfluenceEstimate:
        """The same without the pair matrices: what the history in memory and in a checkpoint keeps."""
        empty = torch.empty(0, len(self.train_index), dtype=torch.float64, device="cpu")
        said = {"known_passing": self.passing, "known_max_abs": self.max_abs}
        return self.replace(matrix=empty, correlation=empty, se=empty, **said)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only."""
        return {"scalars": self.scalars(), "tensors": self.tensors()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InfluenceEstimate:
        """The inverse of :meth:`state_dict`; keys of a newer version are passed over."""
        names = {f.name: f for f in dataclasses.fields(cls)}
        values = {k: v for k, v in {**state["scalars"], **state["tensors"]}.items() if k in names}
        for name in ("reasons", "notes", "groups", "train_group", "query_group"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        values["dropped"] = tuple(Dropped(**d) for d in values.get("dropped", ()))
        for name in ("matrix", "correlation", "se"):
            values[name] = values[name].double()
        for name, field in names.items():
            # what was not finite when it was written
            if field.type == "float" and name in values and values[name] is None:
                values[name] = math.nan
        return cls(**values)

    def __str__(self) -> str:
        where = f"step {self.step}: " if self.step is not None else ""
        state = "" if self.valid else f"  NOT VALID: {'; '.join(self.reasons)}"
        pairs = f", {self.passing:.1%} of the pairs above 3 errors" if math.isfinite(self.passing) else ""
        return (
            f"{where}influence of {len(self.train_index)} samples on {len(self.query_index)} queries, "
            f"{self.num_chains} chains x {self.num_draws} draws{pairs}{state}"
        )

    def __repr__(self) -> str:
        shape = tuple(self.matrix.shape)
        return f"InfluenceEstimate(matrix={shape}, valid={self.valid}, step={self.step})"


def _check_number_of(k: int) -> None:
    """Refuse a negative number, which would be read as all but so many."""
    if k < 0:
        raise ValueError(f"k={k}: must be at least 0, how many are wanted at the most.")


def suspicion_of(firings: Sequence[InfluenceEstimate]) -> Optional[Tensor]:
    r"""How much a sample has cost at the firings of a run so far: what hides in one of them shows in others.

    Wrong labels are learnt last, and once they are, a firing of few chains has not seen enough of the region in which
    they are expensive again. The mean over the logarithm of the step: of the mean losses at firings t, each centred at
    its median m_t and in units of the mean distance from it, with ``a_t = log(step_t / step_{t-1})`` (log 2 for the
    first one),

    .. math:: s_i = \sum_t a_t \frac{E_t[\ell_i] - m_t}{\frac 1 n \sum_j |E_t[\ell_j] - m_t|}
        \Big/ \sum_t a_t ,

    so that neither the scale of a loss nor how often it was measured late in the run outweighs the rest. That the
    course of the loss tells wrong labels better than its end is the idea of the area under the margin (Pleiss et al.
    2020, arXiv 2001.10528).

    Args:
        firings: of one run, oldest first. Each counts for the samples that it has.

    Returns:
        ``[n_train]`` float64 of the last firing's samples; None for fewer than two firings.
    """
    if len(firings) < 2:
        return None
    index = firings[-1].train_index
    place = {sample: k for k, sample in enumerate(index.tolist())}
    total, count = torch.zeros(len(index), device="cpu").double(), torch.zeros(len(index), device="cpu").double()
    before: Optional[int] = None
    for firing in firings:
        weight, step = math.log(2.0), firing.step
        if step is not None and before is not None and step > before > 0:
            weight = math.log(step / before)
        before = step if step is not None else before
        if not len(firing.mean_loss) or not bool(torch.isfinite(firing.mean_loss).all()):
            continue
        centred = firing.mean_loss.double() - firing.mean_loss.double().median()
        scale = float(centred.abs().mean())
        if not scale > 0:
            continue
        if torch.equal(firing.train_index, index):  # as nearly always: all are asked anew at every firing of a run
            total += weight * centred / scale
            count += weight
            continue
        common = [(k, place[sample]) for k, sample in enumerate(firing.train_index.tolist()) if sample in place]
        if common:
            here, at = torch.tensor(common, device="cpu").T
            total[at] += weight * centred[here] / scale
            count[at] += weight
    return total / torch.where(count > 0, count, 1.0)


class InfluenceRecord:
    """The influence estimates of one run, one pair of files for each.

    Args:
        folder: the run's own folder; ``influence/`` in it is made at the first :meth:`save`.
    """

    def __init__(self, folder: Union[str, os.PathLike[str]]) -> None:
        self.folder = Path(folder) / INFLUENCE_FOLDER

    def paths(self, step: Optional[int]) -> tuple[Path, Path]:
        """The tensors' file and the JSON file of a step."""
        stem = self.folder / f"step_{step or 0:09d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def save(self, estimate: InfluenceEstimate) -> None:
        """Write both files, each in one step.

        Raises:
            OSError: where the folder cannot be written.
        """
        tensors, text = self.paths(estimate.step)
        scalars = (json.dumps(estimate.scalars(), indent=1, allow_nan=False) + "\n").encode()
        write_whole(tensors, lambda temporary: temporary.write_bytes(save(estimate.tensors())))
        write_whole(text, lambda temporary: temporary.write_bytes(scalars))

    def load(self, step: Optional[int]) -> InfluenceEstimate:
        """What was measured at a step.

        Raises:
            FileNotFoundError: where nothing was.
            ValueError: where a file is broken, naming it.
        """
        tensors, text = self.paths(step)
        path = text
        try:
            scalars = json.loads(text.read_text(encoding="utf-8"))
            path = tensors
            return InfluenceEstimate.from_state_dict({"tensors": load_file(tensors), "scalars": scalars})
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({type(error).__name__}: {error}). Restore the file from a copy, or delete it."
            ) from error

    def read(self) -> Iterator[InfluenceEstimate]:
        """All of them, in order of steps. A file whose other half is missing is passed over, and so is one that cannot
        be read; the log names that."""
        for path in sorted(self.folder.glob("step_*.json")):
            number = path.stem.removeprefix("step_")
            if not number.isdecimal():
                log.warning(f"{path}: is of no step and is passed over. Move it to another folder, or delete it.")
                continue
            step = int(number)
            if not self.paths(step)[0].exists():
                continue
            try:
                estimate = self.load(step)
            except (OSError, ValueError) as error:
                log.warning(f"the influence at step {step} is left out: {error}")
                continue
            yield estimate

    def drop_after(self, step: int) -> None:
        """Forget what was recorded after ``step``: a resumed run measures those steps again."""
        for path in self.folder.glob("step_*"):
            number = path.name.removeprefix("step_").split(".")[0]
            if number.isdecimal() and int(number) > step:
                path.unlink()
