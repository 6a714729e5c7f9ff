"""A live module lent to chains, and put back exactly; and how a copy or a lent module is silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slt.sampling import steps
from lightning_slt.sampling.belongings import contents_kept


def prepare(module: nn.Module, trainer: Any) -> None:
    """Silence a private copy and let it read, but not touch, its trainer."""
    steps.mute(module)
    steps.attach_trainer(module, trainer)


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


@contextmanager
def borrow(module: nn.Module, trainer: Any) -> Iterator[None]:
    """The live module in eval mode and muted, put back exactly after: flag by flag, attribute by attribute."""
    with contents_kept(module), _attributes_kept(module):
        for m in module.modules():
            m.training = isinstance(m, nn.RNNBase) and m.dropout == 0.0
        prepare(module, trainer)
        steps.stub_metrics(module)
        yield


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back which attributes a module has, and its buffers and gradients."""
    saved = [(m, dict(m.__dict__)) for m in module.modules()]
    # a metric changes its state in place, which putting the attributes back would not undo: it is not called at all
    buffers = [(m, dict(m._buffers), {k: b.clone() for k, b in m._buffers.items() if b is not None}) for m, _ in saved]
    # a step that calls backward() itself would add to those that training accumulates
    gradients = [(p, p.grad) for p in module.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for m, attributes in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
        for p, gradient in gradients:
            p.grad = gradient
        for m, live, values in buffers:
            m._buffers.update(live)
            with torch.no_grad():
                for name, value in values.items():
                    live[name].copy_(value)  # type: ignore[union-attr]


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a copy that still reaches the live module might have moved there: running statistics."""
    saved = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for live, value in saved:
                if not all(torch.equal(a, b) for a, b in zip(_dense(live), _dense(value), strict=True)):
                    live.copy_(value)


def _dense(tensor: Tensor) -> list[Tensor]:
    """What a tensor holds; of a sparse one (a graph's adjacency) torch compares only its parts."""
    return [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]
