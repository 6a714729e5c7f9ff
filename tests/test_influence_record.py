"""Influence of made-up numbers: what is read off them, and their way through files, a checkpoint and a crash."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_slt.influence_record import Dropped, InfluenceEstimate, InfluenceRecord, in_order, suspicion_of
from lightning_slt.susceptibility_record import SusceptibilityRecord

TRAIN = [10, 20, 30, 40]
"""The training samples' numbers in their dataset."""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["class 10", "class 2", "class 1"], ("class 1", "class 2", "class 10")),
        (["10", "9", "-3", "2.5"], ("-3", "2.5", "9", "10")),
        (["b", "10", "a2c", "a10b", "2"], ("2", "10", "a2c", "a10b", "b")),
        (["nan", "3", "1", "2"], ("1", "2", "3", "nan")),  # a column of pandas has such a label
        (["inf", "x", "1e3", "20"], ("20", "1e3", "inf", "x")),
        (["猫", "1" * 5000, "", "犬2"], ("", "1" * 5000, "犬2", "猫")),
    ],
)
def test_names_of_groups_are_in_the_order_of_their_numbers(given: list[str], wanted: tuple[str, ...]) -> None:
    assert in_order(given) == in_order(reversed(given)) == wanted


def double(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def estimate(step: int | None = 100, **changes: Any) -> InfluenceEstimate:
    """Two queries of their own, 5 and 7, and four training samples; every error is 0.5."""
    fields: dict[str, Any] = {
        "matrix": double([4.0, -2.0, 1.0, 0.0], [-1.0, 3.0, -0.25, 6.0]),
        "correlation": double([0.9, -0.5, 0.95, 0.0], [-0.1, 0.3, -0.2, 0.8]),
        "se": torch.full((2, 4), 0.5, dtype=torch.float64),
        "self_influence": double(1.0, 6.0, 2.0, 1.0),
        "self_influence_se": double(0.1, 0.1, 0.1, 0.1),
        "init_loss": double(0.5, 0.1, 3.0, 0.2),
        "mean_loss": double(0.6, 2.5, 2.0, 0.3),
        "mean_loss_se": double(0.01, 0.02, 0.03, 0.04),
        "query_init_loss": double(0.1, 0.2),
        "query_mean_loss": double(0.3, 0.4),
        "train_index": torch.tensor(TRAIN),
        "query_index": torch.tensor([5, 7]),
        "nbeta": 10.0,
        "localization": 2.0,
        "num_chains": 4,
        "num_draws": 25,
        "num_blocks": 16,
        "between_share": 0.125,
        "train_group": ("a", "b", "a", "b"),
        "query_group": ("a", "b"),
        "groups": ("a", "b"),
        "group_matrix": double([2.5, -1.0], [-0.625, 4.5]),
        "group_se": double([0.25, 0.25], [0.25, 0.25]),
        "num_samples": 1000,
        "step": step,
        "epoch": 1,
        "x": None if step is None else step - 1,
        "seconds": 1.5,
    }
    return InfluenceEstimate(**{**fields, **changes})


def of_themselves(**changes: Any) -> InfluenceEstimate:
    """Three training samples that are the queries too: the diagonal is a sample's influence on itself."""
    matrix = double([9.0, 1.0, -2.0], [1.0, 4.0, 0.25], [-2.0, 0.25, 16.0])
    three = {"se": torch.full((3, 3), 0.5).double(), "correlation": matrix / 16, "queries_are_train": True}
    vectors = {"self_influence": matrix.diagonal().clone(), "init_loss": double(1.0, 2.0, 3.0)}
    vectors |= {name: double(1.0, 2.0, 3.0) for name in ("mean_loss", "mean_loss_se", "self_influence_se")}
    vectors |= {name: double(1.0, 2.0, 3.0) for name in ("query_init_loss", "query_mean_loss")}
    index = {"train_index": torch.tensor([3, 5, 8]), "query_index": torch.tensor([3, 5, 8])}
    no_groups = {"train_group": None, "query_group": None, "groups": (), "group_matrix": None, "group_se": None}
    return estimate(**{"matrix": matrix, **three, **vectors, **index, **no_groups, **changes})


def not_measured() -> InfluenceEstimate:
    """What comes of chains of which none has stayed finite."""
    none, pairs, long = torch.empty(0).double(), torch.empty(0, 0).double(), torch.empty(0, dtype=torch.long)
    return InfluenceEstimate(
        *(pairs, pairs, pairs, none, none, none, none, none, none, none, long, long),
        nbeta=math.nan,
        localization=2.0,
        num_chains=0,
        num_draws=0,
        valid=False,
        reasons=("no chain has stayed finite and local",),
        dropped=(Dropped("train", 3, "its loss is not finite"),),
        queries_are_train=True,
        step=7,
    )


def assert_same(a: InfluenceEstimate, b: InfluenceEstimate) -> None:
    """The same, pairs up to the rounding of float32."""
    assert repr(a.scalars()) == repr(b.scalars())
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True)
    assert b.matrix.dtype == torch.float64 and b.train_index.dtype == torch.long


