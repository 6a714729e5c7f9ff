"""One call for a module: which arguments are taken, which are refused, and with what remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_slt import SGLD, KineticLangevin, estimate_influence, estimate_llc, estimate_susceptibility
from lightning_slt.estimate import NonFiniteLossError
from lightning_slt.functional import default_nbeta
from tests.estimates import TINY, same, tiny
from tests.sampling.helpers import gen, mean_squared, mlp, regression


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        x, y = regression().tensors
        return iter(zip(x, y, strict=True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": TensorDataset(torch.empty(0, 5))}, r"data: .*empty"),
    "data that is none": ({"data": 7}, r"data: expected a Dataset.*got int"),
    "one sample": ({"data": regression(1), "nbeta": None}, r"num_samples=1: .*at least 2.*nbeta"),
    "empty restriction": ({"restrict": []}, r"restrict is empty.*None"),
    "restriction without a match": ({"restrict": "head.*"}, r"restrict: 'head\.\*' matches no.*0\.weight"),
    "stream without length": ({"data": Stream(), "nbeta": None}, r"nbeta=None.*num_samples= or nbeta="),
    "no draws": ({"num_draws": 0}, r"num_draws=0.*at least 1"),
    "no chains": ({"num_chains": 0}, r"num_chains=0.*at least 1"),
    "negative burn-in": ({"num_burnin_steps": -1}, r"num_burnin_steps=-1.*at least 0.*None"),
    "no steps a draw": ({"num_steps_bw_draws": 0}, r"num_steps_bw_draws=0.*at least 1.*None"),
    "negative nbeta": ({"nbeta": -1.0}, r"nbeta=-1\.0.*positive.*None"),
    "negative localization": ({"localization": -1.0}, r"localization=-1\.0.*negative.*None"),
    "a seed beyond 64 bits": ({"seed": 2**70}, rf"^seed={2**70}: must be below 2\*\*64"),
    "a seed far below zero": ({"seed": -(2**64)}, rf"^seed=-{2**64}: must be at least"),
    "no tolerance": ({"tolerance": 0}, r"^tolerance=0: .*positive.*None"),
    "infinite tolerance": ({"tolerance": math.inf}, r"^tolerance=inf: .*positive.*None"),
    "wrong method": ({"method": "fast"}, r"method='fast'.*'auto', 'sequential' or 'batched'"),
    "a batch of one chain": ({"method": "batched", "num_chains": 1}, r"method='batched': num_chains=1 .*'auto'"),
    "no batch": ({"batch_size": 0}, r"batch_size=0.*at least 1"),
    "no loss": ({"loss_fn": None}, r"loss_fn is None.*Sequential.*loss_fn\(module, batch\)"),
    "name of a loss": ({"loss_fn": "mse"}, r"loss_fn='mse': expected a function .*got str.*loss_fn\(module, batch\)"),
    "step without a loss": ({"loss_fn": lambda m, b: None}, r"None for every minibatch.*loss_fn\(module, batch\)"),
    "loss that is no tensor": ({"loss_fn": lambda m, b: 1.0}, r"the loss must be a tensor.*float"),
    "no samples": ({"num_samples": 0}, r"num_samples=0.*at least 1.*None"),
    "weights of another module": ({"weights": {"x": torch.zeros(1)}}, r"(?s)Missing key.*0\.weight"),
    "weights that do not fit": (
        {"weights": {"0.weight": torch.zeros(1)}},
        r"(?s)^weights: do not fit the module\. Give the state_dict\(\) of another Sequential.*Missing key",
    ),
    "weights that are no tensors": ({"weights": {"a": 1}}, r"(?s)^weights: do not fit the module\..*Missing key"),
    "device that is none": ({"device": "tpu9"}, r"^device='tpu9': cannot be used here: .*tpu.*None"),
    "device that is not there": ({"device": "cuda:99"}, r"^device='cuda:99': cannot be used here: .*None"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_argument_and_the_remedy(changes: dict[str, Any], message: str) -> None:
    arguments = {**TINY, "data": regression(), "loss_fn": mean_squared, **changes}
    data, loss_fn = arguments.pop("data"), arguments.pop("loss_fn")
    kind = TypeError if "expected" in message or "tensor" in message else ValueError
    with pytest.raises(kind, match=message):
        estimate_llc(mlp(), data, loss_fn, **arguments)


X, Y = regression().tensors
OF_ANOTHER_KIND: dict[str, tuple[dict[str, Any], str]] = {
    "a module for data": ({"data": mlp()}, r"data: got Sequential, .*module first"),
    "a tuple of tensors": ({"data": (X, Y)}, r"data: got a tuple of 2 arrays.*TensorDataset\(X, Y\)"),
    "a list of other tensors": ({"data": [X, Y[:, 0]]}, r"data: got a list of 2 arrays.*TensorDataset\(X, Y\)"),
    "several loaders": (
        {"data": [DataLoader(regression()), DataLoader(regression())]},
        r"data: got 2 DataLoaders.*ConcatDataset",
    ),
    "a dict of tensors": ({"data": {"x": X, "y": Y}}, r"data: got dict .*'x', 'y'.*TensorDataset\(X, Y\)"),
    "a path for data": ({"data": "train.pt"}, r"data='train\.pt': got str.*Dataset"),
    "a path for weights": ({"weights": "x.ckpt"}, r"weights='x\.ckpt': .*a path.*torch\.load\('x\.ckpt'"),
    "a Path for weights": ({"weights": Path("x.ckpt")}, r"weights='x\.ckpt': .*a path.*torch\.load"),
    "a number for a state_dict": ({"weights": {"state_dict": 3}}, r"weights\['state_dict'\]: .*a state_dict, got int"),
    "numbers for names": ({"weights": {1: X}}, r"weights: expected a state_dict, .*got 1"),
    "a module for weights": ({"weights": nn.Linear(1, 1)}, r"weights: .*got Linear.*state_dict\(\)"),
    "a tensor to restrict": ({"restrict": X}, r"restrict: got a Tensor.*name of the parameter"),
    "a number to restrict": ({"restrict": 3}, r"restrict=3: got int.*name of a parameter"),
    "a sampler's name": ({"sampler": "SGLD"}, r"sampler='SGLD': .*SGLD\(\).*'name': 'SGLD'"),
    "a sampler's class": ({"sampler": SGLD}, r"sampler=SGLD: is a class.*SGLD\(\)"),
    "text for chains": ({"num_chains": "2"}, r"num_chains='2': expected a whole number, got str"),
    "a float for draws": ({"num_draws": 20.0}, r"num_draws=20\.0: expected a whole number, got float"),
    "no number of draws": ({"num_draws": None}, r"num_draws=None: expected a whole number"),
    "text for a batch": ({"batch_size": "10"}, r"batch_size='10': expected a whole number, got str"),
    "True for a seed": ({"seed": True}, r"seed=True: expected a whole number, got bool"),
    "True for chains": ({"num_chains": True}, r"num_chains=True: expected a whole number, got bool"),
    "True for nbeta": ({"nbeta": True}, r"nbeta=True: expected a number, got bool"),
    "text for a flag": ({"full_batch": "yes"}, r"full_batch='yes': expected True or False, got str"),
    "a number for a flag": ({"full_batch": 2}, r"full_batch=2: expected True or False, got int"),
    "text for nbeta": ({"nbeta": "10"}, r"nbeta='10': expected a number, got str"),
    "a list for nbeta": ({"nbeta": []}, r"nbeta=\[\]: expected a number, got list"),
    "a tensor for localization": ({"localization": torch.ones(2)}, r"localization=tensor.*a number, got Tensor"),
    "a mapping to restrict": ({"restrict": {"a": 1}}, r"restrict=\{'a': 1\}: got dict.*name of a parameter"),
}


@pytest.mark.parametrize(("changes", "message"), OF_ANOTHER_KIND.values(), ids=OF_ANOTHER_KIND)
@pytest.mark.parametrize("call", ["llc", "influence", "susceptibility"])
def test_an_argument_of_another_kind_is_named_with_the_remedy(call: str, changes: dict[str, Any], message: str) -> None:
    arguments = {**TINY, "data": regression(), **changes}
    data = arguments.pop("data")
    calls: dict[str, Any] = {
        "llc": lambda: estimate_llc(mlp(), data, mean_squared, **arguments),
        "influence": lambda: estimate_influence(mlp(), data, None, mean_squared, **arguments),
        "susceptibility": lambda: estimate_susceptibility(mlp(), data, regression(), mean_squared, **arguments),
    }
    with pytest.raises(TypeError, match=message):
        calls[call]()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": "yes"}, r"per_token='yes': expected True or False, got str"),
        ({"control_variates": 3}, r"control_variates=3: expected True or False, got int"),
        ({"group_fn": []}, r"group_fn=\[\]: expected a callable of \(sample\), got list"),
        ({"shrinkage": "a"}, r"shrinkage='a': expected a number, got str"),
    ],
    ids=["tokens", "control variates", "groups", "shrinkage"],
)
def test_an_argument_of_influence_of_another_kind_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        estimate_influence(mlp(), regression(), None, mean_squared, **{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": ["a"]}, r"components=\['a'\]: expected a mapping, got list.*name: patterns"),
        ({"groups": 3}, r"groups=3: expected a list, got int.*one group for each sample"),
        ({"groups": "abc"}, r"groups='abc': expected a list, got str"),
    ],
    ids=["components", "a number for groups", "text for groups"],
)
def test_an_argument_of_susceptibility_of_another_kind_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        estimate_susceptibility(mlp(), regression(), regression(), mean_squared, **{**TINY, **changes})


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


class Movable(Frozen):
    def to(self, device: torch.device) -> Movable:
        return Movable(self.x.to(device), self.y.to(device))


def _loader_of(kind: type[Frozen]) -> DataLoader[Any]:
    def collate(samples: list[Any]) -> Frozen:
        return kind(*map(torch.stack, zip(*samples, strict=True)))

    return DataLoader(regression(), 8, collate_fn=collate)


def _of_frozen(module: nn.Module, batch: Any) -> torch.Tensor:
    return mean_squared(module, (batch.x, batch.y))


@pytest.mark.parametrize("call", [estimate_llc, estimate_influence])
def test_batches_that_are_frozen_are_named_with_what_can_be_done(call: Any) -> None:
    with pytest.raises(ValueError, match=r"data: its batches are frozen dataclasses.*frozen=True away.*to\(device\)"):
        call(mlp(), _loader_of(Frozen), loss_fn=_of_frozen, **TINY)
    call(mlp(), _loader_of(Movable), loss_fn=_of_frozen, **TINY)


def test_frozen_batches_that_can_be_moved_are_measured_as_others() -> None:
    frozen = estimate_llc(mlp(), _loader_of(Movable), _of_frozen, **TINY)
    assert frozen.mean == estimate_llc(mlp(), DataLoader(regression(), 8), mean_squared, **TINY).mean


def _forgets_its_loss(module: nn.Module, batch: Any) -> None:
    mean_squared(module, batch)


@pytest.mark.parametrize("call", [estimate_llc, estimate_influence])
def test_a_loss_function_that_returns_none_is_named_itself(call: Any) -> None:
    with pytest.raises(ValueError, match=r"loss_fn=_forgets_its_loss: returned None .*Return it") as caught:
        call(mlp(), regression(), loss_fn=_forgets_its_loss, **TINY)
    assert "training_step" not in str(caught.value) and "Give loss_fn" not in str(caught.value)


def test_a_parameter_to_restrict_is_named() -> None:
    module = mlp()
    with pytest.raises(TypeError, match=r"restrict: got a Parameter.*restrict='0\.weight'"):
        tiny(module, restrict=module[0].weight)  # type: ignore[index]


def test_few_tensors_may_be_samples() -> None:
    samples = [torch.randn(6, generator=gen(k)) for k in range(20)]
    square: Any = lambda m, b: m(b[:, :5]).square().mean()  # noqa: E731
    assert math.isfinite(tiny(mlp(), samples, square).mean)
    assert math.isfinite(tiny(mlp(), tuple(samples), square).mean)


ROWS = torch.zeros(40, 5)


@pytest.mark.parametrize("data", [ROWS, ROWS.numpy()], ids=["a tensor", "an array"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("data", lambda data: tiny(mlp(), data, mean_squared)),
        ("train_data", lambda data: estimate_influence(mlp(), data, None, mean_squared)),
        ("data", lambda data: estimate_susceptibility(mlp(), data, regression(3), mean_squared)),
    ],
    ids=["llc", "influence", "susceptibility"],
)
def test_one_array_that_the_step_fails_on_is_said_to_have_been_read_as_samples(
    name: str, call: Callable[[Any], Any], data: Any
) -> None:
    said = (
        f"{name}: got one array of shape (40, 5), which is read as 40 samples without targets: the step is given a "
        f"single tensor [batch, 5], and fails. If there are targets, give {name}=TensorDataset(X, y). ValueError: "
    )
    with pytest.raises(ValueError) as raised:
        call(data)
    assert str(raised.value) == said + str(raised.value.__cause__) and "to unpack" in str(raised.value)


def test_one_array_is_data_where_the_step_wants_no_targets_and_is_not_blamed_for_what_else_is_wrong() -> None:
    square: Any = lambda m, b: m(b).square().mean()  # noqa: E731
    assert tiny(mlp(), torch.randn(40, 5, generator=gen(3)), square).num_samples == 40
    with pytest.raises(TypeError, match=r"^the loss must be a tensor"):
        tiny(mlp(), ROWS, lambda m, b: 1.0)
    with pytest.raises(ValueError, match=r"^loss_fn=<lambda>: returned None for every minibatch"):
        tiny(mlp(), ROWS, lambda m, b: None)
    with pytest.raises(ValueError, match=r"^query_data: its samples give the step \[Tensor, Tensor\]"):
        estimate_influence(mlp(), ROWS, regression(3), square)


@pytest.mark.parametrize(("count", "warned"), [(2, True), (20, False)])
def test_a_short_list_of_equal_tensors_is_read_as_samples_and_said_to_be(
    count: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [torch.randn(40, 6, generator=gen(k)) for k in range(count)]
    square: Any = lambda m, b: m(b[..., :5]).square().mean()  # noqa: E731
    assert tiny(mlp(), samples, square).num_samples == count
    said = "a list of 2 arrays of shape (40, 6) is read as 2 samples. If they are columns, wrap them in TensorDataset"
    assert (said in caplog.text) == warned


@pytest.mark.parametrize(
    ("module", "named"),
    [(regression(), "TensorDataset"), (nn.Linear, "the class Linear"), (mlp().state_dict(), "OrderedDict")],
    ids=["a dataset", "a class", "weights"],
)
def test_what_is_no_module_is_named(module: Any, named: str) -> None:
    message = rf"^module: got {named}, which is no nn\.Module\. Give the module first, then its data"
    with pytest.raises(TypeError, match=message):
        estimate_llc(module, regression(), mean_squared, **TINY)
    with pytest.raises(TypeError, match=message):
        estimate_influence(module, regression(), None, mean_squared, num_chains=1, num_draws=4)
    with pytest.raises(TypeError, match=message):
        estimate_susceptibility(module, regression(), regression(), mean_squared, num_chains=1, num_draws=4)


def _subtracts(outputs: Any, targets: Any) -> Tensor:
    return (outputs - targets).square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "kind", "name", "said"),
    [
        (_subtracts, TypeError, "_subtracts", r"unsupported operand"),
        (lambda out, y: nn.functional.cross_entropy(out, y), TypeError, "<lambda>", r"must be Tensor, not Sequential"),
        (lambda out, y: out.square().mean(), AttributeError, "<lambda>", r"'Sequential' object has no attribute"),
        (lambda out, y, w: out, TypeError, "<lambda>", r"missing 1 required positional argument: 'w'"),
    ],
)
def test_a_function_of_outputs_and_targets_is_told_how_it_is_called(
    loss_fn: Any, kind: type[Exception], name: str, said: str
) -> None:
    message = rf"{said}.*\. loss_fn={name}: is called as loss_fn\(module, batch\), here with a Sequential and a list\."
    with pytest.raises(kind, match=message) as caught:
        tiny(mlp(), loss_fn=loss_fn)
    assert type(caught.value.__cause__) is kind and "loss_fn" not in str(caught.value.__cause__)


def _breaks(module: nn.Module, batch: Any) -> Tensor:
    raise TypeError("of its own")


def test_another_error_of_a_loss_function_is_as_it_was() -> None:
    with pytest.raises(TypeError, match=r"^of its own$"):
        tiny(mlp(), loss_fn=_breaks)
    with pytest.raises(TypeError, match=r"^the loss must be a tensor .*got float\.$"):
        tiny(mlp(), loss_fn=lambda m, b: 1.0)


def test_a_sampler_may_be_a_mapping() -> None:
    assert same(tiny(mlp(), sampler={"name": "SGLD", "lr": 1e-3}), tiny(mlp()))


@pytest.mark.parametrize("method", ["auto", "sequential", "batched"])
@pytest.mark.parametrize(
    "loss_fn", [lambda m, b: mean_squared(m, b).detach(), lambda m, b: torch.tensor(1.0)], ids=["detached", "constant"]
)
def test_a_loss_without_a_gradient_is_named(loss_fn: Any, method: str) -> None:
    with pytest.raises(ValueError, match=r"loss does not depend on the weights that move.*detach\(\)"):
        tiny(mlp(), loss_fn=loss_fn, method=method)


@pytest.mark.parametrize(
    ("criterion", "name", "called"),
    [(nn.CrossEntropyLoss(), "CrossEntropyLoss", "criterion"), (nn.functional.mse_loss, "mse_loss", "mse_loss")],
)
def test_a_loss_of_outputs_and_targets_is_told_how_to_be_wrapped(criterion: Any, name: str, called: str) -> None:
    wrapped = rf"lambda module, batch: {called}\(module\(batch\[0\]\), batch\[1\]\)"
    with pytest.raises(TypeError, match=rf"loss_fn={name}: .*{wrapped}"):
        tiny(mlp(), loss_fn=criterion)


def test_a_criterion_of_the_user_s_own_that_takes_module_and_batch_is_called() -> None:
    class Own(nn.Module):
        def forward(self, module: nn.Module, batch: Any) -> Tensor:
            return mean_squared(module, batch)

    assert same(tiny(mlp(), loss_fn=Own()), tiny(mlp()))


class ReadsItsRate(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return mean_squared(self.net, batch)


def test_a_step_that_asks_for_its_optimiser_is_told_that_there_is_no_trainer() -> None:
    with pytest.raises(AttributeError, match=r"training_step reads trainer\.strategy\.\w+, .*no trainer.*loss_fn"):
        estimate_llc(ReadsItsRate(), regression(), num_chains=1, num_draws=4)


def _asserts(module: nn.Module, batch: Any) -> Tensor:
    assert module.training
    return mean_squared(module, batch)


def test_a_step_for_training_mode_only_is_told_of_eval_mode() -> None:
    with pytest.raises(AssertionError, match=r"eval mode.*self\.training is False"):
        tiny(mlp(), loss_fn=_asserts)
    with pytest.raises(ValueError, match=r"None for every minibatch.*eval mode.*self\.training is False"):
        tiny(mlp(), loss_fn=lambda m, b: mean_squared(m, b) if m.training else None)


CALLS: list[bool] = []


class TwoWords(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class SecondHead(LightningModule):
    """Its step asks for an output that there is in training mode, and notes in what mode it is called."""

    def __init__(self, error: Callable[[], Exception], training: bool = True) -> None:
        super().__init__()
        self.net, self.norm, self.rnn = mlp(), nn.BatchNorm1d(5), nn.LSTM(5, 5, dropout=0.5, num_layers=2)
        self.error, self.works = error, training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        CALLS.append(self.training)
        x = self.rnn(self.norm(batch[0]))[0]
        if not (self.training and self.works):
            raise self.error()
        return mean_squared(self.net, (nn.functional.dropout(x), batch[1]))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (lambda: ValueError("too many values to unpack"), ValueError, "too many values to unpack"),
        (lambda: KeyError("aux"), KeyError, "'aux'"),
        (RuntimeError, RuntimeError, "RuntimeError"),
        (lambda: TwoWords("no", "output"), RuntimeError, "no output"),
    ],
    ids=["ValueError", "KeyError", "no message", "two arguments"],
)
def test_a_step_that_fails_in_eval_mode_only_is_told_so(
    error: Callable[[], Exception], kind: type[Exception], said: str
) -> None:
    CALLS.clear()
    module = SecondHead(error)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    message = rf"{said}\. In training mode the step gives a loss\. .*eval mode.*loss_fn\(module, batch\)"
    with pytest.raises(kind, match=message) as caught:
        estimate_llc(module, regression(), num_chains=1, num_draws=4)
    assert caught.value.__cause__ is not None and str(caught.value.__cause__) == str(error())
    assert CALLS.count(True) == 1 and CALLS[-1]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in module.modules())


def test_a_step_that_fails_in_both_modes_has_its_own_error() -> None:
    CALLS.clear()
    with pytest.raises(ValueError, match=r"^broken$") as caught:
        estimate_llc(SecondHead(lambda: ValueError("broken"), training=False), regression(), num_chains=1, num_draws=4)
    assert caught.value.__cause__ is None and CALLS.count(True) == 1


@pytest.mark.parametrize("lr", [-1e-4, 0.0, math.nan, math.inf])
def test_step_out_of_range(lr: float) -> None:
    with pytest.raises(ValueError, match=r"lr=.*positive.*None"):
        SGLD(lr=lr)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_start(value: float) -> None:
    module = mlp()
    with torch.no_grad():
        module[0].weight[0, 0] = value  # type: ignore[index]
    with pytest.raises(NonFiniteLossError, match=r"loss at the current weights is (nan|inf)|weights.* not finite"):
        tiny(module)


def test_a_stream_with_its_length_given() -> None:
    estimate = tiny(mlp(), Stream(), nbeta=None, num_samples=96)
    assert estimate.num_samples == 96 and estimate.nbeta == pytest.approx(default_nbeta(96))
    assert bool(torch.isfinite(estimate.trace).all())
    assert tiny(mlp(), Stream()).num_samples is None  # with nbeta


def test_num_samples_is_n_where_the_data_has_another_length() -> None:
    """A sample of the training data stands for all of it."""
    estimate = tiny(mlp(), regression(), nbeta=None, num_samples=5000)
    assert estimate.num_samples == 5000 and estimate.nbeta == pytest.approx(default_nbeta(5000))


def test_num_samples_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"num_samples=1\b"):
        tiny(mlp(), Stream(), nbeta=None, num_samples=1)


class OfRegression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mean_squared(self.net, batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [mlp, OfRegression])
def test_what_fabric_has_set_up_is_measured_as_it_was_before(make: Callable[[], nn.Module], precision: Any) -> None:
    """A loader, a module and its weights, by the names that the user knows; n is that of the data."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    module, data = make(), DataLoader(regression(), batch_size=8, shuffle=True)
    wrapped, loader = fabric.setup_module(module), fabric.setup_dataloaders(data)
    loss_fn, names = (mean_squared, "0.*") if make is mlp else (None, "net.0.*")
    settings: dict[str, Any] = {"loss_fn": loss_fn, "restrict": names, **TINY}
    found = estimate_llc(wrapped, loader, weights=wrapped.state_dict(), **settings)
    assert same(found, estimate_llc(module, data, **settings)) and found.num_samples == len(regression())
    samples = estimate_influence(wrapped, loader, fabric.setup_dataloaders(DataLoader(regression(5))), **settings)
    assert samples.matrix.shape == (5, len(regression()))


