"""What a sampler is to the chains that it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Optional, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.kinds import check_number, positive

Calibration = Literal["heat", "curvature", "acceptance"]
"""How a step size that is not given is found: by the heat of the step that the chains show, as a share of the largest
posterior precision, or by the share of proposals that are accepted."""


class Heating(NamedTuple):
    """How a step heats the chains.

    Attributes:
        step: the step of SGLD whose minibatches would heat as much; 0 where nothing does that stays in.
        noise_alone: it is the minibatches alone, and discretisation adds nothing at first order.
        thermostat: the mean over all directions is taken off by the sampler itself, and stays only as far as the
            directions that the loss holds have more of it.
    """

    step: float
    noise_alone: bool
    thermostat: bool = False

    @property
    def virial_step(self) -> float:
        """The step whose heat is in the virial ratio: a thermostat holds that ratio at 1 itself."""
        return 0.0 if self.thermostat else self.step


@dataclass(slots=True)
class SamplerState:
    """What a sampler keeps of a few chains between steps, and what it is told about this one.

    Attributes:
        tensors: its own, by name; ``[num_chains, d]`` or ``[num_chains]``, changed in place.
        preconditioner: ``[d]`` diagonal of the metric's inverse, the same for all chains; None for the identity.
        loss: ``[num_chains]``, the mean loss at the weights before the update. A sampler that may reject puts the loss
            of the accepted weights in its place: that one is recorded.
        uniform: ``[num_chains]`` uniform random numbers of the chains, for samplers that ask for them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    preconditioner: Optional[Tensor] = None
    loss: Optional[Tensor] = None
    uniform: Optional[Tensor] = None


@runtime_checkable
class Sampler(Protocol):
    """One update rule, applied in place to one chain ``[d]`` or several ``[num_chains, d]``.

    Attributes:
        calibration: how its step size is found.
        curvature_share: the squared time step of one with momenta, in inverses of the largest posterior precision at
            ``w*`` (4 is unstable).
        elementwise: a step of a weight needs that weight only: the chains may then move them a block at a time.
        full_batch: it needs the loss of all the data at every step.
        preconditioned: it wants :attr:`SamplerState.preconditioner`.
        keeps_noise: ``update_`` only reads the noise, which may then be memory that other chains read as well.
        shares_noise: half of each step's noise is added again at the next one (``share_``), which makes the step's
            discretisation an error of second order.
        per_chain: names of its tensors ``[num_chains]``; ``per_weight``: of those ``[num_chains, d]``.
    """

    calibration: ClassVar[Calibration]
    curvature_share: ClassVar[float]
    elementwise: ClassVar[bool]
    full_batch: ClassVar[bool]
    preconditioned: ClassVar[bool]
    keeps_noise: ClassVar[bool]
    shares_noise: ClassVar[bool]
    per_chain: ClassVar[tuple[str, ...]]
    per_weight: ClassVar[tuple[str, ...]]

    @property
    def lr(self) -> Optional[float]:
        """The step size; None where it is to be calibrated."""

    def heating(self, lr: float) -> Heating:
        """What steps of size ``lr`` add to the energy, which is measured and taken off."""

    def energy_memory(self, lr: float) -> float:
        """Steps of size ``lr`` after which a chain has forgotten its energy, by a factor e; 0 where it has no momentum.
        Draws that are few of these long are one or two readings of the loss, however often it swings in them."""

    def update_(
        self,
        weights: Tensor,
        anchor: Tensor,
        grad: Tensor,
        noise: Tensor,
        lr: float,
        posterior: LocalPosterior,
        state: Optional[SamplerState] = None,
    ) -> None:
        """Move ``weights`` by one step. ``grad`` is that of the mean loss and may be overwritten; ``noise`` is standard
        normal, and may be where ``keeps_noise`` is False."""


class MinibatchSampler:
    """What holds of a sampler that says nothing else; one of the user's own derives from it too."""

    calibration: ClassVar[Calibration] = "heat"
    curvature_share: ClassVar[float] = 0.1
    elementwise: ClassVar[bool] = True
    full_batch: ClassVar[bool] = False
    preconditioned: ClassVar[bool] = False
    keeps_noise: ClassVar[bool] = False
    shares_noise: ClassVar[bool] = False
    per_chain: ClassVar[tuple[str, ...]] = ()
    per_weight: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """A step of its own keeps the noise only where it says so itself: what it comes from may say so of another."""
        super().__init_subclass__()
        if not vars(cls).keys().isdisjoint({"update_", "share_"}) and "keeps_noise" not in vars(cls):
            cls.keeps_noise = False

    def heating(self, lr: float) -> Heating:
        return Heating(lr if self.calibration == "heat" else 0.0, self.calibration != "heat" or self.shares_noise)

    def energy_memory(self, lr: float) -> float:
        return 0.0


def empty_state(sampler: Sampler, weights: Tensor) -> SamplerState:
    """The state of chains that have not moved.

    Args:
        weights: ``[num_chains, d]``.
    """
    tensors = {name: torch.zeros_like(weights) for name in sampler.per_weight}
    tensors |= {name: weights.new_zeros(weights.shape[:-1], dtype=torch.float64) for name in sampler.per_chain}
    return SamplerState(tensors)


def check_step_size(lr: Optional[float]) -> None:
    """Raises:
    ValueError: for a step size that is not positive and finite.
    TypeError: for one that is no number.
    """
    remedy = "the step size must be positive; leave it None to have it calibrated."
    check_number("lr", lr, fits=positive, remedy=remedy)
