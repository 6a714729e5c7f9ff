"""The loss of a module whose weights are spread over ranks (FSDP2, DTensor), at weights that chains move in place.

Such a module cannot be copied, and a copy would not fit. So the chains move the shards themselves: every rank writes
its part of a chain's weights where its part of the module's weights was, the module's own hooks gather, compute and
scatter, and what training had is put back to the last bit: weights, gradients, buffers, flags, attributes.

All ranks work on one chain at a time with the same minibatch, so that the chain is the one that an unsharded module
makes: the mean of equal gradients over the ranks is that gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_slt.sampling import steps
from lightning_slt.sampling.borrowing import apart, borrow
from lightning_slt.sampling.collective import Collective, Together
from lightning_slt.sampling.layout import Piece, ShardLayout
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.step_call import StepCall


def is_distributed_tensor(value: Any) -> bool:
    """Whether it is a DTensor; without ``torch.distributed`` there are none."""
    return hasattr(value, "to_local") and hasattr(value, "device_mesh") and hasattr(value, "placements")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which may be all of it; it shares its memory."""
    return tensor._local_tensor if is_distributed_tensor(tensor) else tensor  # type: ignore[attr-defined]


def whole_weights(module: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The module's ``state_dict``, each DTensor gathered, on the CPU; on all its ranks at once.

    Args:
        keep: whether they are wanted on this rank; an empty dict is returned where not.
    """
    for wrapped in fully_sharded(module):
        wrapped.reshard()  # type: ignore[operator]
    kept: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        if is_distributed_tensor(value):
            value = value.detach().full_tensor()
        if keep:
            kept[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return kept


def fully_sharded(module: nn.Module) -> list[nn.Module]:
    """The modules to which ``fully_shard`` was applied."""
    return [m for m in module.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


def piece_of(parameter: Tensor, start: int, world_size: int) -> Piece:
    """Where this rank's part of a parameter is.

    Args:
        parameter: a DTensor, or a tensor that every rank has.
        start: of the parameter in the flat vector of all the weights.
        world_size: ranks.

    Raises:
        ValueError: for a placement that is not understood.
    """
    if not is_distributed_tensor(parameter):
        return Piece(range(start, start + parameter.numel()), parameter.numel(), 1.0 / world_size)
    mesh, placements = parameter.device_mesh, list(parameter.placements)  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    kinds = [type(placement).__name__ for placement in placements]
    if coordinate is None or not set(kinds) <= {"Shard", "_StridedShard", "Replicate"}:
        raise ValueError(f"a weight is placed as {placements} on {mesh}, which chains do not know: use restrict=.")
    lists = [torch.arange(size, device="cpu") for size in parameter.shape]
    # a strided shard is a part of what the dimensions to its right have left
    dims = range(len(placements))
    shards = 1
    for mesh_dim in reversed(dims) if "_StridedShard" in kinds else dims:
        if kinds[mesh_dim] == "Replicate":
            continue
        shards *= mesh.size(mesh_dim)
        dim = placements[mesh_dim].dim
        parts = lists[dim].chunk(mesh.size(mesh_dim))
        lists[dim] = parts[coordinate[mesh_dim]] if coordinate[mesh_dim] < len(parts) else lists[dim][:0]
    shape = tuple(len(kept) for kept in lists)
    local = local_of(parameter)
    size, share = local.numel(), shards / world_size
    if size != 0 and tuple(local.shape) != shape:
        raise ValueError(
            f"a weight of shape {tuple(parameter.shape)}, placed as {placements}, has {tuple(local.shape)} here and "
            f"not {shape}: chains do not know this way of sharding. Use restrict=."
        )
    if size == 0:
        return Piece(range(start, start), 0, share)
    rows_only = shape[1:] == tuple(parameter.shape[1:])
    if rows_only:  # which follow each other, however often they were cut
        inner = parameter.numel() // parameter.shape[0] if shape else 1
        first = start + (int(lists[0][0]) * inner if shape else 0)
        return Piece(range(first, first + size), size, share)
    place = torch.zeros((), dtype=torch.long, device="cpu")
    for kept, full in zip(lists, parameter.shape, strict=True):
        place = place.unsqueeze(-1) * full + kept
    return Piece(place.reshape(-1) + start, size, share)


class Passes:
    """Passes through a sharded module, which all ranks make together, and what undoes one that was broken off.

    Args:
        module: the user's module.
        ranks: all that hold a part of it.
    """

    def __init__(self, module: nn.Module, ranks: Collective) -> None:
        self._wrapped, self._ranks = fully_sharded(module), ranks

    def begin(self) -> None:
        """To be called before each."""
        if isinstance(self._ranks, Together):
            self._ranks.begin_pass()

    def break_off(self) -> None:
        """A pass has failed here, and perhaps only here: undo it, and say so."""
        if isinstance(self._ranks, Together):
            self._ranks.break_off()
        self.recover()

    def recover(self) -> None:
        """Undo what a pass that was broken off, or that no backward pass followed, has left in the module's hooks."""
        for module in self._wrapped:
            state = module._get_fsdp_state()  # type: ignore[operator]
            if state._is_root and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()  # type: ignore[operator]
        self.reshard()

    def reshard(self) -> None:
        """The shards in the place of gathered weights, which a pass without gradients leaves behind."""
        for module in self._wrapped:
            module.reshard()  # type: ignore[operator]


@dataclass(eq=False)
class ShardedCall(StepCall):
    """The step of a sharded module, called by all ranks at the same moment.

    Attributes:
        passes: told of each.
    """

    passes: Passes = field(kw_only=True)

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        self.passes.begin()
        try:
            losses = super().losses(module, batch)
        except BaseException:
            self.passes.break_off()
            raise
        if is_distributed_tensor(losses):
            losses = losses.full_tensor()  # type: ignore[attr-defined]
        if not torch.is_grad_enabled():
            self.passes.reshard()
        return losses


class ShardedObjective(Objective):
    """The training loss as a function of the weights that move, on a live module whose weights are spread over ranks.

    What is said of :class:`~lightning_slt.sampling.objective.Objective` holds, but for the copy: the module itself is
    called, inside :meth:`active`, at weights that are written into its shards. ``anchor`` and every vector of the
    chains is this rank's part of the flat weights; what a rank holds of a parameter is its piece.

    Args:
        module: the user's module; put back to the last bit after each :meth:`active`.
        ranks: all ranks, alike in rank 0's eyes (:class:`~lightning_slt.sampling.collective.Together`).
        world_size: how many there are.
        loss_fn, restrict, trainer, context, say: as there.

    Raises:
        ValueError: for a module without a usable loss, a restriction that names nothing, a placement of weights that is
            not understood.
    """

    def __init__(
        self,
        module: nn.Module,
        ranks: Collective,
        world_size: int,
        loss_fn: Optional[steps.LossFn] = None,
        restrict: Restriction = None,
        trainer: Any = None,
        context: Optional[Callable[[], AbstractContextManager[Any]]] = None,
        say: Optional[Callable[[str, str], None]] = None,
    ) -> None:
        self._ranks, self._world_size = ranks, world_size
        self._passes = Passes(module, ranks)
        self._buffers: dict[str, Tensor] = {}
        super().__init__(module, loss_fn, restrict, trainer=trainer, context=context, say=say)

    def _make_call(self, loss_fn: steps.LossFn, context: Callable[[], AbstractContextManager[Any]]) -> StepCall:
        return ShardedCall(loss_fn, context, passes=self._passes)

    def _take_module(self, device: Optional[torch.device | str]) -> None:
        self.module, self.borrowed = self._live, True

    def _read_anchor(self) -> None:
        self._passes.reshard()
        named = dict(self.module.named_parameters())
        self._moving = [named[name] for name in self.names]
        own = [local_of(p) for p in self._moving]
        if any(p.is_complex() for p in own):
            raise ValueError("some of the moving weights are complex, which chains do not know: use restrict=.")
        self._flatten(own)
        # one copy of w* is enough where it has the weights' own bits
        self._home = [p.detach().clone() for p in own] if self.rounds else self.pieces(self.anchor)
        pieces, start = [], 0
        for p in self._moving:
            pieces.append(piece_of(p, start, self._world_size))
            start += p.numel()
        self.layout = ShardLayout(pieces, start, self._ranks.add)

    def parameters(self) -> list[nn.Parameter]:
        """The moving parameters of the module, as their shards."""
        return list(self._moving)

    def settle(self) -> None:
        """See that all ranks have the same model, and take the first one's buffers for all; on all ranks at once.

        Raises:
            ValueError: where a weight that is not sharded differs between ranks.
        """
        first = self._ranks.exchange(self._describe)[0]
        self._ranks.exchange(lambda: self._compare(first))
        self._buffers = first[2]

    def _describe(self) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, float], dict[str, Tensor]]:
        shapes = [(name, tuple(p.shape)) for name, p in self.module.named_parameters()]
        whole = {
            name: float(p.detach().double().sum())
            for name, p in self.module.named_parameters()
            if not is_distributed_tensor(p)
        }
        buffers = {n: b.detach().cpu() for n, b in self.module.named_buffers() if not is_distributed_tensor(b)}
        return shapes, whole, buffers

    def _compare(self, first: tuple[list[Any], dict[str, float], dict[str, Tensor]]) -> None:
        shapes, whole, _ = self._describe()
        if shapes != first[0]:
            raise ValueError("the ranks hold different parameters: chains need one model that all ranks share.")
        for name, value in whole.items():
            if value != first[1].get(name):
                raise ValueError(
                    f"the weight {name} is not sharded, and is another one on each rank: what is trained is no single "
                    "model. Apply fully_shard to the module that holds it."
                )

    def break_off(self) -> None:
        """A pass has failed here, and perhaps only here: undo it, and say so."""
        self._passes.break_off()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around every use of the loss: muted and in eval mode inside; bit for bit as before after, come what may."""
        self._passes.reshard()
        every = list(self.module.parameters())
        flags, grads = [p.requires_grad for p in every], [p.grad for p in every]
        moving = {id(p) for p in self._moving}
        with torch.enable_grad(), apart():
            try:
                with borrow(self.module, self._trainer):
                    for p in every:
                        p.grad = None
                        if p.requires_grad and id(p) not in moving:
                            p.requires_grad_(False)
                    self._set_buffers()
                    yield
            finally:
                self._passes.recover()
                self.load(None)
                for p, flag, grad in zip(every, flags, grads, strict=True):
                    p.requires_grad_(flag)
                    p.grad = grad

    @torch.no_grad()
    def _set_buffers(self) -> None:
        for name, buffer in self.module.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])

    @torch.no_grad()
    def load(self, pieces: Optional[list[Tensor]]) -> None:
        """Write these into the shards; None for the weights that training had."""
        self._passes.reshard()
        torch._foreach_copy_([local_of(p) for p in self._moving], self._home if pieces is None else pieces)

    @torch.no_grad()
    def take_gradients(self, pieces: list[Tensor], keep: bool) -> None:
        """Move the gradients of this rank's shards to ``pieces``, or add them there (``keep``)."""
        for parameter, piece in zip(self._moving, pieces, strict=True):
            grad = parameter.grad
            parameter.grad = None
            if grad is None:
                if not keep:
                    piece.zero_()
                continue
            if is_distributed_tensor(grad):
                if tuple(grad.placements) != tuple(parameter.placements):  # type: ignore[attr-defined]
                    grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
                grad = grad.to_local()  # type: ignore[union-attr]
            if keep:
                piece.add_(grad)
            else:
                piece.copy_(grad)

    def adapt(self, batch: Any) -> None:
        """Settle on a first batch what can only be known by trying: whether the step writes to buffers or the batch."""
        with self.active():
            self._call = self._trials(batch).find_written(self._call)
            self._find_use(batch)
