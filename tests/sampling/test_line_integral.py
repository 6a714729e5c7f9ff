"""Chains that follow another gradient than that of their loss are not valid; those on plateaus and kinks are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, Estimate, estimate_llc
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.sampling import line_integral
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.line_integral import Line, Looked, _are_apart, look_along_lines
from lightning_slt.sampling.objective import Objective
from tests.sampling.helpers import gen, make_chains, mean_squared, mlp, regression, seeded

SAID = "its gradient says"


def measured(module: nn.Module, seed: int = 0) -> Estimate:
    x = torch.randn(500, 4, generator=gen(1))
    y = module(x).detach()
    data = TensorDataset(x, y + 0.3 * torch.randn(y.shape, generator=gen(2)))
    return estimate_llc(module, data, mean_squared, localization=1.0, num_draws=50, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_signs_that_are_read_with_int_are_jumps_that_no_gradient_shows(seed: int) -> None:
    """torch's own choice for a weight that is not square: 60 for less than 8 / 2."""
    est = measured(orthogonal(seeded(lambda: nn.Linear(4, 2, bias=False))), seed)
    assert est.mean > 20 and not est.valid and any(SAID in reason for reason in est.reasons)


class Routed(nn.Module):
    """A sample goes to the experts of the largest scores; of one alone the share is 1, and no score has a gradient."""

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.chosen = experts
        self.router = nn.Linear(4, 3, bias=False)
        self.experts = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = self.router(x).topk(self.chosen, dim=1)
        return (score.softmax(1) * self.experts(x).gather(1, chosen)).sum(1, keepdim=True)


@pytest.mark.parametrize("experts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_expert_that_a_router_chooses_is_a_jump_and_named_so(experts: int) -> None:
    est = measured(seeded(lambda: Routed(experts)))
    assert not est.valid
    assert any(SAID in reason and "topk() as in routing" in reason for reason in est.reasons)


@pytest.mark.slow
def test_the_other_map_has_none() -> None:
    est = measured(orthogonal(seeded(lambda: nn.Linear(4, 4, bias=False)), orthogonal_map="cayley"))
    assert est.valid and abs(est.mean - 3.0) < 0.3  # six angles


class Weights(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))


def plateau(module: Any, batch: Any) -> Tensor:
    return (1 - torch.exp(-module.w.square().sum() / (2 * 0.3**2))) * batch[0].mean()


def kink(module: Any, batch: Any) -> Tensor:
    return module.w.abs().sum() * batch[0].mean()


@pytest.mark.parametrize(("loss_fn", "d", "nbeta", "truth"), [(plateau, 10, 3.0, 3.0), (kink, 4, 30.0, 3.99)])
def test_a_loss_that_rises_more_slowly_than_a_square_is_looked_at_and_let_pass(
    loss_fn: Any, d: int, nbeta: float, truth: float
) -> None:
    """Where the gradient does less work than on a square; at nbeta 3 the pull holds chains on the plateau."""
    data = TensorDataset(torch.ones(16, 1))
    est = estimate_llc(Weights(d), data, loss_fn, localization=1.0, nbeta=nbeta, num_draws=100)
    assert est.valid and est.mean == pytest.approx(truth, rel=0.1)


class Scaled(torch.autograd.Function):
    """Passes a value on, and its gradient times a factor: below 0 the reversal of domain-adversarial training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class TwoHeads(nn.Module):
    """Two linear maps of three weights, of which the first has its gradient times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([Scaled.apply(self.first(x), self.factor), self.second(x)], dim=1)


def of_two_heads(factor: float) -> Estimate:
    x = torch.randn(500, 3, generator=gen(1))
    module = seeded(lambda: TwoHeads(factor))
    return estimate_llc(module, TensorDataset(x, module(x).detach()), mean_squared, localization=0.1, num_draws=50)


