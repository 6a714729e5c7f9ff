"""Losses of single samples at the weights of chains: which samples, and how to get at their losses.

Nothing of the user's module changes for it. A sample's loss is what the step gives for a batch of that sample alone;
many samples are computed at once by :func:`torch.vmap` over such batches, one after another where the step does not
allow that. A ``loss_fn`` that returns ``[batch]`` losses is called on whole batches, and they are used as they are.

A loss that couples the samples of a batch (a contrastive one) has no loss of a single sample: that is seen by trying
and refused. BatchNorm is no such case here: private copies are in eval mode, where running statistics take its place.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_slt.sampling.batches import DatasetSource, clone, num_bytes
from lightning_slt.sampling.engines import ACTIVATION_BUDGET, observe
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import CHOICE, generator
from lightning_slt.sampling.steps import NoLossError

log = logging.getLogger(__name__)

MAX_SAMPLES = 1000
"""Of the training set that are looked at where nothing else is said."""
MAX_CHUNK = 1024
MAX_ROWS = 16
"""Rows of weights whose losses are computed together."""
CHECKED = 8
"""Samples that are read twice, to see whether the dataset gives the same ones again."""
NAMED = 5


class CoupledLossError(ValueError):
    """The loss of a sample depends on the others of its batch."""


def choose_samples(n: int, limit: Optional[int], seed: int) -> list[int]:
    """Which samples of n: all up to ``limit``, else a random subset that depends on ``seed`` alone, in ascending order.

    Example:
        >>> choose_samples(5, 10, seed=0), choose_samples(1000, 4, seed=0) == choose_samples(1000, 4, seed=0)
        ([0, 1, 2, 3, 4], True)
    """
    if limit is None or n <= limit:
        return list(range(n))
    return sorted(torch.randperm(n, generator=generator(seed, CHOICE))[:limit].tolist())


@dataclass
class Samples:
    """Samples of one dataset, read once and kept.

    Attributes:
        index: their numbers in the dataset.
        batches: a batch of each sample alone, as the step wants it.
        changed: those that were different when read a second time (random augmentation), of the few that were tried.
    """

    index: list[int]
    batches: list[Any]
    changed: list[int] = field(default_factory=list)

    @staticmethod
    def of(source: DatasetSource, numbers: Sequence[int]) -> Samples:
        """Read these samples (numbers within the source's ``indices``, where it has some)."""
        index = [source.indices[i] for i in numbers] if source.indices is not None else list(numbers)
        batches = source.read_samples(index)
        again = source.read_samples(index[:CHECKED])
        changed = [i for i, a, b in zip(index, batches, again, strict=False) if not _equal(a, b)]
        return Samples(index, batches, changed)


def _equal(a: Any, b: Any) -> bool:
    (one, spec), (two, other) = tree_flatten(a), tree_flatten(b)
    if spec != other:
        return False
    for x, y in zip(one, two, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape or not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
                return False
        elif type(x) is not type(y) or (isinstance(x, (str, int, float, bool)) and x != y):
            return False
    return True


@dataclass
class _Group:
    """Samples whose batches have one structure and one set of shapes, stacked.

    Attributes:
        places: their columns.
        columns: leaves of the batch; tensors have the samples in front.
        spec: how the leaves make a batch.
        size: of the chunks that are computed at once.
    """

    places: list[int]
    columns: list[Any]
    spec: Any
    size: int = MAX_CHUNK

    def part(self, start: int, stop: int) -> tuple[Any, Any]:
        """The batches of one each, stacked, and the ``in_dims`` for vmap."""
        some = [c[start:stop] if isinstance(c, Tensor) else c for c in self.columns]
        return tree_unflatten(some, self.spec), self.dims

    def joined(self, start: int, stop: int) -> Any:
        """One batch of these samples: the samples take the place of the batch dimension of one."""
        some = [c[start:stop].flatten(0, 1) if isinstance(c, Tensor) and c.ndim > 1 else c for c in self.columns]
        return tree_unflatten(some, self.spec)

    def single(self, k: int) -> Any:
        return tree_unflatten([c[k] if isinstance(c, Tensor) else c for c in self.columns], self.spec)

    @property
    def dims(self) -> Any:
        return tree_unflatten([0 if isinstance(c, Tensor) else None for c in self.columns], self.spec)


class Probe:
    """Losses of samples at any weights.

    Args:
        objective: the loss; must have been adapted to a batch.
        samples: whose losses are wanted.
        per_token: the losses of a ``loss_fn`` that returns ``[batch, tokens]`` stay apart.
        seed: of random numbers inside the step, the same at every reading.

    Raises:
        CoupledLossError: where the loss of a sample depends on the others of its batch.
        ValueError: for ``per_token`` where the loss has no tokens; where no sample has a loss.

    Attributes:
        method: ``"whole batches"``, ``"vmap"`` or ``"one by one"``; ``reason`` says why.
        rows: of weights that are best handed over together.
        index, token: ``[n]`` long: which sample, and which token of it (-1 for whole samples), each column is.
        anchor: ``[n]`` float64, losses at ``w*``.
        without: numbers of the samples for which the step gives no loss.
    """

    def __init__(self, objective: Objective, samples: Samples, per_token: bool = False, seed: int = 0) -> None:
        self._objective = objective
        self._per_token = per_token
        self._seed = seed
        module = objective.module
        self._module = module if objective.borrowed else objective.copy_module()
        self._wrapper = _LossesModule(self._module, objective)
        self._names = [f"module.{name}" for name in objective.names]
        self._dtypes = [p.dtype for p in objective.parameters()]
        self.without: list[int] = []
        self._groups = _grouped(samples.batches)
        self._all = samples.index
        self.method, self.reason, self.rows = "", "", 1
        with torch.no_grad():
            self._drop_without_loss()
            first = self._groups[0]
            self._refuse_coupled()
            out = self._one(self._named(objective.anchor), first.single(0))
            self.tokens = out.numel() if per_token else 0
            if per_token and (out.ndim < 2 or self.tokens < 2):
                raise ValueError(
                    f"per_token=True: the loss of a sample has shape {tuple(out.shape)}. Give loss_fn(module, batch) "
                    "-> [batch, tokens] losses."
                )
            self._choose_method(out)
            total = sum(len(g.places) for g in self._groups)
            order = sorted(place for g in self._groups for place in g.places)
            self._place = {place: k for k, place in enumerate(order)}
            kept = torch.tensor([samples.index[place] for place in order], dtype=torch.long)
            width = max(self.tokens, 1)
            self.index = kept.repeat_interleave(width)
            self.token = torch.arange(width).repeat(total) if per_token else torch.full((total,), -1)
            self.anchor = self._losses(objective.anchor.unsqueeze(0))[0].double().cpu()

    @property
    def n(self) -> int:
        """Columns."""
        return len(self.index)

    def __call__(self, weights: Tensor) -> Tensor:
        """Losses minus those at ``w*``, ``[chains, n]`` float32: the difference keeps the digits.

        Args:
            weights: ``[chains, d]``.
        """
        if not len(weights):
            return torch.empty(0, self.n)
        with torch.no_grad():
            parts = [self._losses(some) for some in weights.split(self.rows)]
            return (torch.cat(parts).double().cpu() - self.anchor).float()

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = self._objective.pieces(flat)
        return {name: p.to(t) for name, p, t in zip(self._names, pieces, self._dtypes, strict=True)}

    def _losses(self, weights: Tensor) -> Tensor:
        """``[rows, n]``, at the weights ``[rows, d]``."""
        rows, width = len(weights), max(self.tokens, 1)
        out = weights.new_empty(rows, len(self._place), width)
        with _same_random_numbers(self._seed, weights.device):
            for group in self._groups:
                for start in range(0, len(group.places), group.size):
                    places = group.places[start : start + group.size]
                    columns = [self._place[p] for p in places]
                    losses = self._chunk(weights, group, start, start + len(places))
                    out[:, columns] = losses.reshape(rows, len(places), width).to(out.dtype)
        return out.reshape(rows, -1)

    def _chunk(self, weights: Tensor, group: _Group, start: int, stop: int) -> Tensor:
        """``[rows, stop - start, tokens or 1]``."""
        if self.method == "vmap":
            batch, dims = group.part(start, stop)
            over_samples = torch.vmap(
                lambda named, b: self._reduced(self._call(named, b)), in_dims=(None, dims), randomness="different"
            )
            if len(weights) == 1:
                return over_samples(self._named(weights[0]), batch).unsqueeze(0)
            return torch.vmap(over_samples, in_dims=(0, None), randomness="same")(self._named(weights), batch)
        found = []
        for row in weights:
            named = self._named(row)
            if self.method == "whole batches":
                losses = self._call(named, group.joined(start, stop))
                found.append(losses if self._per_token else losses.reshape(stop - start, -1).mean(dim=1))
            else:
                singles = [self._reduced(self._one(named, group.single(k))) for k in range(start, stop)]
                found.append(torch.stack(singles))
        return torch.stack(found)

    def _reduced(self, losses: Tensor) -> Tensor:
        return losses.reshape(-1) if self._per_token else losses.mean().reshape(1)

    def _call(self, named: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.func.functional_call(self._wrapper, named, (batch,))

    def _one(self, named: dict[str, Tensor], batch: Any) -> Tensor:
        """The losses of one batch, the ordinary way: buffers that the step writes to are copies."""
        buffers = {f"module.{k}": b.clone() for k, b in self._module.named_buffers()}
        return self._call({**named, **buffers}, clone(batch))

    def _drop_without_loss(self) -> None:
        """Samples for which the step returns None are left out."""
        named = self._named(self._objective.anchor)
        kept = []
        for group in self._groups:
            try:
                self._one(named, group.single(0))
                kept.append(group)
                continue
            except NoLossError:
                pass
            # a group shares its shapes, not its contents: ask one by one
            with_loss = []
            for k in range(len(group.places)):
                try:
                    self._one(named, group.single(k))
                    with_loss.append(k)
                except NoLossError:
                    self.without.append(self._all[group.places[k]])
            if with_loss:
                chosen = torch.tensor(with_loss)
                columns = [c[chosen.to(c.device)] if isinstance(c, Tensor) else c for c in group.columns]
                kept.append(_Group([group.places[k] for k in with_loss], columns, group.spec))
        if not kept:
            raise ValueError("probe: the step gives no loss for any sample.")
        self._groups = kept

    def _refuse_coupled(self) -> None:
        """A sample alone, twice the same one, and two different ones together.

        A mean, weighted (by the number of tokens) or not, gives for twice the same sample what it gives for one, and
        for two something between them. Losses that compare samples do neither.
        """
        group = next((g for g in self._groups if len(g.places) > 1 and g.columns), None)
        if group is None:
            return
        named = self._named(self._objective.anchor)
        try:
            one, two = (float(self._one(named, group.single(k)).mean()) for k in (0, 1))
            if abs(float(self._one(named, group.single(0)).mean()) - one) > 1e-6 * max(abs(one), 1.0):
                log.info("the step draws random numbers: the same ones are given to it at every reading of a sample")
                return
            twice = _Group([0, 0], [_pick(c, [0, 0]) for c in group.columns], group.spec)
            both = float(self._one(named, group.joined(0, 2)).mean())
            same = float(self._one(named, twice.joined(0, 2)).mean())
        except Exception as error:
            log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
            return
        slack = 1e-3 * max(abs(one), abs(two), 1e-6)
        low, high = min(one, two) - slack, max(one, two) + slack
        if abs(same - one) > slack or not low <= both <= high:
            raise CoupledLossError(
                f"the loss couples the samples of a batch: one sample alone has {one:.4g}, twice the same in a batch "
                f"{same:.4g}; two samples have {one:.4g} and {two:.4g} alone, {both:.4g} together. The influence of "
                "single samples is not defined for such a loss (a contrastive or ranking one): give "
                "loss_fn(module, batch) -> [batch] losses of single samples."
            )

    def _choose_method(self, one: Tensor) -> None:
        """Whole batches, vmap, or one by one: the first that gives the numbers of one by one."""
        self._limit_chunks()
        group = max(self._groups, key=lambda g: len(g.places))
        count = min(len(group.places), 4, group.size)
        anchor = self._objective.anchor
        # a second row of other weights, where rows can be computed together
        weights = torch.stack([anchor, 1.01 * anchor])[: self.rows]
        self.method = "one by one"
        expected = self._chunk(weights, group, 0, count).reshape(len(weights), count, -1)
        reasons = []
        for method in ("whole batches", "vmap"):
            if method == "whole batches" and one.ndim == 0:
                continue
            if method == "vmap" and (self._objective.borrowed or not any(isinstance(c, Tensor) for c in group.columns)):
                continue
            self.method = method
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self._chunk(weights, group, 0, count).reshape(len(weights), count, -1)
                if torch.allclose(found, expected, rtol=2e-2 if self._objective.autocast else 1e-3, atol=1e-5):
                    self.reason = "same numbers as one by one"
                    return
                reasons.append(f"{method} gives other numbers")
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else ""
                reasons.append(f"{method} fails: {type(error).__name__}: {text}")
        self.method, self.reason = "one by one", "; ".join(reasons) or "asked for"
        log.info(f"losses of single samples are computed one by one, which is slow: {self.reason}")

    def _limit_chunks(self) -> None:
        """So many samples, and rows of weights, at once as their activations allow."""
        rows = MAX_ROWS
        for group in self._groups:
            single = group.single(0)
            try:
                with torch.enable_grad():
                    saved = observe(self._objective, clone(single)).saved_bytes
            except Exception:
                saved = 64 * num_bytes(single)
            affordable = ACTIVATION_BUDGET // 4 // max(2 * saved, 1)
            group.size = int(max(1, min(MAX_CHUNK, affordable)))
            rows = min(rows, affordable // min(group.size, len(group.places)))
        self.rows = max(1, rows)


class _LossesModule(nn.Module):
    """The losses as a ``forward``, as :func:`torch.func.functional_call` wants it."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self._objective = objective

    def forward(self, batch: Any) -> Tensor:
        return self._objective.losses_of(self.module, batch)


def _pick(column: Any, rows: list[int]) -> Any:
    return column[rows] if isinstance(column, Tensor) else column


def _grouped(batches: Sequence[Any]) -> list[_Group]:
    """Samples that can be stacked with each other."""
    found: dict[Any, list[int]] = {}
    flat = [tree_flatten(batch) for batch in batches]
    for place, (leaves, spec) in enumerate(flat):
        kinds = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _plain_key(x, place) for x in leaves)
        found.setdefault((str(spec), kinds), []).append(place)
    groups = []
    for places in found.values():
        leaves = [flat[p][0] for p in places]
        columns = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in zip(*leaves, strict=True)]
        groups.append(_Group(places, columns, flat[places[0]][1]))
    return groups


def _plain_key(value: Any, place: int) -> Any:
    """What is no tensor keeps samples apart where it differs."""
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float, bool)) for v in value):
        return tuple(value)
    return value if isinstance(value, (str, bytes, int, float, bool, type(None))) else place


@contextmanager
def _same_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside the step are the same at every reading; the global state is put back."""
    on_gpu = device.type == "cuda"
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    torch.default_generator.manual_seed(seed)
    if on_gpu:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)


GroupFn = Callable[[Any], Any]
"""The group of a sample, as the dataset gives it."""


def default_group(sample: Any) -> Optional[str]:
    """The class of a sample: the integer label of ``(x, y)``, or under a usual name in a dict; None without one.

    Example:
        >>> default_group((torch.zeros(4), 3)), default_group({"text": "a", "label": torch.tensor(1)})
        ('3', '1')
        >>> default_group(2.5) is None
        True
    """
    value: Any = None
    if isinstance(sample, (tuple, list)) and len(sample) >= 2:
        value = sample[1]
    elif isinstance(sample, dict):
        value = next((sample[k] for k in ("label", "labels", "target", "targets", "y", "class") if k in sample), None)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if hasattr(value, "item") and getattr(value, "shape", None) == () and not isinstance(value, Tensor):
        value = value.item()
    return str(value) if isinstance(value, (int, str, bool)) else None
