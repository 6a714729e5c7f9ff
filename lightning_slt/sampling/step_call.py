"""How the user's step is called for its loss: in which precision, with which gradients, and what is put back before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_slt.sampling.step_state import StepState
from lightning_slt.sampling.step_tensors import StepTensors
from lightning_slt.sampling.steps import LossFn, mean_loss
from lightning_slt.sampling.structures import clone, over_tensors

log = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
LOOKS = 8
"""Calls without gradients after which it is looked whether the step has left any: a walk through all parameters, which
would show in the time of every loss."""
NO_GRAPH = "does not require grad"
"""How torch's error reads where a derivative is asked for of something that has none."""


@dataclass(eq=False)
class StepCall:
    """The step of a module, or the ``loss_fn`` that was given, as chains call it.

    What trying it shows (:mod:`~lightning_slt.sampling.trials`) is said by another one, made by
    :func:`dataclasses.replace`. Only ``differentiates`` shows in the calls themselves, and is kept from there on: what
    the step asks for and cannot have at any of them, gradients that it leaves behind at the first :data:`LOOKS`.

    Attributes:
        loss_fn: gives the losses of a module on a batch, see :func:`~lightning_slt.sampling.steps.loss_function`.
        context: makes the context in which it is called: autocast, or none.
        upcast: what is in half precision in a batch is handed over in float32.
        mutates: the step changes the batch that it is given, and is handed a copy.
        written: buffers and weights that do not move, put back before each call.
        state: attributes in Python, likewise; None for none.
        differentiates: the step itself asks for derivatives: it is called with gradients on, also where only its value
            is wanted.
        looks: calls that are still looked at for gradients that they leave.
    """

    loss_fn: LossFn
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    upcast: bool = False
    mutates: bool = False
    written: StepTensors = field(default_factory=StepTensors)
    state: Optional[StepState] = None
    differentiates: bool = False
    looks: int = LOOKS

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The scalar mean of :meth:`losses`."""
        return mean_loss(self.losses(module, batch))

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        """What the step gives for ``batch``: a scalar, ``[batch]``, or ``[batch, tokens]``.

        Raises:
            NoLossError: where it returned None.
        """
        if self.mutates:
            batch = clone(batch)
        if self.upcast:
            batch = _to_float32(batch)
        self.written.put_back(module)  # the loss must not depend on how often it was asked for
        if self.state is not None:
            self.state.put_back(module)
        with self.context():
            if torch.is_grad_enabled():
                return self.loss_fn(module, batch)
            if not self.differentiates:
                bare = self._without_gradients(module)
                try:
                    losses = self.loss_fn(module, batch)
                except RuntimeError as error:
                    if NO_GRAPH not in str(error):
                        raise
                    self._note_derivatives()
                else:
                    left = [p for p in bare if p.grad is not None]
                    for parameter in left:  # of a step that turns gradients on itself, and calls backward()
                        parameter.grad = None
                    if left:
                        self._note_derivatives()
                    return losses
            with torch.enable_grad():
                return self.loss_fn(module, batch).detach()

    def _without_gradients(self, module: nn.Module) -> list[nn.Parameter]:
        """In which a call may leave some; none where that is not looked at any more."""
        if self.looks == 0:
            return []
        self.looks -= 1
        return [parameter for parameter in module.parameters() if parameter.grad is None]

    def _note_derivatives(self) -> None:
        log.info("the step asks for derivatives itself: it is called with gradients on")
        self.differentiates = True

    def forget(self, module: nn.Module) -> None:
        """A copy that is given up."""
        if self.state is not None:
            self.state.forget(module)

    def autocasts(self, device: torch.device) -> bool:
        """Whether the loss is computed under autocast, and so known to 8 or 11 bits only."""
        with self.context():
            return torch.is_autocast_enabled(device.type)


def _to_float32(batch: Any) -> Any:
    return over_tensors(batch, lambda x: x.float() if x.dtype in LOW_PRECISION else x)