@pytest.mark.parametrize(
    "factor", [pytest.param(0.5, marks=pytest.mark.slow), 0.7, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_scaled_is_not_that_of_the_loss(factor: float) -> None:
    """Chains are those of ``factor`` times the loss of the first head: ``3 / 2 (1 + 1 / factor)`` in place of 3."""
    est = of_two_heads(factor)
    assert est.mean == pytest.approx(1.5 * (1 + 1 / factor), rel=0.15)
    assert est.kinds == ("GRADIENT",) and "an autograd.Function" in est.reasons[0]


def test_the_same_with_its_own_gradient_is_valid() -> None:
    est = of_two_heads(1.0)
    assert est.valid and est.mean == pytest.approx(3.0, rel=0.1)


def test_a_gradient_that_was_not_that_of_the_loss_is_looked_at_again() -> None:
    """Warm chains are not looked at, so the firing after one that is not valid begins anew."""
    assert [(estimate.kinds, looks > 0) for estimate, looks in two_firings(0.5)] == 2 * [(("GRADIENT",), True)]


@pytest.mark.slow
def test_a_firing_of_warm_chains_makes_no_passes_for_the_look() -> None:
    (first, looks), (second, none) = two_firings(1.0)
    assert first.valid and second.valid and second.num_burnin_steps < first.num_burnin_steps
    assert (looks, none) == (2, 0)


def two_firings(factor: float) -> list[tuple[Estimate, int]]:
    """The second one from where the first one ended; with the number of lines that each looked along."""
    x = torch.randn(500, 3, generator=gen(1))
    module = seeded(lambda: TwoHeads(factor))
    objective = Objective(module, mean_squared)
    data = TensorDataset(x, module(x).detach())
    settings, course, out = ChainSettings(num_draws=50, nbeta=80.0), Course(localization=0.1), []
    for _ in range(2):
        with mock.patch.object(Chains, "line", autospec=True, side_effect=Chains.line) as line:
            source = source_of(data, 64, objective.device, 0)
            out.append((course.measure(objective, source, settings)[0], line.call_count))
    return out


class Adversarial(nn.Module):
    """Features from which a class is told, and, through a reversed gradient, a domain."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.of_class, self.of_domain = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def loss(self, x: Tensor, kind: Tensor, domain: Tensor) -> Tensor:
        hidden = torch.tanh(self.features(x))
        told = nn.functional.cross_entropy(self.of_class(hidden), kind)
        return told + nn.functional.cross_entropy(self.of_domain(Scaled.apply(hidden, -1.0)), domain)


@pytest.mark.slow
def test_a_reversed_gradient_is_not_that_of_the_loss() -> None:
    """The chains of such a network settle, and are of no posterior. With all the data in a batch they stay where two of
    six seeds do not tell."""
    x = torch.randn(1000, 6, generator=gen(1))
    labels = [(x[:, k] + 0.5 * torch.randn(1000, generator=gen(2 + k)) > 0).long() for k in range(2)]
    module: Any = seeded(Adversarial)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        module.loss(x, *labels).backward()
        optimizer.step()
    data = TensorDataset(x, *labels)
    given = {"localization": 1.0, "num_draws": 50, "num_chains": 4, "batch_size": 64}
    est = estimate_llc(module, data, lambda m, b: m.loss(*b), **given)
    assert not est.valid and "GRADIENT" in est.kinds


class Quantised(nn.Module):
    """An autoencoder by the nearest of eight codes.

    Args:
        through: the gradient is passed on as if there were no choice (VQ-VAE); else it is that of the codes chosen.
    """

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.encoder, self.codes = nn.Linear(6, 2), nn.Embedding(8, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))
        self.through = through

    def loss(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        code = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        if not self.through:
            return (self.decoder(code) - x).square().sum(1).mean() / 2 + 1.25 * (code - z).square().mean()
        held = (code - z.detach()).square().mean() + 0.25 * (z - code.detach()).square().mean()
        return (self.decoder(z + (code - z).detach()) - x).square().sum(1).mean() / 2 + held


@pytest.mark.parametrize("through", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_nearest_code_jumps_without_rule_and_is_no_rounding(through: bool) -> None:
    """Valid at 23.2 and 3.5 where HMC of the same losses has -4.0 and runs downhill: each sample jumps for itself, and
    along a line that is as irregular as rounding."""
    x = torch.randn(240, 6, generator=gen(0))
    module: Any = seeded(lambda: Quantised(through=True))
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(600):
        optimizer.zero_grad()
        module.loss(x[torch.randint(0, 240, (24,), generator=gen(1))]).backward()
        optimizer.step()
    module.through = through
    est = estimate_llc(module, TensorDataset(x), lambda m, b: m.loss(b[0]), batch_size=24, num_draws=100)
    assert not est.valid and "GRADIENT" in est.kinds


class Sine(nn.Module):
    """A network with sine activations (SIREN), initialised as such.

    Args:
        fault: what is done to the last features: "detach" takes half of their gradient, "round" all of it.
    """

    def __init__(self, inputs: int, width: int, frequency: float) -> None:
        super().__init__()
        self.frequency, self.fault = frequency, ""
        self.first, self.second, self.head = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.uniform_(self.first.weight, -1 / inputs, 1 / inputs)
        for layer in (self.second, self.head):
            nn.init.uniform_(layer.weight, -math.sqrt(6 / width) / frequency, math.sqrt(6 / width) / frequency)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.frequency * self.second(torch.sin(self.frequency * self.first(x))))
        if self.fault == "detach":
            h = h / 2 + (h / 2).detach()
        if self.fault == "round":
            h = (4 * h).round() / 4
        return self.head(h)


def fitted(inputs: int, width: int, frequency: float, seed: int) -> tuple[Sine, TensorDataset]:
    x = torch.rand(250, inputs, generator=gen(seed)) * 2 - 1
    y = (x * torch.sin(8 * x)).sum(1, keepdim=True) + 0.1 * torch.randn(250, 1, generator=gen(seed + 100))
    module = seeded(lambda: Sine(inputs, width, frequency), seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        mean_squared(module, (x, y)).backward()
        optimizer.step()
    return module, TensorDataset(x, y)


SINES = [(1, 16, 30.0, 1e-4), (2, 12, 5.0, 3e-3)]


def looks_of(module: nn.Module, data: TensorDataset, lr: float) -> tuple[Looked, list[int]]:
    """What is told of chains of 200 steps, and the parts of each look along their lines."""
    chains = make_chains(module, data, mean_squared, num_chains=4)
    drawn, parts = Drawn(chains.advance(200, lr), lr, 0, 1), []
    of_rank = line_integral._of_rank

    def seen(*args: Any) -> list[Line]:
        parts.append(args[4])
        return of_rank(*args)

    with mock.patch.object(line_integral, "_of_rank", seen):
        looked = look_along_lines(chains, drawn, torch.ones(4, dtype=torch.bool))
    return looked, parts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("inputs", "width", "frequency", "lr"), SINES)
def test_a_loss_that_goes_up_and_down_along_a_line_has_its_own_gradient(
    inputs: int, width: int, frequency: float, lr: float, seed: int
) -> None:
    """In forty parts a tenth to a quarter of the rises and falls is missed."""
    looked, parts = looks_of(*fitted(inputs, width, frequency, seed), lr)
    assert looked.misfit == () and parts == [8, 16, 40, 80][: len(parts)]
    assert looked.oscillates is (len(parts) == 4)


@pytest.mark.parametrize("fault", ["detach", "round"])
@pytest.mark.parametrize(("inputs", "width", "frequency", "lr"), SINES)
def test_one_that_goes_up_and_down_and_has_another_gradient_is_named(
    inputs: int, width: int, frequency: float, lr: float, fault: str
) -> None:
    """Of ``round()`` twice the parts show nothing more, and there is no closer look."""
    module, data = fitted(inputs, width, frequency, 0)
    module.fault = fault
    looked, parts = looks_of(module, data, lr)
    assert len(looked.misfit) == 1 and SAID in looked.misfit[0] and not looked.oscillates
    assert parts == [8, 16, 40, 80] or (fault == "detach" and parts == [8, 16, 40, 80, 160])


def test_of_a_loss_that_goes_up_and_down_the_heat_of_a_large_step_is_not_trusted() -> None:
    """Its gradient is its own. With an eighth of the step there is hardly any heat to take off."""
    module, data = fitted(2, 12, 30.0, 0)
    found = estimate_llc(module, data, mean_squared, num_draws=50, num_chains=4, batch_size=64)
    assert found.kinds == ("OSCILLATES",) and found.step_bias > 0.1 * found.mean
    assert "12% of the estimate was taken off as heat of the step" in found.reasons[0]
    assert f"A smaller lr than {found.step_size:.2g}" in found.reasons[0]
    smaller = SGLD(lr=found.step_size / 8)
    cool = estimate_llc(module, data, mean_squared, num_draws=50, num_chains=4, batch_size=64, sampler=smaller)
    assert cool.step_bias < 0.02 * cool.mean and not {"OSCILLATES", "GRADIENT"} & set(cool.kinds)


def test_a_closer_look_goes_on_from_the_one_before() -> None:
    """160 parts of three lines are 161 points, and 8 beside them: of these only ``w*`` is looked at again."""
    looked: list[float] = []
    known: dict[float, tuple[float, float]] = {}

    def look(share: float) -> tuple[float, float]:
        looked.append(share)
        return math.sin(60 * share), 30 * math.cos(60 * share)

    for parts in (8, 16, 40, 80, 160):
        again = line_integral._along(look, parts, torch.float32, known)
    assert len(looked) == 161 + 8 + 4 and len(set(looked)) == len(known) == 161 + 8
    assert again == line_integral._along(look, 160, torch.float32, {})


@pytest.mark.parametrize("height", [0.0, 1.0])
def test_a_part_with_a_jump_is_not_halved_for_ever(height: float) -> None:
    """From an eighth to ``2^-24`` it is in 21 steps, and in 53 both halves have the same ends."""
    line = line_integral._along(lambda share: (height * (share > 0.3), 0.0), 160, torch.float32, known := {})
    assert line.parts == [(height * (k == 2), 0.0) for k in range(8)] and len(known) <= 161 + 8


@pytest.mark.parametrize("power", [2, 8])
def test_losses_in_bfloat16_are_rounded_and_not_misled(power: int) -> None:
    """Rounding is without rule along a line; and a loss that rises fast is no reason either."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(batch[0], module.w).float().pow(power).mean()

    data = TensorDataset(torch.randn(500, 1, generator=gen(1)))
    est = estimate_llc(Weights(1), data, loss_fn, localization=1.0, num_draws=100)
    assert est.valid and est.mean == pytest.approx(1 / power, rel=0.15)


@pytest.mark.parametrize("row", [0, 3])
def test_chains_are_where_they_were_after_a_look(row: int) -> None:
    """The next firing may begin from there."""
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=4)
    chains.advance(12, 1e-3)
    before = chains.displacements().clone()
    with chains.objective.active(), chains.line(row) as look:
        look(0.5)
    torch.testing.assert_close(chains.displacements(), before)


def test_lines_are_looked_at_of_chains_that_count_alone() -> None:
    """No more than two at first, and none of one that has left."""
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=4)
    drawn = Drawn(chains.advance(100, 1e-3), 1e-3, 0, 1)
    rows: list[int] = []
    line = Chains.line

    def seen(own: Chains, row: int, put_back: bool = True) -> Any:
        rows.append(row)
        return line(own, row, put_back)

    with mock.patch.object(Chains, "line", seen):
        assert look_along_lines(chains, drawn, torch.tensor([False, True, False, True])) == Looked()
        assert rows == [1, 3]
        assert look_along_lines(chains, drawn, torch.zeros(4, dtype=torch.bool)) == Looked() and len(rows) == 2


