"""Every value reaches every logger, at its exact x; and no logger, slow or broken, costs the run anything."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_slt import TransitionMonitor
from lightning_slt.callbacks import component_firings, remarks
from lightning_slt.callbacks.inside_firings import InsideFirings
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.susceptibilities import Measures
from lightning_slt.publish import publisher
from lightning_slt.reasons import Kind, Reason, sentences
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sampling import paths
from tests.integration.harness import (
    RecordingLogger,
    Scenario,
    SLTMonitor,
    assert_same,
    nothing_said_of,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import Net, Plain, loaders, tensors, with_validation
from tests.publish.helpers import make_estimate, make_influence
from tests.wandb_runs import records

EVERY_STEP = {"log_every_n_steps": 1}


def curve_x(rows: list[tuple[dict[str, Any], Optional[int]]]) -> list[Optional[int]]:
    """Where the points of the training loss are."""
    return [step for metrics, step in rows if "loss_step" in metrics]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [2, 4, 6, 8, 10, 12]), (2, [2, 4, 6]), (4, [2, 4])])
def test_x_is_that_of_the_loss_curve(accumulate: int, steps: list[int], tmp_path: Path) -> None:
    """The value after step k lies above the loss of the batch that made step k."""
    logger, monitor = RecordingLogger(), tiny_monitor(every_n_train_steps=2)
    settings = {"logger": logger, "accumulate_grad_batches": accumulate, **EVERY_STEP}
    Scenario(Net, loaders, lambda: dict(settings)).run(tmp_path, monitor)
    curve = curve_x(logger.rows)
    assert steps_of(monitor) == steps
    assert [e.x for e in monitor.estimates] == [curve[step - 1] for step in steps]
    published = [(metrics["slt/llc/mean"], x) for metrics, x in logger.of_callback() if "slt/llc/mean" in metrics]
    assert published == [(e.mean, e.x) for e in monitor.estimates]


def test_x_of_an_epoch_end_is_that_of_lightnings_own_epoch_values(tmp_path: Path) -> None:
    logger, monitor = RecordingLogger(), tiny_monitor(every_n_epochs=1)
    Scenario(Net, with_validation, lambda: {"logger": logger}).run(tmp_path, monitor)
    assert steps_of(monitor) == [6, 12]
    assert [e.x for e in monitor.estimates] == [x for metrics, x in logger.rows if "loss_epoch" in metrics]


def test_csv_logger_has_every_value_at_its_x(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path, "csv", "run"), tiny_monitor(every_n_train_steps=3)
    Scenario(Net, loaders, lambda: {"logger": logger, "log_every_n_steps": 50}).run(tmp_path, monitor)
    with open(tmp_path / "csv" / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("slt/llc/mean")]
    assert steps_of(monitor) == [3, 6, 9, 12]
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11] == [e.x for e in monitor.estimates]
    assert [float(row["slt/llc/mean"]) for row in rows] == [e.mean for e in monitor.estimates]
    assert [float(row["slt/step"]) for row in rows] == [3, 6, 9, 12]
    assert monitor.folder == tmp_path / "csv" / "run" / "slt"


@pytest.mark.parametrize("logger", [False, True], ids=["no logger", "a logger"])
def test_local_record_is_complete(logger: bool, pictures: None, tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=6)
    Scenario(Net, loaders, lambda: {"logger": RecordingLogger() if logger else False}).run(tmp_path, monitor)
    assert monitor.folder is not None and monitor.folder.is_relative_to(tmp_path)
    recorded = list(RunRecord(monitor.folder).read())
    assert [(e.step, e.mean, e.x) for e in recorded] == [(e.step, e.mean, e.x) for e in monitor.estimates]
    names = sorted(path.name for path in (monitor.folder / "figures").iterdir())
    assert names == ["chains_step_000000006.png", "chains_step_000000012.png", "history.png"]
    assert all((monitor.folder / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_callback_metrics_carry_the_last_value(tmp_path: Path) -> None:
    monitor = tiny_monitor()
    metrics = Scenario(Net, loaders).run(tmp_path, monitor).trainer.callback_metrics
    last = monitor.estimates[-1]
    assert metrics["slt/llc/mean"].item() == pytest.approx(last.mean)
    assert metrics["slt/llc/se"].item() == pytest.approx(last.se)
    assert metrics["slt/diag/valid"].item() == float(last.valid)


# ------------------------------------------------------------------------------------------------------------- silence


def test_no_logger_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = tiny_monitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Net, loaders, lambda: {"logger": False}).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert not [w for w in caught if "slt" in str(w.message).lower() or "lightning_slt" in w.filename]
    assert capfd.readouterr().out == ""


def test_barebones_is_silent_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = tiny_monitor()
    scenario = Scenario(Net, loaders, lambda: {"barebones": True})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario.assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert not [w for w in caught if "slt" in str(w.message).lower() or "lightning_slt" in w.filename]
    assert "SLTMonitor" not in capfd.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------------------------- loggers that fail


class BrokenLogger(RecordingLogger):
    """Its server is gone as soon as the callback's values come."""

    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
        if any(key.startswith("slt") for key in metrics):
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


