"""Two and four DDP ranks on the CPU (gloo): training is the same, the ranks agree, and no failure makes a rank wait for
ever."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.record import RECORD_FILE
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from tests.integration.ddp import RUNS
from tests.integration.ranks import Results, assert_ranks_agree, estimates_of, launched_once, place, results_of

TIMEOUT = 900.0
"""Seconds for all the scenarios; each has a limit of its own, see :mod:`tests.integration.ranks`."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results."""
    return launched_once(tmp_path_factory, "ddp", "ddp", RUNS, TIMEOUT)


def test_training_is_the_same_and_the_ranks_agree(folder: Path) -> None:
    results = results_of(folder, "undisturbed", 2)
    estimates = assert_ranks_agree(results, [2, 4, 6])
    assert [r["num_batches"] for r in results] == [6, 6]
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["metrics"]["slt/llc/mean"] == pytest.approx(estimates[-1].mean)
    assert [e.num_samples for e in estimates] == [24, 24, 24]


def test_accumulation_under_ddp(folder: Path) -> None:
    results = results_of(folder, "accumulation", 2)
    assert_ranks_agree(results, [1, 2, 3, 4])
    assert [(r["num_batches"], r["global_step"]) for r in results] == [(8, 4), (8, 4)]


def test_ranks_agree_whatever_method_each_finds_faster(folder: Path) -> None:
    assert_ranks_agree(results_of(folder, "tried_methods", 2), [3, 6])


def test_fewer_chains_than_ranks(folder: Path) -> None:
    (first, _) = assert_ranks_agree(results_of(folder, "fewer_chains_than_ranks", 2), [3, 6])
    assert first.trace.shape == (1, 4)


def test_chains_differ_by_rank(folder: Path) -> None:
    """Two of the four chains on each rank; no two walk the same way."""
    results = results_of(folder, "fixed_step", 2)
    (estimate,) = assert_ranks_agree(results, [3])
    assert estimate.trace.shape == (4, 20)
    differences = torch.pdist(estimate.trace.double())
    assert differences.min() > 0.05 * differences.max()
    anchor = results[0]["weights"][0]
    moved = [{w.sub(anchor).sum().item() for w in r["weights"]} - {0.0} for r in results]
    assert len(moved[0]) > 20 and len(moved[1]) > 20
    assert not moved[0] & moved[1]
    (alone,) = results_of(folder, "fixed_step", 1)
    assert max(r["chain_steps"] for r in results) < 0.75 * alone["chain_steps"]


