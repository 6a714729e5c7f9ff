"""A private copy of the user's module: chains move the copy, never the module that trains."""

from __future__ import annotations

import asyncio
import copy
import functools
import io
import threading
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from lightning_slt.sampling.belongings import LiveIterator, is_live_iterator, services_of


class CopyError(Exception):
    """The module cannot be copied; the message names the attribute that blocks it."""


@torch.no_grad()  # the copy of a scripted parameter would be a result of the original's, not a leaf
def shadow_copy(module: nn.Module) -> nn.Module:
    """A copy that shares no parameter, buffer or submodule with ``module``, in eval mode, without ``torch.compile``.

    ``copy.deepcopy`` does most of it. An attribute that it cannot copy is stood in for: a cached non-leaf tensor by its
    detached clone, a generator by one in the same state, an iterator by one that refuses to be read; locks, pipes,
    open files, executors and Python modules, which hold no weights, are shared. Loggers, writers and queues, which have
    somebody at the other end, are stood in for whether they can be copied or not.

    Raises:
        CopyError: where an attribute of another kind blocks the copy, or where the copy still shares a parameter.
    """
    module = getattr(module, "_orig_mod", module)
    # gradients are not copied: a tensor's deepcopy takes its .grad along unless the memo already answers for it
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    memo: dict[int, Any] = {id(g): None for g in grads} | services_of(module)
    try:
        shadow = copy_with_hooks(module, memo)
    except Exception as error:
        stand_ins = stand_ins_for(module, error, memo)
        try:
            shadow = copy_with_hooks(module, stand_ins)
        except Exception as again:
            raise CopyError(
                f"{type(module).__name__} cannot be copied: {type(again).__name__}: {again}. Give loss_fn=, or define "
                "__deepcopy__ or __getstate__ on the class that holds the attribute."
            ) from again
    shadow = uncompile(shadow)
    live = {id(t) for t in (*module.parameters(), *module.buffers())}
    if any(id(t) in live for t in (*shadow.parameters(), *shadow.buffers())):
        raise CopyError(
            f"a copy of {type(module).__name__} still shares parameters or buffers with it (a scripted submodule?)."
        )
    detach_from_training(shadow)
    return shadow


def copy_with_hooks(module: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """``copy.deepcopy``, with hooks that work on the copy.

    A hook that is a function is shared by a deepcopy: it would keep an activation of the copy in an attribute of the
    original. What its closure holds of the original is the copy's here.

    Args:
        memo: answers for what is not to be copied.
    """
    made = dict(memo)
    copied = copy.deepcopy(module, made)
    for hooks in _hooks_of(copied):
        for key, hook in list(hooks.items()):
            hooks[key] = _rebound(hook, made)
    return copied


def _rebound(hook: Any, made: dict[int, Any]) -> Any:
    """The same function over what ``made`` has in place of the objects of its closure, and of its default values."""
    if not isinstance(hook, types.FunctionType) or id(hook) in made:
        return made.get(id(hook), hook)  # of a method, or an object, deepcopy has made another
    made[id(hook)] = hook  # it may be in its own closure
    cells, defaults, named = hook.__closure__ or (), hook.__defaults__ or (), hook.__kwdefaults__ or {}
    before = [*(cell.cell_contents if _holds(cell) else None for cell in cells), *defaults, *named.values()]
    after = [_rebound(value, made) for value in before]
    if all(a is b for a, b in zip(after, before, strict=True)):
        return hook
    closure = tuple(types.CellType(x) if _holds(cell) else cell for x, cell in zip(after, cells, strict=False))
    new = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, closure=closure or None)
    new.__defaults__ = tuple(after[len(cells) : len(cells) + len(defaults)]) or None
    new.__kwdefaults__ = dict(zip(named, after[len(cells) + len(defaults) :], strict=True)) or None  # type: ignore[assignment]
    new.__dict__.update(hook.__dict__)
    new.__module__ = hook.__module__
    made[id(hook)] = new
    return new


