"""The rows that charts draw: which number stands where, what is cut at the frame, and what ends a line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_slt.publish.chart_rows import (
    CURVE_COLUMNS,
    as_dicts,
    curve_rows,
    diagnostic_rows,
    free_energy_rows,
    group_rows,
    loss_is_wide,
    steps_scale,
    trajectory_rows,
)
from lightning_slt.publish.specs.parts import ABOVE, BELOW, INVALID, NONE, VALID
from lightning_slt.transition_record import Verdict
from tests.publish.helpers import make_estimate, make_influence, make_report, make_transition


def test_what_is_not_valid_ends_a_segment_and_widens_the_frame_where_it_is_near() -> None:
    """Valid are 10 and 12 with errors of 0.5: the height of their bands is 3.96, from 9.02 to 12.98."""
    bad = {"reasons": ("not mixed",)}
    estimates = [
        make_estimate(10.0, step=1),
        make_estimate(12.0, step=2),
        make_estimate(14.0, step=3, **bad),
        make_estimate(12.0, step=4),
        make_estimate(-100.0, step=5, **bad),
        make_estimate(math.nan, step=6, **bad),
        make_estimate(10.0, step=7),
    ]
    rows = [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in curve_rows(estimates)]
    assert [row["state"] for row in rows] == [VALID, VALID, INVALID, VALID, BELOW, NONE, VALID]
    assert [row["segment"] for row in rows] == ["0", "0", "1", "1", "2", "3", "3"]
    assert [row["llc"] for row in rows[:4]] == [10.0, 12.0, 14.0, 12.0] and rows[6]["llc"] == 10.0
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((9.02, 10.98))
    foot = rows[4]["llc"]
    assert 7.0 < foot < 9.02 and rows[4]["high"] == rows[4]["low"] == rows[5]["llc"] == foot
    above = [make_estimate(10.0, step=1), make_estimate(1000.0, step=2, **bad)]
    assert [row["state"] for row in as_dicts(CURVE_COLUMNS, curve_rows(above))] == [VALID, ABOVE]


def test_a_transition_that_was_retracted_has_no_row() -> None:
    stands = make_transition(boundary=True)
    rows = curve_rows([make_estimate()], [stands, make_transition(id=1, state="retracted")], [42.0])
    named = as_dicts(CURVE_COLUMNS, rows)
    assert [row["row"] for row in named] == ["estimate", "transition", "boundary"]
    assert {k: named[1][k] for k in ("step", "middle", "end", "kind", "state", "boundary")} == {
        "step": 280.0,
        "middle": 300.0,
        "end": 330.0,
        "kind": "A",
        "state": "provisional",
        "boundary": True,
    }
    assert named[2]["step"] == 42.0


def test_an_axis_with_a_step_of_zero_is_not_purely_logarithmic() -> None:
    def scale(*steps: int) -> str:
        return steps_scale([make_estimate(step=step) for step in steps])

    assert scale(1, 10, 100, 1000) == "log" and scale(0, 1, 10, 100, 1000) == "symlog"
    assert scale(*range(0, 1000, 100)) == "linear"


def test_a_loss_is_wide_beyond_a_factor_of_fifty() -> None:
    def wide(*losses: float) -> bool:
        return loss_is_wide([make_estimate(init_loss=loss) for loss in losses])

    assert wide(51.0, 1.0) and not wide(50.0, 1.0) and not wide(51.0, 1.0, 0.0) and not wide(math.nan)
    assert wide(51.0, math.nan, 1.0)


def test_each_diagnostic_has_its_own_number() -> None:
    rows = diagnostic_rows([make_estimate(rhat=1.25, ess=80.0, virial=0.75, bad_chains=1, step=7)])
    assert [(row["measure"].split()[0], row["step"], row["value"]) for row in rows] == [
        ("R-hat", 7, 1.25),
        ("effective", 7, 80.0),
        ("chains", 7, 1.0),
        ("virial", 7, 0.75),
    ]


@pytest.mark.parametrize(("posterior", "beta"), [("the posterior that was sampled", 0.15), ("beta = 1", 1.0)])
def test_the_lines_of_two_phases_are_their_free_energies_up_to_three_times_where_they_cross(
    posterior: str, beta: float
) -> None:
    """``n beta (L - L_min) + llc log(n beta)``; the losses are 1.5 and 1, the coefficients 10 and 25."""
    rows = [row for row in free_energy_rows(make_report()) if row["posterior"].startswith(posterior)]
    lines = {side: [row for row in rows if row.get("phase") == f"phase {side}"] for side in ("before", "after")}
    for side, loss, llc in (("before", 0.5, 10.0), ("after", 0.0, 25.0)):
        for row in lines[side]:
            size = row["n"] * beta
            assert row["energy"] == pytest.approx(size * loss + llc * math.log(size), rel=1e-3)
    (critical,) = (row for row in rows if row["row"] == "critical")
    crossing = 0.5 * critical["n"] * beta + 10.0 * math.log(critical["n"] * beta)
    highest = max(row["energy"] for side in lines.values() for row in side)
    assert 2 * crossing < highest <= 3.001 * crossing
    assert [row["n"] for row in rows if row["row"] == "here"] == [800]


def test_the_error_of_a_critical_n_is_cut_at_the_lines() -> None:
    report = make_report()
    rows = free_energy_rows(report)
    assert [(row["low"], row["high"]) for row in rows if row["row"] == "critical"][1] == (130.0, 165.0)
    wide = replace(report, tempered=None, untempered=Verdict(1.0, "after", 396.0, 6.0, 147.0, 0.5, 1e9))
    rows = free_energy_rows(wide)
    drawn = sorted({row["n"] for row in rows if row["row"] == "line"})
    (critical,) = (row for row in rows if row["row"] == "critical")
    assert critical["low"] == pytest.approx(drawn[0], rel=1e-4) and drawn[-1] <= critical["high"] < 1e5


def test_a_cell_of_groups_is_of_queries_by_training_samples_and_dark_where_it_is_clear_and_large() -> None:
    values = torch.tensor([[0.0625, 0.01], [-0.05, 0.045]]).double()
    errors = torch.tensor([[0.01, 0.02], [0.01, 0.02]]).double()
    names = ("cat", "dog")
    rows = group_rows(make_influence(classes=2, groups=names, group_matrix=values, group_se=errors))
    found = [(row["query"], row["train"], row["value"], row["clear"], row["dark"], row["text"]) for row in rows]
    assert found == [
        ("cat", "cat", 0.0625, True, True, "6.2"),
        ("cat", "dog", 0.01, False, False, "1.0"),
        ("dog", "cat", -0.05, True, True, "−5.0"),
        ("dog", "dog", 0.045, False, False, "4.5"),
    ]
    assert rows[0]["words"].startswith("Samples of cat help queries of cat")
    assert rows[2]["words"].startswith("Samples of cat harm queries of dog")


def test_each_sample_has_the_course_of_its_own_losses() -> None:
    """The mean loss of the second sample changes most, the others' less, in their order."""
    history = [
        make_influence(
            3,
            2,
            step=step,
            mean_loss=torch.tensor([1.0 + 2 * k, 1.0 + 4 * k, 1.0 + k]).double(),
            self_influence=torch.tensor([10.0 + k, 20.0 + k, 30.0 + k]).double(),
        )
        for k, step in enumerate((5, 15))
    ]
    rows = trajectory_rows(history)
    course: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        line = row["measure"].split()[0], row["sample"].split()[0]
        course.setdefault(line, []).append((row["step"], row["value"]))
    assert course == {
        ("mean", "0"): [(5, 1.0), (15, 3.0)],
        ("mean", "10"): [(5, 1.0), (15, 5.0)],
        ("mean", "20"): [(5, 1.0), (15, 2.0)],
        ("self-influence", "0"): [(5, 10.0), (15, 11.0)],
        ("self-influence", "10"): [(5, 20.0), (15, 21.0)],
        ("self-influence", "20"): [(5, 30.0), (15, 31.0)],
    }
