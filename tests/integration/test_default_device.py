"""A default device that is not the CPU (``torch.set_default_device``): what is made beside the step is where it was."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_slt import estimate_influence, estimate_llc
from lightning_slt.callbacks.attempts import Attempts
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import Net, Plain, loaders, tensors

PACKAGE = Path(__file__).parents[2] / "lightning_slt"
MAKERS = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


@contextmanager
def nothing_on_it() -> Iterator[None]:
    """Of tensors on the meta device nothing can be read."""
    with torch.device("meta"):
        yield


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return tensors()[index]


class Drawing(LightningDataModule):
    """Its hook draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng, self.mean = torch.Generator(), torch.zeros(1)

    def train_dataloader(self) -> DataLoader[Any]:
        return loaders()["train_dataloaders"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.mean += 0.1 * torch.rand(1, generator=self.rng, device="cpu")
        return [batch[0] + self.mean, batch[1]]


class Noisy(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]], batch_idx)


@pytest.mark.parametrize(
    ("module", "data", "settings"),
    [
        pytest.param(Net, loaders, {}, id="plain"),
        pytest.param(Net, lambda: loaders(dataset=Samples()), {}, id="dataset"),
        pytest.param(Net, lambda: {"datamodule": Drawing()}, {}, id="hooks"),
        pytest.param(Noisy, loaders, {}, id="random step"),
        pytest.param(Plain, loaders, {"method": "batched"}, id="batched"),
        pytest.param(Plain, loaders, {"probe": 8, "measures": ["influence", "susceptibility"]}, id="samples"),
    ],
)
def test_firings_are_the_same_under_any_default_device(
    module: Callable[[], Any],
    data: Callable[[], dict[str, Any]],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, elsewhere = (tiny_monitor(on_failure="raise", **settings) for _ in range(2))
    Scenario(module, data).run(tmp_path / "plain", plain)
    fire = Attempts.fire

    def fire_elsewhere(*args: Any) -> Any:
        with nothing_on_it():
            return fire(*args)

    monkeypatch.setattr(Attempts, "fire", fire_elsewhere)
    Scenario(module, data).assert_undisturbed(tmp_path / "elsewhere", elsewhere)
    assert steps_of(plain) == steps_of(elsewhere) == [4, 8, 12]
    for a, b in zip(plain.estimates, elsewhere.estimates, strict=True):
        assert torch.equal(a.trace, b.trace) and a.mean == b.mean
    for c, d in zip(plain.influences, elsewhere.influences, strict=True):
        assert torch.equal(c.matrix, d.matrix)


def test_calls_without_a_trainer_are_the_same_under_any_default_device() -> None:
    torch.manual_seed(0)
    module, data = Plain(), tensors()
    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 20, "seed": 1, "method": "sequential"}
    plain = estimate_llc(module, data, **settings), estimate_influence(module, data, data, **settings)
    with nothing_on_it():
        elsewhere = estimate_llc(module, data, **settings), estimate_influence(module, data, data, **settings)
    assert torch.equal(plain[0].trace, elsewhere[0].trace)
    assert torch.equal(plain[1].matrix, elsewhere[1].matrix)


def made_without_a_device(path: Path) -> list[int]:
    """The lines that make a tensor where ``torch.set_default_device`` says."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKERS
        and not any(word.arg == "device" for word in node.keywords)
    ]


def test_tensors_are_made_on_a_device_that_is_named() -> None:
    """But for what a muted metric gives the step, which is where the step's own are."""
    found = {str(path.relative_to(PACKAGE)): made_without_a_device(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert [name for name, lines in found.items() if lines] == ["sampling/steps.py"]
    assert len(found["sampling/steps.py"]) == 2