def test_fabric_converts_what_its_module_in_half_precision_is_given() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    loader = fabric.setup_dataloaders(DataLoader(regression(), batch_size=8))
    assert tiny(fabric.setup_module(mlp()), loader).num_samples == len(regression())


def test_loaders_of_fabric_in_a_list_are_told_apart_from_samples() -> None:
    loaders = Fabric(accelerator="cpu", devices=1).setup_dataloaders(DataLoader(regression()), DataLoader(regression()))
    with pytest.raises(TypeError, match="data: got 2 DataLoaders"):
        tiny(mlp(), loaders)


def test_seeds_that_are_negative_or_large_are_seeds() -> None:
    assert not same(tiny(mlp(), seed=-1), tiny(mlp(), seed=2**40))


def test_whole_numbers_of_numpy_are_taken_and_fractions_are_not() -> None:
    estimate = tiny(mlp(), seed=np.int64(3), num_draws=np.int32(6))
    assert same(estimate, tiny(mlp(), seed=3, num_draws=6))
    assert type(estimate.seed) is int and type(estimate.num_draws) is int
    for name, value in (("seed", 1.5), ("num_draws", 20.0), ("batch_size", "10")):
        with pytest.raises(TypeError, match=rf"{name}=.*whole number"):
            tiny(mlp(), **{name: value})


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_answer_is_the_same_without_gradients_around_it(mode: Any) -> None:
    """A validation hook of Lightning's runs in inference mode."""
    with mode():
        inside = tiny(mlp())
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert same(inside, tiny(mlp()))


