"""Two ways to get the losses and gradients of chains: one after another on the live buffer, or several under vmap.

Both write the gradient of every chain into one flat buffer ``[chains, d]``, with no Python work per parameter in the
sequential one: the parameters of the private copy are views of the chain's weights, and their ``.grad`` are views of
the gradient buffer, so that ``backward`` accumulates in place. Without a buffer autograd leaves its own tensors there,
which takes the memory of one gradient and no more (:mod:`~lightning_slt.sampling.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.sharded import ShardedObjective
from lightning_slt.sampling.steps import check_gradient
from lightning_slt.sampling.vmapped import Slots, Vmapped
from lightning_slt.sampling.window import Window


class Engine:
    """Losses and gradients of the chains in ``weights`` ``[chains, d]``; ``width`` of them at a time."""

    method: str
    width: int

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Work on these buffers from now on: ``[width or fewer, d]``, both contiguous.

        Args:
            grad: None, of a plain :class:`SequentialEngine` only, for gradients as autograd leaves them.
        """
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
        self._left: list[Tensor | None] = []
        self._take: Callable[[int, Tensor], None] | None = None
        # one copy of w* is enough: the module's own weights become views of the anchor
        self._home = [p.data for p in self._parameters] if self._rounds else objective.pieces(objective.anchor)
        self.release()

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        self._masters = self._objective.pieces(weights[0])
        self._grad = grad[0] if grad is not None else None
        self._grad_pieces = self._objective.pieces(grad[0]) if grad is not None else []
        self._left = []
        if not self._rounds:
            for parameter, piece in zip(self._parameters, self._masters, strict=True):
                parameter.data = piece
            for parameter, gradient in zip(self._parameters, self._grad_pieces, strict=grad is not None):
                parameter.grad = gradient

    def __call__(self, window: Window, indices: Tensor, keep: bool = False) -> Tensor:
        return self.step(window[int(indices[0])], keep).reshape(1)

    def step(self, batch: Any, keep: bool = False) -> Tensor:
        """Loss of one batch at the bound weights, its gradient left in the bound buffer (added to it: ``keep``)."""
        self._load()
        if self._grad is None:
            return self._step_in_parts(batch)
        differentiates = self._objective.differentiates
        before = self._grad.clone() if keep and differentiates else None
        loss = self._objective.loss(batch)
        if not keep:
            self._grad.zero_()
        if differentiates:
            self._clear(before)
        check_gradient(loss)
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

    def _step_in_parts(self, batch: Any) -> Tensor:
        self._left = []
        self._forget_gradients()  # what is there already is added to, which takes another tensor as large
        loss = self._objective.loss(batch)
        self._forget_gradients()  # those of a step that has called backward() itself
        check_gradient(loss)
        with self._taking():
            loss.backward()
        return loss.detach()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor | None]:
        """What autograd has left, ``[size]`` for each parameter, None where the loss does not depend on it; after a
        step on weights that were bound without a buffer."""
        if not self._left:
            for parameter in self._parameters:
                grad = parameter.grad
                if grad is not None and not (grad.layout is torch.strided and grad.is_contiguous()):
                    grad = parameter.grad = flat(grad).view(grad.shape)
                self._left.append(grad.view(-1) if grad is not None else None)
        return self._left

    def hand_over(self, work: Callable[[], object], take: Callable[[int, Tensor], None]) -> None:
        """Have each parameter's gradient taken as soon as autograd has it, and dropped.

        Args:
            work: makes steps, on weights that were bound without a buffer.
            take: called with the number of the parameter and its gradient; more than once in a step, with a portion
                each time, where several backward passes make it (checkpointing of the reentrant kind).
        """
        self._take = take
        try:
            work()
        finally:
            self._take = None

    @contextmanager
    def _taking(self) -> Iterator[None]:
        """Around the backward pass of the loss, and of nothing else that the step may differentiate."""
        take, handles = self._take, []

        def taker(number: int, take: Callable[[int, Tensor], None]) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                if parameter.grad is not None:
                    take(number, parameter.grad)
                parameter.grad = None

            return hook

        if take is not None:
            # a weight that the step has frozen has no gradient, and takes no hook
            moving = [(k, p) for k, p in enumerate(self._parameters) if p.requires_grad]
            handles = [p.register_post_accumulate_grad_hook(taker(k, take)) for k, p in moving]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _load(self) -> None:
        if self._rounds:
            with torch.no_grad():
                torch._foreach_copy_(self._home, self._masters)
            self._forget_gradients()

    def _clear(self, before: Tensor | None) -> None:
        """Take away what a step that called ``backward()`` itself has left among the gradients."""
        if self._rounds:
            self._forget_gradients()
        elif before is not None:
            assert self._grad is not None
            self._grad.copy_(before)

    def release(self) -> None:
        for parameter, home in zip(self._parameters, self._home, strict=True):
            parameter.data = home
            parameter.grad = None
        self._grad, self._masters, self._grad_pieces, self._left = None, [], [], []
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

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
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


