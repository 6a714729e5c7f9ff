"""TransitionMonitor in a trainer: what a flag leads to, in any order of callbacks; training does not notice."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt import TransitionMonitor
from lightning_slt.callbacks import transitions as module
from lightning_slt.transition_record import TransitionLog
from tests.integration.harness import RecordingLogger, Scenario, assert_same, nothing_said_of, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation
from tests.integration.scripted import Scripted, flat, jump, moved_influence

EPOCHS = {"max_epochs": 10}  # 60 steps of 6 batches an epoch


class Seen(Callback):
    """The flag as other callbacks see it at the end of each batch, by step."""

    def __init__(self) -> None:
        self.flags: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.flags[trainer.global_step] = float(trainer.callback_metrics["slt/transition/flag"])


def train(folder: Path, *callbacks: Callback, **trainer: Any) -> Any:
    return Scenario(Plain, loaders, lambda: {**EPOCHS, **trainer}).run(folder, *callbacks)


def test_flag_is_one_at_the_flagged_step_only(tmp_path: Path) -> None:
    logger, seen, watch = RecordingLogger(), Seen(), TransitionMonitor()
    train(tmp_path, Scripted(), watch, seen, logger=logger)
    (found,) = watch.transitions
    assert found.kind == "A" and found.state == "confirmed"
    assert 29 <= found.onset <= found.step <= found.end <= 33 and found.known_at <= 36
    assert found.llc_change > 0 and found.loss_change == pytest.approx(-0.5, abs=0.05)
    known = int(found.known_at)
    assert list(seen.flags) == list(range(1, 61))
    assert [step for step, flag in seen.flags.items() if flag == 1.0] == [known]
    assert sum(seen.flags.values()) == 1.0
    rows = [(row, x) for row, x in logger.of_callback() if "slt/transition/flag" in row]
    assert [x for _, x in rows] == list(range(60))
    assert [x for row, x in rows if row["slt/transition/flag"] == 1.0] == [known - 1]
    assert [row["slt/transition/count"] for row, _ in rows] == [0.0] * (known - 1) + [1.0] * (61 - known)
    assert all((row["slt/transition/score"] > row["slt/transition/threshold"]) <= (x == known - 1) for row, x in rows)
    assert next(x for row, x in rows if "slt/transition/log_odds" in row) >= known - 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_order_of_the_callbacks_does_not_matter(first: bool, tmp_path: Path) -> None:
    monitor, watch, seen = Scripted(at_steps=list(range(61))), TransitionMonitor(), Seen()
    train(tmp_path, *((watch, monitor) if first else (monitor, watch)), seen)
    (found,) = watch.transitions
    assert [e.step for e in monitor.estimates] == list(range(61))
    assert watch.state_dict()["fed"] == 60
    assert [step for step, flag in seen.flags.items() if flag] == [found.known_at]
    assert 31 < found.known_at <= 36


def test_checkpoint_on_a_flag_is_that_of_the_flagged_step(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path, "{step}", monitor="slt/transition/flag", mode="max", every_n_train_steps=1, save_top_k=1
    )
    watch = TransitionMonitor()
    train(tmp_path, watch, Scripted(), saver, enable_checkpointing=True)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={watch.transitions[0].known_at:.0f}.ckpt"]
    assert float(saver.best_model_score) == 1.0


class InFives(Scripted):
    """What it finds comes five firings at once and a batch late, as results from the background may."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Any] = []
        self._told = self._reporting.take_up
        self._reporting.take_up = lambda *found: self._held.append(found)  # type: ignore[method-assign]

    def on_train_batch_end(self, *arguments: Any) -> None:
        if len(self._held) == 5:
            for found in self._held:
                self._told(*found)
            self._held.clear()
        super().on_train_batch_end(*arguments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_flag_is_seen_where_later_points_come_in_the_same_hook(accumulate: int, tmp_path: Path) -> None:
    """The points of steps 31 to 35 come together on the way to step 36; the second or third of them flags."""
    saver = ModelCheckpoint(
        tmp_path, "{step}", monitor="slt/transition/flag", mode="max", every_n_train_steps=1, save_top_k=-1
    )
    watch = TransitionMonitor()
    settings = {"max_epochs": 10 * accumulate, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    train(tmp_path, watch, InFives(), saver, **settings)
    assert 31 < watch.transitions[0].known_at < 35
    assert Path(saver.best_model_path).name == "step=36.ckpt" and float(saver.best_model_score) == 1.0


@pytest.mark.parametrize("validation", [False, True], ids=["at the epoch's end", "at a validation's end"])
def test_early_stop_on_a_flag_is_at_the_end_of_its_epoch(validation: bool, tmp_path: Path) -> None:
    stop = EarlyStopping(
        "slt/transition/flag",
        mode="max",
        stopping_threshold=0.5,
        patience=10**9,
        check_on_train_epoch_end=not validation,
    )
    watch = TransitionMonitor()
    scenario = Scenario(Net, with_validation, lambda: dict(EPOCHS))
    trace = scenario.run(tmp_path, stop, watch, Scripted())
    (found,) = watch.transitions
    assert 31 < found.known_at < 36  # within the sixth epoch, with points after it that flag nothing
    assert trace.trainer.global_step == 36 and stop.stopped_epoch == 5


def test_early_stop_where_validation_is_rare(tmp_path: Path) -> None:
    """Validation after every fourth epoch: the flag of the sixth is seen after the eighth."""
    stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
    watch = TransitionMonitor()
    scenario = Scenario(Net, with_validation, lambda: {"max_epochs": 16, "check_val_every_n_epoch": 4})
    trace = scenario.run(tmp_path, stop, watch, Scripted())
    assert 31 < watch.transitions[0].known_at <= 36 and trace.trainer.global_step == 48


def test_user_function_can_stop_the_run(tmp_path: Path) -> None:
    def stop(transition: Any, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True

    watch = TransitionMonitor(on_transition=stop)
    trace = train(tmp_path, watch, Scripted())
    assert trace.trainer.global_step == watch.transitions[0].known_at < 60


def saddle(step: int) -> dict[str, Any]:
    """Before the jump chains run downhill: a negative number that is not valid."""
    late = jump(step)
    return late if step > 30 else {**late, "mean": late["mean"] - 40.0, "reasons": ("negative beyond its error: ...",)}


def diverged(step: int) -> dict[str, Any]:
    return {**jump(step), "reasons": ("3 of 4 chains diverged or became non-finite",) if step > 30 else ()}


def test_a_saddle_counts_and_diverged_chains_do_not(tmp_path: Path) -> None:
    watch, strict = TransitionMonitor(), TransitionMonitor("slt_b/llc/mean", saddles=False)
    train(tmp_path, watch, strict, Scripted(saddle), Scripted(saddle, name="b"))
    (report,) = watch.reports
    assert 30 <= report.transition.step <= 32 and report.transition.llc_change > 40
    assert report.before is None and report.after is not None and report.tempered is None
    assert strict.transitions == []
    bad = TransitionMonitor()
    train(tmp_path / "bad", bad, Scripted(diverged))
    assert bad.transitions == []


def test_no_flag_stops_nothing(tmp_path: Path) -> None:
    stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
    watch = TransitionMonitor()
    trace = train(tmp_path, Scripted(flat), watch, stop)
    assert watch.transitions == [] and trace.trainer.global_step == 60
    assert float(trace.trainer.callback_metrics["slt/transition/count"]) == 0.0


def test_epoch_cadence_flags_at_the_epochs_end(tmp_path: Path) -> None:
    """The firing comes in the same hook as the end of the epoch, before this callback's turn or after it."""
    for name in ("before", "after"):
        monitor = Scripted(lambda step: jump(step // 2, at=12), every_n_epochs=1)
        watch = TransitionMonitor()
        stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
        pair = [watch, monitor] if name == "before" else [monitor, watch]
        two_batches = lambda: loaders(8)  # noqa: E731
        trace = Scenario(Plain, two_batches, lambda: {"max_epochs": 24}).run(tmp_path / name, stop, *pair)
        assert trace.trainer.global_step == watch.transitions[0].known_at
        assert 26 < watch.transitions[0].known_at <= 34


def test_training_is_bitwise_the_same(tmp_path: Path) -> None:
    called = []
    with nothing_said_of(".*(TransitionMonitor|could not publish).*"):
        scenario = Scenario(Net, with_validation, lambda: {"max_epochs": 7})
        without = scenario.run(tmp_path / "without")
        watch = TransitionMonitor(on_transition=lambda t, *_: called.append(t.id))
        trace = scenario.run(tmp_path / "with", watch, Scripted())
    assert_same(without, trace)
    assert called == [0]


def test_real_chains_are_watched_and_training_is_the_same(tmp_path: Path) -> None:
    scenario = Scenario(Net, with_validation)
    without = scenario.run(tmp_path / "without")
    monitor, watch = tiny_monitor(every_n_train_steps=1), TransitionMonitor()
    trace = scenario.run(tmp_path / "with", watch, monitor)
    assert_same(without, trace)
    assert watch.state_dict()["fed"] == 12
    assert len(list((monitor.folder / "snapshots").iterdir())) == 12


# ------------------------------------------------------------------------------------------------------------- setup


def test_no_monitor_is_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no SLTMonitor of this trainer.*Add SLTMonitor\(\)"):
        train(tmp_path, TransitionMonitor())
    with pytest.raises(MisconfigurationException, match=r"Add SLTMonitor\(name='b'\).*one of 'slt/llc/mean'"):
        train(tmp_path, TransitionMonitor("slt_b/llc/mean"), Scripted())


def test_two_curves_have_keys_and_states_of_their_own(tmp_path: Path) -> None:
    logger = RecordingLogger()
    plain, named = TransitionMonitor(), TransitionMonitor("slt_attn/llc/mean")
    train(tmp_path, named, plain, Scripted(), Scripted(flat, name="attn"), logger=logger)
    assert plain.state_key != named.state_key
    assert (len(plain.transitions), len(named.transitions)) == (1, 0)
    rows = [row for row, _ in logger.of_callback()]
    assert sum(row.get("slt/transition/flag", 0.0) for row in rows) == 1.0
    assert [row["slt_attn/transition/flag"] for row in rows if "slt_attn/transition/flag" in row] == [0.0] * 60


def test_unnamed_monitors_are_told_apart_by_their_place(tmp_path: Path) -> None:
    second = TransitionMonitor("slt_2/llc/mean")
    train(tmp_path, second, Scripted(flat, seed=1), Scripted(jump, seed=2))
    assert len(second.transitions) == 1


def test_smoke_test_flags_nothing_and_writes_nothing(tmp_path: Path) -> None:
    watch = TransitionMonitor()
    Scenario(Plain, loaders, lambda: {"fast_dev_run": 2}).run(tmp_path, Scripted(), watch)
    assert watch.state_dict()["fed"] == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------- acting on a flag


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


# --------------------------------------------------------------------------------------------------------- boundaries


class Stepped(Plain):
    """A learning rate that drops to a tenth at step 30, where the curve jumps."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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


# --------------------------------------------------------------------------------------------------- resume and crash


class Dies(Callback):
    """Raises at the start of the batch after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise RuntimeError("the power is gone")


def watched(folder: Path) -> tuple[Scripted, TransitionMonitor]:
    return Scripted(dirpath=str(folder / "slt")), TransitionMonitor()


def known(watch: TransitionMonitor) -> list[dict[str, Any]]:
    """All that is known, with the pinned files by their names."""
    plain = [report.as_dict() for report in watch.reports]
    return [{**r, "checkpoints": {k: Path(v).name for k, v in r["checkpoints"].items()}} for r in plain]


@pytest.mark.parametrize(("saved", "dead"), [(30, 33), (31, 40), (33, 45), (20, 21)])
def test_crash_and_resume_gives_the_transitions_of_an_uninterrupted_run(saved: int, dead: int, tmp_path: Path) -> None:
    """The checkpoint is from before the flag, or after it; the crash before the verdict, or after it."""
    reference = watched(tmp_path / "whole")
    Scenario(Stepped, loaders, lambda: dict(EPOCHS)).run(tmp_path / "whole", *reference)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="the power is gone"):
        Scenario(Stepped, loaders, lambda: {**EPOCHS, "enable_checkpointing": True}).run(
            tmp_path, *watched(tmp_path), saver, Dies(dead)
        )
    (tmp_path / "slt" / "snapshots" / "step_000000099.pt.tmp").write_bytes(b"half a file")
    checkpoint = str(tmp_path / f"step={saved}.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert [key for key in state if key.startswith("TransitionMonitor")] == [reference[1].state_key]
    again = watched(tmp_path)
    Scenario(Stepped, loaders, lambda: dict(EPOCHS)).run(tmp_path, *again, ckpt_path=checkpoint)
    assert again[1].transitions == reference[1].transitions and len(again[1].transitions) == 1
    assert again[1].boundaries == reference[1].boundaries == [30.0]
    assert known(again[1]) == known(reference[1])
    for folder in ("snapshots", "pinned"):
        names = [sorted(p.name for p in (m.folder / folder).iterdir()) for m in (again[0], reference[0])]
        assert names[0] == names[1]


class Bell(RecordingLogger):
    """A logger that can tell a person."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    @property
    def experiment(self) -> Any:
        return self

    def send_notification(self, title: str, **_: Any) -> None:
        self.told.append(title)

    def log_other(self, *_: Any, **__: Any) -> None:
        pass  # with the next two, what tells the publisher that a logger is of Comet's kind

    log_figure = log_table = log_other


@pytest.mark.parametrize("saved", [30, 45])
def test_an_alert_is_sent_once_across_a_crash_and_a_resume(saved: int, tmp_path: Path) -> None:
    """From a checkpoint before the flag, which the resumed run finds again, and from one after it."""
    bell = Bell()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(tmp_path, *watched(tmp_path), saver, Dies(50), enable_checkpointing=True, logger=bell)
    assert len(bell.told) == 1
    monitor, watch = watched(tmp_path)
    Scenario(Plain, loaders, lambda: {**EPOCHS, "logger": bell}).run(
        tmp_path, monitor, watch, ckpt_path=str(tmp_path / f"step={saved}.ckpt")
    )
    assert len(watch.transitions) == len(bell.told) == 1


def test_a_new_run_is_told_of_its_own_transitions(tmp_path: Path) -> None:
    bell = Bell()
    for _ in range(2):
        train(tmp_path, *watched(tmp_path), logger=bell)
    assert len(bell.told) == 2


def test_a_monitor_that_is_added_on_resume_has_the_curve_before(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError):
        train(tmp_path, watched(tmp_path)[0], saver, Dies(25), enable_checkpointing=True)
    monitor, watch = watched(tmp_path)
    Scenario(Plain, loaders, lambda: dict(EPOCHS)).run(
        tmp_path, monitor, watch, ckpt_path=str(tmp_path / "step=24.ckpt")
    )
    whole = TransitionMonitor()
    train(tmp_path / "whole", Scripted(), whole)
    assert watch.transitions == whole.transitions and len(whole.transitions) == 1


def test_a_second_run_of_the_same_object_starts_afresh(tmp_path: Path) -> None:
    monitor, watch = Scripted(), TransitionMonitor()
    train(tmp_path / "a", monitor, watch)
    first = watch.transitions
    train(tmp_path / "b", monitor, watch)
    assert watch.transitions == first and len(first) == 1


def test_a_failure_of_the_detector_follows_the_monitors_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setattr(module.TransitionDetector, "update", broken)
    monitor = Scripted(on_failure="warn")
    with pytest.warns(UserWarning, match="TransitionMonitor failed at step 1;.*ArithmeticError: broken") as caught:
        trace = train(tmp_path, monitor, TransitionMonitor())
    assert trace.trainer.global_step == 60 and len(monitor.estimates) == 60
    assert len([w for w in caught if "TransitionMonitor failed" in str(w.message)]) == 1


def test_it_pickles_for_strategies_that_spawn(tmp_path: Path) -> None:
    """After a run too: neither end of the link between the two goes with it, and both work again."""
    monitor, watch = tiny_monitor(), TransitionMonitor()
    Scenario(Plain, loaders).run(tmp_path / "a", monitor, watch)
    monitor.add_listener(watch)
    again, watching = pickle.loads(pickle.dumps((monitor, watch)))
    assert again._reporting._listeners == [] and watching.state_dict() == watch.state_dict()
    Scenario(Plain, loaders).run(tmp_path / "b", watching, again)
    assert watching.state_dict()["fed"] == 12 and len(again.estimates) == 3


def test_barebones_is_watched_without_a_file(tmp_path: Path) -> None:
    watch = TransitionMonitor()
    Scenario(Plain, loaders, lambda: {"barebones": True, **EPOCHS}).run(tmp_path, Scripted(), watch)
    assert len(watch.transitions) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
