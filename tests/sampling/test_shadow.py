"""The private copy: of modules that do not like to be copied, sharing nothing, the original as it was."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_slt import SGLD, estimate_llc
from lightning_slt.sampling.engines import sequential_engine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.shadow import CopyError, shadow_copy
from tests.sampling.helpers import Scripted, gen, make_chains, mean_squared, regression, seeded


class Odd(nn.Module):
    """5 -> 3 through a hidden layer, with something that ``copy.deepcopy`` stumbles over."""

    def __init__(self, attribute: Callable[[Odd], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros(3))
        self.drop = nn.Dropout(0.5)
        self.odd = attribute(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).tanh()))


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(5, 6))
    net = nn.Sequential(layer, nn.Linear(6, 3))
    net(torch.ones(1, 5))  # the weight is now a non-leaf tensor
    return net


ODD: dict[str, Callable[[], nn.Module]] = {
    "nothing odd": lambda: Odd(lambda m: None),
    "lock": lambda: Odd(lambda m: threading.Lock()),
    "generator": lambda: Odd(lambda m: torch.Generator().manual_seed(3)),
    "non-leaf tensor": lambda: Odd(lambda m: m.first(torch.ones(2, 5)).tanh()),
    "non-leaf tensor in a list in a dict": lambda: Odd(lambda m: {"cache": [m.first(torch.ones(2, 5))]}),
    "file handle": lambda: Odd(lambda m: open(__file__)),  # noqa: SIM115
    "string buffer": lambda: Odd(lambda m: io.StringIO("x")),
    "event": lambda: Odd(lambda m: threading.Event()),
    "legacy weight_norm": normed,
    "scripted submodule": Scripted,
}


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {k: v.clone() for k, v in module.state_dict().items()},
        "training": {n: m.training for n, m in module.named_modules()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "versions": {n: p._version for n, p in module.named_parameters()},
        "where": {n: (id(p), p.data_ptr()) for n, p in module.named_parameters()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in module.named_modules()},
        "names": {n: sorted(m.__dict__) for n, m in module.named_modules()},
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(module)
    for kind in ("tensors", "grads"):
        assert before[kind].keys() == after[kind].keys()
        for name, tensor in before[kind].items():
            other = after[kind][name]
            assert (tensor is None and other is None) or torch.equal(tensor, other), name
    for kind in ("training", "requires_grad", "versions", "where", "hooks", "names"):
        assert before[kind] == after[kind], kind


def opened(name: str) -> nn.Module:
    module = seeded(ODD[name])
    module.train()
    if isinstance(module, Odd):
        module.last.eval()  # a mixture of flags, as with a frozen BatchNorm
        module.first.bias.requires_grad_(False)
    mean_squared(module, regression().tensors).backward()
    return module


@pytest.mark.parametrize("name", ODD)
def test_a_copy_shares_nothing_and_computes_the_same(name: str) -> None:
    module = opened(name)
    before = state_of(module)
    shadow = shadow_copy(module)
    live = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert not live & {t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())}
    assert [n for n, _ in shadow.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert all(p.grad is None for p in shadow.parameters())
    assert not any(m.training for m in shadow.modules())
    x = regression().tensors[0]
    torch.testing.assert_close(shadow(x), copy_free_eval(module, x))
    assert_untouched(module, before)


def copy_free_eval(module: nn.Module, x: Tensor) -> Tensor:
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    out = module(x).detach()
    for m, flag in flags:
        m.training = flag
    return out


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("method", ["sequential", "auto"])
def test_chains_leave_the_module_bitwise_as_it_was(name: str, method: str) -> None:
    module = opened(name)
    before = state_of(module)
    estimate = estimate_llc(
        module,
        regression(),
        mean_squared,
        sampler=SGLD(lr=1e-3),
        num_chains=2,
        num_draws=4,
        num_burnin_steps=2,
        nbeta=20.0,
        localization=1.0,
        method=method,
        batch_size=16,
    )
    assert estimate.trace.abs().max() > 0 and bool(torch.isfinite(estimate.trace).all())
    assert_untouched(module, before)


@pytest.mark.parametrize("name", ODD)
def test_the_loss_of_a_chain_responds_to_its_weights(name: str) -> None:
    chains = make_chains(opened(name), regression(), mean_squared, num_chains=2)
    chains.advance(3, 1e-2)
    batch = chains.source.window(0)[0]
    engine = chains._engine
    grad = torch.zeros(1, len(chains.objective.anchor))
    losses = []
    with chains.objective.active():
        for weights in (chains.objective.anchor, chains.weights[0], chains.weights[1]):
            engine.bind(weights.clone().unsqueeze(0), grad)
            losses.append(float(engine.step(batch)))  # type: ignore[attr-defined]
            assert all(bool(piece.abs().max() > 0) for piece in chains.objective.pieces(grad[0]))
        engine.release()
    assert len(set(losses)) == 3


def test_a_generator_in_the_copy_starts_in_the_same_state_and_runs_apart() -> None:
    module = opened("generator")
    shadow = shadow_copy(module)
    state = module.odd.get_state()
    assert torch.equal(shadow.odd.get_state(), state) and shadow.odd is not module.odd
    torch.rand(3, generator=shadow.odd)
    assert torch.equal(module.odd.get_state(), state)


def test_a_deep_chain_of_attributes_that_blocks_is_named() -> None:
    class Blocks:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("cannot be cloned")

    module = Odd(lambda m: {"a": Blocks()})
    with pytest.raises(CopyError, match=r"Odd\.odd\['a'\].*cannot be cloned"):
        shadow_copy(module)


def test_a_module_that_cannot_be_copied_is_borrowed_and_put_back() -> None:
    class Blocks:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("cannot be cloned")

    module = seeded(lambda: Odd(lambda m: Blocks()))
    twin = seeded(lambda: Odd(lambda m: None))
    module.train()
    before = state_of(module)

    def run(net: nn.Module) -> Any:
        return estimate_llc(
            net,
            regression(),
            mean_squared,
            sampler=SGLD(lr=1e-3),
            num_chains=2,
            num_draws=4,
            num_burnin_steps=2,
            nbeta=20.0,
            localization=1.0,
            method="sequential",
            batch_size=16,
        )

    estimate = run(module)
    assert_untouched(module, before)
    torch.testing.assert_close(estimate.trace, run(twin).trace, rtol=1e-4, atol=1e-5)


def test_a_borrowed_module_with_checkpointing_has_the_gradients_of_the_chains_weights() -> None:
    """The block is computed again in the backward pass, and must not find the weights of training there."""

    class Blocks:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("cannot be cloned")

    class Checkpointed(nn.Module):
        def __init__(self, odd: Any) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3)
            self.odd = odd

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())

    borrowed, copied = seeded(lambda: Checkpointed(Blocks())), seeded(lambda: Checkpointed(None))
    batch = next(iter(DataLoader(regression(), batch_size=16)))
    found = []
    for module in (borrowed, copied):
        objective = Objective(module, mean_squared)
        assert objective.borrowed is (module is borrowed)
        with objective.active():
            engine = sequential_engine(objective)
            weights = (objective.anchor + 0.3 * torch.randn(objective.anchor.shape, generator=gen(0))).unsqueeze(0)
            grad = torch.zeros_like(weights)
            engine.bind(weights, grad)
            found.append((engine.step(batch), grad))
            engine.release()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("how", ["wrapped", "submodule", "in place"])
def test_compiled_modules_are_copied_uncompiled_and_respond_to_their_weights(how: str) -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    plain = seeded(ODD["nothing odd"])
    module: Any = copy.deepcopy(plain)
    if how == "wrapped":
        module = torch.compile(module, backend=backend)
    elif how == "submodule":
        module.first = torch.compile(module.first, backend=backend)
    else:
        module.compile(backend=backend)
    x = regression().tensors[0]
    module(x)
    compiled_for_the_user = len(calls)
    assert compiled_for_the_user > 0
    shadow = shadow_copy(module)
    assert not any("_orig_mod" in n for n, _ in shadow.named_parameters())
    with torch.no_grad():
        for p in shadow.parameters():
            p.zero_()
    assert shadow(x).abs().max() == 0  # its own weights, not those of the original
    assert len(calls) == compiled_for_the_user
    arguments: dict[str, Any] = {
        "sampler": SGLD(lr=1e-3),
        "num_chains": 2,
        "num_draws": 4,
        "num_burnin_steps": 2,
        "nbeta": 20.0,
        "localization": 1.0,
        "method": "sequential",
    }
    expected = estimate_llc(plain, regression(), mean_squared, **arguments)
    found = estimate_llc(module, regression(), mean_squared, **arguments)
    torch.testing.assert_close(found.trace, expected.trace, rtol=1e-4, atol=1e-5)
    assert found.num_weights == expected.num_weights


def test_dropout_of_a_recurrent_layer_is_off_though_it_stays_in_training_mode() -> None:
    net = nn.LSTM(4, 3, num_layers=2, dropout=0.5)
    shadow = shadow_copy(net)
    x = torch.ones(5, 1, 4)
    torch.testing.assert_close(shadow(x)[0], shadow(x)[0], rtol=0, atol=0)
    assert net.dropout == 0.5 and net.training


def test_open_files_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with open(path, "w") as file:
        module = Odd(lambda m: file)
        shadow_copy(module)
        file.write("still open")
    assert path.read_text() == "still open"