class _GradientModule(nn.Module):
    """The loss with its gradients, as a ``forward`` that :func:`torch.func.functional_call` takes them by, while the
    weights are in the module.

    A checkpointed block is computed once more in the backward pass, and reads its weights again: after
    ``functional_call`` has put those of training back, they would be the wrong ones.
    """

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self._objective = objective

    def forward(self, batch: Any, leaves: list[Tensor]) -> tuple[Tensor, tuple[Optional[Tensor], ...]]:
        loss = self._objective.loss_of(self.module, batch)
        check_gradient(loss)
        return loss, torch.autograd.grad(loss, leaves, allow_unused=True)


class _OneChain:
    """What :class:`BatchedEngine` vmaps: functions of the weights of one chain, and of the leaves of its batch.

    It knows nothing of the engine, which would be in a cycle of references otherwise: an engine that is given up is to
    leave at once, with the chains' weights and the frozen ones of its module.

    Attributes:
        window: of which the batch is.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._module = objective.copy_module()
        self._count = len(objective.names)
        self._slots = Slots(self._module, objective.names)
        self.window: Window | None = None

    def loss(self, *inputs: Any) -> Tensor:
        assert self.window is not None
        self._slots.put(inputs[: self._count])
        return self._objective.loss_of(self._module, self.window.whole(inputs[self._count :]))

    def losses(self, *inputs: Any) -> tuple[Tensor, ...]:
        return (self.loss(*inputs),)

    def gradients(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The loss, and its gradients."""
        slopes, loss = torch.func.grad_and_value(self.loss, argnums=tuple(range(self._count)))(*inputs)
        return loss, *slopes

    def release(self) -> None:
        self.window = None
        self._slots.empty()


class BatchedEngine(Engine):
    """``width`` chains at a time: stacked weights, the forward pass under vmap.

    Args:
        through: ``"backward"`` differentiates the vmapped forward pass the ordinary way; ``"grad"`` vmaps the gradient
            itself, which some modules (recurrent ones) need.
    """

    method = "batched"

    def __init__(self, objective: Objective, width: int, through: str) -> None:
        self._objective = objective
        self._one = _OneChain(objective)
        self.width = width
        self._through = through
        self._rows = Vmapped(self._one.losses if through == "backward" else self._one.gradients)
        self._leaves: list[Tensor] = []
        self._grad_pieces: list[Tensor] = []
        self._grad: Tensor | None = None

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        self._grad = grad
        self._grad_pieces = self._objective.pieces(grad)
        self._leaves = []
        for piece, gradient in zip(self._objective.pieces(weights), self._grad_pieces, strict=True):
            leaf = piece.detach()
            if self._through == "backward":
                leaf.requires_grad_(True)
                leaf.grad = gradient
            self._leaves.append(leaf)

    def __call__(self, window: Window, indices: Tensor, keep: bool = False) -> Tensor:
        assert self._grad is not None
        self._one.window = window
        columns, batched = window.gather(indices)
        inputs, dims = [*self._leaves, *columns], [*(0 for _ in self._leaves), *batched]
        if self._through == "backward":
            if not keep:
                self._grad.zero_()
            (losses,) = self._rows(inputs, dims)
            check_gradient(losses)
            losses.backward(torch.ones_like(losses))
            return losses.detach()
        losses, *gradients = self._rows(inputs, dims)
        move = torch._foreach_add_ if keep else torch._foreach_copy_
        move(self._grad_pieces, gradients)  # type: ignore[operator]
        return losses.detach()

    def release(self) -> None:
        self._leaves, self._grad_pieces, self._grad = [], [], None
        self._one.release()


class ShardedEngine(SequentialEngine):
    """The sequential path for a module whose weights are spread over ranks: its shards move in place.

    Every rank calls it at the same moment with its part of the same chain, and the same batch.
    """

    def __init__(self, objective: ShardedObjective) -> None:
        self._shards = objective

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        self._masters = self._shards.pieces(weights[0])
        self._grad_pieces = self._shards.pieces(grad[0])

    def step(self, batch: Any, keep: bool = False) -> Tensor:
        shards = self._shards
        shards.load(self._masters)
        try:
            loss = shards.loss(batch)
            check_gradient(loss)
            loss.backward()
        except BaseException:
            shards.break_off()
            raise
        shards.take_gradients(self._grad_pieces, keep)
        return loss.detach()

    def release(self) -> None:
        self._shards.load(None)
        self._masters, self._grad_pieces = [], []


def flat(grad: Tensor) -> Tensor:
    """``[size]`` in the order of the parameter, of a gradient however it lies; no copy where it lies so."""
    return (grad if grad.layout is torch.strided else grad.to_dense()).reshape(-1)


def sequential_engine(objective: Objective) -> SequentialEngine:
    if isinstance(objective, ShardedObjective):
        return ShardedEngine(objective)
    return BorrowedEngine(objective) if objective.borrowed else SequentialEngine(objective)
