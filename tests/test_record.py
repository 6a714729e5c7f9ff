"""An estimate through a file, a checkpoint, a crash and a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_slt.functional import rhat
from lightning_slt.functional.learning_coefficient import summarise
from lightning_slt.reasons import Kind
from lightning_slt.record import RECORD_FILE, Estimate, RunRecord


def estimate(step: int | None = 100, **changes: Any) -> Estimate:
    trace = torch.randn(4, 30, generator=torch.Generator().manual_seed(step or 0))
    fields: dict[str, Any] = {
        "mean": 12.25,
        "se": 0.5,
        "per_chain": trace.double().mean(1),
        "trace": trace,
        "rhat": 1.01,
        "ess": 250.0,
        "valid": True,
        "reasons": (),
        "nbeta": 144.7,
        "localization": 2.0,
        "init_loss": 0.1,
        "chain_loss": 0.2,
        "num_samples": 1000,
        "num_weights": 10,
        "step_size": 1e-4,
        "virial": 0.99,
        "num_chains": 4,
        "num_draws": 30,
        "step": step,
        "seconds": 1.5,
        "overhead": 0.1,
    }
    return Estimate(**{**fields, **changes})


def assert_same(a: Estimate, b: Estimate) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    torch.testing.assert_close(x.pop("trace"), y.pop("trace"), rtol=0, atol=0, equal_nan=True)
    assert repr(x) == repr(y)  # NaN is not equal to itself, but is spelt the same


def not_valid() -> Estimate:
    one_bad = torch.tensor([1.0, math.nan, 2.0, 3.0], dtype=torch.float64)
    return estimate(
        200, mean=math.nan, se=math.nan, rhat=math.nan, ess=math.nan, valid=False, reasons=("a", "b"), per_chain=one_bad
    )


@pytest.mark.parametrize("original", [estimate(), not_valid(), estimate(None, num_samples=None)])
def test_roundtrip_through_files(original: Estimate, tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run" / "deep")
    record.append(original)
    (back,) = RunRecord(tmp_path / "run" / "deep").read()
    assert_same(original, back)
    assert back.per_chain.dtype == torch.float64 and isinstance(back.reasons, tuple)


@pytest.mark.parametrize("original", [estimate(), not_valid()])
def test_roundtrip_through_a_checkpoint_that_is_loaded_weights_only(original: Estimate, tmp_path: Path) -> None:
    torch.save({"estimates": [original.state_dict()]}, tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(original, Estimate.from_state_dict(state["estimates"][0]))


def test_keys_of_a_newer_version_are_passed_over() -> None:
    state = {**estimate().state_dict(), "susceptibility": 3.0}
    assert_same(Estimate.from_state_dict(state), estimate())


def test_kinds_of_reasons_are_in_the_record_and_older_ones_have_none(tmp_path: Path) -> None:
    record, original = RunRecord(tmp_path), not_valid()
    kinds = tuple(Kind.DIVERGED.name for _ in original.reasons)
    record.append(original.replace(kinds=kinds))
    line = json.loads(record.path.read_text())
    assert line["kinds"] == list(kinds) and line["reasons"] == list(original.reasons)
    older = {name: value for name, value in line.items() if name != "kinds"}
    with open(record.path, "a") as file:
        file.write(json.dumps(older) + "\n")
    assert [found.kinds for found in record.read()] == [kinds, ()]
    assert original.replace(kinds=kinds).replace(reasons=("another",)).kinds == ()


def test_nan_and_infinity_are_null_in_the_file(tmp_path: Path) -> None:
    RunRecord(tmp_path).append(not_valid().replace(step_bias=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / RECORD_FILE).read_text(), parse_constant=refuse)
    assert line["mean"] is None and line["step_bias"] is None
    assert line["per_chain"] == [1.0, None, 2.0, 3.0]
    assert "trace" not in line


def test_an_r_hat_that_is_infinite_stays_so(tmp_path: Path) -> None:
    """Chains that each stand still, apart from each other: no number was read as one that is not known."""
    still = torch.arange(2.0)[:, None].expand(2, 32)  # a mean of 16 alike is exact
    assert rhat(still) == math.inf
    original = estimate(rhat=rhat(still), valid=False, reasons=("chains have not mixed: R-hat inf > 1.1, error 0.6",))
    RunRecord(tmp_path).append(original)
    RunRecord(tmp_path).append(not_valid())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(x, parse_constant=refuse) for x in (tmp_path / RECORD_FILE).read_text().splitlines()]
    assert [line["rhat"] for line in lines] == ["inf", None]
    again, other = RunRecord(tmp_path).read()
    assert again.rhat == math.inf and math.isnan(other.rhat)
    assert_same(again, original)
    assert Estimate.from_state_dict(original.state_dict()).rhat == math.inf


def test_one_line_an_estimate_in_order(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in (10, 20, 30):
        record.append(estimate(step))
        assert (tmp_path / RECORD_FILE).read_text().endswith("}\n")
    assert [e.step for e in record.read()] == [10, 20, 30]
    traces = [e.trace for e in record.read()]
    torch.testing.assert_close(traces[1], estimate(20).trace, rtol=0, atol=0)
    assert [e.trace.shape for e in record.read(traces=False)] == [(4, 0)] * 3


def test_a_lost_trace_costs_the_trace_only(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(10))
    record.trace_path(estimate(10)).unlink()
    (back,) = record.read()
    assert back.mean == 12.25 and back.trace.shape == (4, 0)


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_last_line_cut_off_by_a_crash_is_passed_over_and_does_not_swallow_the_next(cut: int, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(10))
    record.append(estimate(20))
    text = (tmp_path / RECORD_FILE).read_bytes()
    (tmp_path / RECORD_FILE).write_bytes(text[: -cut - 1])
    assert [e.step for e in record.read()] == [10]
    record.append(estimate(30))
    assert [e.step for e in record.read()] == [10, 30]


@pytest.mark.parametrize("line", ["{}", '{"step": 3, "mean": 1.0}', '{"per_chain": 3}', "[1]", "3", "9" * 5000])
def test_a_line_that_is_no_estimate_is_passed_over(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(10))
    with open(record.path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    record.append(estimate(20))
    assert [e.step for e in record.read()] == [10, 20]
    assert ("no estimate" in caplog.text) is line.startswith("{")
    record.drop_after(20)
    assert len(record.path.read_text().splitlines()) == 2


@pytest.mark.parametrize("step", ["7", 7.0])
def test_a_step_that_another_tool_wrote_otherwise_is_read(step: Any, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(7))
    line = {**json.loads(record.path.read_text()), "step": step, "mean": "1.5"}
    record.path.write_text(json.dumps(line) + "\n")
    (found,) = record.read()
    assert (found.step, type(found.step), found.mean) == (7, int, 1.5)
    assert found.trace.numel()


@pytest.mark.parametrize("changes", [{"step": "a"}, {"step": 2.5}, {"step": math.inf}, {"step": [3]}, {"mean": "a"}])
def test_a_line_with_a_number_that_is_none_is_passed_over(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(7))
    line = json.dumps({**json.loads(record.path.read_text()), **changes})
    with open(record.path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert [e.step for e in record.read()] == [7]
    assert "no estimate" in caplog.text


def test_a_mark_at_the_beginning_of_the_file_costs_no_line(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(10))
    record.append(estimate(20))
    record.path.write_bytes(b"\xef\xbb\xbf" + record.path.read_bytes())
    assert [e.step for e in record.read()] == [10, 20]
    record.drop_after(20)
    assert [e.step for e in record.read()] == [10, 20]


def test_a_line_without_its_line_end_is_whole_and_stays_so(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(10))
    (tmp_path / RECORD_FILE).write_bytes((tmp_path / RECORD_FILE).read_bytes()[:-1])
    record.append(estimate(20))
    assert [e.step for e in record.read()] == [10, 20]


def test_a_firing_does_not_read_the_record_of_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of many firings is long: to append to it costs the same as to a new one."""
    record = RunRecord(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or b"")
    monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: read.append(path) or "")
    for step in (1, 2, 3):
        record.append(estimate(step))
    assert not read
    assert [e.step for e in record.read()] == [1, 2, 3]