def test_what_rises_and_integrals_may_differ_by() -> None:
    """A tenth of the rises; and besides twice what rounding makes of eight parts, told by a third difference."""
    smooth = lambda seen: [Line([(1.0, seen)] * 8)]  # noqa: E731
    assert [_are_apart(smooth(seen)) for seen in (1.0, 0.91, 0.89, 1.11)] == [False, False, True, True]

    def rounded(by: float) -> list[tuple[float, float]]:
        return [(1.0 + by * (-1) ** k, 1.0) for k in range(8)]

    # of a difference that goes to and fro by b the third difference is 8 b: 2 * 8 * 8 b / sqrt(35) = 21.6 b
    assert not _are_apart([Line(rounded(0.3))])
    lost = [(rise, seen - 1.0) for rise, seen in rounded(0.02)]
    assert _are_apart([Line(lost)]) and not _are_apart([])
    # the sum of the differences is 8 s; allowed are 0.8 and 21.6 b = 2.16
    offset = lambda s: [Line([(1.0 + 0.1 * (-1) ** k, 1.0 - s) for k in range(8)])]  # noqa: E731
    allowed = 0.8 + 2 * 8 * 0.8 / math.sqrt(35)
    assert not _are_apart(offset(0.99 * allowed / 8)) and _are_apart(offset(1.01 * allowed / 8))
    # the same to and fro, where rounding is known: 8 * 0.3 are not allowed, and are within 0.8 + 2 * 8 * 0.11
    assert _are_apart([Line(rounded(0.3), 0.0)]) and not _are_apart([Line(rounded(0.3), 0.11)])


@pytest.mark.parametrize(("scatter", "looked"), [(0.0, True), (0.2, True), (0.4, False)])
def test_a_loss_is_found_steep_where_it_is_beyond_its_error(scatter: float, looked: bool) -> None:
    """Twice half the work, against one and a half: three errors of four chains are half of it at a scatter of a third.
    Warm chains, which are looked at for nothing else."""
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=4)
    shown = chains.advance(40, 1e-3)
    rows = 2.0 + scatter * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    shown = replace(shown, difference=rows.expand(4, 40), grad_dot=torch.full_like(shown.grad_dot, 2.0))
    with mock.patch.object(Chains, "line", autospec=True, side_effect=Chains.line) as line:
        look_along_lines(chains, Drawn(shown, 1e-3, 0, 1, warm=True), torch.ones(4, dtype=torch.bool))
    assert bool(line.call_count) is looked
