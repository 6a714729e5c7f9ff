"""Every road to losses and gradients gives the numbers of the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling import engines, paths
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.collective import Alone
from lightning_slt.sampling.engines import BatchedEngine, SequentialEngine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import choose_engine
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.window import Window
from tests.sampling import helpers
from tests.sampling.helpers import cross_entropy, gen, mean_squared, mlp, next_token, regression, seeded, tokens

BATCH, CHAINS = 8, 3


def window_of(data: TensorDataset) -> Window:
    return Window([tuple(t[i : i + BATCH] for t in data.tensors) for i in range(0, 4 * BATCH, BATCH)])


def images() -> TensorDataset:
    return helpers.classification((1, 8, 8))


Problem = tuple[Callable[[], nn.Module], Callable[[], TensorDataset], Any]
PROBLEMS: dict[str, Problem] = {
    "mlp": (mlp, regression, mean_squared),
    "conv with GroupNorm": (lambda: helpers.Conv(lambda: nn.GroupNorm(2, 4)), images, cross_entropy),
    "conv with BatchNorm": (lambda: helpers.Conv(lambda: nn.BatchNorm2d(4)), images, cross_entropy),
    "lstm": (helpers.Recurrent, lambda: helpers.classification((5, 4)), cross_entropy),
    "attention": (helpers.Attention, tokens, next_token),
    "a temperature": (helpers.Scaled, regression, mean_squared),
    "tied embedding": (helpers.Tied, tokens, next_token),
    "scripted submodule": (helpers.Scripted, regression, mean_squared),
    "torchmetrics in a LightningModule": (helpers.WithMetric, lambda: helpers.classification((5,)), None),
}


def two_batches(engine: Any, window: Window, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Gradients of one batch, and those of another added to them."""
    grad = torch.full_like(weights, 7.0)
    for start in range(0, len(weights), engine.width):
        rows = slice(start, start + engine.width)
        engine.bind(weights[rows].clone(), grad[rows])
        engine(window, first[rows])
        engine(window, second[rows], keep=True)
    engine.release()
    return grad


