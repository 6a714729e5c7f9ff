"""Stand-ins for what a step reaches through its trainer: they show what training has, and keep what is written."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_slt.callbacks.data.own_contents import OwnContents
from lightning_slt.sampling.belongings import RANDOM, LiveIterator, copy_of_random, is_live_iterator
from lightning_slt.sampling.stand_ins import ReadThrough

METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class SeenTrainer(ReadThrough):
    """The live trainer as the chains may see it: what a step writes to its metrics, to the settings of its optimisers
    and schedulers, and to what its DataModule holds (within limits) stays here, and no checkpoint is saved.

    Args:
        trainer: the live one.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, {"save_checkpoint": _nothing})

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizers", "lr_scheduler_configs"):
            return getattr(self.strategy, name)
        value, local = super().__getattr__(name), self.__dict__["_local"]
        if name in local:
            return value
        if name == "strategy":
            local[name] = value = SeenStrategy(value)
        elif name == "datamodule" and value is not None:
            local[name] = twin = loosened(value)
            OwnContents(value, twin)
            return twin
        elif name in METRICS:
            local[name] = value = dict(value)
        return value


class SeenStrategy(ReadThrough):
    """A strategy whose optimisers and schedulers may be looked at and written to, and do not step.

    Args:
        strategy: the live one.
    """

    def __init__(self, strategy: Any) -> None:
        optimizers = {id(o): _seen_optimizer(o) for o in getattr(strategy, "optimizers", [])}
        wrapped = [_still(o) for o in getattr(strategy, "_lightning_optimizers", [])]
        for wrapper in wrapped:
            wrapper.__dict__["_optimizer"] = optimizers.get(id(wrapper._optimizer), wrapper._optimizer)
        configs = [_seen_config(c, optimizers) for c in getattr(strategy, "lr_scheduler_configs", [])]
        local = {
            "optimizers": list(optimizers.values()),
            "_lightning_optimizers": wrapped,
            "lr_scheduler_configs": configs,
        }
        super().__init__(strategy, local)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # a step may ask which strategy it runs under
        return type(self.__dict__["_live"])


def _seen_optimizer(optimizer: Any) -> Any:
    # one whose groups are those of another that it wraps (DeepSpeed's) would hand what is written on to it
    if "param_groups" not in vars(optimizer):
        return optimizer
    twin = _still(optimizer)
    twin.__dict__["param_groups"] = [{k: _own(v) for k, v in group.items()} for group in optimizer.param_groups]
    return twin


def _seen_config(config: Any, optimizers: dict[int, Any]) -> Any:
    scheduler = _still(config.scheduler)
    live = getattr(scheduler, "optimizer", None)
    if live is not None:
        scheduler.__dict__["optimizer"] = optimizers.get(id(live), live)
    return dataclasses.replace(config, scheduler=scheduler)


def loosened(value: Any) -> Any:
    """The same object a second time, with attributes, lists, dicts and generators of its own, and iterators that are
    not read."""
    if not hasattr(value, "__dict__"):
        return value
    twin = object.__new__(type(value))
    kept = {
        k: LiveIterator(f"{type(value).__name__}.{k}") if is_live_iterator(v) else _own(v)
        for k, v in vars(value).items()
    }
    twin.__dict__.update(kept)
    return twin


def _still(value: Any) -> Any:
    """A second optimiser or scheduler with the settings of this one, which steps nothing."""
    twin = object.__new__(type(value))
    twin.__dict__.update({k: _own(v) if isinstance(v, list) else v for k, v in vars(value).items()})
    twin.__dict__["step"] = twin.__dict__["zero_grad"] = _nothing
    return twin


def _own(value: Any) -> Any:
    if type(value) in (list, dict, set):
        return value.copy()
    if isinstance(value, RANDOM):
        return copy_of_random(value)
    return value.clone() if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad else value


def _nothing(*_: Any, **__: Any) -> None:
    return None


__all__ = ["SeenStrategy", "SeenTrainer", "loosened"]
