import csv
import io
import math

import pytest

from lightning_slt.publish.tables import (
    HISTORY_COLUMNS,
    are_log_spaced,
    chain_rows,
    history_csv,
    history_markdown,
    history_row,
    step_of,
    to_markdown,
)
from tests.publish.helpers import make_estimate


def test_chains_are_thinned_to_whole_draws_within_the_limit():
    estimate = make_estimate(num_chains=4, num_draws=1001)
    rows = chain_rows(estimate)
    assert len(rows) == 4 * 334  # every third draw
    assert [row[:2] for row in rows[:3]] == [[0, 0], [0, 3], [0, 6]]
    assert rows[1][2] == float(estimate.trace[0, 3])
    assert len(chain_rows(make_estimate(num_chains=4, num_draws=500))) == 2000
    assert len(chain_rows(make_estimate(num_chains=5, num_draws=10), limit=3)) == 3


def test_nan_is_none_in_rows_and_empty_in_csv():
    estimate = make_estimate(mean=math.nan, se=math.nan, reasons=("a", "b"), step=7)
    row = dict(zip(HISTORY_COLUMNS, history_row(estimate), strict=True))
    assert (row["step"], row["llc"], row["valid"], row["reasons"]) == (7, None, False, "a; b")
    read = next(csv.DictReader(io.StringIO(history_csv([estimate]))))
    assert (read["llc"], read["rhat"], read["reasons"]) == ("", "1.01", "a; b")


def test_every_column_has_the_number_of_its_name():
    names = {"llc": "mean", "loss": "init_loss", "overhead_frac": "overhead", "n_bad_chains": "num_bad_chains"}
    columns = [name for name in HISTORY_COLUMNS if name not in ("valid", "reasons")]
    values = {names.get(column, column): 2 + k for k, column in enumerate(columns)}
    row = dict(zip(HISTORY_COLUMNS, history_row(make_estimate(**values)), strict=True))
    assert {column: row[column] for column in columns} == dict(zip(columns, values.values(), strict=True))


def test_an_estimate_without_a_step_stands_at_the_loggers_one_and_else_at_its_number():
    assert step_of(make_estimate(step=7, x=5), 3) == 7
    assert step_of(make_estimate(step=None, x=5), 3) == 5
    assert step_of(make_estimate(step=None, x=None), 3) == 3


def test_steps_that_span_a_factor_of_a_hundred_are_not_drawn_on_a_logarithmic_axis():
    assert not are_log_spaced([1, 2, 4, 20, 100])
    assert are_log_spaced([1, 2, 4, 20, 101])
    assert not are_log_spaced([0, 1, 1000])


def test_the_monte_carlo_error_can_be_told_from_a_row():
    """Transitions go by that part of the error; what is owed, and of the step, moves along a curve."""
    estimate = make_estimate(se=0.5, owed=0.3, lean=0.24, unsure_heat=0.1)
    row = dict(zip(HISTORY_COLUMNS, history_row(estimate), strict=True))
    assert [row[key] for key in ("se", "owed", "lean", "unsure_heat")] == [0.5, 0.3, 0.24, 0.1]
    assert math.sqrt(row["se"] ** 2 - row["owed"] ** 2 - row["lean"] ** 2 - 0.1**2) == pytest.approx(estimate.chain_se)


def test_a_bar_in_a_reason_does_not_end_the_markdown_cell():
    lines = history_markdown([make_estimate(reasons=("|w| grew",))]).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == len(HISTORY_COLUMNS) + 1


def test_a_step_keeps_its_digits_in_markdown():
    """Steps of transitions lie between those of estimates; 1.011e+05 would be of any of a hundred."""
    rows = [[101072.8125, 0.000123456], [123456.0, -12345.6], [999.96, -1.0612e13]]
    assert to_markdown(("step", "value"), rows).splitlines()[2:] == [
        "| 101073 | 0.0001235 |",
        "| 123456 | -12346 |",
        "| 1000 | -1.061e+13 |",
    ]


def test_a_backslash_in_front_of_a_bar_does_not_end_the_markdown_cell():
    assert to_markdown(("group",), [["a\\|b"], ["two\r\nlines"]]).splitlines()[2:] == ["| a\\\\\\|b |", "| two lines |"]
