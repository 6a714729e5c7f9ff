"""The table 'Chains: batched or one after another' of docs/compatibility.md, row by row."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_slt.sampling import paths
from lightning_slt.sampling.engines import BatchedEngine, Engine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import choose_engine
from lightning_slt.sampling.window import Window
from tests.sampling.batching_models import PROBLEMS, Problem
from tests.sampling.helpers import gen, seeded

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEADING = "## Chains: batched or one after another"
WAYS = {
    "batched": ("backward", "grad"),
    "batched, ordinary backward only": ("backward",),
    "batched, gradient under vmap only": ("grad",),
    "one after another": (),
}
"""What the second column may say, and the ways to differentiate under vmap that then give the module's numbers."""
CHAINS = 2
SCALES = (0.02, 0.02, 0.2, 0.2)
"""Two sets of weights for two chains: near the anchor and far from it."""
INDICES = torch.tensor([2, 0, 3, 3])


class Row(NamedTuple):
    kind: str
    path: str
    reason: str


def table() -> list[Row]:
    section = DOCUMENT.read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [Row(kind.replace("`", ""), path, reason) for kind, path, reason in cells]


TABLE = table()
BATCHED = [row for row in TABLE if row.path.startswith("batched")]
SEQUENTIAL = [row for row in TABLE if row.path == "one after another"]


def by_kind(rows: list[Row]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=[row.kind for row in rows])


def test_every_row_has_one_problem_and_every_problem_a_row() -> None:
    assert sorted(row.kind for row in TABLE) == sorted(PROBLEMS)
    assert {row.path for row in TABLE} <= set(WAYS)


class Opened:
    """A row's module, as an objective with a window and weights away from the anchor."""

    def __init__(self, kind: str) -> None:
        self.problem: Problem = PROBLEMS[kind]()
        self.module = seeded(self.problem.make).train()
        self._before = self._state()
        self.window = Window(self.problem.batches(self.problem.data().tensors))
        self.objective = Objective(self.module, self.problem.loss_fn, context=self.problem.context)
        self.objective.adapt(self.window[0])
        anchor = self.objective.anchor
        noise = torch.randn(len(SCALES), len(anchor), generator=gen(9), dtype=anchor.dtype)
        self.weights = anchor + torch.tensor(SCALES, dtype=anchor.dtype)[:, None] * noise

    def by(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """Losses and gradients as the package has them."""
        grad, losses = torch.full_like(self.weights, 7.0), []
        torch.manual_seed(0)
        with self.objective.active():
            for start in range(0, len(self.weights), engine.width):
                rows = slice(start, start + engine.width)
                engine.bind(self.weights[rows].clone(), grad[rows])
                losses.append(engine(self.window, INDICES[rows]).reshape(-1))
            engine.release()
        return torch.cat(losses), grad

    def by_autograd(self) -> tuple[Tensor, Tensor]:
        """The same with nothing of the package: the user's module built anew, the weights written in, backward."""
        losses, grads = [], []
        torch.manual_seed(0)
        for w, i in zip(self.weights, INDICES.tolist(), strict=True):
            with torch.random.fork_rng():
                module = seeded(self.problem.make).eval()
            batch = self.window[i]
            if self.problem.in_float32:
                module, batch = module.float(), apply_to_collection(batch, Tensor, Tensor.float)
            parameters = list(module.parameters())
            with torch.no_grad():
                for p, piece in zip(parameters, w.split([p.numel() for p in parameters]), strict=True):
                    p.copy_(piece.view_as(p))
            with (self.problem.context or nullcontext)():
                loss = self._users_loss(module, batch)
            module.zero_grad()  # as Lightning does between the step and the backward pass
            loss.backward()
            losses.append(loss.detach())
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
            grads.append(torch.cat([g.flatten() for g in pieces]).to(w.dtype))
        return torch.stack(losses), torch.stack(grads)

    def _users_loss(self, module: nn.Module, batch: Any) -> Tensor:
        step = self.problem.loss_fn
        output: Any = cast(LightningModule, module).training_step(batch, 0) if step is None else step(module, batch)
        loss: Tensor = output if isinstance(output, Tensor) else output["loss"]
        return loss.mean()

    def check(self, engine: Engine) -> None:
        """The engine's numbers are the module's, and the module is as it was.

        Raises:
            AssertionError: where they differ.
        """
        expected = self.by_autograd()
        for name, a, b in zip(("loss", "gradient"), self.by(engine), expected, strict=True):
            a, b = a.double().reshape(len(SCALES), -1), b.double().reshape(len(SCALES), -1)
            assert ((a - b).norm(dim=1) <= self.problem.tolerance * b.norm(dim=1)).all(), f"another {name}"
        assert expected[1].norm(dim=1).min() > 0

    def agrees(self, through: str) -> bool:
        """Whether one way under vmap works and gives the module's numbers."""
        try:
            self.check(BatchedEngine(self.objective, CHAINS, through))
        except Exception:
            return False
        return True

    def _state(self) -> tuple[dict[str, Tensor], Any]:
        counts = {name: m._update_count for name, m in self.module.named_modules() if isinstance(m, Metric)}
        flags = {name: m.training for name, m in self.module.named_modules()}
        return {k: v.detach().clone() for k, v in self.module.state_dict().items()}, (counts, flags)

    def check_untouched(self) -> None:
        tensors, rest = self._state()
        assert tensors.keys() == self._before[0].keys() and rest == self._before[1]
        assert all(torch.equal(value, self._before[0][name]) for name, value in tensors.items())
        assert all(p.grad is None and p.requires_grad for p in self.module.parameters())


def test_the_anchor_is_the_modules_own_weights() -> None:
    for kind in ("MLP", "tied embeddings", "float64 weights", "bfloat16 weights", "parametrizations.weight_norm"):
        opened = Opened(kind)
        own = torch.cat([p.detach().flatten() for p in opened.module.parameters()])
        assert torch.equal(opened.objective.anchor, own.to(opened.objective.dtype))


@by_kind(BATCHED)
def test_batched_with_the_modules_own_numbers(row: Row) -> None:
    opened = Opened(row.kind)
    engine = choose_engine(opened.objective, opened.window, CHAINS, "batched").engine
    assert engine.method == "batched" and engine.width == CHAINS
    opened.check(engine)
    assert tuple(through for through in ("backward", "grad") if opened.agrees(through)) == WAYS[row.path]
    opened.check_untouched()


@by_kind(SEQUENTIAL)
def test_one_after_another_with_the_modules_own_numbers(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "COMPUTE_BOUND", 10.0)  # never "too slow to try" on a busy machine
    (why,) = re.findall('"(.+?)"', row.reason)
    opened = Opened(row.kind)
    with pytest.raises(ValueError, match="method='batched' cannot be used: .*" + re.escape(why)):
        choose_engine(opened.objective, opened.window, CHAINS, "batched")
    choice = choose_engine(opened.objective, opened.window, CHAINS)
    assert choice.engine.method == "sequential" and why in choice.reason
    opened.check(choice.engine)
    opened.check_untouched()