def losses_and_gradients(
    objective: Objective, engine: Any, window: Window, weights: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    weights, grad, losses = weights.clone(), torch.full_like(weights, 7.0), []
    for start in range(0, len(weights), engine.width):
        rows = slice(start, start + engine.width)
        engine.bind(weights[rows], grad[rows])
        losses.append(engine(window, indices[rows]).reshape(-1))
    engine.release()
    return torch.cat(losses), grad


def by_autograd(module: nn.Module, loss_fn: Any, window: Window, weights: Tensor, indices: Tensor) -> Any:
    """The same with nothing of the package: a copy in eval mode, weights written in, torch.autograd.grad."""
    losses, grads = [], []
    for w, i in zip(weights, indices.tolist(), strict=True):
        twin = copy.deepcopy(module).eval()
        for sub in twin.modules():
            if isinstance(sub, nn.LSTM):
                sub.train()
        parameters = [p for p in twin.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, piece in zip(parameters, w.split([p.numel() for p in parameters]), strict=True):
                p.copy_(piece.view_as(p))
        if loss_fn is None:
            loss = nn.functional.cross_entropy(twin.net(window[i][0]), window[i][1])
        else:
            loss = loss_fn(twin, window[i])
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(losses), torch.stack(grads)


def opened(name: str) -> tuple[nn.Module, Any, Objective, Window, Tensor, Tensor]:
    make, data, loss_fn = PROBLEMS[name]
    module = seeded(make)
    window = window_of(data())
    objective = Objective(module, loss_fn)
    objective.adapt(window[0])
    d = len(objective.anchor)
    weights = objective.anchor + 0.05 * torch.randn(CHAINS, d, generator=gen(9))
    return module, loss_fn, objective, window, weights, torch.tensor([2, 0, 3])


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Relative to the largest number of each chain: float32 sums in another order."""
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().reshape(CHAINS, -1).amax(1)
        assert ((a - b).abs().reshape(CHAINS, -1).amax(1) <= tolerance * scale).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_sequential_engine_gives_the_modules_own_losses_and_gradients(name: str) -> None:
    module, loss_fn, objective, window, weights, indices = opened(name)
    found = losses_and_gradients(objective, SequentialEngine(objective), window, weights, indices)
    assert_close(found, by_autograd(module, loss_fn, window, weights, indices))


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "scripted submodule"])
def test_batched_engine_gives_the_modules_own_losses_and_gradients(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "chunk_width", lambda *_: width)
    module, loss_fn, objective, window, weights, indices = opened(name)
    choice = choose_engine(objective, window, CHAINS, "batched")
    assert isinstance(choice.engine, BatchedEngine) and "same numbers" in choice.reason
    found = losses_and_gradients(objective, choice.engine, window, weights, indices)
    assert_close(found, by_autograd(module, loss_fn, window, weights, indices))


@pytest.mark.parametrize("method", ["sequential", "batched"])
@pytest.mark.parametrize("name", ["conv with BatchNorm", "torchmetrics in a LightningModule"])
def test_buffers_and_metrics_of_the_module_are_not_touched(name: str, method: str) -> None:
    module, _, objective, window, weights, indices = opened(name)
    module.train()
    before = copy.deepcopy(module.state_dict())
    metric_before = {n: copy.deepcopy(v.__dict__.get("_update_count")) for n, v in module.named_modules()}
    engine = choose_engine(objective, window, CHAINS, method).engine
    losses_and_gradients(objective, engine, window, weights, indices)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert {n: v.__dict__.get("_update_count") for n, v in module.named_modules()} == metric_before
    assert module.training and all(p.grad is None for p in module.parameters())
    # the copy's own running statistics stand still as well: L(w) is a function of w
    shadow = objective.module.state_dict()
    assert all(torch.equal(v, shadow[k]) for k, v in before.items() if "running" in k)


@pytest.mark.parametrize("name", ["mlp", "lstm", "torchmetrics in a LightningModule"])
def test_engines_give_the_anchor_back(name: str) -> None:
    module, _, objective, window, weights, indices = opened(name)
    losses_and_gradients(objective, SequentialEngine(objective), window, weights, indices)
    for p, q in zip(objective.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert p.grad is None


def with_item(module: nn.Module, batch: Any) -> Tensor:
    loss = mean_squared(module, batch)
    return loss * 1.0 if loss.item() > 0 else loss


def data_dependent(module: nn.Module, batch: Any) -> Tensor:
    error = (module(batch[0]) - batch[1]).square().sum(-1)
    return error[error > 0.5].mean()


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (with_item, "calling .item(), which gives one Python number for several chains"),
        (data_dependent, "indexing with a boolean mask, which gives another length in each chain"),
    ],
)
def test_a_step_that_vmap_cannot_take_falls_back_with_the_reason(
    loss_fn: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of the documentation: torch's own ask for a bug report."""
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)  # never "too slow to try" on a busy machine
    objective, window = Objective(mlp(), loss_fn), window_of(regression())
    objective.adapt(window[0])
    choice = choose_engine(objective, window, CHAINS)
    assert choice.engine.method == "sequential" and choice.reason == f"vmap fails: {said}"
    with pytest.raises(ValueError, match=r"method='batched' cannot be used: vmap fails"):
        choose_engine(objective, window, CHAINS, "batched")


def test_other_numbers_under_vmap_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return 1.01 * y if torch._C._functorch.maybe_current_level() else y

    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)
    objective, window = Objective(seeded(Sly), mean_squared), window_of(regression())
    objective.adapt(window[0])
    choice = choose_engine(objective, window, CHAINS)
    assert choice.engine.method == "sequential" and "vmap gives other numbers" in choice.reason


