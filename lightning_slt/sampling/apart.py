"""Stand-ins for what a step reaches through its trainer: they show what training has, and keep what is written."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from lightning_slt.sampling.belongings import LiveIterator, is_live_iterator

METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class ReadThrough:
    """An object's attributes to read; writes stay here.

    Args:
        live: the object.
        local: what is answered in its place.
    """

    def __init__(self, live: Any, local: dict[str, Any]) -> None:
        self.__dict__["_live"] = live
        self.__dict__["_local"] = local

    def __getattr__(self, name: str) -> Any:
        local = self.__dict__["_local"]
        return local[name] if name in local else getattr(self.__dict__["_live"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_local"][name] = value


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
    """The same object a second time, with attributes, lists and dicts of its own, and iterators that are not read."""
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
    return value.clone() if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad else value


def _nothing(*_: Any, **__: Any) -> None:
    return None


__all__ = ["METRICS", "ReadThrough", "SeenStrategy", "loosened"]