@pytest.mark.parametrize(
    ("name", "world"),
    [
        *((name, world) for name in ("fixed_step", "calibrated_step", "five_chains", "two_chains") for world in (2, 4)),
        *((name, 2) for name in ("bf16_mixed", "bf16_true", "fp16_mixed", "fp16_true", "double")),
        ("slow_rank", 2),
    ],
)
def test_the_answer_does_not_depend_on_the_number_of_ranks(name: str, world: int, folder: Path) -> None:
    """Five chains are divided by neither two nor four ranks, two chains are too few for four; whatever the precision;
    and a slow rank is waited for."""
    results = results_of(folder, name, world)
    (shared,) = assert_ranks_agree(results, [-(-6 // world)])
    (alone,) = estimates_of(results_of(folder, name, 1)[0])
    scale = float(alone.trace.abs().max())
    assert scale > 0
    torch.testing.assert_close(shared.per_chain, alone.per_chain, rtol=0.0, atol=1e-6 * scale)
    torch.testing.assert_close(shared.trace, alone.trace, rtol=0.0, atol=1e-6 * scale)
    assert shared.num_burnin_steps == alone.num_burnin_steps
    assert (shared.step_size, shared.init_loss) == pytest.approx((alone.step_size, alone.init_loss), rel=1e-6)


def test_chains_are_shared_out_evenly(folder: Path) -> None:
    """Five chains of 22 steps, and the losses of the six minibatches at w*: a rank has two chains, or three."""
    by_ranks = {world: [r["chain_steps"] for r in results_of(folder, "five_chains", world)] for world in (1, 2, 4)}
    per_chain = 22
    own = {world: sorted((n - n % per_chain) // per_chain for n in counts) for world, counts in by_ranks.items()}
    assert own == {1: [5], 2: [2, 3], 4: [1, 1, 1, 2]}


def test_machines_of_one_rank_each(folder: Path) -> None:
    """The same numbers as two ranks of one machine."""
    (apart,) = assert_ranks_agree(results_of(folder, "two_machines", 2), [3])
    (together,) = estimates_of(results_of(folder, "fixed_step", 2)[0])
    assert torch.equal(apart.trace, together.trace)


def test_one_rank_raises_and_that_firing_is_left_out_on_both(folder: Path) -> None:
    results = results_of(folder, "one_rank_raises_warn", 2)
    assert_ranks_agree(results, [2, 6])
    assert [r["num_batches"] for r in results] == [6, 6]
    assert len(results[0]["warnings"]) == 1
    assert "step 4" in results[0]["warnings"][0] and "rank 1" in results[0]["warnings"][0]


def test_one_rank_raises_and_both_end_where_failures_raise(folder: Path) -> None:
    first, second = results_of(folder, "one_rank_raises_raise", 2)
    assert second["raised"] == "RuntimeError: only this rank fails"
    assert "rank 1" in first["raised"] and "only this rank fails" in first["raised"]
    assert [e.step for e in estimates_of(first)] == [e.step for e in estimates_of(second)] == [2]


def test_data_that_one_rank_cannot_read_leaves_the_firing_out_on_both(folder: Path) -> None:
    results = results_of(folder, "unreadable_on_one_rank", 2)
    assert [r["num_batches"] for r in results] == [6, 6]
    assert [r["estimates"] for r in results] == [[], []]
    first, *later = results[0]["warnings"]
    assert "rank 1 failed: OSError" in first and "only this rank fails" in first
    assert len(later) == 2 and all("for the reason given at step 2" in warning for warning in later)


def test_ranks_whose_data_differ_in_size_have_one_n(folder: Path) -> None:
    """Each had that of its own data, and so chains of another posterior and another estimate."""
    results = results_of(folder, "other_sizes", 2)
    assert_ranks_agree(results, [2, 4, 6, 8])
    assert {(e.num_samples, e.nbeta) for r in results for e in estimates_of(r)} == {(32, 32 / math.log(32))}
    assert [len(r["warnings"]) for r in results] == [1, 0]
    assert "[32, 16]" in results[0]["warnings"][0] and "num_samples=" in results[0]["warnings"][0]


def test_ranks_that_have_parts_of_an_iterable_are_said_to(folder: Path) -> None:
    """12 of the 24 samples on each; where each has all of them, or n is given, there is nothing to say."""
    first, second = results_of(folder, "own_parts", 2)
    assert first["sizes"] == second["sizes"] == [[12, 12], [12, 24, 24, 24], [24, 24]]
    assert [len(texts) for texts in first["warnings"]] == [1, 0, 0] and second["warnings"] == [[], [], []]
    assert "Give num_samples= of all the data where each rank has a part of it" in first["warnings"][0][0]


def test_ranks_with_epochs_of_different_lengths_measure_at_the_same_steps(folder: Path) -> None:
    """The first rank's 16 steps are spaced for both; the second one's 8 gave 1, 3 and 8, and both waited for good."""
    first, second = results_of(folder, "other_lengths", 2)
    assert_ranks_agree([first, second], [1, 4])
    refusals = [r["raised"][0] for r in (first, second)]
    assert all("every_n_epochs=1" in r and "[8, 4] batches" in r and "every_n_train_steps=" in r for r in refusals)
    # as without a monitor: the second rank has come to its end, and the first finds it gone
    assert len(second["raised"]) == 1 and first["raised"][1].startswith("RuntimeError")


def test_a_rank_that_is_killed_ends_the_run_of_the_other(folder: Path) -> None:
    """As without chains: the other rank finds nobody there, and does not wait."""
    here = place(folder, "rank_dies", 2)
    assert not (here / "1.pt").exists()
    left = torch.load(here / "0.pt", weights_only=False)
    assert left["raised"].startswith("RuntimeError") and left["estimates"] == []


def test_a_signal_in_a_firing_is_answered_when_no_rank_waits_for_another(folder: Path) -> None:
    """Both leave the chains, and both write the checkpoint; where one is in its chains and one waits they hung."""
    results = results_of(folder, "signalled", 2)
    assert_ranks_agree(results, [2, 6])
    assert [(r["num_batches"], r["step"]) for r in results] == [(6, 4)] * 2


def test_a_signal_in_the_chains_of_components_is_answered_by_all_ranks(folder: Path) -> None:
    results = results_of(folder, "signalled_components", 2)
    assert_ranks_agree(results, [2, 4, 6])
    assert [(r["num_batches"], r["step"]) for r in results] == [(6, 4)] * 2
    assert [[found["step"] for found in r["susceptibilities"]] for r in results] == [[2, 6]] * 2


@pytest.mark.parametrize("name", ["ctrl_c", "ctrl_c_raise"])
def test_ctrl_c_in_a_firing_is_answered_when_no_rank_waits_for_another(name: str, folder: Path) -> None:
    """Both write the checkpoint, of weights whose point is still to be measured, also where failures are raised."""
    results = results_of(folder, name, 2)
    assert_ranks_agree(results, [2])
    assert [(r["ended"], r["step"], r["last"]) for r in results] == [(["KeyboardInterrupt"], 4, 3)] * 2


def test_resume_under_ddp(folder: Path) -> None:
    results = results_of(folder, "resume", 2)
    estimates = assert_ranks_agree(results, [2, 4, 6])
    assert torch.equal(estimates[0].trace, results[0]["before"][0]["trace"])


def test_the_first_rank_spends_the_budget_for_all(folder: Path) -> None:
    """Their clocks agree on nothing, and yet they fire at the same steps, asking each other now and then."""
    results = results_of(folder, "budget", 2)
    steps = [e.step for e in estimates_of(results[0])]
    estimates = assert_ranks_agree(results, steps)
    assert results[1]["now"] > 1e6 * results[0]["now"]
    assert [r["num_batches"] for r in results] == [200, 200]
    # one of the two chains on each rank, of six steps: priced at a batch's second each
    assert estimates[0].predicted_seconds == 6.0 and estimates[0].step == 24 and len(estimates) >= 2
    assert estimates[1].overhead <= 0.2
    for a, b in zip(*(estimates_of(r) for r in results), strict=True):
        names = ("credit_seconds", "predicted_seconds", "firing_size", "skipped")
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]
    assert results[0]["exchanges"] == results[1]["exchanges"] < 75


@pytest.mark.parametrize("name", ["spawn", "fork"])
def test_ranks_that_lightning_starts_return_metrics_and_leave_a_record(name: str, folder: Path) -> None:
    (result,) = results_of(folder, name, 0)
    records = list(place(folder, name, 0).rglob(RECORD_FILE))
    assert len(records) == 1
    assert len(records[0].read_text().splitlines()) == 3
    assert result["metrics"]["slt/llc/mean"] != 0.0
    assert result["estimates"] == []  # they are in the processes that are gone, and in the record
    assert "loss_epoch" in result["metrics"]


def influences_of(result: Results) -> list[InfluenceEstimate]:
    return [InfluenceEstimate.from_state_dict(state) for state in result["influences"]]


def assert_influences_agree(results: list[Results]) -> list[InfluenceEstimate]:
    """Every rank has the same numbers, to the last bit."""
    first, *others = (influences_of(result) for result in results)
    assert others
    for other in others:
        assert len(first) == len(other) > 0
        for a, b in zip(first, other, strict=True):
            # a firing's seconds are its rank's own
            assert repr(a.replace(seconds=0.0).scalars()) == repr(b.replace(seconds=0.0).scalars())
            x, y = a.tensors(), b.tensors()
            assert x.keys() == y.keys()
            for name in x:
                torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True)
    return first


@pytest.mark.parametrize(
    ("name", "world", "chains"),
    [
        ("influence", 2, 4),
        ("influence_of_calibrated_chains", 2, 4),
        ("influence_of_three_chains", 2, 3),
        ("influence_of_three_chains", 4, 3),
    ],
)
def test_influence_is_the_same_on_all_ranks_and_in_one_process(
    name: str, world: int, chains: int, folder: Path
) -> None:
    """A chain is a chain, whoever runs it: each is counted once."""
    (both,) = assert_influences_agree(results_of(folder, name, world))
    (alone,) = influences_of(results_of(folder, name, 1)[0])
    assert both.matrix.shape == (4, 24) and both.num_chains == alone.num_chains == chains
    assert (both.num_draws, both.num_blocks, both.num_samples) == (alone.num_draws, alone.num_blocks, 24)
    assert torch.equal(both.train_index, alone.train_index) and torch.equal(both.query_index, alone.query_index)
    assert torch.equal(both.init_loss, alone.init_loss)
    for field in ("matrix", "se", "self_influence", "mean_loss", "group_matrix"):
        x, y = getattr(both, field), getattr(alone, field)
        assert float((x - y).abs().max()) <= 1e-5 * float(y.abs().max()), field
    assert both.between_share == pytest.approx(alone.between_share, rel=1e-5)
    assert float(both.self_influence.min()) > 0


def test_influence_is_recorded_by_the_first_rank_only(folder: Path) -> None:
    first = results_of(folder, "influence", 2)[0]
    recorded = list(InfluenceRecord(first["folder"]).read())
    assert [(e.step, tuple(e.matrix.shape)) for e in recorded] == [(3, (4, 24))]
    (kept,) = influences_of(first)
    assert torch.equal(recorded[0].matrix, kept.matrix)
    assert len(list(place(folder, "influence", 2).rglob("step_*.safetensors"))) == 1


def test_training_with_influence_is_the_same_under_ddp(folder: Path) -> None:
    """One chain for two ranks."""
    results = results_of(folder, "influence_undisturbed", 2)
    influences = assert_influences_agree(results)
    assert [(e.step, e.num_chains, len(e.train_index)) for e in influences] == [(2, 1, 7), (4, 1, 7), (6, 1, 7)]
    assert [r["num_batches"] for r in results] == [6, 6]
    assert_ranks_agree(results, [2, 4, 6])


def test_samples_that_fail_on_one_rank_leave_influence_out_on_both_and_nothing_else(folder: Path) -> None:
    """Said once; the learning coefficient is measured at all three steps, the same on both ranks."""
    results = results_of(folder, "influence_fails_on_one_rank", 2)
    assert [r["num_batches"] for r in results] == [6, 6]
    assert [r["influences"] for r in results] == [0, 0]
    assert [e["step"] for e in results[0]["estimates"]] == [2, 4, 6]
    assert [e["mean"] for e in results[0]["estimates"]] == [e["mean"] for e in results[1]["estimates"]]
    assert len(results[0]["warnings"]) == 1 and "rank 1" in results[0]["warnings"][0]


def susceptibilities_of(result: Results) -> list[SusceptibilityEstimate]:
    return [SusceptibilityEstimate.from_state_dict(state) for state in result["susceptibilities"]]


def assert_same_susceptibility(a: SusceptibilityEstimate, b: SusceptibilityEstimate) -> None:
    """To the last bit; a firing's seconds are its rank's own."""
    ours, theirs = (found.replace(seconds=0.0).state_dict() for found in (a, b))
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == theirs[name], name


def assert_susceptibilities_agree(results: list[Results], steps: list[int]) -> list[SusceptibilityEstimate]:
    first, *others = (susceptibilities_of(result) for result in results)
    assert others and [found.step for found in first] == steps
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_susceptibility(a, b)
    return first


@pytest.mark.parametrize(
    ("name", "world", "chains"),
    [
        ("susceptibility", 2, 4),
        ("susceptibility_of_three_chains", 2, 3),
        ("susceptibility_of_three_chains", 4, 3),
    ],
)
def test_susceptibility_is_the_same_on_all_ranks_and_in_one_process(
    name: str, world: int, chains: int, folder: Path
) -> None:
    """A chain counted twice would halve the spread that the error is made of; one left out is a NaN."""
    results = results_of(folder, name, world)
    (both,) = assert_susceptibilities_agree(results, [-(-6 // world)])
    (alone,) = susceptibilities_of(results_of(folder, name, 1)[0])
    assert both.components == alone.components == ("first", "last") and both.num_weights == (40, 18)
    assert both.num_chains == chains and both.num_draws == alone.num_draws == 16
    assert both.per_chain.shape == (2, chains) and both.per_chain.isfinite().all()
    assert both.matrix.shape == (2, 4) and torch.equal(both.sample_index, alone.sample_index)
    assert both.localization == pytest.approx(alone.localization, rel=1e-6)
    for field in ("per_chain", "chi", "se", "matrix", "matrix_se", "group_chi", "group_se", "llc"):
        x, y = getattr(both, field), getattr(alone, field)
        assert float(y.abs().max()) > 0, field
        assert float((x - y).abs().max()) <= 1e-5 * float(y.abs().max()), field
    assert_ranks_agree(results, [-(-6 // world)])


def test_susceptibility_is_recorded_by_the_first_rank_only(folder: Path) -> None:
    first = results_of(folder, "susceptibility", 2)[0]
    (recorded,) = SusceptibilityRecord(first["folder"]).read()
    (kept,) = susceptibilities_of(first)
    assert_same_susceptibility(recorded, kept)
    assert len(list(place(folder, "susceptibility", 2).rglob("susceptibility/*"))) == 1


def test_training_with_susceptibility_is_the_same_under_ddp(folder: Path) -> None:
    """One chain for two ranks."""
    results = results_of(folder, "susceptibility_undisturbed", 2)
    found = assert_susceptibilities_agree(results, [2, 4, 6])
    assert [r["num_batches"] for r in results] == [6, 6]
    assert all(f.per_chain.shape == (2, 1) and f.per_chain.isfinite().all() for f in found)


def test_queries_that_one_rank_cannot_read_leave_susceptibility_out_on_both_and_nothing_else(folder: Path) -> None:
    results = results_of(folder, "susceptibility_fails_on_one_rank", 2)
    assert [r["num_batches"] for r in results] == [6, 6]
    assert [r["susceptibilities"] for r in results] == [[], []]
    assert_ranks_agree(results, [2, 4, 6])
    assert len(results[0]["warnings"]) == 3 and "rank 1" in results[0]["warnings"][0]


@pytest.mark.parametrize("name", ["one_rank_cannot_copy", "first_rank_cannot_copy"])
def test_a_module_that_one_rank_alone_cannot_copy_is_measured_in_place_there(name: str, folder: Path) -> None:
    """Such as a writer that only the first rank opens; the chains of both ranks are in the answer."""
    results = results_of(folder, name, 2)
    estimates = assert_ranks_agree(results, [2, 4, 6])
    assert [r["num_batches"] for r in results] == [6, 6]
    assert all(e.trace.shape == (2, 16) and e.method == "sequential" for e in estimates)
    for found in assert_susceptibilities_agree(results, [2, 4, 6]):
        assert found.per_chain.shape == (2, 2) and found.per_chain.isfinite().all()


def test_resume_of_susceptibility_under_ddp(folder: Path) -> None:
    """The record holds each firing once, as the run that went on has measured it."""
    results = results_of(folder, "susceptibility_resume", 2)
    found = assert_susceptibilities_agree(results, [2, 4, 6])
    before = SusceptibilityEstimate.from_state_dict(results[0]["before"][0])
    assert_same_susceptibility(found[0], before)
    assert len({f.localization for f in found}) == 1
    recorded = list(SusceptibilityRecord(results[0]["folder"]).read())
    for a, b in zip(recorded, found, strict=True):
        assert_same_susceptibility(a, b)


@pytest.mark.parametrize("name", ["transitions", "transitions_stop"])
def test_transitions_are_the_same_decision_on_both_ranks(name: str, folder: Path) -> None:
    """The first rank keeps the weights; both call the user's function, and both stop."""
    first, second = results_of(folder, name, 2)
    (found,) = first["transitions"]
    assert 16 < found["known_at"] <= 21
    assert first["called"] == second["called"] == [(0, found["known_at"])]
    for key in ("transitions", "metrics", "global_step"):
        assert first[key] == second[key]
    assert set(first["checkpoints"]) == {"before", "onset", "after", "flag"} and second["checkpoints"] == {}
    pinned = {Path(path).name for path in first["checkpoints"].values()}
    assert {path.name for path in place(folder, name, 2).rglob("transition_00_*.pt")} == pinned
    end = -(-found["known_at"] // 3) * 3  # 3 steps an epoch
    assert first["global_step"] == (end if name == "transitions_stop" else 30)


def test_what_fails_at_a_flag_on_one_rank_is_said_there(folder: Path) -> None:
    """It was said on the first rank alone, and so not at all."""
    first, second = results_of(folder, "transitions_fail", 2)
    assert first["num_batches"] == second["num_batches"] == 30
    assert first["warnings"] == []
    assert len(second["warnings"]) == 1 and "transition 0 on rank 1;" in second["warnings"][0]