def test_reasons_for_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, window = Objective(mlp(), mean_squared), window_of(regression())
    objective.adapt(window[0])
    x, y = regression().tensors
    ragged = Window([(x[:8], y[:8]), (x[:5], y[:5])])
    assert choose_engine(objective, window, 4, "sequential").reason == "asked for"
    assert "one chain" in choose_engine(objective, window, 1).reason
    assert "differ in shape" in choose_engine(objective, ragged, 4).reason
    with pytest.raises(ValueError, match="the batches differ in shape"):
        choose_engine(objective, ragged, 4, "batched")
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 0.0)
    assert "computing" in choose_engine(objective, window, 4).reason
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)
    monkeypatch.setattr(paths, "ACTIVATION_BUDGET", 1)
    assert "memory budget" in choose_engine(objective, window, 4).reason
    with pytest.raises(ValueError, match=r"method='fast': must be 'auto', 'sequential' or 'batched'"):
        choose_engine(objective, window, 4, "fast")


def test_the_chunk_fits_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, window = Objective(mlp(), mean_squared), window_of(regression())
    saved = paths.observe(objective, window[0]).saved_bytes
    each = 2 * saved + 16 * len(objective.anchor)
    assert saved >= BATCH * 7 * 4  # tanh's output at least
    for chains in (3, 100):
        monkeypatch.setattr(paths, "ACTIVATION_BUDGET", 5 * each)
        assert paths.chunk_width(objective, saved, chains) == min(chains, 5)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.use_reentrant is None:
            h = self.body(h).tanh()
        else:
            h = checkpoint(lambda v: self.body(v).tanh(), h, use_reentrant=self.use_reentrant)
        return self.last(h)