# -------------------------------------------------------------------------------------------------- what it says


def test_most_helpful_and_most_harmful_by_their_number_in_the_dataset() -> None:
    e = estimate()
    assert e.top(0) == [(10, 4.0, 0.5), (30, 1.0, 0.5)]
    assert e.bottom(0) == [(20, -2.0, 0.5)]
    assert e.top(1, k=1) == [(40, 6.0, 0.5)]
    assert e.bottom(1) == [(10, -1.0, 0.5), (30, -0.25, 0.5)]
    assert e.top(0, k=0) == []
    for row in (2, -1):
        with pytest.raises(IndexError, match=rf"query={row}: there are 2 queries, numbered from 0"):
            e.top(row)


@pytest.mark.parametrize("method", ["top", "bottom", "nearest"])
def test_without_any_row_the_reason_is_given(method: str) -> None:
    none = estimate(valid=False, reasons=("no chain stayed in the posterior",)).without_pairs()
    with pytest.raises(IndexError, match=r"query=0: there are 0 queries, .* not valid: no chain stayed in the post"):
        getattr(none, method)()


@pytest.mark.parametrize("method", ["top", "bottom", "suspects", "nearest"])
def test_a_negative_number_of_samples_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"^k=-1: must be at least 0"):
        getattr(estimate(), method)(k=-1)
    assert getattr(estimate(), method)(k=0) == []


def test_a_limit_on_z_leaves_out_what_chance_makes() -> None:
    """z is 8, -4, 2 and 0 in the first row; a value at the limit stays."""
    e = estimate()
    assert e.z[0].tolist() == [8.0, -4.0, 2.0, 0.0]
    assert e.top(0, min_z=3.0) == [(10, 4.0, 0.5)] and e.top(0, min_z=2.0) == e.top(0)
    assert e.bottom(0, min_z=3.0) == [(20, -2.0, 0.5)] and e.bottom(0, min_z=4.5) == []
    unknown = estimate(se=torch.full((2, 4), math.nan).double())
    assert unknown.top(0, min_z=3.0) == [] and unknown.passing == 0.0


def test_a_sample_does_not_count_as_its_own_query() -> None:
    e = of_themselves()
    assert e.top(0) == [(5, 1.0, 0.5)] and e.bottom(0) == [(8, -2.0, 0.5)] and e.top(2) == [(5, 0.25, 0.5)]
    assert e.max_abs == 2.0
    assert e.passing == 2 / 6  # both of the pair of 3 and 8
    assert e.nearest(0) == [(5, 1 / 16), (8, -2 / 16)]
    # the same numbers with queries that are other samples: the diagonal is a pair like any
    other = of_themselves(queries_are_train=False)
    assert other.max_abs == 16.0 and other.passing == 5 / 9 and other.top(0, 1) == [(3, 9.0, 0.5)]


def test_suspects_are_those_of_the_largest_posterior_mean_loss() -> None:
    e = estimate()
    assert e.suspects() == [1, 2, 0, 3] and e.suspects(2) == [1, 2]
    assert e.loss_rank().tolist() == [2, 4, 1, 3]  # by plain loss the third is first, and the second last
    assert not_measured().suspects() == [] and not_measured().loss_rank().tolist() == []