def _holds(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    for submodule in module.modules():
        yield submodule._forward_hooks
        yield submodule._forward_pre_hooks
        yield submodule._backward_hooks
        yield submodule._backward_pre_hooks


def detach_from_training(shadow: nn.Module) -> None:
    """Eval mode (dropout off, BatchNorm on its running statistics: L(w) must be a function of w), no gradients held."""
    shadow.eval()
    for submodule in shadow.modules():
        if isinstance(submodule, nn.RNNBase):
            # cuDNN refuses the backward pass of an RNN in eval mode; without dropout both modes are the same function
            submodule.dropout = 0.0
            submodule.train()
    for parameter in shadow.parameters():
        parameter.grad = None


def take_hooks(module: nn.Module) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Take the user's own hooks off a copy, those of the forward and of the backward pass.

    What a hook writes to may not be the copy's: a list that nothing of the module holds.

    Hooks of torch itself (weight norm, pruning, parametrisations) are a part of the model and stay.

    Returns:
        What :func:`put_hooks_back` needs.
    """
    taken = []
    for hooks in _hooks_of(module):
        own = {k: h for k, h in hooks.items() if not str(getattr(h, "__module__", "")).startswith("torch.")}
        for key in own:
            del hooks[key]
        if own:
            taken.append((hooks, own))
    return taken


def put_hooks_back(taken: list[tuple[dict[int, Any], dict[int, Any]]]) -> None:
    """Undo :func:`take_hooks`."""
    for hooks, own in taken:
        hooks.update(own)


def without_compile(name: str) -> str:
    """A parameter's name as it is without ``torch.compile`` around the modules that hold it."""
    return name.replace("_orig_mod.", "")


def uncompile(module: nn.Module) -> nn.Module:
    """Take ``torch.compile`` off a private copy and its submodules: its compiled step is bound to the original."""
    module = getattr(module, "_orig_mod", module)
    if getattr(module, "_compiler_ctx", None) is not None:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            module.__dict__.pop(name, None)
        module._compiler_ctx = None  # type: ignore[assignment]
    for parent in list(module.modules()):
        parent.__dict__.pop("_compiled_call_impl", None)  # module.compile() in place
        for name, child in list(parent._modules.items()):
            if child is not None and hasattr(child, "_orig_mod"):
                parent._modules[name] = uncompile(child)
    return module


def stand_ins_for(copied: Any, error: Exception, known: Mapping[int, Any]) -> dict[int, Any]:
    """A deepcopy memo with a substitute for everything that blocks the copy.

    Args:
        copied: a module, or what one holds.
        error: what its copy has raised.
        known: a memo that answers for some of it already.

    Raises:
        CopyError: where something blocks the copy for which there is no substitute.
    """
    memo: dict[int, Any] = dict(known)
    blocking: list[tuple[str, Exception]] = []
    seen: set[int] = set(known)

    def visit(value: Any, path: str) -> None:
        if id(value) in seen or value is None or isinstance(value, (str, bytes, int, float, bool, type)):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
            elif type(value) not in (Tensor, nn.Parameter) and (why := _blocks(value, memo)) is not None:
                blocking.append((path, why))
            return
        if isinstance(value, torch.Generator):
            memo[id(value)] = torch.Generator(device=value.device)
            memo[id(value)].set_state(value.get_state())
            return
        if isinstance(value, _SHARED):
            memo[id(value)] = value
            return
        if is_live_iterator(value) and _blocks(value, memo) is not None:
            memo[id(value)] = LiveIterator(path)
            return
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                visit(part, path)
        if isinstance(value, types.MethodType):
            visit(value.__self__, path)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                visit(item, f"{path}[{key!r}]")
            return
        if isinstance(value, (list, tuple, set)):
            for index, item in enumerate(list(value)):
                visit(item, f"{path}[{index}]")
            return
        if isinstance(value, nn.Module) or hasattr(value, "__dict__"):
            for name, item in list(vars(value).items()):
                if name in ("_trainer", "_fabric") and isinstance(value, nn.Module):
                    continue
                visit(item, f"{path}.{name}")
        # what holds another one that blocks comes after it
        if not isinstance(value, (nn.Module, *_FUNCTIONS)) and (why := _blocks(value, memo)) is not None:
            blocking.append((path, why))

    visit(copied, type(copied).__name__)
    try:
        copy.deepcopy(copied, dict(memo))
    except Exception as again:
        where, why = blocking[0] if blocking else ("", again)
        raise CopyError(
            f"{type(copied).__name__} cannot be copied: {f'the attribute {where}' if where else 'an attribute'} blocks "
            f"it ({type(why).__name__}: {why}). Give that "
            "attribute's class a __deepcopy__ or __getstate__, or create it when it is used."
        ) from error
    return memo


def _blocks(value: Any, memo: dict[int, Any]) -> Optional[Exception]:
    """What a copy of it raises, None where it can be copied."""
    try:
        copy.deepcopy(value, dict(memo))
    except Exception as error:
        return error
    return None


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
"""What they are bound to is looked at in their place. Objects that can be called, as a connection of sqlite3 can, are
objects."""


_SHARED = (
    Connection,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Event,
    threading.Condition,
    threading.Semaphore,
    threading.Thread,
    Executor,
    asyncio.AbstractEventLoop,
    ContextVar,
    io.IOBase,
    types.ModuleType,  # all that was ever imported can be reached from one
    record_function,  # of PyTorchProfiler, which keeps them in its hooks of the modules
)
