"""Losses of single samples at the weights of chains.

Nothing of the user's module changes for it. A sample's loss is what the step gives for a batch of that sample alone;
many samples are computed at once in whole batches whose mean is left out (:mod:`~lightning_slt.sampling.unreduced`), by
:func:`torch.vmap` over batches of one where that gives other numbers, and one after another where the step allows
neither. A ``loss_fn`` that returns ``[batch]`` losses is called on whole batches, and they are used as they are.

A loss that couples the samples of a batch (a contrastive one) has no loss of a single sample: that is seen by trying
and refused. BatchNorm is no such case here: private copies are in eval mode, where running statistics take its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.one_by_one import slow_sentence
from lightning_slt.sampling.paths import ACTIVATION_BUDGET, observe
from lightning_slt.sampling.rng import preserve_rng, seed_globals
from lightning_slt.sampling.samples import MAX_CHUNK, SampleGroup, Samples, grouped
from lightning_slt.sampling.steps import NoLossError
from lightning_slt.sampling.structures import clone, num_bytes
from lightning_slt.sampling.unreduced import Unreduced
from lightning_slt.sampling.vmapped import what_failed, without_advice

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**23
"""Activations of the samples that are computed at once on the CPU: larger tensors are given back to the system after
every call, and cleared by it before the next."""
MAX_ROWS = 16
"""Rows of weights whose losses are computed together."""
MAX_GRADIENTS = 2**26
"""Numbers in the gradients of all samples: 256 MB."""
NO_STATISTICS = "Expected more than 1 value"
"""How torch's error begins where a layer normalises by the statistics of a single number."""
TOGETHER = 8
"""Samples whose loss together is compared with their losses alone."""


class CoupledLossError(ValueError):
    """The loss of a sample depends on the others of its batch."""


