"""What a flag leads to: kept weights, a record of what changed, and what is said of boundaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_slt import TransitionMonitor
from lightning_slt.transition_record import TransitionLog
from tests.integration.harness import RecordingLogger, Scenario
from tests.integration.models import Net, Plain, loaders
from tests.integration.scripted import Scripted, flat, jump, moved_influence
from tests.integration.watching import EPOCHS, Stepped, train


def test_user_function_is_called_once_a_flag_and_may_fail(tmp_path: Path) -> None:
    called: list[Any] = []

    def act(transition: Any, trainer: Any, pl_module: Any) -> None:
        called.append((transition.id, transition.state, trainer.global_step, type(pl_module).__name__))
        raise RuntimeError("no disk")

    watch = TransitionMonitor(on_transition=act)
    with pytest.warns(UserWarning, match=r"on_transition failed for transition 0.*RuntimeError: no disk"):
        trace = train(tmp_path, watch, Scripted())
    assert called == [(0, "provisional", watch.transitions[0].known_at, "Plain")]
    assert trace.trainer.global_step == 60


def test_weights_around_a_flag_are_kept(tmp_path: Path) -> None:
    """The pinned files hold the weights of their steps: those of a run that was stopped there."""
    watch = TransitionMonitor(dirpath=str(tmp_path / "kept"))
    train(tmp_path, watch, Scripted())
    (report,) = watch.reports
    t = report.transition
    assert set(report.checkpoints) == {"before", "onset", "after", "flag"}
    held = {role: torch.load(path, weights_only=True) for role, path in report.checkpoints.items()}
    assert held["before"]["step"] == int(t.onset) and held["flag"]["step"] == t.known_at
    assert abs(held["onset"]["step"] - t.onset) <= 0.5 and 0 <= held["after"]["step"] - t.end < 1
    for role, path in report.checkpoints.items():
        assert Path(path).parent == tmp_path / "kept" / "pinned"
        assert role in Path(path).name and f"step_{held[role]['step']:09d}" in Path(path).name
    shorter = Scenario(Plain, loaders, lambda: {**EPOCHS, "max_steps": int(t.known_at)}).run(tmp_path / "short")
    assert torch.equal(held["flag"]["state_dict"]["net.weight"], shorter.module.net.weight.detach())
    assert not torch.equal(held["before"]["state_dict"]["net.weight"], shorter.module.net.weight.detach())
    ring = list((tmp_path / "kept" / "snapshots").iterdir())
    assert 8 <= len(ring) <= 12 and all(path.suffix == ".pt" for path in ring)


def test_no_weights_are_kept_where_none_are_asked_for(tmp_path: Path) -> None:
    watch = TransitionMonitor(pin_checkpoints=False)
    train(tmp_path, watch, Scripted())
    assert len(watch.transitions) == 1 and dict(watch.reports[0].checkpoints) == {}
    assert not list(tmp_path.rglob("*.pt"))


def test_a_full_disk_costs_the_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    watch = TransitionMonitor()
    with pytest.warns(UserWarning, match="could not keep weights.*No space left") as caught:
        train(tmp_path, watch, Scripted())
    assert len([w for w in caught if "could not keep weights" in str(w.message)]) == 1
    assert len(watch.transitions) == 1
    assert not list(tmp_path.rglob("*.pt*"))


def bump(step: int) -> dict[str, Any]:
    """Up at 30 and down again after 2 points."""
    return jump(step) if step <= 32 else flat(step)


def test_a_retraction_is_published(tmp_path: Path) -> None:
    logger, watch, monitor = RecordingLogger(), TransitionMonitor(), Scripted(bump)
    train(tmp_path, watch, monitor, logger=logger)
    assert watch.transitions[0].state == "retracted"
    rows = [row for row, _ in logger.of_callback() if "slt/transition/count" in row]
    counts, flag = [row["slt/transition/count"] for row in rows], int(watch.transitions[0].known_at)
    told = counts.index(0.0, flag)  # the row of the verdict
    assert flag < told < 45 and counts == [0.0] * (flag - 1) + [1.0] * (told - flag + 1) + [0.0] * (60 - told)
    assert sum(row["slt/transition/flag"] for row in rows) == 1.0
    log = TransitionLog.read(monitor.folder)
    assert [r.transition.state for r in log.reports] == ["retracted"] and log.standing == []
    summary = json.loads((monitor.folder / "summary.json").read_text())
    assert summary["slt/transition/count"] == 0.0
    assert len(list((monitor.folder / "tables").glob("transitions_step_*.csv"))) == 3


def test_record_says_what_changed(tmp_path: Path) -> None:
    """The samples, the component, the phases; the tempered posterior is the chains' own: beta = nbeta / n."""
    monitor, watch = Scripted(influence=moved_influence, probe=True), TransitionMonitor()
    train(tmp_path, monitor, Scripted(flat, name="attn"), watch)
    raw = json.loads((monitor.folder / "transitions.json").read_text())
    assert raw["monitor"] == "slt/llc/mean" and len(raw["offline"]) == 1
    (report,) = TransitionLog.read(monitor.folder).reports
    assert report == watch.reports[0]
    assert [s.index for s in report.samples[:3]] == [70, 30, 120] and len(report.samples) == 10
    assert report.samples[0].mean_loss_change == pytest.approx(3.01)
    assert [s.index for s in report.samples if s.stands_out] == [70, 30, 120]
    assert [c.name for c in report.components] == ["slt", "attn"]
    assert report.components[0].change == pytest.approx(15.0, abs=0.7) and report.components[1].scatters < 2
    assert report.before.llc == pytest.approx(10.0, abs=0.5) and report.after.llc == pytest.approx(25.0, abs=0.5)
    assert report.before.loss == pytest.approx(1.5, abs=0.01) and report.after.loss == pytest.approx(1.0, abs=0.01)
    assert report.tempered.beta == pytest.approx(0.15) and report.untempered.beta == 1.0
    # n (L_U - L_V) = (lambda_V - lambda_U) log n: 0.5 n = 15 log n at n = 147
    assert report.untempered.critical_n == pytest.approx(147, rel=0.1)
    assert report.tempered.critical_n == pytest.approx(147 / 0.15, rel=0.1)
    assert report.untempered.critical_n_low < 147 < report.untempered.critical_n_high
    assert report.untempered.preferred == "after" and report.untempered.log_odds == pytest.approx(396, abs=20)
    assert report.refined.onset == pytest.approx(30, abs=1)
    assert "samples that moved most: 70, 30, 120;" in report.sentence()
    summary = json.loads((monitor.folder / "summary.json").read_text())
    assert summary["slt/transition/count"] == 1.0 and summary["slt/transition/last_step"] == report.transition.step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_drop_of_the_learning_rate_is_a_boundary(accumulate: int, tmp_path: Path) -> None:
    watch, suppress = TransitionMonitor(), TransitionMonitor("slt_b/llc/mean", at_boundary="suppress")
    settings = {"max_epochs": 10 * accumulate, "accumulate_grad_batches": accumulate}
    scenario = Scenario(Stepped, loaders, lambda: dict(settings))
    scenario.run(tmp_path, watch, suppress, Scripted(), Scripted(name="b"))
    assert watch.boundaries == suppress.boundaries == [30.0]
    assert [t.boundary for t in watch.transitions] == [30.0]
    assert suppress.transitions == []


def test_smooth_schedules_have_no_boundary(tmp_path: Path) -> None:
    watch = TransitionMonitor()
    Scenario(Net, loaders, lambda: dict(EPOCHS)).run(tmp_path, watch, Scripted(flat))
    assert watch.boundaries == []


def test_data_that_is_loaded_anew_is_a_boundary(tmp_path: Path) -> None:
    class Reloads(Plain):
        def train_dataloader(self) -> Any:
            return loaders()["train_dataloaders"]

    watch = TransitionMonitor()
    settings = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 2}
    Scenario(Reloads, dict, lambda: dict(settings)).run(tmp_path, watch, Scripted(flat))
    assert watch.boundaries == [12.0]
    plain = TransitionMonitor()
    Scenario(Reloads, dict, lambda: {"max_epochs": 4}).run(tmp_path / "plain", plain, Scripted(flat))
    assert plain.boundaries == []
