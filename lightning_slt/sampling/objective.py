"""The loss of THIS module at weights that chains move: a private copy, its moving weights, and how to call it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten

from lightning_slt.sampling import steps
from lightning_slt.sampling.arguments import check_device, check_module
from lightning_slt.sampling.borrowing import borrow, buffers_kept, prepare
from lightning_slt.sampling.graphs import ends_in_sum
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.restriction import Restriction, select_parameters
from lightning_slt.sampling.rng import global_states, preserve_rng
from lightning_slt.sampling.shadow import (
    CopyError,
    copy_with_hooks,
    detach_from_training,
    put_hooks_back,
    shadow_copy,
    take_hooks,
    without_compile,
)
from lightning_slt.sampling.step_state import StepState, changed_between, look
from lightning_slt.sampling.step_tensors import StepTensors, TensorLook
from lightning_slt.sampling.window import clone, tensors_in

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NO_GRAPH = "does not require grad"
"""How torch's error reads where a derivative is asked for of something that has none."""


class Objective:
    """The training loss as a function of the weights that move, on a private copy of the user's module.

    The copy is in eval mode, logs nothing, and holds the anchor ``w*``. Chains move in float32 (float64 for a float64
    module) whatever the module's dtype: a bfloat16 weight of 1 cannot take a step of 0.001. A half-precision module is
    therefore evaluated in float32 where it can be, and else through float32 masters that are rounded at every call.

    Args:
        module: the user's module; read, never changed.
        loss_fn: ``loss_fn(module, batch)``; None for the ``training_step`` of a LightningModule.
        restrict: which weights move, see :func:`~lightning_slt.sampling.restriction.select_parameters`.
        device: where the copy goes; None leaves it where the module is.
        trainer: what the copy may read as ``self.trainer``.
        context: makes the context in which the loss is computed (autocast); None for none.
        weights: a ``state_dict`` to study in place of the module's own weights.
        say: told why the module is called in place, where it could not be copied; None for the log.

    Raises:
        TypeError: for a module that is none.
        ValueError: for a module without a usable loss, a restriction that names nothing, or a device that is not there.
        RuntimeError: for weights of another module.
        CopyError: where the module cannot be copied and cannot be borrowed either.

    Attributes:
        module: the private copy (the live module where ``borrowed``).
        names: the parameters that move.
        anchor: ``[d]``, the flat ``w*``, float32 or float64; this rank's part of it where the model is sharded.
        layout: which of the weights ``anchor`` has.
        borrowed: the module could not be copied: it is called in place with other weights, and put back after.
        rounds: the module computes in half precision from float32 masters.
        given_loss: ``loss_fn`` as it was given.
        differentiates: the step itself asks for derivatives (a gradient penalty, an adversarial input): it is called
            with gradients on, also where only its value is wanted.
        ends_in_sum: the last thing that the first loss was made by is a sum, by its graph.
        unreached: moving weights that the loss of the first batch does not depend on.
        only_in_training: those of them that it depends on in training mode, of several batches.
        draws: the step draws random numbers, so that its loss is one of many: chains compare it with that of the same
            numbers at ``w*``.
        is_sum: the loss of a batch is the sum over its samples, as far as the first batch showed.
    """

    differentiates = False
    unreached: tuple[str, ...] = ()
    only_in_training: tuple[str, ...] = ()
    draws = False
    ends_in_sum = False
    is_sum = False

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Optional[steps.LossFn] = None,
        restrict: Restriction = None,
        device: Optional[torch.device | str] = None,
        trainer: Any = None,
        context: Optional[Callable[[], AbstractContextManager[Any]]] = None,
        weights: Optional[dict[str, Tensor]] = None,
        say: Optional[Callable[[str], None]] = None,
    ) -> None:
        check_module("module", module)
        check_device("device", device)
        self._say = say or log.warning
        self._live, self._live_names = module, select_parameters(module, restrict)
        refuse_lazy(module)
        self._may_borrow = device is None and weights is None
        self._mutates = False
        self._weights = weights
        self._written = StepTensors()
        self._state: Optional[StepState] = None
        self.names = self._live_names
        self._loss_fn, self.given_loss = steps.loss_function(module, loss_fn), loss_fn
        self._trainer = trainer
        self._context = context or nullcontext
        self.borrowed = False
        self.rounds = False
        self._upcast = False
        self._take_module(device)
        self._enable(self.names)
        self._read_anchor()

    def _take_module(self, device: Optional[torch.device | str]) -> None:
        """Make the private copy; where that cannot be done, borrow the module."""
        try:
            self.module = shadow_copy(self._live)
        except CopyError as error:
            if not self._may_borrow:
                raise
            self._say(f"{error} Chains call the module in place instead, and put it back after.")
            self.module, self.borrowed = self._live, True
        if not self.borrowed:
            self.names = [without_compile(name) for name in self.names]
        if self._weights is not None:
            self._load(self._weights)
        if not self.borrowed:
            if device is not None:
                self.module.to(device)
            prepare(self.module, self._trainer)

    def _load(self, weights: dict[str, Tensor]) -> None:
        try:
            self.module.load_state_dict({without_compile(name): w for name, w in weights.items()})
        except RuntimeError as error:
            remedy = f"Give the state_dict() of another {type(self.module).__name__} like it."
            raise RuntimeError(f"weights: do not fit the module. {remedy} {error}") from error

    def _enable(self, names: list[str]) -> None:
        if self.borrowed:
            return
        moving = set(names)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in moving)

    def _read_anchor(self) -> None:
        parameters = self.parameters()
        complex_ones = [name for name, p in zip(self.names, parameters, strict=True) if p.is_complex()]
        if complex_ones:
            raise ValueError(
                f"the moving weights {complex_ones[:3]} are complex, which chains do not know. Keep them as real pairs "
                "(torch.view_as_real) in the module, or leave them out with restrict=."
            )
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"the moving weights are on several devices, {sorted(map(str, devices))}: use restrict=.")
        self.device = devices.pop()
        self.dtype = torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32
        self.anchor = torch.cat([p.detach().reshape(-1).to(self.dtype) for p in parameters])
        self.rounds = any(p.dtype != self.dtype for p in parameters)
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.layout = Layout(len(self.anchor))

    def parameters(self) -> list[nn.Parameter]:
        """The moving parameters of the copy, in the order of ``anchor``."""
        by_name = dict(self.module.named_parameters())
        return [by_name[name] for name in self.names]

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of the last dimension of ``flat`` in the shapes of the parameters, leading dimensions kept."""
        lead = flat.shape[:-1]
        return [p.view((*lead, *shape)) for p, shape in zip(flat.split(self.sizes, dim=-1), self.shapes, strict=True)]

    def loss(self, batch: Any) -> Tensor:
        """The scalar mean loss of ``batch`` at the weights that the copy holds.

        Raises:
            NoLossError: where the step returned None for this batch.
        """
        return self.loss_of(self.module, batch)

    def loss_of(self, module: nn.Module, batch: Any) -> Tensor:
        """As :meth:`loss`, for another copy of the module."""
        return steps.mean_loss(self.losses_of(module, batch))

    def losses_of(self, module: nn.Module, batch: Any) -> Tensor:
        """What the step or ``loss_fn`` gives for ``batch``: a scalar, ``[batch]``, or ``[batch, tokens]``."""
        return self._losses_on(module, clone(batch) if self._mutates else batch)

    def _loss_on(self, module: nn.Module, batch: Any) -> Tensor:
        return steps.mean_loss(self._losses_on(module, batch))

    def _losses_on(self, module: nn.Module, batch: Any) -> Tensor:
        if self._upcast:
            batch = _to_float32(batch)
        if self._written and module is self.module:
            self._written.put_back()  # the loss must not depend on how often it was asked for
        if self._state is not None:
            self._state.put_back(module)
        with self._context():
            if torch.is_grad_enabled():
                return self._loss_fn(module, batch)
            if not self.differentiates:
                try:
                    return self._loss_fn(module, batch)
                except RuntimeError as error:
                    if _NO_GRAPH not in str(error):
                        raise
                    log.info("the step asks for derivatives itself: it is called with gradients on")
                    self.differentiates = True
            with torch.enable_grad():
                return self._loss_fn(module, batch).detach()

    @property
    def writes(self) -> bool:
        """Whether the step writes to buffers or to weights that do not move: they are put back before every call."""
        return bool(self._written)

    def _given(self, name: str) -> Tensor:
        """A weight of the copy as it came: from the weights that were handed over, or from the live module."""
        source = self._weights if self._weights is not None else dict(self._live.named_parameters())
        return next(value for key, value in source.items() if without_compile(key) == name).detach().clone()

    def _find_written(self, batch: Any) -> None:
        """Which buffers and frozen weights one call of the step changes."""
        before = TensorLook(self.module, self.parameters())
        try:
            with torch.no_grad():
                self._without_hooks(lambda: self._loss_on(self.module, clone(batch)))
        except steps.NoLossError:
            raise
        except Exception as error:
            log.debug(f"could not see what the step writes to: {error}")
        self._written = before.written(self._given)
        if self._written:
            self._written.put_back()
            log.info(f"the step writes to {', '.join(self._written.names)}: put back before every call of the chains")

    @property
    def autocast(self) -> bool:
        """Whether the loss is computed under autocast, and so known to 8 or 11 bits only."""
        with self._context():
            return torch.is_autocast_enabled(self.device.type)

    def copy_module(self, stand_ins: bool = False) -> nn.Module:
        """A second private copy, for the batched path: vmap may leave dead tensors in a module's attributes.

        Args:
            stand_ins: what cannot be copied (a lock, a cached tensor) is stood in for, as in the first copy.
        """
        if self.borrowed:
            raise CopyError("the module cannot be copied")
        with torch.no_grad():
            # the weights that move come from the chains at every call: the twin's own may be w* itself, not a copy.
            # They are those of the private copy: what training moves is shared with neither
            moving = self.parameters()  # held, so that the numbers by which deepcopy knows them stay theirs
            shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in moving}
            twin = shadow_copy(self.module) if stand_ins else copy_with_hooks(self.module, shared)
        detach_from_training(twin)
        prepare(twin, self._trainer)
        return twin

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around every use of the loss: gradients on; a borrowed module is muted inside and restored after."""
        with torch.enable_grad(), as_interpreted(), apart():
            if not self.borrowed:
                yield
                return
            with borrow(self.module, self._trainer):
                yield

    def adapt(self, batch: Any) -> None:
        """Settle on a first batch what can only be known by trying: float32 for half precision, stubs for metrics.

        Raises:
            NoLossError: where the step returns no loss for this batch.
            Exception: whatever the user's step raises.
        """
        if not self.borrowed:
            with buffers_kept(self._live), as_interpreted(), apart():
                copied = self.module
                self._find_written(batch)
                self._adapt_copy(batch)
            if self.borrowed:
                self._written, self._state = StepTensors(), None
            elif self.module is not copied:
                self._find_written(batch)
        with self.active():
            self._look_at_step(batch)

    def has_loss_in_training(self, batch: Any) -> bool:
        """Whether the step, which has failed, gives a loss in training mode; tried once."""
        return self.in_training(lambda twin: bool(self._loss_on(twin, clone(batch)).ndim == 0), False)

    def in_training(self, ask: Callable[[nn.Module], _T], otherwise: _T) -> _T:
        """What is asked of another copy in training mode, without hooks; ``otherwise`` where that cannot be tried.

        It is not tried with a module that is called in place, nor where there are several ranks: in training mode some
        layers ask the others.
        """
        if self.borrowed or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return otherwise
        try:
            with buffers_kept(self._live), as_interpreted(), apart(), torch.no_grad(), preserve_rng():
                twin = self.copy_module(stand_ins=True).train()
                take_hooks(twin)
                return ask(twin)
        except Exception as error:
            log.debug(f"the step gives no loss in training mode either: {error}")
            return otherwise

    def _adapt_copy(self, batch: Any) -> None:
        before = look(self.module)
        self._check_own_weights(clone(batch))
        if self.borrowed:  # what it holds is put back when the chains have ended
            return
        self._keep_state(changed_between(before, look(self.module)))
        taken = take_hooks(self.module)
        # what a hook or a metric has kept of an earlier call would be right at w* itself
        with self._moved() if taken or steps.metrics_of(self.module) else nullcontext():
            without = self._loss_or_none(batch) if taken else None
            put_hooks_back(taken)
            with torch.no_grad(), preserve_rng(0):
                reference = self._loss_on(self.module, clone(batch))
            if taken and _same(without, reference):
                take_hooks(self.module)
            if steps.stub_metrics(self.module) and not _same(self._loss_or_none(batch), reference):
                steps.unstub_metrics(self.module)
        if self.rounds and any(p.dtype in _LOW_PRECISION for p in self.parameters()):
            self._try_float32(clone(batch))

    def _keep_state(self, changed: dict[tuple[str, str], bool]) -> None:
        """Attributes that each call of the step changes: put back from here on."""
        state = StepState(getattr(self._live, "_orig_mod", self._live), self.module, changed) if changed else None
        if state:
            state.put_back(self.module)
            self._state = state
            log.info(f"the step changes {', '.join(state.names)}: put back before every call of the chains")

    def _loss_or_none(self, batch: Any) -> Optional[Tensor]:
        """The loss of a copy of the batch; None where the step fails."""
        try:
            with torch.no_grad(), preserve_rng(0):  # a step that draws: the same numbers each time
                return self._loss_on(self.module, clone(batch))
        except Exception:
            return None

    def elsewhere(self) -> AbstractContextManager[None]:
        """The copy's weights a little beside ``w*``, where no loss is zero by chance; a borrowed module stays."""
        return nullcontext() if self.borrowed else self._moved()

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """The copy's weights elsewhere, and put back."""
        home = [(p, p.detach().clone()) for p in self.parameters()]
        try:
            with torch.no_grad():
                for parameter, _ in home:
                    parameter.mul_(1.05).add_(1e-3)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in home:
                    parameter.copy_(value)

    def _without_hooks(self, call: Callable[[], _T]) -> _T:
        """Call it without the user's hooks on the copy (they write to what is not copied), unless it fails for that.

        Those of a borrowed module keep their order: they stay.
        """
        taken = take_hooks(self.module) if not self.borrowed else []
        try:
            return call()
        except (steps.NoLossError, RuntimeError):
            raise
        except Exception as error:
            if not taken:
                raise
            put_hooks_back(taken)
            taken = []
            log.debug(f"the step needs its hooks: {type(error).__name__}: {error}")
            return call()
        finally:
            put_hooks_back(taken)

    def _look_at_step(self, batch: Any) -> None:
        """By one call: whether the step changes the batch that it is given (a chain then hands it a copy each time),
        and whether it draws random numbers. A generator of its own that is put back is seeded from the global one."""
        trial = clone(batch)
        before, versions = tree_flatten(trial), _versions(trial)
        with torch.no_grad(), preserve_rng():
            states = global_states()
            self._first_loss = float(self._loss_on(self.module, trial))
            self.draws = global_states() != states
        after = tree_flatten(trial)
        same = after[1] == before[1] and all(a is b for a, b in zip(after[0], before[0], strict=True))
        self._mutates = not same or _versions(trial) != versions

    def compare_with_first(self, loss: float) -> None:
        """Told the loss of the batch that it was adapted to: another one than then is one of many, of generators that
        the step makes anew. Ranks with shards, who compute every loss together, have one answer."""
        slack = (2e-2 if self.autocast else 1e-4) * abs(self._first_loss)
        drew = self.draws or abs(loss - self._first_loss) > slack
        self.draws = not self.layout.all_finite(torch.tensor([math.nan if drew else 0.0]))

    def _check_own_weights(self, batch: Any) -> None:
        """The loss must depend on the copy's weights and on nothing of the live module (a closure kept as attribute).

        Raises:
            CopyError: where it does not and the module cannot be borrowed instead.
        """
        own = self.parameters()
        live = [p for p in self._live.parameters() if p.requires_grad]
        try:
            with torch.enable_grad():
                grads = self._without_hooks(
                    lambda: torch.autograd.grad(self._watched(clone(batch)), [*own, *live], allow_unused=True)
                )
        except RuntimeError as error:
            # re-entrant checkpointing knows only backward(); a loss without any gradient shows in the chains
            log.debug(f"could not check which weights the loss depends on: {error}")
            if _NO_GRAPH in str(error):
                self.unreached = tuple(self.names)
            return
        if all(g is None for g in grads[len(own) :]):
            self.unreached = tuple(name for name, g in zip(self.names, grads, strict=False) if g is None)
            return
        message = (
            f"the loss of a copy of {type(self._live).__name__} still reads the live weights: an attribute is a "
            "function bound to the original module."
        )
        if not self._may_borrow:
            raise CopyError(f"{message} Make it a method, or give loss_fn(module, batch) -> loss.")
        self._say(f"{message} Chains call the module in place instead, and put it back after.")
        self.module, self.borrowed = self._live, True
        self.names = self._live_names
        self._read_anchor()

    def _watched(self, batch: Any) -> Tensor:
        """The loss, of whose graph is kept what it shows."""
        loss = self.loss(batch)
        self.ends_in_sum = ends_in_sum(loss)
        return loss

    def _try_float32(self, batch: Any) -> None:
        context, self._context = self._context, nullcontext
        original = self.module
        try:
            with torch.no_grad():
                self.module = copy.deepcopy(original).float()
            prepare(self.module, self._trainer)
            self._upcast = True
            with torch.no_grad():
                self.loss(batch)
            self._enable(self.names)
            self._read_anchor()
            if self._state is not None:
                self._state.forget(original)
        except Exception as error:
            log.info(f"chains keep float32 weights and round them at each call: {type(error).__name__}: {error}")
            self.module, self._context, self._upcast = original, context, False
            self._read_anchor()


