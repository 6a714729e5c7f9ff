"""What only trying shows of the user's step: what it reads, writes to, changes and draws, and what it can do without.

A trial calls the step on one batch, and returns what it has found: a
:class:`~lightning_slt.sampling.step_call.StepCall` that knows more than the one it was given, and what else there is to
say. The weights that move and the batch are after it what they were.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_slt.sampling import steps
from lightning_slt.sampling.borrowing import prepare
from lightning_slt.sampling.graphs import ends_in_sum
from lightning_slt.sampling.rng import global_states, preserve_rng
from lightning_slt.sampling.shadow import put_hooks_back, take_hooks, without_compile
from lightning_slt.sampling.step_call import LOW_PRECISION, NO_GRAPH, StepCall
from lightning_slt.sampling.step_state import StepState, changed_between, look
from lightning_slt.sampling.step_tensors import TensorLook
from lightning_slt.sampling.structures import clone, data_in

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Watched:
    """What a call with gradients showed.

    Attributes:
        call: puts back before each call the attributes that this one has changed.
        reads_live: the loss of the copy depends on weights of the module that it was copied from.
        unreached: moving weights that the loss does not depend on.
        ends_in_sum: the last thing that it was made by is a sum, by its graph.
    """

    call: StepCall
    reads_live: bool = False
    unreached: tuple[str, ...] = ()
    ends_in_sum: bool = False


@dataclass(frozen=True)
class Used:
    """What the step did with the batch and the random numbers that it was given.

    Attributes:
        call: hands over a copy of the batch where the step changes it.
        loss: what it gave.
        draws: it has moved a random number generator that belongs to no module.
    """

    call: StepCall
    loss: float
    draws: bool


class Trials:
    """Trials of a step on one batch.

    Args:
        module: whose step it is: a private copy, or a module that is called in place.
        moving: its weights that move, by name.
        batch: read, never changed.
        live: the module that trains; ``module`` itself where that is called in place.
        weights: a ``state_dict`` that was loaded into the copy; None for the weights of ``live``.
    """

    def __init__(
        self,
        module: nn.Module,
        moving: Mapping[str, nn.Parameter],
        batch: Any,
        live: nn.Module,
        weights: Optional[Mapping[str, Tensor]] = None,
    ) -> None:
        self._module, self._moving, self._batch = module, moving, batch
        self._live, self._weights = live, weights

    def find_written(self, call: StepCall) -> StepCall:
        """Which buffers and frozen weights one call changes: they are put back before every other.

        Raises:
            NoLossError: where the step returned None. What else it raises is left to the next call.
        """
        call.written.put_back(self._module)  # by an earlier trial: what is looked at is what the copy came with
        before = TensorLook(self._module, list(self._moving.values()))
        try:
            with torch.no_grad():
                self._without_hooks(lambda: self._loss(call))
        except steps.NoLossError:
            raise
        except Exception as error:
            log.debug(f"could not see what the step writes to: {error}")
        written = before.written(self._given)
        if written:
            written.put_back(self._module)
            log.info(f"the step writes to {', '.join(written.names)}: put back before every call of the chains")
        return replace(call, written=written)

    def watch(self, call: StepCall) -> Watched:
        """What the loss of a private copy depends on, and which attributes asking for it changes.

        It must depend on the copy's weights and on nothing of the live module (a closure kept as attribute).
        """
        before = look(self._module)
        own = list(self._moving.values())
        others = [p for p in self._live.parameters() if p.requires_grad]
        unreached: tuple[str, ...] = ()
        summed = False

        def gradients() -> tuple[Optional[Tensor], ...]:
            nonlocal summed
            loss = self._loss(call)
            summed = ends_in_sum(loss)
            return torch.autograd.grad(loss, [*own, *others], allow_unused=True)

        try:
            with torch.enable_grad():
                found = self._without_hooks(gradients)
        except RuntimeError as error:
            # re-entrant checkpointing knows only backward(); a loss without any gradient shows in the chains
            log.debug(f"could not check which weights the loss depends on: {error}")
            if NO_GRAPH in str(error):
                unreached = tuple(self._moving)
        else:
            if any(g is not None for g in found[len(own) :]):
                return Watched(call, reads_live=True, ends_in_sum=summed)
            unreached = tuple(name for name, g in zip(self._moving, found, strict=False) if g is None)
        changed = changed_between(before, look(self._module))
        return Watched(self._put_back(call, changed), unreached=unreached, ends_in_sum=summed)

    def _put_back(self, call: StepCall, changed: dict[tuple[str, str], bool]) -> StepCall:
        """The call that puts these attributes back; what is put back already does not show as changed here."""
        state = StepState(getattr(self._live, "_orig_mod", self._live), self._module, changed) if changed else None
        if not state:
            return call
        state.put_back(self._module)
        log.info(f"the step changes {', '.join(state.names)}: put back before every call of the chains")
        return replace(call, state=state)

    def take_off_idle(self, call: StepCall) -> None:
        """Take hooks off a private copy, and stub its metrics, where its loss is the same without them."""
        taken = take_hooks(self._module)
        # what a hook or a metric has kept of an earlier call would be right at w* itself
        with moved(self._moving.values()) if taken or steps.metrics_of(self._module) else nullcontext():
            without = self._loss_or_none(call) if taken else None
            put_hooks_back(taken)
            reference = self._seeded_loss(call)
            if taken and _same(without, reference):
                take_hooks(self._module)
            if steps.stub_metrics(self._module) and not _same(self._loss_or_none(call), reference):
                steps.unstub_metrics(self._module)

    def in_float32(self, call: StepCall, trainer: Any) -> Optional[tuple[nn.Module, StepCall]]:
        """A copy in float32 of a private copy in half precision, and how it is called; None where it does not run, or
        no weight that moves is in half precision.

        Args:
            call: how the step is called so far.
            trainer: what the copy may read as ``self.trainer``.
        """
        if not any(p.dtype in LOW_PRECISION for p in self._moving.values()):
            return None
        call.written.put_back(self._module)
        wide = replace(call, context=nullcontext, upcast=True)
        module: Optional[nn.Module] = None
        try:
            with torch.no_grad():
                module = copy.deepcopy(self._module).float()
            prepare(module, trainer)
            before = TensorLook(module, [p for name, p in module.named_parameters() if name in self._moving])
            with torch.no_grad():
                wide.loss(module, clone(self._batch))
        except Exception as error:
            log.info(f"chains keep float32 weights and round them at each call: {type(error).__name__}: {error}")
            if module is not None:
                call.forget(module)
            return None
        call.forget(self._module)
        written = before.written(self._given)
        written.put_back(module)
        return module, replace(wide, written=written)

    def find_use(self, call: StepCall) -> Used:
        """By one call: whether the step changes the batch that it is given (a chain then hands it a copy each time),
        and whether it draws random numbers. A generator of its own that is put back is seeded from the global one."""
        call = replace(call, mutates=False)
        batch = clone(self._batch)
        before, versions = tree_flatten(batch), _versions(batch)
        with torch.no_grad(), preserve_rng():
            states = global_states()
            loss = float(call.loss(self._module, batch))
            draws = global_states() != states
        after = tree_flatten(batch)
        same = after[1] == before[1] and all(a is b for a, b in zip(after[0], before[0], strict=True))
        return Used(replace(call, mutates=not same or _versions(batch) != versions), loss, draws)

    def _given(self, name: str) -> Tensor:
        """A weight of the copy as it came: from the weights that were handed over, or from the live module."""
        source = self._weights if self._weights is not None else dict(self._live.named_parameters())
        return next(value for key, value in source.items() if without_compile(key) == name).detach().clone()

    def _loss(self, call: StepCall) -> Tensor:
        return call.loss(self._module, clone(self._batch))

    def _seeded_loss(self, call: StepCall) -> Tensor:
        with torch.no_grad(), preserve_rng(0):  # a step that draws: the same numbers each time
            return self._loss(call)

    def _loss_or_none(self, call: StepCall) -> Optional[Tensor]:
        try:
            return self._seeded_loss(call)
        except Exception:
            return None

    def _without_hooks(self, ask: Callable[[], _T]) -> _T:
        """Ask without the user's hooks on the copy (they write to what is not copied), unless it fails for that.

        Those of a module that is called in place keep their order: they stay.
        """
        taken = take_hooks(self._module) if self._module is not self._live else []
        try:
            return ask()
        except (steps.NoLossError, RuntimeError):
            raise
        except Exception as error:
            if not taken:
                raise
            put_hooks_back(taken)
            taken = []
            log.debug(f"the step needs its hooks: {type(error).__name__}: {error}")
            return ask()
        finally:
            put_hooks_back(taken)


def ask_in_training(make: Callable[[], nn.Module], ask: Callable[[nn.Module], _T], otherwise: _T) -> _T:
    """What is asked of another copy in training mode, without hooks; ``otherwise`` where that cannot be tried.

    It is not tried where there are several ranks: in training mode some layers ask the others.

    Args:
        make: makes the copy.
        ask: called with it, without gradients; random numbers are put back.
        otherwise: the answer where anything fails.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return otherwise
    try:
        with torch.no_grad(), preserve_rng():
            twin = make().train()
            take_hooks(twin)
            return ask(twin)
    except Exception as error:
        log.debug(f"the step gives no loss in training mode either: {error}")
        return otherwise


def _a_little(parameter: nn.Parameter) -> None:
    parameter.mul_(1.05).add_(1e-3)


@contextmanager
def moved(parameters: Iterable[nn.Parameter], move: Callable[[nn.Parameter], object] = _a_little) -> Iterator[None]:
    """Weights elsewhere than where they are, and put back.

    Args:
        parameters: of a copy.
        move: writes to one of them.
    """
    home = [(p, p.detach().clone()) for p in parameters]
    try:
        with torch.no_grad():
            for parameter, _ in home:
                move(parameter)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in home:
                parameter.copy_(value)


def _same(loss: Optional[Tensor], reference: Tensor) -> bool:
    """Not where there is no number: two of those say nothing."""
    return loss is not None and bool(torch.isfinite(reference)) and torch.allclose(loss, reference, rtol=1e-5)


def _versions(batch: Any) -> list[tuple[int, int, bool]]:
    """Which tensors there are, how often each has been changed in place, and whether it gathers gradients; which
    arrays, and what is in each."""
    return [
        (id(held), zlib.crc32(held.tobytes()), False)
        if isinstance(held, np.ndarray)
        else (id(held), held._version, held.requires_grad)
        for held in data_in(batch)
    ]
