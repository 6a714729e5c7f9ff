"""Two ways to get the losses and gradients of chains: one after another on the live buffer, or several under vmap.

Both write the gradient of every chain into one flat buffer ``[chains, d]``, with no Python work per parameter in the
sequential one: the parameters of the private copy are views of the chain's weights, and their ``.grad`` are views of
the gradient buffer, so that ``backward`` accumulates in place.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_slt.sampling.batches import Window
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.sharded import ShardedObjective

ACTIVATION_BUDGET = 2**30
"""Bytes of activations that the chains of one chunk may hold together on the CPU."""
COMPUTE_BOUND = 0.004
"""Seconds of a step on the CPU above which products, not calls, take the time: batching is not tried."""
GRADIENT_BUDGET = 2**23
"""Bytes of gradients that the chains of one chunk may hold together on the CPU, where one after another holds those of
one chain. Above 100,000 weights batching was never faster there (benchmarks/README.md)."""
PROBED_AT_MOST = 8
TIMED_STEPS = 8
BATCHED_GAIN = 1.25
"""How much faster the batched path must be to be kept: near ties go to the path that always works, at every run."""
HOPELESS = 2.0
"""A batched step that takes this many times what it may is not timed again."""


class Engine:
    """Losses and gradients of the chains in ``weights`` ``[chains, d]``; ``width`` of them at a time."""

    method: str
    width: int

    def bind(self, weights: Tensor, grad: Tensor) -> None:
        """Work on these buffers from now on: ``[width or fewer, d]``, both contiguous."""
        raise NotImplementedError

    def __call__(self, window: Window, indices: Tensor, keep: bool = False) -> Tensor:
        """Losses ``[chains]`` of the bound chains on the batches ``indices`` ``[chains]``; gradients in the buffer.

        Args:
            keep: add the gradients to what is in the buffer, in place of putting them there.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Give the module its own weights back."""


class SequentialEngine(Engine):
    """One chain at a time through the private copy itself. Takes any module."""

    method = "sequential"
    width = 1

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._parameters = objective.parameters()
        self._rounds = objective.rounds
        self._masters: list[Tensor] = []
        self._grad: Tensor | None = None
        self._grad_pieces: list[Tensor] = []
        # one copy of w* is enough: the module's own weights become views of the anchor
        self._home = [p.data for p in self._parameters] if self._rounds else objective.pieces(objective.anchor)
        self.release()

    def bind(self, weights: Tensor, grad: Tensor) -> None:
        self._masters = self._objective.pieces(weights[0])
        self._grad = grad[0]
        self._grad_pieces = self._objective.pieces(grad[0])
        if not self._rounds:
            for parameter, piece, gradient in zip(self._parameters, self._masters, self._grad_pieces, strict=True):
                parameter.data = piece
                parameter.grad = gradient

    def __call__(self, window: Window, indices: Tensor, keep: bool = False) -> Tensor:
        return self.step(window[int(indices[0])], keep).reshape(1)

    def step(self, batch: Any, keep: bool = False) -> Tensor:
        """Loss of one batch at the bound weights, its gradient left in the bound buffer (added to it: ``keep``)."""
        assert self._grad is not None
        self._load()
        differentiates = self._objective.differentiates
        before = self._grad.clone() if keep and differentiates else None
        loss = self._objective.loss(batch)
        if not keep:
            self._grad.zero_()
        if differentiates:
            self._clear(before)
        loss.backward()
        if self._rounds:
            pairs = [
                (g, p.grad) for g, p in zip(self._grad_pieces, self._parameters, strict=True) if p.grad is not None
            ]
            if keep:
                torch._foreach_add_([g for g, _ in pairs], [g.to(self._grad.dtype) for _, g in pairs])  # type: ignore[union-attr]
            else:
                torch._foreach_copy_([g for g, _ in pairs], [g for _, g in pairs])  # type: ignore[misc]
        return loss.detach()

    def _load(self) -> None:
        if self._rounds:
            with torch.no_grad():
                torch._foreach_copy_(self._home, self._masters)
            for parameter in self._parameters:
                parameter.grad = None

    def _clear(self, before: Tensor | None) -> None:
        """Take away what a step that called ``backward()`` itself has left among the gradients."""
        if self._rounds:
            for parameter in self._parameters:
                parameter.grad = None
        elif before is not None:
            assert self._grad is not None
            self._grad.copy_(before)

    def release(self) -> None:
        for parameter, home in zip(self._parameters, self._home, strict=True):
            parameter.data = home
            parameter.grad = None
        self._grad, self._masters, self._grad_pieces = None, [], []
        if self._rounds:
            with torch.no_grad():
                torch._foreach_copy_(self._home, self._objective.pieces(self._objective.anchor))


class BorrowedEngine(SequentialEngine):
    """The sequential path for a module that cannot be copied: ``functional_call`` on the live one.

    Protects parameters and buffers; metrics and Python attributes that the step changes are put back by
    :meth:`Objective.active`, as far as they are attributes.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._wrapper = _GradientModule(objective.module, objective)
        self._buffers = {f"module.{k}": b for k, b in objective.module.named_buffers()}

    def bind(self, weights: Tensor, grad: Tensor) -> None:
        low = [p.dtype for p in self._objective.parameters()]
        self._grad_pieces = self._objective.pieces(grad[0])
        self._masters = self._objective.pieces(weights[0])
        self._low = low

    def _call(self, batch: Any) -> tuple[Tensor, tuple[Optional[Tensor], ...]]:
        leaves = [m.detach().to(t).requires_grad_(True) for m, t in zip(self._masters, self._low, strict=True)]
        named = {f"module.{n}": leaf for n, leaf in zip(self._objective.names, leaves, strict=True)}
        buffers = {k: b.clone() for k, b in self._buffers.items()}
        return torch.func.functional_call(self._wrapper, {**named, **buffers}, (batch, leaves))

    def step(self, batch: Any, keep: bool = False) -> Tensor:
        loss, gradients = self._call(batch)
        for piece, g in zip(self._grad_pieces, gradients, strict=True):
            if not keep:
                piece.zero_()
            if g is not None:
                piece.add_(g)
        return loss.detach()

    def release(self) -> None:
        self._masters, self._grad_pieces = [], []