def _same(loss: Optional[Tensor], reference: Tensor) -> bool:
    """Not where there is no number: two of those say nothing."""
    return loss is not None and bool(torch.isfinite(reference)) and torch.allclose(loss, reference, rtol=1e-5)


def as_interpreted() -> AbstractContextManager[None]:
    """TorchScript without its optimiser: that compiles a function anew after its first calls, rounds otherwise from
    there on, and a copy shares that count with the module that trains."""
    return torch.jit.optimized_execution(False)  # type: ignore[no-untyped-call, no-any-return]


@contextmanager
def apart() -> Iterator[None]:
    """What watches the training is not told of chains: no run of wandb, nor the detection of anomalies.

    A chain that is thrown up while its step is looked for is no anomaly of the user's model.
    """
    with torch.autograd.set_detect_anomaly(False), steps.runs_muted():
        yield


def refuse_lazy(module: nn.Module) -> None:
    """Weights without a shape cannot be measured.

    Raises:
        ValueError: naming the first one.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet: a lazy module gets its weights with its first batch. Measure after the "
                "first training step, or run a batch through the module before."
            )


def _to_float32(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda x: x.float() if x.dtype in _LOW_PRECISION else x)


def _versions(batch: Any) -> list[tuple[int, int, bool]]:
    """Which tensors there are, how often each has been changed in place, and whether it gathers gradients."""
    return [(id(tensor), tensor._version, tensor.requires_grad) for tensor in tensors_in(batch)]