class Probe:
    """Losses of samples at any weights.

    Args:
        objective: the loss; must have been adapted to a batch.
        samples: whose losses are wanted.
        per_token: the losses of a ``loss_fn`` that returns ``[batch, tokens]`` stay apart.
        seed: of random numbers inside the step, the same at every reading.
        progress: told of no steps, again and again while losses are computed: what it raises ends that, which may
            take as long as the chains.

    Raises:
        CoupledLossError: where the loss of a sample depends on the others of its batch.
        ValueError: for ``per_token`` where the loss has no tokens; where no sample has a loss.

    Attributes:
        method: ``"whole batches"``, ``"unreduced batches"``, ``"vmap"`` or ``"one by one"``; ``reason`` says why.
        rows: of weights that are best handed over together.
        index, token: ``[n]`` long: which sample, and which token of it (-1 for whole samples), each column is.
        anchor: ``[n]`` float64, losses at ``w*``.
        without: numbers of the samples for which the step gives no loss.
    """

    def __init__(
        self,
        objective: Objective,
        samples: Samples,
        per_token: bool = False,
        seed: int = 0,
        progress: Optional[Callable[[int], None]] = None,
    ) -> None:
        self._objective = objective
        self._per_token = per_token
        self._seed = seed
        module = objective.module
        self._module = module if objective.borrowed else objective.copy_module(stand_ins=True)
        self._wrapper = _LossesModule(self._module, objective)
        self._names = [f"module.{name}" for name in objective.names]
        self._moving = set(self._names)
        self._dtypes = [p.dtype for p in objective.parameters()]
        self.without: list[int] = []
        self._groups = grouped(samples.batches)
        self._all = samples.index
        self.method, self.reason, self.rows = "", "", 1
        self._alike = False
        self._progress: Callable[[int], None] = lambda steps: None
        with torch.no_grad(), preserve_rng(seed):
            self._drop_without_loss(all_samples=False)
            self._refuse_coupled()
            # a group shares its shapes, and so the number of its tokens
            outs = [self._one(self._named(objective.anchor), group.single(0)) for group in self._groups]
            if per_token and (outs[0].ndim < 2 or max(out.numel() for out in outs) < 2):
                raise ValueError(
                    f"per_token=True: the loss of a sample has shape {tuple(outs[0].shape)}. Give "
                    "loss_fn(module, batch) -> [batch, tokens] losses."
                )
            self._choose_method(outs[0])
            self._progress = progress or self._progress  # not before: what it raises is no failure of a method
            try:
                self.anchor = self._at_anchor()
            except Exception as error:
                if self.method == "one by one":
                    raise
                self.reason = f"{self.method} fails for some samples: {type(error).__name__}"
                self.method = "one by one"
                self.anchor = self._at_anchor()

    @property
    def n(self) -> int:
        """Columns."""
        return len(self.index)

    @property
    def slow(self) -> str:
        """What a user should know where several samples are computed one by one; empty for other ways."""
        return slow_sentence(self.reason) if self.method == "one by one" and len(self._all) > 1 else ""

    def __call__(self, weights: Tensor) -> Tensor:
        """Losses minus those at ``w*``, ``[chains, n]`` float32: the difference keeps the digits.

        Args:
            weights: ``[chains, d]``.
        """
        if not len(weights):
            return torch.empty(0, self.n, device="cpu")
        with torch.no_grad():
            parts = [self._losses(some) for some in weights.split(self.rows)]
            return (torch.cat(parts).double().cpu() - self.anchor).float()

    @property
    def products(self) -> int:
        """Multiplications that the loss of one sample takes: those of its matrix products and convolutions, or as many
        as there are weights, where these cannot be counted."""
        objective = self._objective
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad(), preserve_rng():
                self._one(self._named(objective.anchor), self._groups[0].single(0))
            counted = counter.get_total_flops() // 2
        except Exception as error:
            log.debug(f"the operations of a sample cannot be counted: {type(error).__name__}: {error}")
            counted = 0
        return counted or len(objective.anchor)

    def gradients(self, limit: int = MAX_GRADIENTS) -> Optional[Tensor]:
        """``[n, d]``, of every loss at ``w*``; None where they are too many numbers, or are not to be had at once.

        Args:
            limit: numbers at the most.
        """
        anchor = self._objective.anchor
        if self.method == "one by one" or self.n * len(anchor) > limit:
            return None
        out = anchor.new_empty(self.n, len(anchor))

        def losses(flat: Tensor, batch: Any) -> Tensor:
            return self._reduced(self._call(self._named(flat), batch))

        one = torch.func.jacrev(losses)
        try:
            with torch.no_grad(), preserve_rng():
                for group in self._groups:
                    size = max(1, min(group.size, limit // 8 // (len(anchor) * group.at.shape[1])))
                    for start in range(0, len(group.places), size):
                        columns = group.at[start : start + size]
                        batch, dims = group.part(start, start + len(columns))
                        self._reseed(group.places[start])
                        with without_advice():
                            found = torch.vmap(one, in_dims=(None, dims), randomness="different")(anchor, batch)
                        out[columns.flatten().to(out.device)] = found.reshape(-1, len(anchor)).to(out.dtype)
        except Exception as error:
            log.debug(f"gradients of single samples are not to be had at once: {type(error).__name__}: {error}")
            return None
        out[~torch.isfinite(out).all(dim=1)] = 0.0  # a sample without a finite loss is left out anyway
        return out

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = self._objective.pieces(flat)
        return {name: p.to(t) for name, p, t in zip(self._names, pieces, self._dtypes, strict=True)}

    def _at_anchor(self) -> Tensor:
        """``[n]`` losses at ``w*``, and with them which columns there are."""
        if self.method == "one by one":
            self._drop_without_loss(all_samples=True)
        self._number_columns()
        return self._losses(self._objective.anchor.unsqueeze(0))[0].double().cpu()

    def _number_columns(self) -> None:
        """Which sample and token each column is: samples in their order, the tokens of one beside each other."""
        named = self._named(self._objective.anchor)
        width: dict[int, int] = {}
        for group in self._groups:
            tokens = self._one(named, group.single(0)).numel() if self._per_token else 1
            width.update(dict.fromkeys(group.places, tokens))
        first, total = {}, 0
        for place in sorted(width):
            first[place], total = total, total + width[place]
        for group in self._groups:
            starts = torch.tensor([first[place] for place in group.places], device="cpu")
            group.at = starts[:, None] + torch.arange(width[group.places[0]], device="cpu")
        samples, tokens_of = sorted(width), [torch.arange(width[place], device="cpu") for place in sorted(width)]
        self.index = torch.tensor(
            [self._all[p] for p in samples for _ in range(width[p])], dtype=torch.long, device="cpu"
        )
        self.token = torch.cat(tokens_of) if self._per_token else torch.full((total,), -1, device="cpu")

    def _losses(self, weights: Tensor) -> Tensor:
        """``[rows, n]``, at the weights ``[rows, d]``."""
        out = weights.new_empty(len(weights), self.n)
        with preserve_rng():
            for group in self._groups:
                for start in range(0, len(group.places), group.size):
                    columns = group.at[start : start + group.size]
                    losses = self._chunk(weights, group, start, start + len(columns))
                    out[:, columns.flatten().to(out.device)] = losses.reshape(len(weights), -1).to(out.dtype)
        return out

    def _chunk(self, weights: Tensor, group: SampleGroup, start: int, stop: int) -> Tensor:
        """``[rows, stop - start, tokens or 1]``.

        Random numbers inside the step start anew for every row of weights: a sample has the same ones at all of them.
        """
        self._progress(0)
        if self.method == "vmap":
            batch, dims = group.part(start, stop)
            self._reseed(group.places[start])
            over_samples = torch.vmap(
                lambda named, b: self._reduced(self._call(named, b)),
                in_dims=(None, dims),
                randomness="same" if self._alike else "different",
            )
            with without_advice():
                if len(weights) == 1:
                    return over_samples(self._named(weights[0]), batch).unsqueeze(0)
                return torch.vmap(over_samples, in_dims=(0, None), randomness="same")(self._named(weights), batch)
        found = []
        for row in weights:
            self._progress(0)
            named = self._named(row)
            self._reseed(group.places[start])
            if self.method in ("whole batches", "unreduced batches"):
                apart = Unreduced(stop - start) if self.method == "unreduced batches" else contextlib.nullcontext()
                with apart:
                    losses = self._call(named, group.joined(slice(start, stop)))
                found.append(losses if self._per_token else losses.reshape(stop - start, -1).mean(dim=1))
                continue
            singles = []
            for k in range(start, stop):
                if self._alike:
                    self._reseed(group.places[start])
                singles.append(self._reduced(self._one(named, group.single(k))))
            found.append(torch.stack(singles))
        return torch.stack(found)

    def _reseed(self, number: int) -> None:
        """The random numbers inside the step from here on, the same for the same number; inside ``preserve_rng``."""
        seed_globals((self._seed + number) % 2**32)

    def _reduced(self, losses: Tensor) -> Tensor:
        return losses.reshape(-1) if self._per_token else losses.mean().reshape(1)

    def _call(self, named: dict[str, Tensor], batch: Any) -> Tensor:
        """The losses of a batch; buffers that the step writes to are copies."""
        if self._objective.differentiates and not torch.is_grad_enabled():  # it may ask for those of the weights
            named = {k: v.detach().requires_grad_(k in self._moving) for k, v in named.items()}
        if self._objective.writes:
            named = {**{f"module.{k}": b.clone() for k, b in self._module.named_buffers()}, **named}
        return torch.func.functional_call(self._wrapper, named, (batch,))

    def _one(self, named: dict[str, Tensor], batch: Any) -> Tensor:
        """The losses of one batch, the ordinary way."""
        buffers = {f"module.{k}": b.clone() for k, b in self._module.named_buffers()}
        try:
            return self._call({**named, **buffers}, clone(batch))
        except ValueError as error:
            if NO_STATISTICS not in str(error):
                raise
            raise CoupledLossError(_by_the_batch(self._module)) from error

    def _has_loss(self, named: dict[str, Tensor], batch: Any) -> bool:
        try:
            self._one(named, batch)
        except NoLossError:
            return False
        return True

    def _drop_without_loss(self, all_samples: bool) -> None:
        """Samples for which the step returns None are left out.

        Args:
            all_samples: ask about each of them, else about the first of a group and about the others where that has
                none. A step that can look at what is in a sample, and not just at its shape, cannot be vmapped.
        """
        named = self._named(self._objective.anchor)
        kept = []
        for group in self._groups:
            if not all_samples and self._has_loss(named, group.single(0)):
                kept.append(group)
                continue
            rows = [k for k in range(len(group.places)) if self._has_loss(named, group.single(k))]
            self.without += [self._all[place] for k, place in enumerate(group.places) if k not in set(rows)]
            if rows:
                kept.append(group.only(rows))
        if not kept:
            raise ValueError("the step gives no loss for any sample: there is nothing to measure the influence of.")
        self._groups = kept

    def _refuse_coupled(self) -> None:
        """A sample alone, twice the same one, and some different ones together.

        A mean, weighted (by the number of tokens) or not, gives for twice the same sample what it gives for one, and
        for several something between them; a sum gives twice as much, and as many times. Losses that compare samples
        do neither.
        """
        group = next((g for g in self._groups if len(g.places) > 1 and g.columns), None)
        if group is None:
            return
        named = self._named(self._objective.anchor)
        rows: list[int] = []
        alone: list[float] = []
        try:
            for k in range(min(len(group.places), 4 * TOGETHER)):
                if self._has_loss(named, group.single(k)):
                    value = float(self._one(named, group.single(k)).mean())
                    rows, alone = ([*rows, k], [*alone, value]) if math.isfinite(value) else (rows, alone)
                if len(rows) == TOGETHER:
                    break
            if len(rows) < 2:
                return
            again = float(self._one(named, group.single(rows[0])).mean())
            if abs(again - alone[0]) > 1e-6 * max(abs(again), 1.0):
                log.info("the step draws random numbers: the same ones are given to it at every reading of a sample")
                return
            found = self._together(named, group, rows, time_first=False)
        except Exception as error:
            log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
            return
        if _separate(alone, *found):
            return
        if group.may_be_time_first:
            try:
                if _separate(alone, *self._together(named, group, rows, time_first=True)):
                    return
            except Exception as error:
                log.debug(f"the batch dimension is not the second: {type(error).__name__}: {error}")
        same, together = found
        raise CoupledLossError(
            f"the loss couples the samples of a batch: one sample alone has {alone[0]:.4g}, twice the same in a batch "
            f"{same:.4g}; {len(alone)} samples have {min(alone):.4g} to {max(alone):.4g} alone, {together:.4g} "
            "together. The influence of single samples is not defined for such a loss (a contrastive or ranking one): "
            "give loss_fn(module, batch) -> [batch] losses of single samples."
        )

    def _together(
        self, named: dict[str, Tensor], group: SampleGroup, rows: list[int], time_first: bool
    ) -> tuple[float, float]:
        """The loss of a batch of twice the first sample, and of all of them."""
        same = float(self._one(named, group.joined([rows[0], rows[0]], time_first)).mean())
        return same, float(self._one(named, group.joined(rows, time_first)).mean())

    def _choose_method(self, one: Tensor) -> None:
        """Whole batches, the same unreduced, vmap, or one by one: the first that gives the numbers of one by one.

        The samples that are tried are spread over a whole chunk, where batches of that size are to be used.
        """
        self._limit_chunks()
        group = max(self._groups, key=lambda g: len(g.places))
        count = min(len(group.places), 4, group.size)
        anchor = self._objective.anchor
        # a second row of other weights, where rows can be computed together
        weights = torch.stack([anchor, 1.01 * anchor])[: self.rows]
        self.method, self._alike = "one by one", True  # the same random numbers for all samples, to be comparable
        try:
            expected = self._chunk(weights, group, 0, count).reshape(len(weights), count, -1)
        except NoLossError:
            self._alike, self.reason = False, "the step gives no loss for some samples"
            return
        reasons = []
        for method in ("whole batches", "unreduced batches", "vmap"):
            if (method == "whole batches" and one.ndim == 0) or (method == "unreduced batches" and one.ndim > 0):
                continue
            if method == "vmap" and (self._objective.borrowed or not any(isinstance(c, Tensor) for c in group.columns)):
                continue
            self.method = method
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self._chunk(weights, group, 0, count).reshape(len(weights), count, -1)
                rtol = 2e-2 if self._objective.autocast else 1e-3
                right = torch.allclose(found, expected, rtol=rtol, atol=1e-5, equal_nan=True)
                if right and method == "unreduced batches":
                    right = self._holds_for_a_chunk(group, rtol)
                if right:
                    self._alike, self.reason = False, "same numbers as one by one"
                    return
                reasons.append(f"{method} gives other numbers")
            except Exception as error:
                reasons.append(f"{method} fails: {what_failed(error)}")
        self._alike = False
        self.method, self.reason = "one by one", "; ".join(reasons) or "the module is called in place"

    def _holds_for_a_chunk(self, group: SampleGroup, rtol: float) -> bool:
        """Whether samples far apart in a batch of the full size have the losses that they have alone."""
        stop = min(len(group.places), group.size)
        some = sorted({round(k * (stop - 1) / 3) for k in range(4)})
        named = self._named(self._objective.anchor)
        alone = torch.stack([self._one(named, group.single(k)).mean() for k in some])
        together = self._chunk(self._objective.anchor[None], group, 0, stop)[0].reshape(-1)[some]
        return torch.allclose(together, alone, rtol=rtol, atol=1e-5, equal_nan=True)

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
            at_once = affordable
            if self._objective.device.type == "cpu":
                at_once = min(affordable, CHUNK_BYTES // max(saved, 1))
            group.size = int(max(1, min(MAX_CHUNK, at_once)))
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


def _by_the_batch(module: nn.Module) -> str:
    """What is said of layers that normalise by the statistics of a batch, which a sample alone does not have."""
    norm = nn.modules.batchnorm._BatchNorm
    names = [name for name, m in module.named_modules() if isinstance(m, norm) and m.running_mean is None]
    which = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return (
        f"the loss of a sample depends on the others of its batch: a layer{which} normalises by the statistics of the "
        "batch and keeps no running ones (track_running_stats=False), and one sample has none. Single samples have no "
        "influence of their own there: use track_running_stats=True, GroupNorm or LayerNorm, give loss_fn(module, "
        "batch) -> [batch] losses of single samples, or do without: probe=None."
    )


def _separate(alone: list[float], same: float, together: float) -> bool:
    """Whether these are what a mean or a sum over samples gives; see :meth:`Probe._refuse_coupled`."""
    slack = 1e-3 * max(*map(abs, alone), 1e-6)
    low, high = min(alone) - slack, max(alone) + slack
    return any(
        abs(same / a_pair - alone[0]) <= slack and low <= together / all_of_them <= high
        for a_pair, all_of_them in ((1, 1), (2, len(alone)))
    )