def test_logger_that_raises_costs_nothing(tmp_path: Path) -> None:
    """One warning; the other logger, the record and training have everything."""
    broken, sound, monitor = BrokenLogger(), RecordingLogger(), tiny_monitor()
    reference = Scenario(Net, loaders).run(tmp_path / "without")
    with pytest.warns(UserWarning, match=r"BrokenLogger.*the server is gone") as caught:
        trace = Scenario(Net, loaders, lambda: {"logger": [broken, sound]}).run(tmp_path, monitor)
    reference.rows, trace.rows = [], []  # loggers of another kind
    assert_same(reference, trace)
    assert len([w for w in caught if "the server is gone" in str(w.message)]) == 1
    assert [x for metrics, x in sound.of_callback() if "slt/llc/mean" in metrics] == [3, 7, 11]
    assert monitor.folder is not None
    assert [e.step for e in RunRecord(monitor.folder).read()] == steps_of(monitor) == [4, 8, 12]


def test_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monitor = tiny_monitor(dirpath=str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="local") as caught:
        trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12
    assert steps_of(monitor) == [4, 8, 12]
    assert any("3 estimates" in str(w.message) and "with dirpath=" in str(w.message) for w in caught)


def test_a_folder_below_the_home_is_not_one_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monitor, watching = tiny_monitor(dirpath="~/slt"), TransitionMonitor(dirpath="~/kept")
    Scenario(Net, loaders).run(tmp_path, monitor, watching)
    assert monitor.folder == tmp_path / "home" / "slt"
    assert len(list(RunRecord(monitor.folder).read())) == 3
    assert len(list((tmp_path / "home" / "kept" / "snapshots").iterdir())) == 3
    assert not (tmp_path / "~").exists()


# --------------------------------------------------------------------------------------------------------------- wandb


def test_wandb_offline_has_every_value(offline: Path, pictures: None) -> None:
    """Rows of training are written every 50 steps only; those of the callback all are, each at its x."""
    import wandb

    monitor = tiny_monitor(every_n_train_steps=2)
    logger = WandbLogger(save_dir=str(offline), offline=True, project="test")
    scenario = Scenario(Net, with_validation, lambda: {"logger": logger, "log_every_n_steps": 50})
    scenario.run(offline, monitor)
    run_folder = Path(logger.experiment.dir).parent
    wandb.finish()
    rows = [record["history"]["item"] for record in records(run_folder) if record["type"] == "history"]
    ours = [row for row in rows if "slt/llc/mean" in row]
    assert steps_of(monitor) == [2, 4, 6, 8, 10, 12]
    assert [row["slt/llc/mean"] for row in ours] == pytest.approx([e.mean for e in monitor.estimates])
    assert [row["trainer/global_step"] for row in ours] == [1, 3, 5, 7, 9, 11]
    assert [row["slt/step"] for row in ours] == [2, 4, 6, 8, 10, 12]
    assert all(row["slt/media/chains._type"] == "image-file" for row in ours)
    assert any(row.get("slt/tables/history._type") == "table-file" for row in rows)
    assert [row["trainer/global_step"] for row in rows if "val_loss" in row] == [5, 11]


class LogsToTheRun(Net):
    """What wandb's own documentation shows: a row at a step of one's own. One below the run's own step is dropped."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.training and isinstance(self.logger, WandbLogger):
            self.logger.experiment.log({"own": self.global_step}, step=self.global_step)
        return loss


class OfEpochs(LogsToTheRun):
    """Lightning has no row of its own after a batch."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **{**kwargs, "on_step": False, "on_epoch": True})