class _LossModule(nn.Module):
    """The loss as a ``forward``, as :func:`torch.func.functional_call` wants it."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self._objective = objective

    def forward(self, batch: Any) -> Tensor:
        return self._objective.loss_of(self.module, batch)


class _GradientModule(_LossModule):
    """The loss with its gradients, taken while the weights are in the module.

    A checkpointed block is computed once more in the backward pass, and reads its weights again: after
    ``functional_call`` has put those of training back, they would be the wrong ones.
    """

    def forward(self, batch: Any, leaves: list[Tensor]) -> tuple[Tensor, tuple[Optional[Tensor], ...]]:  # type: ignore[override]
        loss = super().forward(batch)
        return loss, torch.autograd.grad(loss, leaves, allow_unused=True)


class BatchedEngine(Engine):
    """``width`` chains at a time: stacked weights, the forward pass under vmap.

    Args:
        through: ``"backward"`` differentiates the vmapped forward pass the ordinary way; ``"grad"`` vmaps the gradient
            itself, which some modules (recurrent ones) need.
    """

    method = "batched"

    def __init__(self, objective: Objective, width: int, through: str) -> None:
        self._objective = objective
        self._wrapper = _LossModule(objective.copy_module(), objective)
        self._names = [f"module.{name}" for name in objective.names]
        self.width = width
        self._through = through
        self._leaves: list[Tensor] = []
        self._grad_pieces: list[Tensor] = []
        self._grad: Tensor | None = None

    def bind(self, weights: Tensor, grad: Tensor) -> None:
        self._grad = grad
        self._grad_pieces = self._objective.pieces(grad)
        self._leaves = []
        for piece, gradient in zip(self._objective.pieces(weights), self._grad_pieces, strict=True):
            leaf = piece.detach()
            if self._through == "backward":
                leaf.requires_grad_(True)
                leaf.grad = gradient
            self._leaves.append(leaf)

    def _loss(self, named: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.func.functional_call(self._wrapper, named, (batch,))

    def __call__(self, window: Window, indices: Tensor, keep: bool = False) -> Tensor:
        assert self._grad is not None
        # one batch for all chains is no copy for each: products with it become one large product
        batch, dims = window.gather(indices) if len(window) > 1 else (window[0], None)
        named = dict(zip(self._names, self._leaves, strict=True))
        if self._through == "backward":
            if not keep:
                self._grad.zero_()
            losses = torch.vmap(self._loss, in_dims=(0, dims), randomness="different")(named, batch)
            losses.sum().backward()
            return losses.detach()
        function = torch.func.grad_and_value(self._loss)
        grads, losses = torch.vmap(function, in_dims=(0, dims), randomness="different")(named, batch)
        move = torch._foreach_add_ if keep else torch._foreach_copy_
        move(self._grad_pieces, [grads[name] for name in self._names])  # type: ignore[operator]
        return losses.detach()

    def release(self) -> None:
        self._leaves, self._grad_pieces, self._grad = [], [], None


class ShardedEngine(SequentialEngine):
    """The sequential path for a module whose weights are spread over ranks: its shards move in place.

    Every rank calls it at the same moment with its part of the same chain, and the same batch.
    """

    def __init__(self, objective: ShardedObjective) -> None:
        self._shards = objective

    def bind(self, weights: Tensor, grad: Tensor) -> None:
        self._masters = self._shards.pieces(weights[0])
        self._grad_pieces = self._shards.pieces(grad[0])

    def step(self, batch: Any, keep: bool = False) -> Tensor:
        shards = self._shards
        shards.load(self._masters)
        try:
            loss = shards.loss(batch)
            loss.backward()
        except BaseException:
            shards.break_off()
            raise
        shards.take_gradients(self._grad_pieces, keep)
        return loss.detach()

    def release(self) -> None:
        self._shards.load(None)
        self._masters, self._grad_pieces = [], []


def sequential_engine(objective: Objective) -> SequentialEngine:
    if isinstance(objective, ShardedObjective):
        return ShardedEngine(objective)
    return BorrowedEngine(objective) if objective.borrowed else SequentialEngine(objective)


@dataclass(frozen=True)
class Observed:
    """What one step showed on its way.

    Attributes:
        saved_bytes: what autograd keeps for the backward pass of one chain's loss.
        pads: an embedding is looked up with a padding index. Under vmap the ordinary backward pass masks the gradient
            of the padding row for the first chain only, which a probe without padding in its batches would not see.
    """

    saved_bytes: int
    pads: bool


class _Embeddings(TorchFunctionMode):
    """Sees whether an embedding under it has a padding index, as a module or as a function."""

    padded = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            index = args[2] if len(args) > 2 else kwargs.get("padding_idx")
            self.padded |= index is not None
        return func(*args, **kwargs)


def observe(objective: Objective, batch: Any) -> Observed:
    """Run the loss of one batch at the weights that the copy holds, and look on."""
    total = 0
    known = {p.data_ptr() for p in objective.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        if tensor.data_ptr() not in known:
            total += tensor.numel() * tensor.element_size()
        return tensor

    embeddings = _Embeddings()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), embeddings:
            objective.loss(batch)
    except RuntimeError:  # functorch inside the step refuses the hooks: as much again as was counted, or the weights
        total = max(2 * total, objective.anchor.numel() * objective.anchor.element_size())
        with embeddings:
            objective.loss(batch)
    return Observed(total, embeddings.padded)


def chunk_width(objective: Objective, saved_bytes: int, num_chains: int, least: int = 1) -> int:
    """How many chains fit a chunk: activations and gradients within their budgets (a quarter of what is free, on a
    GPU, all together).

    Args:
        least: as many may exceed the budget of the gradients.
    """
    budget, own = ACTIVATION_BUDGET, len(objective.anchor) * objective.anchor.element_size()
    if objective.device.type == "cuda":
        budget = torch.cuda.mem_get_info(objective.device)[0] // 4
    elif objective.device.type == "cpu":
        num_chains = min(num_chains, max(GRADIENT_BUDGET // max(own, 1), least))
    # twice: what autograd saved, and what the backward pass makes from it
    each = 2 * saved_bytes + 4 * own
    return int(max(1, min(num_chains, budget // max(each, 1))))


@dataclass(frozen=True)
class Choice:
    """Which engine was kept and why, for the log."""

    engine: Engine
    reason: str


def choose_engine(objective: Objective, window: Window, num_chains: int, method: str = "auto") -> Choice:
    """Try the paths on the first batches: equal numbers are demanded, then the faster one is kept.

    Args:
        method: ``"auto"``, ``"sequential"`` or ``"batched"``.

    Raises:
        ValueError: for another method, or for ``"batched"`` where the module does not allow it.
    """
    if method not in ("auto", "sequential", "batched"):
        raise ValueError(f"method={method!r}: must be 'auto', 'sequential' or 'batched'.")
    sequential = sequential_engine(objective)
    if method == "sequential":
        return Choice(sequential, "asked for")
    refusal = ""
    if num_chains < 2 and not objective.layout.sharded:
        refusal = "there is one chain"
    elif objective.layout.sharded:
        refusal = "the weights are sharded, and all ranks work on one chain"
    elif objective.borrowed:
        refusal = "the module cannot be copied"
    elif objective.rounds:
        refusal = "half-precision weights are rounded from float32 masters"
    elif objective.writes:
        refusal = "the step writes to buffers or frozen weights, which are put back before every call"
    else:
        refusal = window.unlike
    if refusal:
        if method == "batched":
            raise ValueError(f"method='batched' cannot be used: {refusal}.")
        return Choice(sequential, refusal)

    if method == "auto" and objective.device.type == "cpu":
        seconds = _one_step_seconds(objective, sequential, window)
        if seconds > COMPUTE_BOUND:
            return Choice(sequential, f"a step is {1000 * seconds:.0f} ms of computing, which batching would not save")
    observed = observe(objective, window[next(iter(window.anchor_loss), 0)])
    width = chunk_width(objective, observed.saved_bytes, num_chains, 2 if method == "batched" else 1)
    if width < 2:
        if method == "batched":
            raise ValueError("method='batched' cannot be used: two chains do not fit the memory budget.")
        return Choice(sequential, "two chains do not fit the memory budget")
    probe = _Probe(objective, window, min(width, num_chains))
    reason = ""
    best: tuple[float, Engine] | None = None
    for through in ("backward", "grad"):
        if observed.pads and through == "backward":
            reason = "an embedding with padding_idx has other gradients under vmap"
            continue
        try:
            engine = BatchedEngine(objective, width, through)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                difference, alone = probe.compare(engine, sequential)
                if difference > probe.tolerance:
                    reason = reason or f"vmap gives other numbers (relative difference {difference:.1e})"
                    continue
                best = probe.seconds(engine, enough=alone / BATCHED_GAIN), engine
            # the second road is for modules that the first does not take: where both do, they are as fast
            break
        except Exception as error:
            reason = reason or f"vmap fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if best is None:
        if method == "batched":
            raise ValueError(f"method='batched' cannot be used: {reason}.")
        return Choice(sequential, reason)
    gain = alone / best[0]
    best[1].release()  # else it would hold the probe's weights and gradients until the chains bind theirs
    if method == "batched" or gain > BATCHED_GAIN:
        return Choice(best[1], f"{gain:.1f} times the speed of one after another, same numbers")
    return Choice(sequential, f"batched would be {gain:.2f} times as fast, which is no gain")


class _Probe:
    """A few chains at perturbed weights on a few batches, to compare engines in numbers and speed."""

    def __init__(self, objective: Objective, window: Window, chains: int) -> None:
        d = len(objective.anchor)
        gen = torch.Generator(device=objective.device).manual_seed(0)
        scale = 0.01 * float(objective.anchor.norm()) / max(d, 1) ** 0.5 or 0.01
        # in place: these are as large as the chains, and so are their gradients
        self._weights = torch.empty(chains, d, device=objective.device, dtype=objective.dtype).normal_(generator=gen)
        self._weights.mul_(scale).add_(objective.anchor)
        self._grad = torch.empty_like(self._weights)
        known = list(window.anchor_loss)[:PROBED_AT_MOST] or list(range(min(len(window), PROBED_AT_MOST)))
        # a window of these alone: stacking the whole one takes the memory and the time of all the data
        least = min(len(window), 2)  # of one batch chains make one large product: not where they will have several
        self._window = Window([window[known[k % len(known)]] for k in range(max(len(known), least))])
        self._indices = torch.tensor([k % len(self._window) for k in range(chains)])
        # autocast rounds each product to 8 or 11 bits; float32 sums in another order
        self.tolerance = 1e-8 if objective.dtype == torch.float64 else 1e-3
        if objective.autocast:
            self.tolerance = 2e-2

    def compare(self, engine: Engine, reference: SequentialEngine) -> tuple[float, float]:
        """How far the engine's numbers are off, and the seconds of a step of the reference.

        The first is the largest relative difference in the losses and gradients of a chain; infinite where not finite.
        The reference's gradients are added to those of the engine with the sign turned: they take no memory of their
        own.
        """
        losses = []
        for start in range(0, len(self._weights), engine.width):
            rows = slice(start, start + engine.width)
            engine.bind(self._weights[rows], self._grad[rows])
            losses.append(engine(self._window, self._indices[rows]).reshape(-1).double())
        worst, seconds = 0.0, []
        try:
            for k, found in enumerate(torch.cat(losses)):
                own = self._grad[k : k + 1]
                size = own.norm()
                reference.bind(self._weights[k : k + 1], own.neg_())
                start_time = self._now()
                loss = reference(self._window, self._indices[k : k + 1], keep=True).reshape(()).double()
                seconds.append(self._now() - start_time)
                for off, scale in zip(((loss - found).abs(), own.norm()), (loss.abs(), size), strict=True):
                    relative = float(off / scale.clamp_min(1e-12))
                    worst = max(worst, relative) if math.isfinite(relative) else math.inf
        finally:
            reference.release()
        return worst, min(seconds)

    def seconds(self, engine: Engine, enough: float) -> float:
        """Of a step of one chain: the fastest of a few, and of one where that is nowhere near ``enough``. Binding is
        left out: chains are bound once for many steps."""
        rows = slice(0, min(engine.width, len(self._weights)))
        engine.bind(self._weights[rows], self._grad[rows])
        best = float("inf")
        for _ in range(max(2, TIMED_STEPS // engine.width)):
            start = self._now()
            engine(self._window, self._indices[rows])
            best = min(best, (self._now() - start) / (rows.stop - rows.start))
            if best > HOPELESS * enough:
                break
        return best

    def _now(self) -> float:
        if self._weights.device.type == "cuda":
            torch.cuda.synchronize(self._weights.device)
        return time.perf_counter()


def _one_step_seconds(objective: Objective, engine: SequentialEngine, window: Window) -> float:
    """The faster of two steps at ``w*``."""
    engine.bind(objective.anchor.clone().unsqueeze(0), torch.empty_like(objective.anchor).unsqueeze(0))
    usable = next(iter(window.anchor_loss), 0)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        engine.step(window[usable])
        seconds.append(time.perf_counter() - start)
    engine.release()
    return min(seconds)