@pytest.mark.parametrize("method", ["sequential", "auto"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_gradients_of_the_plain_twin(
    use_reentrant: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)
    monkeypatch.setattr(paths, "BATCHED_GAIN", 0.0)  # take batching wherever it is thought right
    module, plain = seeded(lambda: Checkpointed(use_reentrant)), Checkpointed(None)
    plain.load_state_dict(module.state_dict())
    window = window_of(regression())
    objective = Objective(module, mean_squared)
    objective.adapt(window[0])
    weights = objective.anchor + 0.3 * torch.randn(CHAINS, len(objective.anchor), generator=gen(9))
    indices = torch.tensor([2, 0, 3])
    engine = choose_engine(objective, window, CHAINS, method).engine
    found = losses_and_gradients(objective, engine, window, weights, indices)
    assert_close(found, by_autograd(plain, mean_squared, window, weights, indices))


def test_bfloat16_module_is_computed_in_float32() -> None:
    module = mlp().bfloat16()
    data = TensorDataset(*(t.bfloat16() for t in regression().tensors))
    window = window_of(data)
    objective = Objective(module, mean_squared)
    objective.adapt(window[0])
    assert objective.anchor.dtype == torch.float32 and not objective.rounds
    assert all(p.dtype == torch.float32 for p in objective.parameters())
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    weights = objective.anchor + 1e-4 * torch.randn(CHAINS, len(objective.anchor), generator=gen(9))
    indices = torch.tensor([2, 0, 3])
    found = losses_and_gradients(objective, SequentialEngine(objective), window, weights, indices)
    full = Window([tuple(t.float() for t in batch) for batch in window.batches])
    assert_close(found, by_autograd(copy.deepcopy(module).float(), mean_squared, full, weights, indices))


class Casts(nn.Module):
    """Computes in bfloat16 by explicit casts: it cannot run with float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.bfloat16()).float()


def test_a_module_that_insists_on_bfloat16_is_rounded_from_float32_masters() -> None:
    module, window = seeded(Casts), window_of(regression())
    objective = Objective(module, mean_squared)
    objective.adapt(window[0])
    assert objective.rounds and objective.anchor.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in objective.parameters())
    choice = choose_engine(objective, window, CHAINS)
    assert choice.engine.method == "sequential" and "half-precision" in choice.reason
    weights = objective.anchor + 0.05 * torch.randn(CHAINS, len(objective.anchor), generator=gen(9))
    indices = torch.tensor([2, 0, 3])
    found = losses_and_gradients(objective, choice.engine, window, weights, indices)
    losses, grads = by_autograd(module, mean_squared, window, weights, indices)
    assert_close(found, (losses, grads.float()), 1e-6)
    for p, q in zip(objective.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rounded_masters_keep_steps_that_bfloat16_would_lose() -> None:
    """100 steps of noise 1e-4 at weights near 1, where bfloat16 numbers are 0.004 to 0.008 apart."""
    module = Casts()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0)
    chains = helpers.make_chains(module, regression(), mean_squared, num_chains=8, nbeta=1e-6, gamma=0.0)
    assert chains.objective.rounds
    chains.advance(100, 1e-8)
    variance = float((chains.weights - 1.0).square().mean())
    # 144 numbers: a relative error of sqrt(2 / 144) = 12 %; float32 at 1 rounds by 6e-8: nothing
    assert variance == pytest.approx(100 * 1e-8, rel=0.4)


def test_float64_module_stays_float64() -> None:
    objective = Objective(mlp().double(), mean_squared)
    assert objective.anchor.dtype == objective.dtype == torch.float64


class _Averages(nn.Module):
    """A target network that follows, and a running mean that is assigned anew: both written to by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(5, 3), nn.Linear(5, 3)
        self.target.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.online(x)
        with torch.no_grad():
            self.target.weight.lerp_(self.online.weight, 0.1)
            self.mean = 0.9 * self.mean + 0.1 * out.mean(dim=0)
        return out - self.target(x) + self.mean


def test_a_step_that_writes_to_buffers_and_frozen_weights_has_one_loss() -> None:
    """200 steps elsewhere, and the loss of a batch at w* is what it was; the live module has not moved."""
    net = seeded(_Averages)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    objective = Objective(net, mean_squared, restrict="online.*")
    source = DatasetSource(regression(), 16)
    first = open_window(objective, source)
    choice = choose_engine(objective, source.window(0), 4)
    assert choice.engine.method == "sequential" and "writes to buffers" in choice.reason
    choice.engine.release()
    chains = Chains(objective, source, LocalPosterior(20.0, 1.0), SGLD(), 2, 0, Alone())
    chains.advance(100, 1e-3)
    with torch.no_grad():
        assert float(objective.loss(source.window(0)[0])) == pytest.approx(first, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_complex_weights_are_refused() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    with pytest.raises(ValueError, match=r"filter.*complex.*view_as_real"):
        Objective(Spectral(), mean_squared)


class _Padded(nn.Module):
    """Looks up through the function, and has a padding row that the first batches do not use."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=None if functional else 0)
        self.head = nn.Linear(8, 3)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.embedding(x, self.table.weight, padding_idx=0) if self.functional else self.table(x)
        return self.head(h.mean(dim=1))


@pytest.mark.parametrize("functional", [False, True])
def test_padding_that_comes_late_has_the_modules_own_gradient(functional: bool) -> None:
    """Padding only in batches that no probe saw: the ordinary backward pass under vmap was 16 % off there."""
    x = torch.randint(1, 11, (24 * BATCH, 6), generator=gen(0))
    x[12 * BATCH :, 0] = 0
    y = torch.randint(3, (len(x),), generator=gen(1))
    window = Window([(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)])
    net = seeded(lambda: _Padded(functional))
    objective = Objective(net, cross_entropy)
    objective.adapt(window[0])
    with torch.no_grad():
        window.anchor_loss.update({i: float(objective.loss(window[i])) for i in range(4)})
    choice = choose_engine(objective, window, CHAINS, "batched")
    weights = objective.anchor.repeat(CHAINS, 1)
    grad = torch.empty_like(weights)
    choice.engine.bind(weights, grad)
    choice.engine(window, torch.tensor([20, 21, 22]))
    choice.engine.release()
    for row, i in zip(grad, (20, 21, 22), strict=True):
        own = torch.autograd.grad(cross_entropy(net, window[i]), list(net.parameters()))
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in own]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("road", ["sequential", "borrowed", "rounded", "backward", "grad"])
def test_gradients_of_a_second_batch_are_added(road: str) -> None:
    module = mlp().bfloat16() if road == "rounded" else mlp()
    data = regression()
    if road == "rounded":
        data = TensorDataset(*[t.bfloat16() for t in data.tensors])
    objective, window = Objective(module, mean_squared), window_of(data)
    objective.adapt(window[0])
    if road == "rounded":
        objective.rounds = True
    with objective.active():
        engine: Any = {
            "sequential": lambda: SequentialEngine(objective),
            "rounded": lambda: SequentialEngine(objective),
            "borrowed": lambda: engines.BorrowedEngine(objective),
            "backward": lambda: BatchedEngine(objective, CHAINS, "backward"),
            "grad": lambda: BatchedEngine(objective, CHAINS, "grad"),
        }[road]()
        weights = objective.anchor + 0.1 * torch.randn(CHAINS, len(objective.anchor), generator=gen(0))
        first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1])
        expected = sum(losses_and_gradients(objective, engine, window, weights, k)[1] for k in (first, second))
        found = two_batches(engine, window, weights, first, second)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, losses_and_gradients(objective, engine, window, weights, second)[1], rtol=1e-2)


@pytest.mark.parametrize("turns_on", [False, True], ids=["as it is called", "with gradients on"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_that_calls_backward_leaves_is_not_in_the_gradients(dtype: torch.dtype, turns_on: bool) -> None:
    """Neither in the first gradient nor in one that is added to it."""

    def step(module: nn.Module, batch: Any) -> Tensor:
        x = batch[0].to(dtype).clone().requires_grad_()
        with torch.enable_grad() if turns_on else nullcontext():
            module(x).square().mean().backward()
        assert x.grad is not None
        return (module(batch[0].to(dtype) + 0.1 * x.grad.sign()) - batch[1]).square().mean()

    module, batch = seeded(mlp).to(dtype), tuple(t[:8] for t in regression(16).tensors)
    objective = Objective(module, step)
    objective.adapt(batch)
    assert objective.differentiates and objective.rounds == (dtype == torch.bfloat16)
    engine, grad = SequentialEngine(objective), torch.empty(1, len(objective.anchor))
    with objective.active():
        engine.bind(objective.anchor.clone().unsqueeze(0), grad)
        engine.step(batch)
        once = grad.clone()
        engine.step(batch, keep=True)
        engine.release()
    own = copy.deepcopy(objective.module)
    loss = step(own, batch)
    own.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.float().flatten() for p in own.parameters() if p.grad is not None])
    torch.testing.assert_close(once[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[0], 2 * expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_has_its_batch_gather_gradients_is_given_a_copy_each_time() -> None:
    def step(module: nn.Module, batch: Any) -> Tensor:
        x = batch[0].requires_grad_()
        module(x).square().mean().backward()
        return (module((x + x.grad).detach()) - batch[1]).square().mean()

    batch = tuple(t[:8] for t in regression(16).tensors)
    objective = Objective(seeded(mlp), step)
    objective.adapt(batch)
    with objective.active():
        first, second = objective.loss(batch).item(), objective.loss(batch).item()
    assert first == second
    assert not batch[0].requires_grad


class _Sized(dict[str, Tensor]):
    """A batch that torch takes apart, and that is not made from its entries alone, as a tensordict is."""

    def __init__(self, entries: dict[str, Tensor], length: int) -> None:
        super().__init__(entries)
        self.length = length

    @staticmethod
    def collated(samples: list[tuple[Tensor, Tensor]]) -> _Sized:
        x, y = (torch.stack(list(column)) for column in zip(*samples, strict=True))
        return _Sized({"x": x, "y": y}, len(samples))


register_pytree_node(
    _Sized,
    lambda batch: (list(batch.values()), (list(batch), batch.length)),
    lambda leaves, known: _Sized(dict(zip(known[0], leaves, strict=True)), known[1]),
)


def test_a_step_that_writes_to_a_batch_of_its_own_class_has_several_chains_at_once() -> None:
    """It is handed a copy, with what the class has beside its tensors, also under vmap."""

    def writes(module: nn.Module, batch: _Sized) -> Tensor:
        batch["x"].add_(0.1)
        batch["out"] = module(batch["x"][: batch.length])
        return (batch["out"] - batch["y"]).square().mean()

    found = []
    for method in ("sequential", "batched"):
        source = DatasetSource(regression(), 16, _Sized.collated)
        chains = helpers.make_chains(mlp(), regression(), writes, source=source, method=method)
        assert chains.method == method
        found.append(chains.advance(24, 1e-4).difference)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