@pytest.mark.parametrize("module", [LogsToTheRun, OfEpochs])
@pytest.mark.parametrize(("every", "probe"), [(1, None), (2, 5), (50, 5)])
def test_rows_that_a_user_logs_to_the_run_itself_are_kept(
    module: type[Net], every: int, probe: Optional[int], offline: Path
) -> None:
    """But for those that Lightning's own rows go ahead of, at the end of an epoch."""
    monitor = tiny_monitor(every_n_train_steps=3, probe=probe)

    def rows_with(*callbacks: Any) -> list[dict[str, Any]]:
        import wandb

        logger = WandbLogger(save_dir=str(offline), offline=True, project="test")
        trainer = {"logger": logger, "log_every_n_steps": every}
        Scenario(module, loaders, lambda: dict(trainer)).run(offline, *callbacks)
        run_folder = Path(logger.experiment.dir).parent
        wandb.finish()
        return [record["history"]["item"] for record in records(run_folder) if record["type"] == "history"]

    without, rows = rows_with(), rows_with(monitor, TransitionMonitor())
    own = [row["own"] for row in rows if "own" in row]
    assert own == [row["own"] for row in without if "own" in row]
    assert len(own) >= (6 if every == 1 else 11)
    ours = [row for row in rows if "slt/llc/mean" in row]
    assert [(row["trainer/global_step"], row["slt/step"]) for row in ours] == [(2, 3), (5, 6), (8, 9), (11, 12)]
    assert all("slt/transition/score" in row for row in ours)
    assert sum("slt/influence/valid" in row for row in ours) == (0 if probe is None else 4)


class LogsAfterTheBatch(Net):
    """Between the firing and Lightning's row of the same step, and at another x."""

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.logger, WandbLogger):
            self.logger.log_metrics({"own": 1.0}, step=self.global_step)


@pytest.mark.parametrize("module", [LogsAfterTheBatch, Net])
def test_x_is_exact_whatever_rows_come_after_a_firing(module: type[Net], offline: Path) -> None:
    import wandb

    monitor = tiny_monitor(every_n_train_steps=2)
    logger = WandbLogger(save_dir=str(offline), offline=True, project="test")
    trainer = {"logger": logger, "log_every_n_steps": 1, "val_check_interval": 3}
    Scenario(module, with_validation, lambda: dict(trainer)).run(offline, monitor)
    run_folder = Path(logger.experiment.dir).parent
    wandb.finish()
    rows = [record["history"]["item"] for record in records(run_folder) if record["type"] == "history"]
    ours = [(row["trainer/global_step"], row["slt/step"]) for row in rows if "slt/llc/mean" in row]
    assert ours == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
    assert [row["trainer/global_step"] for row in rows if "loss_step" in row] == list(range(12))
    assert [row["trainer/global_step"] for row in rows if "own" in row] == ([] if module is Net else list(range(1, 13)))


def test_wandb_disabled_is_no_obstacle(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monitor = tiny_monitor()
    with nothing_said_of(".*could not publish.*"):
        trace = Scenario(Net, loaders, lambda: {"logger": WandbLogger(save_dir=str(offline))}).run(offline, monitor)
    assert trace.num_batches == 12
    assert steps_of(monitor) == [4, 8, 12]


def test_method_and_settings_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Scenario(Net, loaders).run(tmp_path, SLTMonitor(every_n_train_steps=4, num_chains=2, num_draws=4))
    said = [record.getMessage() for record in caplog.records if "chains over" in record.getMessage()]
    assert len(said) == 1
    assert "n = 24" in said[0]


def test_chains_that_are_slow_as_they_were_asked_for_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths._Trial, "gain", property(lambda trial: 0.07))
    monitor = tiny_monitor(
        method="batched", measures=[{"name": "susceptibility", "components": {"all": ["*"]}}], probe=5
    )
    Scenario(Net, with_validation).run(tmp_path, monitor, tiny_monitor(method="auto", name="head"))
    assert [e.method for e in monitor.estimates] == ["batched"] * 3
    (said,) = [r.getMessage() for r in caplog.records if "speed" in r.getMessage()]
    assert said.startswith("SLTMonitor: method='batched': ") and "0.07 times the speed of one after another" in said


