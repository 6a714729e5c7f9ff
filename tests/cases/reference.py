"""Long exact sampling of a local posterior: full-batch Hamiltonian Monte Carlo with a Metropolis test.

Target (Lau et al. 2023, arXiv 2308.12108): p(w) ~ exp(-nbeta L_n(w) - gamma/2 |w - w*|^2). The localising Gaussian is
integrated exactly: a step is a half kick by -nbeta grad L_n, an exact rotation of (w - w*, momentum) in the harmonic
potential gamma/2 |.|^2, and another half kick (split HMC: Shahbaba et al. 2014, Statistics and Computing 24(3); Beskos
et al. 2011 in infinite dimension). The step is symmetric and volume-preserving, so the Metropolis test leaves the
target exact, and the error of a trajectory comes only from the few directions the loss constrains: the 26,122 weights
of an MLP cost no smaller step than 10 would. The default mean trajectory is a quarter period, pi / (2 sqrt(gamma)),
after which an unconstrained direction is drawn afresh.

With `whiten` the coordinates are z = A^(1/2) (w - w*), A = nbeta |H| + gamma with the Hessian H at w* and its
eigenvalues made positive: the Gaussian that is integrated exactly is then exp(-|z|^2 / 2), and the kicks are what
nbeta L_n differs from it by. The same target in other coordinates; steep directions no longer set the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from tests.cases.problems import Case

__all__ = ["Reference", "effective_sample_size", "hmc_reference", "kinetic_reference", "split_rhat"]


@dataclass
class Reference:
    """The result of `hmc_reference` or `kinetic_reference`; `trace` is chains x draws of nbeta (L_n(w) - L_n(w*))."""

    name: str
    n: int
    nbeta: float
    gamma: float
    mean: float
    se: float
    se_between: float
    se_within: float
    rhat: float
    ess: float
    acceptance: float
    step_size: float
    mean_leapfrog: float
    num_chains: int
    num_draws: int
    num_warmup: int
    seed: int
    per_chain: np.ndarray
    trace: np.ndarray


def split_rhat(trace: np.ndarray) -> float:
    """Split R-hat of chains x draws (Gelman et al., BDA3, section 11.4): each chain is cut into two halves."""
    half = trace.shape[1] // 2
    pieces = np.concatenate([trace[:, :half], trace[:, -half:]])
    within = pieces.var(axis=1, ddof=1).mean()
    between = pieces.mean(axis=1).var(ddof=1)
    if within == 0.0:
        return 1.0 if between == 0.0 else math.inf
    return math.sqrt((half - 1) / half + between / within)


def effective_sample_size(trace: np.ndarray) -> float:
    """Multi-chain ESS with Geyer's initial monotone sequence (Vehtari et al. 2021, arXiv 1903.08008)."""
    chains, draws = trace.shape
    centred = trace - trace.mean(axis=1, keepdims=True)
    size = 2 ** math.ceil(math.log2(2 * draws))
    spectrum = np.fft.rfft(centred, size, axis=1)
    autocovariance = (np.fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :draws] / draws).mean(axis=0)
    within = autocovariance[0] * draws / (draws - 1)
    between = trace.mean(axis=1).var(ddof=1) if chains > 1 else 0.0
    total = within * (draws - 1) / draws + between
    if total == 0.0:
        return float(trace.size)
    rho = 1.0 - (within - autocovariance) / total
    rho[0] = 1.0
    pairs = rho[: draws // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0.0)
    pairs = np.minimum.accumulate(pairs[: negative[0]] if negative.size else pairs)
    tau = max(-1.0 + 2.0 * float(pairs.sum()), 1.0 / math.log10(max(trace.size, 10)))
    return trace.size / tau


class _Objective(nn.Module):
    """loss_fn(module, batch) as a module, so that functional_call reaches the weights."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = copy.deepcopy(case.module).to(dtype)
        self.loss_fn = case.loss_fn

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        return self.loss_fn(self.module, batch)


class _LoopPotential:
    """L_n and its gradient at w* + displacement, one chain after another through plain autograd on a live module.

    For modules that vmap cannot take (nn.LSTM), and as fast where one gradient over all rows fills the processor.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(case.module).to(dtype)
        self.loss_fn = case.loss_fn
        self.batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.data)
        self.parameters = list(self.module.parameters())
        # w* is taken as stored (float32), in float64
        self.anchor = torch.cat([p.detach().double().flatten() for p in case.module.parameters()])

    def _loss(self, displacement: Tensor) -> Tensor:
        with torch.no_grad():
            pieces = (self.anchor + displacement).split([p.numel() for p in self.parameters])
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))
        return self.loss_fn(self.module, self.batch)

    def value(self, displacement: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([self._loss(row) for row in displacement]).double()

    def gradient(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for row in displacement:
            loss = self._loss(row)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)]))
            values.append(loss.detach())
        return torch.stack(gradients).double(), torch.stack(values).double()