def test_a_write_of_traces_that_breaks_off_leaves_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord(tmp_path)
    record.append(estimate(1))
    whole = record.trace_path(estimate(1)).read_bytes()

    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        record.append(estimate(1))
    assert record.trace_path(estimate(1)).read_bytes() == whole
    assert [path.name for path in record.trace_path(estimate(1)).parent.iterdir()] == ["step_000000001.npz"]


def test_drop_after_forgets_what_a_resumed_run_measures_again(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in (10, 20, 30):
        record.append(estimate(step))
    record.drop_after(20)
    assert [e.step for e in record.read()] == [10, 20]
    assert not list(tmp_path.glob("*.tmp"))
    record.append(estimate(30, mean=1.0))
    assert [(e.step, e.mean) for e in record.read()] == [(10, 12.25), (20, 12.25), (30, 1.0)]
    record.append(estimate(40))
    record.drop_after(20)
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "step_000000010.npz",
        "step_000000020.npz",
    ]
    record.drop_after(5)
    assert list(record.read()) == []


def test_a_second_estimate_without_a_step_does_not_take_the_chains_of_the_first(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    first = estimate(1).replace(step=None)
    record.append(first)
    with pytest.raises(ValueError, match=r"step=None: .*estimate\.replace\(step=\.\.\.\)"):
        record.append(first.replace(trace=first.trace + 1))
    (read,) = record.read()
    assert read.step is None and torch.equal(read.trace, first.trace)


def test_an_empty_folder_reads_as_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "none")
    record.drop_after(3)
    assert list(record.read()) == [] and not (tmp_path / "none").exists()


def test_interval_and_text() -> None:
    e = estimate()
    assert e.interval == pytest.approx((12.25 - 0.98, 12.25 + 0.98))
    assert str(e).startswith("step 100: LLC 12.2 ± 0.5") and "NOT VALID" not in str(e)
    assert "NOT VALID: a; b" in str(not_valid())


@pytest.mark.parametrize(
    ("reasons", "comparable"),
    [
        ((), True),
        (("negative beyond its error: the weights are not at a minimum (chains run downhill)",), True),
        (("chains have not mixed: R-hat 1.5 > 1.1, error 2", "chains drift: second half minus first half is +3"), True),
        (("the chains have not reached their width in 200 steps (virial ratio 0.40): more draws",), True),
        (("step size 0.1 is too large: 60% of the estimate is heat of the step",), False),
        (("chains drift: ...", "3 of 4 chains diverged or became non-finite (chains [0, 1, 2]): left out"), False),
    ],
    ids=["valid", "negative", "unsettled", "width", "step size", "diverged"],
)
def test_a_state_of_the_weights_may_stand_in_a_curve(reasons: tuple[str, ...], comparable: bool) -> None:
    assert estimate(valid=not reasons, reasons=reasons).comparable is comparable
    assert not estimate(valid=not reasons, reasons=reasons, mean=math.nan).comparable


def test_reasons_that_a_saddle_gives_are_known_as_such() -> None:
    """Chains that run downhill together, as they are summed up."""
    trace = -torch.arange(100.0).expand(4, 100) - torch.arange(4.0)[:, None]
    summary = summarise(trace)
    assert not summary.valid and len(summary.reasons) >= 2
    assert estimate(valid=False, reasons=summary.reasons).comparable