def test_of_several_monitors_each_line_says_whose_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remarks, "LARGE_OVERHEAD", 0.0)
    steps = [2, 4, 6, 8]
    monitors = [
        tiny_monitor(at_steps=steps),
        tiny_monitor(at_steps=steps, seed=1),
        tiny_monitor(at_steps=steps, name="head"),
    ]
    with caplog.at_level("INFO", logger="lightning.pytorch"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Net, loaders).run(tmp_path, *monitors)
    told = [record.getMessage() for record in caplog.records] + [str(w.message) for w in caught]
    for line in (" chains over ", "measuring has taken", "4 estimates, "):
        whose = [text.partition(": ")[0] for text in told if line in text]
        assert whose == ["SLTMonitor", "SLTMonitor (slt_2)", "SLTMonitor (slt_head)"], line


class HasASpareLayer(Plain):
    """Its second layer is in no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def in_an_order_of_its_own() -> dict[str, Any]:
    return {"train_dataloaders": DataLoader(tensors(24), 4, sampler=WeightedRandomSampler([1.0] * 24, 24))}


def test_what_is_said_below_the_monitor_has_its_prefix_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the data, of the weights, of samples and of components."""

    def fails(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(component_firings, "measure_beside", fails)
    settings: dict[str, Any] = {
        "probe": tensors(5),
        "query": 3,
        "measures": ["influence", {"name": "susceptibility", "components": {"all": "*"}}],
        "on_failure": "warn",
    }
    monkeypatch.setattr(Measures, "check_data", lambda self, indexed: None)
    monitors = [tiny_monitor(**settings), tiny_monitor(seed=1, **settings), tiny_monitor(name="head", **settings)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(HasASpareLayer, in_an_order_of_its_own).run(tmp_path, *monitors)
    told = [str(w.message) for w in caught]
    for line, arguments in {
        "are in no optimizer": "",
        "batches that training has seen are replayed": "(num_samples=None)",
        "there is no validation data": "(query=3)",
        "susceptibility at step 4 failed": "",
    }.items():
        whose = [text.partition(": ")[0] for text in told if line in text]
        assert whose == [f"SLTMonitor{arguments}{of}" for of in ("", " (slt_2)", " (slt_head)")], line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"measures": {"name": "susceptibility", "components": {"head": "fc.*"}}, "probe": True},
            r"^SLTMonitor \(slt_head\): measures: components\['head'\]: 'fc\.\*' matches no",
        ),
        ({"restrict": "body.*"}, r"^SLTMonitor \(slt_head\): .*'body\.\*' matches no"),
        ({"execution": "background"}, r"^SLTMonitor\(execution='background'\) \(slt_head\): .* cannot be pickled"),
    ],
    ids=["measures", "restrict", "background"],
)
def test_what_is_refused_before_training_is_said_by_the_monitor_that_refuses(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    class Local(Plain):
        pass

    with pytest.raises(MisconfigurationException, match=said):
        Scenario(Local, loaders).run(tmp_path, tiny_monitor(), tiny_monitor(name="head", **settings))


def test_influence_that_is_not_valid_says_so_and_why_first(caplog: pytest.LogCaptureFixture) -> None:
    influence = make_influence(valid=False, reasons=("chains have not mixed",), notes=("the data changes",))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        remarks.say_how(Voice(), 30, make_estimate(), influence)
    assert caplog.records[-1].getMessage() == (
        "SLTMonitor: step 30: influence is not valid: chains have not mixed (of 30 training samples on 6 queries; the "
        "data changes)"
    )


@pytest.mark.parametrize(("steps", "said"), [([4], "1 estimate, "), ([4, 8], "2 estimates, ")])
def test_the_last_line_counts_the_estimates(
    steps: list[int], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        monitor = tiny_monitor(at_steps=steps)
        Scenario(Net, loaders).run(tmp_path, monitor)
    last = caplog.records[-1].getMessage()
    assert last.startswith(f"SLTMonitor: {said}")
    assert last.endswith(f", in {monitor.folder}; report: {monitor.folder / 'report.html'}")
    assert (monitor.folder / "report.html").exists()


def test_the_last_line_names_no_report_where_none_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_write_report", lambda folder: 1 / 0)
    monitor = tiny_monitor(at_steps=[4])
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.warns(UserWarning, match="publish to the report"):
        Scenario(Net, loaders).run(tmp_path, monitor)
    assert caplog.records[-1].getMessage().endswith(f", in {monitor.folder}")


def test_the_last_line_says_how_many_estimates_a_full_disk_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunRecord._write_traces

    def full(record: RunRecord, estimate: Estimate) -> None:
        if estimate.step != 4:
            raise OSError(28, "No space left on device")
        whole(record, estimate)

    monkeypatch.setattr(RunRecord, "_write_traces", full)
    monitor = tiny_monitor()
    told = r"local record: OSError: \[Errno 28\] No space left on device\. .*could not be written: name .* dirpath=\."
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.warns(UserWarning, match=told):
        Scenario(Net, loaders).run(tmp_path, monitor)
    last = caplog.records[-1].getMessage()
    assert last.startswith("SLTMonitor: 3 estimates, ")
    assert f", in {monitor.folder}, without 2 of them that could not be written there; report: " in last


def test_reasons_of_one_kind_are_said_once_however_they_are_worded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of two kinds both, though they are worded alike; two of a kind at one firing are both told."""
    verdicts = {
        2: (Reason(Kind.EVAL_MODE, "no loss of a"), Reason(Kind.EVAL_MODE, "in eval mode b has none")),
        4: (Reason(Kind.EVAL_MODE, "c has none"), Reason(Kind.SUM, "the loss is wrong")),
        6: (Reason(Kind.GRADIENT, "the loss is wrong"), Reason(Kind.SUM, "the loss is a sum")),
    }
    measure = InsideFirings.measure

    def judged(self: InsideFirings, moment: Moment, *args: Any) -> Any:
        found, influence = measure(self, moment, *args)
        why = verdicts[moment.step]
        kinds = tuple(reason.kind.name for reason in why)
        return found.replace(mean=1.0, se=0.5, valid=False, reasons=sentences(why), kinds=kinds), influence

    monkeypatch.setattr(InsideFirings, "measure", judged)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Scenario(Net, loaders).run(tmp_path, tiny_monitor(at_steps=list(verdicts)))
    said = [r.getMessage().split(" is not valid: ")[1] for r in caplog.records if "is not valid: " in r.getMessage()]
    assert said == ["no loss of a; in eval mode b has none.", "the loss is wrong.", "the loss is wrong."]


def test_each_kind_of_reason_why_an_estimate_is_not_valid_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {
        2: ("negative beyond its error: downhill",),
        4: (),
        6: ("chains drift: by -3 ± 1", "chains have not mixed: R-hat 2"),
        8: ("chains have not mixed: R-hat 3", "negative beyond its error: downhill"),
    }
    measure = InsideFirings.measure

    def judged(self: InsideFirings, moment: Moment, *args: Any) -> Any:
        found, influence = measure(self, moment, *args)
        why = reasons[moment.step]
        return found.replace(mean=-16.0, se=2.0, valid=not why, reasons=why), influence

    monkeypatch.setattr(InsideFirings, "measure", judged)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Scenario(Net, loaders).run(tmp_path, tiny_monitor(at_steps=list(reasons)))
    assert [r.getMessage() for r in caplog.records if "is not valid: " in r.getMessage()] == [
        "SLTMonitor: step 2: LLC −16 ± 2 is not valid: negative beyond its error: downhill. Usual early in training, "
        "at a saddle, while the learning rate is large, and under strong weight decay.",
        "SLTMonitor: step 6: LLC −16 ± 2 is not valid: chains drift: by -3 ± 1; chains have not mixed: R-hat 2. More "
        "draws (num_draws) give them time. More draws (num_draws) or chains (num_chains) help.",
    ]
    assert "SLTMonitor: 4 estimates, 1 valid; step 4: LLC −16 ± 2, in " in caplog.records[-1].getMessage()


def test_that_valid_numbers_are_of_weights_beside_a_minimum_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = {2: 0.5, 4: 4.0, 6: 3.0}
    measure = InsideFirings.measure

    def judged(self: InsideFirings, moment: Moment, *args: Any) -> Any:
        found, influence = measure(self, moment, *args)
        judged = {"mean": 16.0, "se": 0.6, "valid": True, "reasons": (), "slope": slopes[moment.step], "slope_se": 0.2}
        return found.replace(**judged), influence

    monkeypatch.setattr(InsideFirings, "measure", judged)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Scenario(Net, loaders).run(tmp_path, tiny_monitor(at_steps=list(slopes)))
    assert [r.getMessage() for r in caplog.records if "minimum" in r.getMessage()] == [
        "SLTMonitor: step 4: LLC 16.0 ± 0.6 is of weights beside a minimum, at which it would be about 4.0 higher. "
        "Usual early in training, while the learning rate is large, under weight decay and under dropout."
    ]