class _Potential:
    """L_n and its gradient at w* + displacement, for a batch of chains under vmap; displacements are float64."""

    def __init__(self, case: Case, dtype: torch.dtype, use_sufficient: bool) -> None:
        self.objective = _Objective(case, dtype)
        data = case.sufficient if use_sufficient and case.sufficient is not None else case.data
        self.batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in data)
        self.dtype = dtype
        parameters = dict(self.objective.named_parameters())
        self.names, self.shapes = list(parameters), [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]
        # w* is taken as stored (float32), in float64
        self.anchor = torch.cat([p.detach().double().flatten() for p in case.module.parameters()])
        self._value = vmap(self._loss)
        self._both = vmap(grad_and_value(self._loss))
        self._traced: dict[int, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}  # by the number of chains

    def _loss(self, flat: Tensor) -> Tensor:
        pieces = flat.split(self.sizes)
        weights = {k: p.view(s) for k, p, s in zip(self.names, pieces, self.shapes, strict=True)}
        return functional_call(self.objective, weights, (self.batch,))

    def value(self, displacement: Tensor) -> Tensor:
        with torch.no_grad():
            return self._value((self.anchor + displacement).to(self.dtype)).double()

    def gradient(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.anchor + displacement).to(self.dtype)
        chains = len(weights)
        if chains not in self._traced:
            # flat aten operations, several times faster than functorch's wrappers on small problems
            self._traced[chains] = make_fx(lambda flat: self._both(flat))(weights)
        with torch.no_grad():
            gradient, value = self._traced[chains](weights)
        return gradient.double(), value.double()


class _Whitened:
    """A potential in coordinates z with w - w* = A^(-1/2) z, as the sampler sees it at gamma = 1.

    L'(z) = L_n + (gamma |w - w*|^2 - |z|^2) / (2 nbeta), so that nbeta L' + |z|^2 / 2 is the target's exponent.
    """

    def __init__(
        self, inner: _LoopPotential | _Potential, nbeta: float, gamma: float, basis: Tensor, precision: Tensor
    ) -> None:
        self._inner, self._nbeta, self._gamma = inner, nbeta, gamma
        self.anchor, self._basis = inner.anchor, basis
        self._extra = precision.rsqrt() - gamma**-0.5

    def displacement(self, z: Tensor) -> Tensor:
        return self._gamma**-0.5 * z + (z @ self._basis * self._extra) @ self._basis.T

    def excess(self, z: Tensor, displacement: Tensor) -> Tensor:
        """What is added to L_n."""
        return (self._gamma * displacement.square().sum(1) - z.square().sum(1)) / (2 * self._nbeta)

    def value(self, z: Tensor) -> Tensor:
        displacement = self.displacement(z)
        return self._inner.value(displacement) + self.excess(z, displacement)

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        displacement = self.displacement(z)
        gradient, value = self._inner.gradient(displacement)
        pull = self.displacement(gradient + self._gamma / self._nbeta * displacement)
        return pull - z / self._nbeta, value + self.excess(z, displacement)