def test_batches_that_were_made_in_inference_mode_are_taken() -> None:
    """What a validation hook is handed is such a batch."""
    inputs, targets = regression(64).tensors
    outside = tiny(mlp(), [(inputs, targets)], num_samples=64)
    with torch.inference_mode():
        batch = (inputs.clone(), targets.clone())
        assert same(tiny(mlp(), [batch], num_samples=64), outside)
    assert same(tiny(mlp(), [batch], num_samples=64), outside)
    assert batch[0].is_inference()


def test_a_list_of_batches_without_their_number_is_said_to_be_read_as_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = list(DataLoader(regression(64), batch_size=16))
    tiny(mlp(), list(regression(64)), nbeta=None)
    assert not caplog.records
    assert tiny(mlp(), batches, nbeta=None, num_samples=64).num_samples == 64
    assert not caplog.records
    tiny(mlp(), batches, nbeta=None)
    assert "n = 4; its first one looks like a batch. If they are batches, give num_samples" in caplog.text


def test_kinetic_chains_on_minibatches_are_said_to_be_heated(caplog: pytest.LogCaptureFixture) -> None:
    tiny(mlp(), sampler=KineticLangevin(), full_batch=True)
    assert not caplog.records
    tiny(mlp(), sampler=KineticLangevin())
    assert "minibatches of 16 heat its chains" in caplog.text and "full_batch=True" in caplog.text


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_shortest_of_chains_do_not_warn_of_a_scatter(num_draws: int, recwarn: pytest.WarningsRecorder) -> None:
    estimate = estimate_llc(mlp(), regression(), mean_squared, num_chains=1, num_draws=num_draws)
    assert math.isfinite(estimate.mean) and not estimate.valid and not list(recwarn)


def test_an_estimate_whose_error_is_not_known_is_not_valid() -> None:
    alone = tiny(mlp(), num_chains=1, num_draws=3)
    assert math.isnan(alone.se) and not alone.valid
    assert "error is not known: one chain of 3 draws" in "; ".join(alone.reasons)
    assert math.isfinite(tiny(mlp(), num_chains=2, num_draws=3).se)
