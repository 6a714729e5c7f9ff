"""Which path the chains take: one after another, or several at once where that is tried, right and faster."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_slt.sampling.device_clock import seconds_on as _now
from lightning_slt.sampling.engines import BatchedEngine, Engine, SequentialEngine, sequential_engine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.steps import NoGradientError
from lightning_slt.sampling.vmapped import what_failed
from lightning_slt.sampling.window import Window

ACTIVATION_BUDGET = 2**30
"""Bytes of activations that the chains of one chunk may hold together on the CPU."""
COMPUTE_BOUND = 0.004
"""Seconds of a step on the CPU above which products, not calls, take the time: batching is not tried."""
GRADIENT_BUDGET = 2**23
"""Bytes of gradients that the chains of one chunk may hold together on the CPU, where one after another holds those of
one chain. Above 100,000 weights batching was never faster there (benchmarks/README.md)."""
GPU_BUSY = 1.5
"""Seconds that a GPU takes for a step, in those that its calls take, above which products, not calls, take the time:
batching is not tried."""
FEW = 2
FEW_FIRST = ("cuda",)
"""Where so few chains are tried before as many as fit, which hold the memory of all: a GPU whose calls take as long as
its products gains nothing, and the clock of one chain does not tell which of the two it waits for."""
PROBED_AT_MOST = 8
TIMED_STEPS, LEAST_TIMED = 8, 4
"""Steps that are timed, those of so many chains at once being as many fewer, but not fewer than these: on a busy
machine a long step is seldom left alone, and the fastest of two is not what it takes."""
BATCHED_GAIN = 1.25
"""How much faster the batched path must be to be kept: near ties go to the path that always works, at every run."""
SLOW = 0.5
"""How fast the batched path is at the least without a warning, where it was asked for: a tie, on a busy machine too."""
HOPELESS = 2.0
"""Batched steps of which the fastest takes this many times what it may are not timed any more, ..."""
HICCUP = 0.05
"""... once they have taken these seconds: on a machine that does other things a short step may wait as long."""


@dataclass(frozen=True)
class Observed:
    """What one step showed on its way.

    Attributes:
        saved_bytes: what autograd keeps for the backward pass of one chain's loss.
        pads: an embedding is looked up with a padding index. Under vmap the ordinary backward pass masks the gradient
            of the padding row for the first chain only, which a probe without padding in its batches would not see.
    """

    saved_bytes: int
    pads: bool


class _Embeddings(TorchFunctionMode):
    """Sees whether an embedding under it has a padding index, as a module or as a function."""

    padded = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            index = args[2] if len(args) > 2 else kwargs.get("padding_idx")
            self.padded |= index is not None
        return func(*args, **kwargs)


def observe(objective: Objective, batch: Any) -> Observed:
    """Run the loss of one batch at the weights that the copy holds, and look on."""
    total = 0
    known = {p.data_ptr() for p in objective.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        if tensor.data_ptr() not in known:
            total += tensor.numel() * tensor.element_size()
        return tensor.detach()  # an output that its own graph held would never go, and the private copy with it

    embeddings = _Embeddings()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), embeddings:
            objective.loss(batch)
    except RuntimeError:  # functorch inside the step refuses the hooks: as much again as was counted, or the weights
        total = max(2 * total, objective.anchor.numel() * objective.anchor.element_size())
        with embeddings:
            objective.loss(batch)
    return Observed(total, embeddings.padded)


def chunk_width(objective: Objective, saved_bytes: int, num_chains: int, least: int = 1) -> int:
    """How many chains fit a chunk: activations and gradients within their budgets (a quarter of what is free, on a
    GPU, all together).

    Args:
        least: as many may exceed the budget of the gradients.
    """
    budget, own = ACTIVATION_BUDGET, len(objective.anchor) * objective.anchor.element_size()
    if objective.device.type == "cuda":
        budget = torch.cuda.mem_get_info(objective.device)[0] // 4
    elif objective.device.type == "cpu":
        num_chains = min(num_chains, max(GRADIENT_BUDGET // max(own, 1), least))
    # twice: what autograd saved, and what the backward pass makes from it
    each = 2 * saved_bytes + 4 * own
    return int(max(1, min(num_chains, budget // max(each, 1))))


@dataclass(frozen=True)
class Choice:
    """Which engine was kept and why, for the log.

    Attributes:
        gain: times the speed of one after another, of several chains at once; NaN where they are not.
    """

    engine: Engine
    reason: str
    gain: float = math.nan


def choose_engine(objective: Objective, window: Window, num_chains: int, method: str = "auto") -> Choice:
    """Try the paths on the first batches: equal numbers are demanded, then the faster one is kept.

    Args:
        method: ``"auto"``, ``"sequential"`` or ``"batched"``.

    Raises:
        ValueError: for another method, or for ``"batched"`` where the module does not allow it.
    """
    if method not in ("auto", "sequential", "batched"):
        raise ValueError(f"method={method!r}: must be 'auto', 'sequential' or 'batched'.")
    sequential = sequential_engine(objective)
    if method == "sequential":
        return Choice(sequential, "asked for")
    refusal = ""
    if num_chains < 2 and not objective.layout.sharded:
        refusal = "there is one chain"
    elif objective.layout.sharded:
        refusal = "the weights are sharded, and all ranks work on one chain"
    elif objective.borrowed:
        refusal = "the module cannot be copied"
    elif objective.rounds:
        refusal = "half-precision weights are rounded from float32 masters"
    elif objective.writes:
        refusal = "the step writes to buffers or frozen weights, which are put back before every call"
    elif objective.draws:
        refusal = "the step draws random numbers, those of each chain's own"
    else:
        refusal = window.unlike
    if refusal:
        if method == "batched":
            raise ValueError(f"method='batched' cannot be used: {refusal}.")
        return Choice(sequential, refusal)

    if method == "auto" and objective.device.type in ("cpu", "cuda"):
        seconds, calls = _one_step_seconds(objective, sequential, window)
        if seconds > (COMPUTE_BOUND if objective.device.type == "cpu" else GPU_BUSY * calls):
            return Choice(sequential, f"a step is {1000 * seconds:.0f} ms of computing, which batching would not save")
    observed = observe(objective, window[next(iter(window.anchor_loss), 0)])
    width = chunk_width(objective, observed.saved_bytes, num_chains, 2 if method == "batched" else 1)
    if width < 2:
        if method == "batched":
            raise ValueError("method='batched' cannot be used: two chains do not fit the memory budget.")
        return Choice(sequential, "two chains do not fit the memory budget")
    if method == "auto" and width > FEW and objective.device.type in FEW_FIRST:
        hopeless = _no_hope_for(width, _try(objective, window, sequential, FEW, observed.pads, forecast=True))
        if hopeless:
            return Choice(sequential, hopeless)
    trial = _try(objective, window, sequential, width, observed.pads)
    if trial.engine is None:
        if method == "batched":
            raise ValueError(f"method='batched' cannot be used: {trial.reason}.")
        return Choice(sequential, trial.reason)
    if method == "batched" or trial.gain > BATCHED_GAIN:
        how = f"{trial.gain:{'.1f' if trial.gain >= 1 else '.2g'}} times the speed of one after another, same numbers"
        return Choice(trial.engine, how, trial.gain)
    return Choice(sequential, f"batched would be {trial.gain:.2f} times as fast, which is no gain")


@dataclass(frozen=True)
class _Trial:
    """How several chains at once did.

    Attributes:
        engine: computes them; None where none gives the right numbers.
        reason: why none does.
        chains: how many were tried.
        alone: seconds of a step of a chain by itself.
        together: seconds of a step of all of them.
        single: seconds of a step of one of them in the same engine, where a forecast was asked for.
    """

    engine: Engine | None
    reason: str
    chains: int
    alone: float = math.inf
    together: float = math.inf
    single: float = math.inf

    @property
    def gain(self) -> float:
        return self.chains * self.alone / self.together

    def gain_of(self, chains: int) -> float:
        """What more chains would gain, if a step of k of them takes a + b k seconds."""
        each = max((self.together - self.single) / (self.chains - 1), 0.0)
        return chains * self.alone / (self.together + (chains - self.chains) * each)


def _no_hope_for(chains: int, few: _Trial) -> str:
    """Why so many chains need not be tried; empty where they are. The trial of the few, whose engine has frozen weights
    of its own, is not held meanwhile."""
    gain = few.gain_of(chains)
    if few.engine is not None and gain > BATCHED_GAIN:
        return ""
    return few.reason or f"batched would be {gain:.2f} times as fast, no gain"


def _try(
    objective: Objective, window: Window, sequential: SequentialEngine, chains: int, pads: bool, forecast: bool = False
) -> _Trial:
    """Have so many chains computed at once: equal numbers are demanded, then they are timed.

    Args:
        pads: the first road is not to be taken (:class:`Observed`).
        forecast: they are timed with a view to more of them.
    """
    probe = _Probe(objective, window, chains)
    reason = ""
    for through in ("backward", "grad"):
        if pads and through == "backward":
            reason = "an embedding with padding_idx has other gradients under vmap"
            continue
        try:
            engine = BatchedEngine(objective, chains, through)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                difference, alone = probe.compare(engine, sequential)
                if difference > probe.tolerance:
                    reason = reason or f"vmap gives other numbers (relative difference {difference:.1e})"
                    continue
                together = probe.seconds(engine, chains, math.inf if forecast else chains * alone / BATCHED_GAIN)
                single = probe.seconds(engine, 1) if forecast else math.inf
        except NoGradientError:
            raise  # neither path could
        except Exception as error:
            reason = reason or f"vmap fails: {what_failed(error)}"
        else:
            engine.release()  # else it would hold the probe's weights and gradients until the chains bind theirs
            # the second road is for modules that the first does not take: where both do, they are as fast
            return _Trial(engine, "", chains, alone, together, single)
    return _Trial(None, reason, chains)


class _Probe:
    """A few chains at perturbed weights on a few batches, to compare engines in numbers and speed."""

    def __init__(self, objective: Objective, window: Window, chains: int) -> None:
        d = len(objective.anchor)
        gen = torch.Generator(device=objective.device).manual_seed(0)
        scale = 0.01 * float(objective.anchor.norm()) / max(d, 1) ** 0.5 or 0.01
        # in place: these are as large as the chains, and so are their gradients
        self._weights = torch.empty(chains, d, device=objective.device, dtype=objective.dtype).normal_(generator=gen)
        self._weights.mul_(scale).add_(objective.anchor)
        self._grad = torch.empty_like(self._weights)
        known = list(window.anchor_loss)[:PROBED_AT_MOST] or list(range(min(len(window), PROBED_AT_MOST)))
        # a window of these alone: stacking the whole one takes the memory and the time of all the data
        least = min(len(window), 2)  # of one batch chains make one large product: not where they will have several
        self._window = Window([window[known[k % len(known)]] for k in range(max(len(known), least))])
        self._indices = torch.tensor([k % len(self._window) for k in range(chains)], device="cpu")
        # autocast and TF32 round each product to 8 or 11 bits; float32 sums in another order
        self.tolerance = 1e-8 if objective.dtype == torch.float64 else 1e-3
        if objective.autocast or (
            objective.dtype == torch.float32 and multiplies_in_tensor_float(objective.device, objective.module)
        ):
            self.tolerance = 2e-2

    def compare(self, engine: Engine, reference: SequentialEngine) -> tuple[float, float]:
        """How far the engine's numbers are off, and the seconds of a step of the reference.

        The first is the largest relative difference in the losses and gradients of a chain; infinite where not finite.
        The reference's gradients are added to those of the engine with the sign turned: they take no memory of their
        own.
        """
        losses = []
        for start in range(0, len(self._weights), engine.width):
            rows = slice(start, start + engine.width)
            engine.bind(self._weights[rows], self._grad[rows])
            losses.append(engine(self._window, self._indices[rows]).reshape(-1).double())
        worst, seconds = 0.0, []
        try:
            for k, found in enumerate(torch.cat(losses)):
                own = self._grad[k : k + 1]
                size = own.norm()
                reference.bind(self._weights[k : k + 1], own.neg_())
                start_time = self._now()
                loss = reference(self._window, self._indices[k : k + 1], keep=True).reshape(()).double()
                seconds.append(self._now() - start_time)
                for off, scale in zip(((loss - found).abs(), own.norm()), (loss.abs(), size), strict=True):
                    relative = float(off / scale.clamp_min(1e-12))
                    worst = max(worst, relative) if math.isfinite(relative) else math.inf
        finally:
            reference.release()
        return worst, min(seconds)

    def seconds(self, engine: Engine, chains: int, enough: float = math.inf) -> float:
        """Of a step of so many of the chains: the fastest of a few, and of one where that is nowhere near ``enough``.
        Binding is left out: chains are bound once for many steps."""
        engine.bind(self._weights[:chains], self._grad[:chains])
        best, spent = math.inf, 0.0
        for _ in range(max(LEAST_TIMED, TIMED_STEPS // chains)):
            start = self._now()
            engine(self._window, self._indices[:chains])
            took = self._now() - start
            best, spent = min(best, took), spent + took
            if best > HOPELESS * enough and spent > HICCUP:
                break
        return best

    def _now(self) -> float:
        return _now(self._weights.device)


def multiplies_in_tensor_float(device: torch.device, module: nn.Module) -> bool:
    """Whether products may be TF32: those of cuDNN's layers are by default, of matrices where the user allows it."""
    if device.type != "cuda":
        return False
    try:
        with warnings.catch_warnings():  # that these names are old
            warnings.simplefilter("ignore")
            layers = any(isinstance(m, (nn.modules.conv._ConvNd, nn.RNNBase)) for m in module.modules())
            return bool(torch.backends.cuda.matmul.allow_tf32 or (layers and torch.backends.cudnn.allow_tf32))
    except RuntimeError:  # set through torch's newer names, of which the older do not speak
        return True


def _one_step_seconds(objective: Objective, engine: SequentialEngine, window: Window) -> tuple[float, float]:
    """The fastest of a few steps at ``w*``, and how much of it went by until the last call had returned."""
    engine.bind(objective.anchor.clone().unsqueeze(0), torch.empty_like(objective.anchor).unsqueeze(0))
    usable = next(iter(window.anchor_loss), 0)
    seconds = []
    for _ in range(2 if objective.device.type == "cpu" else 3):  # the first loads kernels, and chooses among them
        start = _now(objective.device)
        engine.step(window[usable])
        called = time.perf_counter()
        seconds.append((_now(objective.device) - start, called - start))
    engine.release()
    return min(seconds)