def _steep_directions(
    potential: _LoopPotential | _Potential, nbeta: float, gamma: float, radius: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """Eigenvectors and precisions nbeta |h| + gamma of the Hessian at w*, where those are more than 3 gamma."""
    rows = radius * torch.eye(potential.anchor.numel(), dtype=torch.float64)
    hessian = torch.cat(
        [(potential.gradient(part)[0] - potential.gradient(-part)[0]) / (2 * radius) for part in rows.split(64)]
    )
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    precision = nbeta * values.abs() + gamma
    steep = precision > 3 * gamma
    return vectors[:, steep].contiguous(), precision[steep]


def hmc_reference(
    case: Case,
    nbeta: float | None = None,
    gamma: float | None = None,
    *,
    num_chains: int = 32,
    num_draws: int = 1000,
    num_warmup: int = 500,
    trajectory: float | None = None,
    max_leapfrog: int = 1024,
    step_factors: Sequence[float] = (1.0, 1.0, 0.5, 0.25),
    target_acceptance: float = 0.8,
    initial_step: float | None = None,
    dtype: torch.dtype = torch.float64,
    sufficient: bool = True,
    loop: bool = False,
    whiten: bool = False,
    seed: int = 0,
) -> Reference:
    """The LLC of `case` under exact sampling, with its standard error.

    Chains start at w*. The first 60 % of the warm-up adapts the step by dual averaging (Hoffman & Gelman 2014) to the
    target acceptance; then it is frozen, and the rest of the warm-up is burn-in at that step. The length of a
    trajectory is uniform on [1/2, 3/2] times `trajectory`, and each iteration's step is the adapted one times a random
    member of `step_factors` (one draw for all chains, independent of the state, so that the target stays exact):
    singular posteriors have arms that are stiffer the further out they reach, and a single step that suits the bulk
    seldom enters or leaves the arms (w1 w2: effective sample size 7 times smaller at 2/3 of the cost, and the errors
    of short runs too small). Gradients are taken in `dtype`; positions, momenta and the energies of the Metropolis
    test are float64. `sufficient` lets linear cases use their sufficient statistics instead of all rows: the same loss
    at every w. `loop` takes the chains one after another, without vmap; `whiten` samples in the coordinates in which
    the Hessian at w* is round (a trajectory is then pi / 2 long). se is the larger of the between-chain error and the
    one from the effective sample size.
    """
    nbeta = case.nbeta if nbeta is None else nbeta
    gamma = case.gamma if gamma is None else gamma
    if gamma <= 0:
        raise ValueError("the reference needs a localisation: the posterior of a singular model is improper without")
    pull = 1.0 if whiten else gamma
    omega = math.sqrt(pull)
    length = math.pi / (2 * omega) if trajectory is None else trajectory

    def potential(dtype: torch.dtype) -> _LoopPotential | _Potential:
        return _LoopPotential(case, dtype) if loop else _Potential(case, dtype, sufficient)

    forces: Any = potential(dtype)
    energies: Any = forces if dtype == torch.float64 else potential(torch.float64)
    if whiten:
        directions = _steep_directions(forces, nbeta, gamma)
        wrapped = [_Whitened(part, nbeta, gamma, *directions) for part in (forces, energies)]
        forces, energies = wrapped[0], (wrapped[0] if energies is forces else wrapped[1])
    generator = torch.Generator().manual_seed(seed)
    dim = forces.anchor.numel()

    q = torch.zeros(num_chains, dim, dtype=torch.float64)
    loss_anchor = energies.value(q[:1]).item()
    loss = energies.value(q)
    gradient, _ = forces.gradient(q)

    step = length / 20 if initial_step is None else initial_step
    shrink, log_average, error_sum, adaptive = math.log(10 * step), 0.0, 0.0, max(1, int(0.6 * num_warmup))
    trace = np.empty((num_chains, num_draws))
    accepted, leapfrogs = 0.0, 0
    for iteration in range(num_warmup + num_draws):
        target = length * (0.5 + torch.rand((), generator=generator).item())
        pace = step * step_factors[int(torch.randint(len(step_factors), (), generator=generator))]
        steps = min(max_leapfrog, max(1, round(target / pace)))
        p = torch.randn(num_chains, dim, dtype=torch.float64, generator=generator)
        cos, sin = math.cos(omega * pace), math.sin(omega * pace)
        start = nbeta * loss + 0.5 * pull * q.square().sum(1) + 0.5 * p.square().sum(1)
        q_new, gradient_new = q, gradient
        for _ in range(steps):
            p = p - 0.5 * pace * nbeta * gradient_new
            q_new, p = cos * q_new + (sin / omega) * p, cos * p - (omega * sin) * q_new
            gradient_new, loss_new = forces.gradient(q_new)
            p = p - 0.5 * pace * nbeta * gradient_new
        if energies is not forces:
            loss_new = energies.value(q_new)
        end = nbeta * loss_new + 0.5 * pull * q_new.square().sum(1) + 0.5 * p.square().sum(1)
        probability = (
            torch.nan_to_num(start - end, nan=-math.inf, posinf=-math.inf, neginf=-math.inf).clamp(max=0.0).exp()
        )
        take = torch.rand(num_chains, dtype=torch.float64, generator=generator) < probability
        q = torch.where(take[:, None], q_new, q)
        gradient = torch.where(take[:, None], gradient_new, gradient)
        loss = torch.where(take, loss_new, loss)

        acceptance = probability.mean().item()
        if iteration < adaptive:
            k = iteration + 1
            error_sum = (1 - 1 / (k + 10)) * error_sum + (target_acceptance - acceptance) / (k + 10)
            log_step = shrink - math.sqrt(k) / 0.05 * error_sum
            weight = k**-0.75
            log_average = weight * log_step + (1 - weight) * log_average
            step = math.exp(log_average if k == adaptive else log_step)
            step = min(step, 1.5 / omega)  # a rotation of pi / 2 at most: beyond it the trajectory would fold back
        elif iteration >= num_warmup:
            own = forces.excess(q, forces.displacement(q)) if whiten else 0.0
            trace[:, iteration - num_warmup] = (nbeta * (loss - own - loss_anchor)).numpy()
            accepted += acceptance
            leapfrogs += steps

    return _summary(
        case,
        nbeta,
        gamma,
        trace,
        acceptance=accepted / num_draws,
        step_size=step,
        mean_leapfrog=leapfrogs / num_draws,
        num_warmup=num_warmup,
        seed=seed,
    )


def kinetic_reference(
    case: Case,
    nbeta: float | None = None,
    gamma: float | None = None,
    *,
    step: float,
    friction: float,
    num_chains: int = 12,
    num_draws: int = 200,
    num_warmup: int = 40,
    steps_a_draw: int = 100,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Reference:
    """The LLC of `case` under kinetic Langevin dynamics on all the data (BAOAB: Leimkuhler & Matthews 2013), from w*.

    For a posterior whose slow directions take HMC thousands of gradients: here a trajectory never ends, and nothing is
    rejected. There is no Metropolis test, so it is exact to second order in `step` only: two steps have to agree. A
    draw is the mean over its steps; the warm-up is in draws.
    """
    nbeta = case.nbeta if nbeta is None else nbeta
    gamma = case.gamma if gamma is None else gamma
    potential = _Potential(case, dtype, use_sufficient=False)
    generator = torch.Generator().manual_seed(seed)
    dim = potential.anchor.numel()
    q = torch.zeros(num_chains, dim, dtype=torch.float64)
    p = torch.randn(num_chains, dim, dtype=torch.float64, generator=generator)
    loss_anchor = potential.value(q[:1]).item()
    keep = math.exp(-friction * step)
    renewed = math.sqrt(1.0 - keep * keep)
    trace = np.empty((num_chains, num_draws))
    for draw in range(-num_warmup, num_draws):
        total = torch.zeros(num_chains, dtype=torch.float64)
        for _ in range(steps_a_draw):
            gradient, loss = potential.gradient(q)
            total += nbeta * (loss - loss_anchor)
            # the half kicks on either side of a gradient put together
            p = p - step * (nbeta * gradient + gamma * q)
            q = q + 0.5 * step * p
            p = keep * p + renewed * torch.randn(num_chains, dim, dtype=torch.float64, generator=generator)
            q = q + 0.5 * step * p
        if draw >= 0:
            trace[:, draw] = (total / steps_a_draw).numpy()
    return _summary(
        case,
        nbeta,
        gamma,
        trace,
        acceptance=1.0,
        step_size=step,
        mean_leapfrog=float(steps_a_draw),
        num_warmup=num_warmup,
        seed=seed,
    )


def _summary(case: Case, nbeta: float, gamma: float, trace: np.ndarray, **run: Any) -> Reference:
    """Mean and errors of a trace, and how it was run."""
    num_chains, num_draws = trace.shape
    per_chain = trace.mean(axis=1)
    ess = effective_sample_size(trace)
    between = float(per_chain.std(ddof=1) / math.sqrt(num_chains)) if num_chains > 1 else math.nan
    within = float(trace.std(ddof=1) / math.sqrt(ess))
    return Reference(
        name=case.name,
        n=case.n,
        nbeta=nbeta,
        gamma=gamma,
        mean=float(per_chain.mean()),
        se=float(np.nanmax([between, within])),
        se_between=between,
        se_within=within,
        rhat=split_rhat(trace),
        ess=ess,
        num_chains=num_chains,
        num_draws=num_draws,
        per_chain=per_chain,
        trace=trace,
        **run,
    )
