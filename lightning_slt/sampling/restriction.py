"""Which weights move: all that train, or the subset of a refined learning coefficient (wrLLC).

Wang et al. 2024 (arXiv 2410.02984): with only a component's weights moving, and the rest held at ``w*``, the learning
coefficient is that component's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Union

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_slt.sampling.arguments import no_restriction
from lightning_slt.sampling.shadow import without_compile

Restriction = Union[str, nn.Module, Sequence[Union[str, nn.Module]], None]


class AllFrozenError(ValueError):
    """What is to move exists, and is frozen; a callback may thaw it later."""


def select_parameters(module: nn.Module, restrict: Restriction = None, called: str = "restrict") -> list[str]:
    """Names of the parameters that chains move, in the module's order.

    Args:
        module: its parameters with ``requires_grad`` are the candidates: frozen ones never move.
        restrict: None for all of them, or one or several of: a glob over parameter names (``"encoder.*.weight"``), the
            name of a submodule (``"encoder"``), or a submodule itself. A weight that is pruned keeps its name here.
        called: what an error calls ``restrict``.

    Raises:
        ValueError: where nothing is named, or nothing is matched.
        AllFrozenError: where all that is matched is frozen, at the moment.
        TypeError: for a Parameter, a Tensor, or anything else that is not a name or a submodule.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> select_parameters(net, "1.*")
        ['1.weight', '1.bias']
        >>> select_parameters(net, [net[0], "1.bias"])
        ['0.weight', '0.bias', '1.bias']
    """
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(module).__name__} has no parameter with requires_grad=True: there is nothing for a chain to move."
        )
    if restrict is None:
        return trainable
    entries = restriction_entries(restrict)
    if not entries:
        raise nothing_named(called)

    # a tied weight has several names but is one parameter: match every name, move it once
    aliases = [(without_compile(name), p) for name, p in module.named_parameters(remove_duplicate=False)]
    masked = {without_compile(name) for name, _ in module.named_buffers() if name.endswith("_mask")}
    # pruning calls a weight weight_orig from then on, in the middle of a run maybe
    before = [(name.removesuffix("_orig"), p) for name, p in aliases if name.endswith("_orig")]
    aliases += [(name, p) for name, p in before if f"{name}_mask" in masked]
    chosen: set[int] = set()
    for entry in entries:
        if isinstance(entry, nn.Module):
            matched = {id(p) for p in entry.parameters()} & {id(p) for _, p in aliases}
            label = f"the submodule {type(entry).__name__}"
        elif not isinstance(entry, str):
            raise no_restriction(entry, next((name for name, p in aliases if p is entry), None))
        else:
            wanted = without_compile(entry)
            matched = {id(p) for name, p in aliases if fnmatchcase(name, wanted) or name.startswith(f"{wanted}.")}
            label = repr(entry)
        if not matched:
            shown = ", ".join(trainable[:8]) + (", ..." if len(trainable) > 8 else "")
            raise ValueError(f"{called}: {label} matches no parameter. The trainable parameters are: {shown}.")
        chosen |= matched
    moving = [name for name, p in module.named_parameters() if p.requires_grad and id(p) in chosen]
    if not moving:
        raise AllFrozenError(
            f"{called}: every parameter matched by {entries} is frozen (requires_grad=False), and chains move what "
            "training may. Name others, or thaw them by the end of the step (untoggle_optimizer, requires_grad_())."
        )
    return moving


def restriction_entries(restrict: Restriction) -> list[Union[str, nn.Module]]:
    """What ``restrict`` names, one by one; a single Parameter or Tensor stays whole.

    Raises:
        TypeError: for what is neither one entry nor several.
    """
    if restrict is None:
        return []
    if isinstance(restrict, (str, nn.Module, Tensor)):
        return [restrict]  # type: ignore[list-item]
    if isinstance(restrict, Mapping) or not isinstance(restrict, Iterable):
        raise no_restriction(restrict)
    return list(restrict)


def nothing_named(called: str) -> ValueError:
    """What is said of a list without an entry."""
    return ValueError(f"{called} is empty: leave it None to move every weight, or name parameters or submodules.")


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


def refuse_empty(module: nn.Module, moving: Sequence[str]) -> None:
    """Weights without a single number cannot be measured; beside others they are left as they are.

    Raises:
        ValueError: naming them.
    """
    names = set(moving)
    if not any(parameter.numel() for name, parameter in module.named_parameters() if name in names):
        raise ValueError(
            f"the moving weights {list(moving)} have no elements: there is nothing for a chain to move. Look at the "
            "sizes of the layers, or name other weights with restrict."
        )