def test_samples_alike_keep_their_order() -> None:
    even = double(1.0, 1.0, 1.0, 1.0)
    e = estimate(mean_loss=even, init_loss=even, matrix=torch.ones(2, 4).double())
    assert e.suspects(3) == [0, 1, 2] and e.loss_rank().tolist() == [1, 2, 3, 4]
    assert [index for index, *_ in e.top(1, 3)] == TRAIN[:3]


def test_nearest_goes_by_correlation_and_not_by_covariance() -> None:
    assert estimate().nearest(0, 2) == [(30, 0.95), (10, 0.9)]
    assert estimate().top(0, 1)[0][0] == 10


def test_llc_of_each_sample() -> None:
    assert estimate().per_sample_llc.tolist() == pytest.approx([1.0, 24.0, -10.0, 1.0])


def test_share_of_the_samples_with_most_self_influence() -> None:
    assert estimate().top_share == 0.6  # one of four is the nearest to a tenth
    assert estimate(self_influence=torch.ones(40).double()).top_share == pytest.approx(0.1)
    assert math.isnan(estimate(self_influence=torch.zeros(4).double()).top_share)


def test_share_that_passes_beside_what_passes_by_chance() -> None:
    e = estimate()
    assert e.passing == 0.5  # 8, -4, 6 and 12 of eight
    assert e.chance == pytest.approx(0.00897, abs=1e-5)  # Student's t with 15 degrees of freedom, beyond 3
    assert estimate(num_blocks=10**6).chance == pytest.approx(0.0026998, abs=1e-6)
    assert estimate(num_blocks=2).chance == pytest.approx(0.20483, abs=1e-4)
    assert estimate(num_blocks=0).chance == estimate(num_blocks=2).chance


def test_in_words() -> None:
    assert str(estimate()) == (
        "step 100: influence of 4 samples on 2 queries, 4 chains x 25 draws, 50.0% of the pairs above 3 errors"
    )
    assert "NOT VALID: no chain has stayed finite and local" in str(not_measured())
    assert repr(estimate()) == "InfluenceEstimate(matrix=(2, 4), valid=True, step=100)"


@pytest.mark.parametrize("original", [estimate(), of_themselves()], ids=["queries of their own", "of themselves"])
def test_without_its_pairs_it_still_says_what_they_said(original: InfluenceEstimate) -> None:
    kept = original.without_pairs()
    assert kept.matrix.shape == kept.correlation.shape == kept.se.shape == (0, len(original.train_index))
    assert (kept.passing, kept.max_abs, kept.top_share) == (original.passing, original.max_abs, original.top_share)
    assert str(kept) == str(original) and kept.suspects() == original.suspects()
    assert kept.group_matrix is original.group_matrix
    with pytest.raises(IndexError, match="there are 0 queries"):
        kept.top(0)
    again = kept.without_pairs()
    assert (again.passing, again.max_abs) == (original.passing, original.max_abs)
    read = InfluenceEstimate.from_state_dict(kept.state_dict())
    assert (read.passing, read.max_abs) == (original.passing, original.max_abs)


def test_nothing_measured_has_no_shares() -> None:
    e = not_measured()
    assert math.isnan(e.max_abs) and math.isnan(e.top_share) and math.isnan(e.passing)
    assert math.isnan(e.without_pairs().max_abs)


# --------------------------------------------------------------------------------------------- files and checkpoints


