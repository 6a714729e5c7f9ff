"""Influence as rows: their columns, order and values, and what a cell may hold."""

import csv
import io
import math

import pytest
import torch

from lightning_slt.publish.influence_tables import (
    PAIR_COLUMNS,
    SUSPECT_COLUMNS,
    media_id,
    pair_rows,
    suspect_rows,
)
from lightning_slt.publish.tables import to_csv, to_markdown
from tests.publish.helpers import make_influence, nothing_measured


def named(columns, rows):
    assert all(len(row) == len(columns) for row in rows)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_suspects_in_the_order_of_their_posterior_mean_loss_with_the_plain_rank_beside():
    """Plain losses are in the opposite order: the first suspect is the last by plain loss."""
    rows = named(SUSPECT_COLUMNS, suspect_rows(make_influence(n=30)))
    assert [r["rank"] for r in rows] == list(range(1, 21))
    assert [r["index"] for r in rows] == list(range(0, 200, 10))
    assert [r["plain_loss_rank"] for r in rows] == list(range(30, 10, -1))
    assert rows[1] == {
        "rank": 2,
        "index": 10,
        "group": "1",
        "mean_loss": pytest.approx(2 + 29 / 30),
        "mean_loss_se": 0.01,
        "plain_loss": pytest.approx(0.1 + 1 / 30),
        "plain_loss_rank": 29,
        "self_influence": 1.5,
        "llc": pytest.approx(100 * (1.9 + 28 / 30)),
        "media": "sample_10",
    }
    assert [type(v) for v in rows[0].values()] == [int, int, str, float, float, float, int, float, float, str]


def test_as_many_suspects_as_asked_for_and_as_there_are():
    assert len(suspect_rows(make_influence(n=30), k=3)) == 3
    assert len(suspect_rows(make_influence(n=5))) == 5
    assert suspect_rows(nothing_measured()) == []


def test_suspects_without_groups_and_with_errors_that_are_not_known():
    estimate = make_influence(n=3, train_group=None, query_group=None, mean_loss_se=torch.full((3,), math.nan))
    rows = named(SUSPECT_COLUMNS, suspect_rows(estimate))
    assert [(r["group"], r["mean_loss_se"]) for r in rows] == [("", None)] * 3


def test_only_pairs_beyond_three_errors_are_shown():
    rows = named(PAIR_COLUMNS, pair_rows(make_influence()))
    assert rows == [
        {
            "query": 1,
            "token": None,
            "query_group": "1",
            "side": "helpful",
            "index": 20,
            "group": "2",
            "value": 2.0,
            "se": 0.25,
            "z": 8.0,
            "rho": 0.5,
        }
    ]


def test_pairs_on_either_side_of_the_limit():
    """z of 3.1 and -3.1 are in, 2.9 and -2.9 are not."""
    z = torch.tensor([[3.1, 2.9, -2.9, -3.1, 0.0], [-9.0, 5.0, 7.0, -4.0, 1.0]], dtype=torch.float64)
    estimate = make_influence(n=5, num_queries=2, matrix=0.5 * z, se=torch.full((2, 5), 0.5).double(), correlation=z)
    rows = named(PAIR_COLUMNS, pair_rows(estimate))
    found = [(r["query"], r["side"], r["index"], r["z"]) for r in rows]
    assert found == [
        (0, "helpful", 0, pytest.approx(3.1)),
        (0, "harmful", 30, pytest.approx(-3.1)),
        (1, "helpful", 20, 7.0),
        (1, "helpful", 10, 5.0),
        (1, "harmful", 0, -9.0),
        (1, "harmful", 30, -4.0),
    ]


def test_pairs_are_bounded_by_query_and_side():
    everything = make_influence(n=30, num_queries=25, matrix=torch.ones(25, 30).double())
    rows = named(PAIR_COLUMNS, pair_rows(everything))
    assert len(rows) == 20 * 5 and {r["query"] for r in rows} == set(range(20))
    assert len(pair_rows(everything, k=2, max_queries=3)) == 6


def test_pairs_of_tokens_say_which_token():
    tokens = make_influence(query_index=torch.tensor([4, 4, 4, 9, 9, 9]), query_token=torch.tensor([0, 1, 2] * 2))
    (row,) = named(PAIR_COLUMNS, pair_rows(tokens))
    assert (row["query"], row["token"]) == (4, 1)


def test_no_pairs_where_none_are_kept_or_their_errors_are_unknown():
    assert pair_rows(make_influence().without_pairs()) == []
    assert pair_rows(make_influence(se=torch.full((6, 30), math.nan).double())) == []
    assert pair_rows(nothing_measured()) == []


HOSTILE = ["a|b", "two\nlines", 'a "quoted", comma', "<script>", "$x$", "日本語"]


def test_hostile_groups_come_back_from_csv_as_they_were():
    groups = tuple(HOSTILE)
    text = to_csv(SUSPECT_COLUMNS, suspect_rows(make_influence(n=6, train_group=groups, query_group=groups)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [r["group"] for r in rows] == HOSTILE
    assert to_csv(("a", "b"), [[None, 1.5]]) == "a,b\n,1.5\n"


def test_hostile_groups_do_not_break_a_markdown_table():
    lines = to_markdown(("group", "value"), [[g, 0.123456] for g in HOSTILE] + [[None, 7]]).splitlines()
    assert len(lines) == 2 + len(HOSTILE) + 1
    assert lines[:4] == ["| group | value |", "| --- | --- |", "| a\\|b | 0.1235 |", "| two lines | 0.1235 |"]
    assert lines[-1] == "|  | 7 |"


def test_media_is_referred_to_by_a_name_that_any_file_system_takes():
    assert media_id(1234) == "sample_1234"
