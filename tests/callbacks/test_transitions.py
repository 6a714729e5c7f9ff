"""The pieces of TransitionMonitor that need no trainer: arguments, jumps of the rate, the ring, what changed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from lightning_slt import SLTMonitor, TransitionMonitor
from lightning_slt.callbacks.flags.boundaries import LearningRateWatch
from lightning_slt.callbacks.flags.snapshots import SnapshotRing
from lightning_slt.callbacks.flags.what_changed import moved_components, moved_samples, phase_of, sides, with_phases
from lightning_slt.callbacks.transitions import refined
from lightning_slt.transition_record import MovedComponent, TransitionReport, Verdict
from lightning_slt.transitions import Phase
from tests.publish.helpers import make_estimate, make_influence, make_report, make_transition

# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": "val_loss"}, "monitor='val_loss': expected the key of an SLTMonitor's curve, 'slt/llc/mean'"),
        ({"monitor": "slt/llc/se"}, "monitor='slt/llc/se'"),
        ({"monitor": 3}, "monitor=3: expected the key of an SLTMonitor's curve"),
        ({"dirpath": "s3://bucket/ring"}, "dirpath=.s3://bucket/ring.: is an address"),
        ({"max_snapshots": 3}, "max_snapshots=3: must be at least 4; pin_checkpoints=False keeps none"),
        ({"false_alarms": 0.0}, "false_alarms: expected a rate above 0"),
        ({"min_change": -1.0}, "min_change: expected a height of the LLC, at least 0, got -1.0"),
        ({"at_boundary": "ignore"}, "at_boundary: expected 'annotate' or 'suppress', got 'ignore'"),
    ],
    ids=["no curve", "no mean", "no text", "address", "snapshots", "false alarms", "change", "boundary"],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace("|", r"\|")):
        TransitionMonitor(**arguments)


def test_a_function_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"on_transition='print': expected a callable of .* got str\. Give a function"):
        TransitionMonitor(on_transition="print")  # type: ignore[arg-type]


def test_text_for_a_number_of_snapshots_is_refused() -> None:
    with pytest.raises(TypeError, match=r"max_snapshots='a': expected a whole number, got str"):
        TransitionMonitor(max_snapshots="a")  # type: ignore[arg-type]


def test_state_keys_differ_by_curve_only() -> None:
    keys = {TransitionMonitor(key).state_key for key in ("slt/llc/mean", "slt_2/llc/mean", "slt_attn/llc/mean")}
    assert len(keys) == 3
    assert TransitionMonitor(min_change=1.0).state_key == TransitionMonitor().state_key


# ----------------------------------------------------------------------------------------------------------- boundaries

COSINE = [0.5 * (1 + math.cos(math.pi * i / 40)) for i in range(41)]
SCHEDULES: dict[str, tuple[list[float], list[int]]] = {
    "constant": ([0.1] * 10, []),
    "drop": ([0.1] * 5 + [0.01] * 5, [5]),
    "two drops": ([0.1] * 5 + [0.05] * 5 + [0.025] * 5, [5, 10]),
    "rise": ([0.1] * 5 + [0.2] * 5, [5]),
    "smaller than the ratio": ([0.1] * 5 + [0.07] * 5, []),
    "linear warm-up": ([0.01 * (i + 1) for i in range(10)] + [0.1] * 5, []),
    "warm-up from zero": ([0.0, 0.05, 0.1, 0.1, 0.1], []),
    "warm-up, then a drop": ([0.01, 0.05, 0.1, 0.1, 0.01], [4]),
    "exponential": ([0.9**i for i in range(60)], []),
    "cosine to zero": (COSINE, []),
    "linear to zero": ([1 - i / 30 for i in range(31)], []),
    "warm restart": (COSINE[:38] + COSINE[:38], [38]),
    "a vanishing rate that comes back": ([1.0, 1.0, 1e-5, 1e-6, 1.0], [2, 4]),
}


@pytest.mark.parametrize(("rates", "jumps"), SCHEDULES.values(), ids=SCHEDULES)
def test_jumps_are_found_and_smooth_schedules_are_none(rates: list[float], jumps: list[int]) -> None:
    watch = LearningRateWatch()
    assert [i for i, rate in enumerate(rates) if watch.jumped([rate])] == jumps


def test_one_group_of_several_is_enough_and_new_groups_are_no_jump() -> None:
    watch = LearningRateWatch()
    seen = [[0.1, 0.2], [0.1, 0.2], [0.1, 0.02], [0.1, 0.02, 0.5], [0.1, 0.02, 0.5]]
    assert [watch.jumped(rates) for rates in seen] == [False, False, True, False, False]


def test_a_watch_goes_on_from_its_state() -> None:
    for cut in range(1, 14):
        rates = SCHEDULES["two drops"][0]
        first, second = LearningRateWatch(), LearningRateWatch()
        found = [i for i in range(cut) if first.jumped([rates[i]])]
        second.load_state_dict(first.state_dict())
        assert found + [i for i in range(cut, 15) if second.jumped([rates[i]])] == [5, 10]


# ------------------------------------------------------------------------------------------------------------- the ring


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), float(step))}


def filled(folder: Path, last: int, max_snapshots: int = 12) -> SnapshotRing:
    ring = SnapshotRing(folder, max_snapshots)
    for step in range(0, 10 * last + 1, 10):
        ring.add(weights(step), step, epoch=step // 100)
    return ring


def test_the_ring_is_bounded_and_reaches_back(tmp_path: Path) -> None:
    ring = filled(tmp_path, 100)
    assert len(ring.steps) == 12 == len(list((tmp_path / "snapshots").iterdir()))
    assert ring.steps[-4:] == [970, 980, 990, 1000] and ring.steps == sorted(ring.steps)
    # however long ago an onset lies, a snapshot is not much further from it than a third of its age
    for onset in range(100, 1000, 10):
        nearest = min(abs(step - onset) for step in ring.steps)
        assert nearest <= 10 + (1000 - onset) / 3, onset
    for step in ring.steps:
        held = torch.load(ring.path(step), weights_only=True)
        assert (held["step"], held["epoch"], held["state_dict"]["w"].tolist()) == (step, step // 100, [step, step])


def test_what_no_search_can_reach_leaves_the_ring(tmp_path: Path) -> None:
    assert filled(tmp_path, 400, max_snapshots=4).steps[0] > 0
    assert len(list((tmp_path / "snapshots").iterdir())) == 4


def test_roles_choose_their_side_and_share_a_file(tmp_path: Path) -> None:
    ring = filled(tmp_path, 8)
    paths = ring.pin({"before": 34.0, "onset": 34.0, "after": 41.0, "flag": 80.0}, "transition_00")
    assert {role: Path(path).name for role, path in paths.items()} == {
        "before": "transition_00_before_onset_step_000000030.pt",
        "onset": "transition_00_before_onset_step_000000030.pt",
        "after": "transition_00_after_step_000000050.pt",
        "flag": "transition_00_flag_step_000000080.pt",
    }
    assert sorted(p.name for p in (tmp_path / "pinned").iterdir()) == sorted({Path(p).name for p in paths.values()})
    assert torch.load(paths["after"], weights_only=True)["state_dict"]["w"].tolist() == [50.0, 50.0]
    assert ring.steps == [0, 10, 20, 40, 60, 70] and not ring.path(30).exists()
    # a later transition finds what an earlier one has pinned, under its first name
    again = ring.pin({"before": 55.0, "after": 1000.0}, "transition_01")
    assert Path(again["before"]).name == "transition_00_after_step_000000050.pt"
    assert Path(again["after"]).name == "transition_00_flag_step_000000080.pt"
    for step in range(90, 500, 10):
        ring.add(weights(step), step)
    assert all(Path(path).exists() for path in paths.values())


def test_nothing_to_pin_is_no_error(tmp_path: Path) -> None:
    assert SnapshotRing(tmp_path).pin({"before": 3.0}, "transition_00") == {}
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = filled(tmp_path, 2)

    def full(_: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        ring.add(weights(30), 30)
    assert ring.steps == [0, 10, 20]
    assert [p.name for p in sorted((tmp_path / "snapshots").iterdir())] == [
        f"step_0000000{s}.pt" for s in ("00", 10, 20)
    ]


def test_a_ring_goes_on_after_a_crash(tmp_path: Path) -> None:
    """After the checkpoint two more were written, one half, and one that it names was pinned."""
    ring = filled(tmp_path, 4)
    state = ring.state_dict()
    ring.pin({"flag": 30.0}, "transition_00")
    ring.add(weights(50), 50)
    (tmp_path / "snapshots" / "step_000000060.pt.tmp").write_bytes(b"half")
    (tmp_path / "snapshots" / "notes.txt").write_text("somebody else's")
    again = SnapshotRing(tmp_path)
    again.load_state_dict(state)
    assert again.steps == [0, 10, 20, 40] and list(again.pinned) == [30]
    names = sorted(p.name for p in (tmp_path / "snapshots").iterdir())
    assert names == ["notes.txt", *(f"step_{s:09d}.pt" for s in (0, 10, 20, 40))]
    assert again.pin({"flag": 30.0}, "transition_00") == {
        "flag": str(tmp_path / "pinned" / "transition_00_flag_step_000000030.pt")
    }


# --------------------------------------------------------------------------------------------------------- what changed


def curve(**changes: Any) -> list[Any]:
    """10 with scatter 1 up to step 280, 25 from 330 on; every 10 steps."""
    points = []
    for step in range(0, 600, 10):
        share = min(max((step - 280) / 50, 0.0), 1.0)
        mean, loss = 10 + 15 * share + (-1) ** (step // 10) * 0.5, 1.5 - 0.5 * share
        points.append(make_estimate(num_draws=2, mean=mean, init_loss=loss, step=step, nbeta=150.0, **changes))
    return points


def test_sides_are_the_plateaus_next_to_it() -> None:
    left, right = sides(make_transition(), curve())
    assert [e.step for e in left] == list(range(210, 281, 10)) and [e.step for e in right] == list(range(330, 401, 10))
    earlier = make_transition(id=1, onset=200.0, step=230.0, end=250.0)
    later = make_transition(id=2, onset=350.0, step=360.0, end=370.0)
    gone = make_transition(id=3, onset=335.0, step=336.0, end=337.0, state="retracted")
    left, right = sides(make_transition(), curve(), [earlier, later, gone])
    assert [e.step for e in left] == [250, 260, 270, 280] and [e.step for e in right] == [330, 340, 350]


def test_points_that_are_not_valid_speak_for_no_phase() -> None:
    points = [e.replace(valid=e.step != 270, mean=math.nan if e.step == 260 else e.mean) for e in curve()]
    left, _ = sides(make_transition(), points)
    assert [e.step for e in left] == [190, 200, 210, 220, 230, 240, 250, 280]


def test_a_phase_is_the_mean_with_the_chain_error_kept() -> None:
    points = [make_estimate(num_draws=2, mean=m, se=0.3, init_loss=x) for m, x in ((9.0, 1.4), (11.0, 1.6))]
    phase = phase_of(points)
    assert phase is not None
    assert (phase.llc, phase.loss) == (10.0, pytest.approx(1.5))
    assert phase.llc_se == pytest.approx(math.hypot(1.0, 0.3)) and phase.loss_se == pytest.approx(0.1)
    assert phase_of(points[:1]) is None


def test_posteriors_and_what_they_prefer() -> None:
    report = with_phases(TransitionReport(make_transition()), curve())
    assert report.num_samples == 1000 and report.before is not None and report.tempered and report.untempered
    assert report.before.llc == pytest.approx(10.0) and report.after.llc == pytest.approx(25.0)
    assert report.tempered.beta == pytest.approx(0.15)
    # n beta (L_U - L_V) - (lambda_V - lambda_U) log(n beta)
    assert report.tempered.log_odds == pytest.approx(150 * 0.5 - 15 * math.log(150), abs=1e-6)
    assert report.untempered.log_odds == pytest.approx(1000 * 0.5 - 15 * math.log(1000), abs=1e-6)
    assert (report.tempered.preferred, report.untempered.preferred) == ("undecided", "after")
    critical = report.untempered.critical_n
    assert critical * 0.5 == pytest.approx(15 * math.log(critical), rel=1e-6)
    assert report.tempered.critical_n == pytest.approx(critical / 0.15)


def test_nothing_is_said_where_n_or_a_phase_is_not_known() -> None:
    report = with_phases(TransitionReport(make_transition()), curve(num_samples=None))
    assert report.before is not None and report.tempered is None and report.untempered is None
    early = with_phases(report, [e for e in curve() if e.step <= 330])
    assert early.after is None and early.tempered is None


def test_a_phase_of_negative_llc_is_preferred_to_nothing() -> None:
    points = [e.replace(mean=e.mean - 20.0) for e in curve()]
    report = with_phases(TransitionReport(make_transition()), points)
    assert report.before is not None and report.before.llc == pytest.approx(-10.0)
    assert report.tempered is None and report.untempered is None


def test_samples_are_compared_across_the_transition_only() -> None:
    changed = make_influence(step=330)
    loss = changed.mean_loss.clone()
    loss[4] += 2.0
    loss += 0.01
    own = changed.self_influence.clone()
    own[8] += 50.0
    own += 0.01
    after = changed.replace(mean_loss=loss, self_influence=own)
    history = [make_influence(step=100), make_influence(step=280), changed.replace(step=300), after]
    moved = moved_samples(make_transition(), history)
    assert [s.index for s in moved[:2]] == [80, 40] and len(moved) == 10
    assert moved[0].self_influence_change == pytest.approx(50.01) and moved[1].mean_loss_change == pytest.approx(2.01)
    assert moved[1].mean_loss_change_se == pytest.approx(math.hypot(0.01, 0.01))
    assert [s.stands_out for s in moved[:3]] == [True, True, False]
    assert moved_samples(make_transition(), history[:2]) == ()
    assert moved_samples(make_transition(), [e.replace(valid=False) for e in history]) == ()


def test_samples_that_moved_at_the_next_transition_are_not_named_at_this_one() -> None:
    """Where nothing valid lies on the plateau between the two, nothing is said."""
    later = make_transition(id=1, onset=340.0, step=345.0, end=350.0)
    changed = make_influence(step=360)
    loss = changed.mean_loss.clone()
    loss[4] += 2.0
    history = [make_influence(step=280), changed.replace(mean_loss=loss)]
    assert moved_samples(make_transition(), history)[0].index == 40
    assert (
        moved_samples(make_transition(), history, others=[later])
        == moved_samples(
            later,
            history,
            others=[
                make_transition(),
            ],
        )
        == ()
    )
    between = [history[0], make_influence(step=335), history[1]]
    assert not any(s.stands_out for s in moved_samples(make_transition(), between, others=[later]))
    assert moved_samples(later, between, others=[make_transition()])[0].index == 40


def test_components_are_compared_in_their_own_scatter() -> None:
    quiet = [e.replace(mean=5 + 0.01 * (e.step >= 330) + (-1) ** (e.step // 10) * 1e-4, se=1e-4) for e in curve()]
    moved = moved_components(make_transition(), {"loud": curve(), "quiet": quiet, "late": curve()[40:]})
    assert [c.name for c in moved] == ["quiet", "loud"]
    assert moved[0].change == pytest.approx(0.01, rel=0.05) and moved[1].change == pytest.approx(15.0)
    assert moved[0].scatters > 3 * moved[1].scatters > 0


def test_what_a_component_moved_by_at_the_next_transition_is_not_counted_at_this_one() -> None:
    """Two points lie on the plateau between the two; the second component moves at the later one only."""
    later = make_transition(id=1, onset=340.0, step=345.0, end=350.0)
    still = [e.replace(mean=5 + 40 * (e.step > 345) + (-1) ** (e.step // 10) * 0.1) for e in curve()]
    moved = moved_components(make_transition(), {"slt": curve(), "still": still}, [make_transition(), later])
    assert [c.name for c in moved] == ["slt", "still"]
    assert moved[0].change == pytest.approx(15.0) and abs(moved[1].change) < 0.2


def test_offline_transitions_go_to_one_report_each() -> None:
    up = make_transition(id=0, onset=281.0, step=299.0)
    down = make_transition(id=1, onset=285.0, step=300.0, llc_change=-5.0, kind="B")
    far = make_transition(id=2, onset=900.0, step=910.0, end=920.0)
    first, second = make_report(), make_report(make_transition(id=1, step=310.0))
    gone = make_report(make_transition(id=2, state="retracted"))
    found = refined([gone, first, second], [up, down, far])
    assert [r.refined for r in found] == [None, up, None]


def test_the_sentence_says_what_is_known() -> None:
    assert make_report().sentence() == (
        "transition 0 (kind A, provisional) around step 300 (280 to 330), known at step 360: LLC from 10 ± 0.5 to 25 ± "
        "0.5, loss from 1.5 ± 0.01 to 1 ± 0.01; of the components attn moved most (+9, 18 times as much as it varies "
        "from point to point); samples that moved most: 70; the sampled posterior prefers the phase before at n = 800 "
        "(log-odds of the new phase −7 ± 2; equal at n = 980, 95 % 700 to unbounded)"
    )
    bare = TransitionReport(make_transition(boundary=295.0))
    assert bare.sentence() == (
        "transition 0 (kind A, provisional) around step 300 (280 to 330), known at step 360: LLC rose by 15 ± 0.5, "
        "loss fell by 0.5 ± 0.01; the learning rate or the data changed at step 295"
    )


def test_the_sentence_has_minus_signs_and_the_digits_that_errors_leave() -> None:
    report = make_report(
        before=Phase(1.5, 0.01, -20987.0, 3.0),
        after=Phase(-1.0, 0.01, 25.0, 0.5),
        components=(MovedComponent("attn-1", -9.0, 18.26), MovedComponent("mlp", 0.1, 0.2)),
        samples=(),
        tempered=Verdict(0.15, "before", -12345.6, 240.0, None, None, None),
    )
    said = report.sentence()
    assert "LLC from −20987 ± 3 to 25 ± 0.5, loss from 1.5 ± 0.01 to −1 ± 0.01" in said
    assert "attn-1 moved most (−9, 18 times as much as it varies from point to point)" in said
    assert said.endswith("(log-odds of the new phase −12350 ± 240)")
    still = report.replace(components=(MovedComponent("attn-1", -9.0, math.inf),))
    assert "attn-1 moved most (−9); the sampled" in still.sentence()
    small = TransitionReport(make_transition(llc_change=-21234.0, llc_change_se=12.0))
    assert "LLC fell by 21234 ± 12" in small.sentence()


@pytest.mark.parametrize("callback", [SLTMonitor(), TransitionMonitor()], ids=["SLTMonitor", "TransitionMonitor"])
def test_an_empty_state_changes_nothing(callback: Any) -> None:
    before = callback.state_dict()
    callback.load_state_dict({})
    assert str(callback.state_dict()) == str(before)


class LongHistory(list[Any]):
    """May be read from its end, and not as a whole."""

    def __iter__(self) -> Any:
        raise AssertionError("the whole history was gone through")


def test_a_point_of_a_long_run_costs_no_look_at_all_that_came_before() -> None:
    monitor = SimpleNamespace(measures_later=True, estimates=LongHistory())
    watch = TransitionMonitor(pin_checkpoints=False)
    trainer: Any = SimpleNamespace(callback_metrics={}, callbacks=[])
    for step in range(1, 6):
        monitor.estimates.append(make_estimate(step=step))
        if step != 3:  # of one that it has not been told of it learns with the next
            watch.on_estimate(trainer, None, monitor, monitor.estimates[-1], None)  # type: ignore[arg-type]
    assert [point[0] for point in watch.state_dict()["detector"]["points"]] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert watch.state_dict()["fed"] == 5