def test_files_can_be_read_without_this_package(tmp_path: Path) -> None:
    original = estimate(dropped=(Dropped("query", 9, "its loss is not finite"),), between_share=math.nan)
    InfluenceRecord(tmp_path).save(original)
    assert sorted(p.name for p in (tmp_path / "influence").iterdir()) == [
        "step_000000100.json",
        "step_000000100.safetensors",
    ]
    text = (tmp_path / "influence" / "step_000000100.json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (told["step"], told["x"], told["epoch"], told["num_samples"]) == (100, 99, 1, 1000)
    assert told["train_group"] == ["a", "b", "a", "b"] and told["groups"] == ["a", "b"]
    assert told["dropped"] == [{"kind": "query", "index": 9, "reason": "its loss is not finite"}]
    assert told["between_share"] is None and told["nbeta"] == 10.0 and told["valid"] is True
    with safe_open(tmp_path / "influence" / "step_000000100.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert tensors["matrix"].tolist() == original.matrix.tolist() and tensors["matrix"].dtype == "float32"
    assert tensors["mean_loss"].tolist() == [0.6, 2.5, 2.0, 0.3]
    assert tensors["train_index"].tolist() == TRAIN and tensors["query_index"].tolist() == [5, 7]
    assert tensors["group_matrix"].shape == (2, 2)
    assert "query_token" not in tensors


ORIGINALS = {
    "complete": estimate(),
    "of themselves": of_themselves(),
    "without pairs": of_themselves().without_pairs(),
    "nothing measured": not_measured(),
    "tokens, a name, no step": estimate(None, query_token=torch.tensor([0, 1]), component="head"),
    "values that are not finite": estimate(
        self_influence_se=torch.full((4,), math.nan).double(), group_se=torch.full((2, 2), math.nan), seconds=math.nan
    ),
}


@pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)
def test_round_trip_through_files(original: InfluenceEstimate, tmp_path: Path) -> None:
    record = InfluenceRecord(tmp_path / "run" / "deep")
    record.save(original)
    assert_same(original, record.load(original.step))
    assert [e.step for e in record.read()] == [original.step]


@pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)
def test_a_checkpoint_holds_plain_types_only(original: InfluenceEstimate) -> None:
    file = io.BytesIO()
    torch.save({"influences": [original.state_dict()]}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert_same(original, InfluenceEstimate.from_state_dict(state["influences"][0]))


def test_fields_of_a_newer_version_and_those_an_older_one_lacks() -> None:
    state = estimate().state_dict()
    state["scalars"]["of_tomorrow"] = 3
    del state["scalars"]["known_passing"], state["scalars"]["notes"]
    assert_same(estimate(), InfluenceEstimate.from_state_dict(state))


def test_all_of_a_run_in_order_and_the_last_word_counts(tmp_path: Path) -> None:
    record = InfluenceRecord(tmp_path)
    assert list(record.read()) == []
    for step in (1000, 20, 300):
        record.save(estimate(step))
    record.save(estimate(20, nbeta=99.0))
    assert [(e.step, e.nbeta) for e in record.read()] == [(20, 99.0), (300, 10.0), (1000, 10.0)]
    assert not list((tmp_path / "influence").glob("*.tmp"))
    with pytest.raises(FileNotFoundError):
        record.load(21)


def test_what_came_after_a_step_is_forgotten(tmp_path: Path) -> None:
    record = InfluenceRecord(tmp_path)
    record.drop_after(10)  # where nothing is, nothing is to be done
    for step in (0, 9, 10, 11, 100):
        record.save(estimate(step))
    (tmp_path / "influence" / "step_of_mine.txt").write_text("not ours")
    record.drop_after(10)
    assert [e.step for e in record.read()] == [0, 9, 10]
    assert sorted(p.name for p in (tmp_path / "influence").iterdir() if p.suffix != ".json") == [
        "step_000000000.safetensors",
        "step_000000009.safetensors",
        "step_000000010.safetensors",
        "step_of_mine.txt",
    ]


def test_a_foreign_file_in_the_folder_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Notes of one's own, beside the record: reading it ended with "invalid literal for int()"."""
    record = InfluenceRecord(tmp_path)
    for step in (10, 20):
        record.save(estimate(step=step))
    foreign = record.folder / "step_x.json"
    foreign.write_text("{}")
    assert [found.step for found in record.read()] == [10, 20]
    (said,) = [r.getMessage() for r in caplog.records]
    assert str(foreign) in said and "passed over. Move it to another folder, or delete it" in said
    (susceptibilities := SusceptibilityRecord(tmp_path)).folder.mkdir()
    (other := susceptibilities.folder / "step_x.npz").write_bytes(b"")
    record.drop_after(10)
    susceptibilities.drop_after(10)
    assert [found.step for found in record.read()] == [10] and foreign.exists() and other.exists()
    assert list(susceptibilities.read()) == [] and str(other) in caplog.records[-1].getMessage()


def test_half_a_pair_is_passed_over(tmp_path: Path) -> None:
    record = InfluenceRecord(tmp_path)
    for step in (1, 2, 3, 4):
        record.save(estimate(step))
    record.paths(2)[0].unlink()
    record.paths(3)[1].unlink()
    tensors = record.paths(4)[0]
    tensors.rename(tensors.with_name(tensors.name + ".tmp"))  # dead in the middle of writing
    assert [e.step for e in record.read()] == [1]


def test_suspicion_is_the_mean_over_firings_in_units_of_each() -> None:
    """Samples 5, 7 and 9; the loss doubles and is shifted: neither counts. Step 8 is log 4 after step 2, whose own
    weight is log 2: a third and two thirds."""
    first = estimate(2, train_index=torch.tensor([5, 7, 9]), mean_loss=double(1.0, 2.0, 6.0))
    # centred at the median 2: -1, 0, 4, of mean distance 5/3
    second = estimate(8, train_index=torch.tensor([9, 7, 5]), mean_loss=double(5.0, 3.0, 13.0))
    # centred at 5: 0, -2, 8, of mean distance 10/3
    assert suspicion_of([first]) is None
    found = suspicion_of([first, second])
    assert found is not None
    torch.testing.assert_close(found, double(2.4 / 3, -0.4, (4.8 - 0.6) / 3))


def test_suspicion_does_not_depend_on_the_order_of_the_samples() -> None:
    """Firings of a run have the same samples in the same order, which are not looked up one by one."""
    index, generator = torch.tensor([5, 7, 9, 11]), torch.Generator().manual_seed(0)
    run = [estimate(step, train_index=index, mean_loss=torch.rand(4, generator=generator).double()) for step in (1, 4)]
    other = torch.tensor([2, 0, 3, 1])
    shuffled = [firing.replace(train_index=index[other], mean_loss=firing.mean_loss[other]) for firing in run]
    straight, looked_up = suspicion_of(run), suspicion_of([*shuffled[:-1], run[-1]])
    assert straight is not None and looked_up is not None
    torch.testing.assert_close(straight, looked_up, rtol=1e-14, atol=1e-14)


def test_suspicion_over_many_firings_reads_the_samples_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = [estimate(step, train_index=torch.arange(4), mean_loss=double(1.0, 2.0, 6.0, step)) for step in range(1, 50)]
    as_list, read = Tensor.tolist, []
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: read.append(1) or as_list(tensor))
    monkeypatch.setattr(Tensor, "__int__", lambda tensor: pytest.fail("a sample was looked up by itself"))
    assert suspicion_of(run) is not None
    assert len(read) == 1


def test_suspects_are_ranked_over_the_run_where_it_is_known_and_it_survives_the_state() -> None:
    one = estimate(2, mean_loss=double(1.0, 2.0, 6.0), train_index=torch.tensor([5, 7, 9]))
    assert one.suspects(3) == [2, 1, 0]
    ranked = one.replace(suspicion=double(3.0, -1.0, 0.5))
    assert ranked.suspects(3) == [0, 2, 1]
    assert InfluenceEstimate.from_state_dict(ranked.state_dict()).suspects(3) == [0, 2, 1]
    assert InfluenceEstimate.from_state_dict(one.state_dict()).suspicion is None


def test_a_firing_with_a_loss_that_is_not_finite_does_not_count() -> None:
    good = estimate(1, train_index=torch.tensor([5, 7, 9]), mean_loss=double(1.0, 2.0, 6.0))
    bad = estimate(2, train_index=torch.tensor([5, 7, 9]), mean_loss=double(math.nan, 2.0, 6.0))
    found = suspicion_of([bad, good])
    assert found is not None
    torch.testing.assert_close(found, double(-0.6, 0.0, 2.4))
