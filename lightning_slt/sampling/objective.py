"""The loss of THIS module at weights that chains move: a private copy, and its moving weights as one flat vector."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn

from lightning_slt.sampling import steps
from lightning_slt.sampling.arguments import check_device, check_module, without_fabric
from lightning_slt.sampling.borrowing import apart, as_interpreted, borrow, buffers_kept, prepare
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.restriction import Restriction, refuse_empty, refuse_lazy, select_parameters
from lightning_slt.sampling.shadow import (
    CopyError,
    copy_with_hooks,
    detach_from_training,
    shadow_copy,
    stand_ins_for,
    without_compile,
)
from lightning_slt.sampling.step_call import StepCall
from lightning_slt.sampling.step_tensors import StepTensors
from lightning_slt.sampling.structures import clone
from lightning_slt.sampling.trials import Trials, ask_in_training, moved

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class WrongWeightsError(ValueError):
    """The weights to study are not those of such a module."""


def told_once() -> Callable[[str, str], None]:
    """What is said of a topic, the first time, as a warning in the log: chains that begin anew find it anew."""
    topics: set[str] = set()

    def say(topic: str, sentence: str) -> None:
        if topic not in topics:
            topics.add(topic)
            log.warning(sentence)

    return say


def _copy_sharing(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """A copy that has what ``known`` says in place of what it answers for; locks and the like are shared with it."""
    try:
        return copy_with_hooks(module, known)
    except Exception as error:
        with suppress(CopyError):
            stand_ins = stand_ins_for(module, error, known)
            known = known | {key: held for key, held in stand_ins.items() if id(held) == key}
    return copy_with_hooks(module, known)


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
        say: told what a user should know, as a topic and a sentence: that the module is called in place, or that chains
            or the losses of samples are slow. It is so at every estimate; None for the log, each topic once.

    Raises:
        TypeError: for a module that is none.
        ValueError: for a module without a usable loss, a restriction that names nothing, or a device that is not there.
        WrongWeightsError: for weights of another module.
        CopyError: where the module cannot be copied and cannot be borrowed either.

    Attributes:
        module: the private copy (the live module where ``borrowed``).
        names: the parameters that move.
        anchor: ``[d]``, the flat ``w*``, float32 or float64; this rank's part of it where the model is sharded.
        layout: which of the weights ``anchor`` has.
        borrowed: the module could not be copied: it is called in place with other weights, and put back after.
        rounds: the module computes in half precision from float32 masters.
        given_loss: ``loss_fn`` as it was given.
        ends_in_sum: the last thing that the first loss was made by is a sum, by its graph.
        unreached: moving weights that the loss of the first batch does not depend on.
        only_in_training: those of them that it depends on in training mode, of several batches.
        draws: the step draws random numbers, so that its loss is one of many: chains compare it with that of the same
            numbers at ``w*``.
        is_sum: the loss of a batch is the sum over its samples, as far as the first batch showed.
    """

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
        say: Optional[Callable[[str, str], None]] = None,
    ) -> None:
        module = without_fabric(module)
        check_module("module", module)
        check_device("device", device)
        self.say = say or told_once()
        self._live, self._live_names = module, select_parameters(module, restrict)
        refuse_lazy(module)
        refuse_empty(module, self._live_names)
        self._may_borrow = device is None and weights is None
        self._weights, self._trainer = weights, trainer
        self.names = self._live_names
        self.given_loss = loss_fn
        self._call = self._make_call(steps.loss_function(module, loss_fn), context or nullcontext)
        self.borrowed = False
        self._take_module(device)
        self._enable()
        self._read_anchor()

    def _make_call(self, loss_fn: steps.LossFn, context: Callable[[], AbstractContextManager[Any]]) -> StepCall:
        return StepCall(loss_fn, context)

    def _take_module(self, device: Optional[torch.device | str]) -> None:
        """Make the private copy; where that cannot be done, borrow the module."""
        try:
            self.module = shadow_copy(self._live)
        except CopyError as error:
            if not self._may_borrow:
                raise
            self._call_in_place(str(error))
            return
        self.names = [without_compile(name) for name in self._live_names]
        if self._weights is not None:
            self._load(self._weights)
        if device is not None:
            self.module.to(device)
        prepare(self.module, self._trainer)

    def _call_in_place(self, why: str) -> None:
        self.say("in place", f"{why} Chains call the module in place instead, and put it back after.")
        self.module, self.names, self.borrowed = self._live, self._live_names, True

    def _load(self, weights: dict[str, Tensor]) -> None:
        try:
            self.module.load_state_dict({without_compile(name): w for name, w in weights.items()})
        except RuntimeError as error:
            remedy = f"Give the state_dict() of another {type(self.module).__name__} like it."
            raise WrongWeightsError(f"weights: do not fit the module. {remedy} {error}") from error

    def _enable(self) -> None:
        if self.borrowed:
            return
        moving = set(self.names)
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
        self._flatten(parameters)
        self.layout = Layout(len(self.anchor))

    def _flatten(self, parameters: Sequence[Tensor]) -> None:
        """Read the anchor off what is here of the moving weights, and how they lie in it."""
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"the moving weights are on several devices, {sorted(map(str, devices))}: use restrict=.")
        self.device = devices.pop()
        self.dtype = torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32
        self.anchor = torch.cat([p.detach().reshape(-1).to(self.dtype) for p in parameters])
        self.rounds = any(p.dtype != self.dtype for p in parameters)
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]

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
        return self._call.losses(module, batch)

    @property
    def differentiates(self) -> bool:
        """Whether the step itself asks for derivatives (a gradient penalty, an adversarial input): it is called with
        gradients on, also where only its value is wanted."""
        return self._call.differentiates

    @property
    def writes(self) -> bool:
        """Whether the step writes to buffers or to weights that do not move: they are put back before every call."""
        return bool(self._call.written)

    @property
    def autocast(self) -> bool:
        """Whether the loss is computed under autocast, and so known to 8 or 11 bits only."""
        return self._call.autocasts(self.device)

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
            twin = shadow_copy(self.module) if stand_ins else _copy_sharing(self.module, shared)
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
        """Settle on a first batch what only trying shows (:mod:`~lightning_slt.sampling.trials`): what is put back
        before each call, float32 for half precision, stubs for metrics.

        Raises:
            NoLossError: where the step returns no loss for this batch.
            Exception: whatever the user's step raises.
        """
        if not self.borrowed:
            with buffers_kept(self._live), as_interpreted(), apart():
                self._adapt_copy(batch)
        with self.active():
            self._find_use(batch)
            if self.borrowed and not self.layout.sharded:
                self._call_again(batch)

    def _adapt_copy(self, batch: Any) -> None:
        trials = self._trials(batch)
        self._call = trials.find_written(self._call)
        watched = trials.watch(self._call)
        self.ends_in_sum = watched.ends_in_sum
        if watched.reads_live:
            self._leave_copy()
            return
        self.unreached, self._call = watched.unreached, watched.call
        trials.take_off_idle(self._call)
        wide = trials.in_float32(self._call, self._trainer)
        if wide is not None:
            self.module, self._call = wide
            self._enable()
            self._read_anchor()

    def _find_use(self, batch: Any) -> None:
        used = self._trials(batch).find_use(self._call)
        self._call, self._first_loss, self.draws = used.call, used.loss, used.draws

    def _trials(self, batch: Any) -> Trials:
        moving = dict(zip(self.names, self.parameters(), strict=True))
        return Trials(self.module, moving, batch, self._live, self._weights)

    def _leave_copy(self) -> None:
        """Call the module in place after all, since the loss of its copy is not the copy's own.

        Raises:
            CopyError: where that cannot be done.
        """
        why = (
            f"the loss of a copy of {type(self._live).__name__} still reads the live weights: an attribute is a "
            "function bound to the original module."
        )
        if not self._may_borrow:
            raise CopyError(f"{why} Make it a method, or give loss_fn(module, batch) -> loss.")
        self._call_in_place(why)
        self._read_anchor()
        # what it holds is put back when the chains have ended
        self._call = replace(self._call, written=StepTensors(), state=None)

    def compare_with_first(self, loss: float) -> None:
        """Told the loss of the batch that it was adapted to: another one than then is one of many, of generators that
        the step makes anew. Ranks with shards, who compute every loss together, have one answer."""
        drew = self.draws or self._differs(loss)
        self.draws = not self.layout.all_finite(torch.tensor([math.nan if drew else 0.0], device="cpu"))

    def _call_again(self, batch: Any) -> None:
        """Say so where a module that is called in place has another loss at its next call, for no global random number:
        what it keeps is put back when the chains have ended, and not before each of their calls."""
        try:
            with torch.no_grad():
                same = self.draws or not self._differs(float(self.loss(clone(batch))))
        except steps.NoLossError:  # now and then it has none: nothing to compare
            same = True
        if same:
            return
        self.say(
            "state in place",
            "the loss of one batch is another one at each call: the step keeps something from call to call (a count, "
            "a generator of its own), which is put back before each only where the module can be copied. Chains of "
            "this one sample a loss that moves on. Make it copyable, or keep that out of the loss.",
        )

    def _differs(self, loss: float) -> bool:
        """Whether this is another loss than the first of the same batch, beyond rounding."""
        return abs(loss - self._first_loss) > (2e-2 if self.autocast else 1e-4) * abs(self._first_loss)

    def elsewhere(self) -> AbstractContextManager[None]:
        """The copy's weights a little beside ``w*``, where no loss is zero by chance; a borrowed module stays."""
        return nullcontext() if self.borrowed else moved(self.parameters())

    def has_loss_in_training(self, batch: Any) -> bool:
        """Whether the step, which has failed, gives a loss in training mode; tried once."""
        return self.in_training(lambda twin: self._call.loss(twin, clone(batch)).ndim == 0, False)

    def in_training(self, ask: Callable[[nn.Module], _T], otherwise: _T) -> _T:
        """What is asked of another copy in training mode, see :func:`~lightning_slt.sampling.trials.ask_in_training`;
        ``otherwise`` where that cannot be tried, as with a module that is called in place."""
        if self.borrowed:
            return otherwise

        def asked(twin: nn.Module) -> _T:
            try:
                return ask(twin)
            finally:
                self._call.forget(twin)

        with buffers_kept(self._live), as_interpreted(), apart():
            return ask_in_training(lambda: self.copy_module(stand_ins=True), asked, otherwise)
