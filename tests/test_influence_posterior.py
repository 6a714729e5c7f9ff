"""The posterior of influence, from weights and curvature; the groups and limits of the samples that it is read of."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_slt.influence.firing import CALLS, READ_COST, reading_interval
from lightning_slt.influence.posterior import influence_sampling
from lightning_slt.influence.probes import groups_of, probe_set
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.metric import Curvature

ANCHOR = torch.tensor([3.0, 0.0, 4.0, 0.0])
CURVATURE = Curvature(torch.tensor([2.0]), torch.eye(4, 1), 0.5)
GAMMA = 4 / (0.35**2 * 25)
"""``d / (0.35 |w*|)²``."""


@pytest.mark.parametrize(
    ("given", "nbeta", "gamma"),
    [
        ((None, None), GAMMA / (2.5 * 0.5), GAMMA),
        ((300.0, None), 300.0, 2.5 * 0.5 * 300.0),
        ((None, 70.0), 70.0 / (2.5 * 0.5), 70.0),
        ((300.0, 70.0), 300.0, 70.0),
        ((300.0, 0.0), 300.0, 0.0),
    ],
)
def test_width_and_damping_follow_from_weights_and_mean_curvature(
    given: tuple[Optional[float], Optional[float]], nbeta: float, gamma: float
) -> None:
    posterior = influence_sampling(ANCHOR, CURVATURE, *given).posterior
    assert (posterior.nbeta, posterior.localization) == (pytest.approx(nbeta), pytest.approx(gamma))


def test_what_has_no_scale_of_its_own_has_the_least() -> None:
    """Weights of a hundredth each, and a curvature of a thousandth of the largest, or of 1e-12."""
    zero = influence_sampling(torch.zeros(4), CURVATURE, None, None).posterior
    assert zero.localization == pytest.approx(4 / (0.35**2 * 4 * 1e-4))
    for values, mean, least in ((torch.tensor([2.0]), -1.0, 2e-3), (torch.zeros(0), 0.0, 1e-12)):
        curvature = Curvature(values, torch.eye(4, len(values)), mean)
        found = influence_sampling(ANCHOR, curvature, None, 1.0).posterior
        assert found.nbeta == pytest.approx(1.0 / (2.5 * least))


def labelled(labels: list[Any]) -> DatasetSource:
    return DatasetSource(TensorDataset(torch.zeros(len(labels), 2), torch.tensor(labels)), 4)


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        ([0, 1, 0, 1], None, ["0", "1", "0", "1"]),
        ([0, 1, 2, 1], None, None),
        ([0, 1, 2, 1], ["0", "1", "2", "3"], ["0", "1", "2", "1"]),
        ([0, 1, 2, 1], ["0", "1", None], None),
        ([7], None, ["7"]),
    ],
    ids=["classes", "too many", "known", "of which one is not known", "a single one"],
)
def test_labels_are_classes_where_they_are_few_or_known(
    labels: list[int], classes: Optional[list[Optional[str]]], found: Optional[list[str]]
) -> None:
    assert groups_of(labelled(labels), range(len(labels)), None, classes) == found


def test_a_function_of_ones_own_may_give_each_sample_a_group_and_is_named_where_it_fails() -> None:
    def function(sample: Any) -> Any:
        if int(sample[1]) == 9:
            raise KeyError("nine")
        return None if int(sample[1]) == 1 else f"g{int(sample[1])}"

    assert groups_of(labelled([0, 1, 2, 3]), [3, 1, 2], function) == ["g3", None, "g2"]
    assert groups_of(labelled([1, 1]), [0, 1], function) is None
    with pytest.raises(ValueError, match=r"group_fn failed on sample 2: KeyError: 'nine'"):
        groups_of(labelled([0, 1, 9]), [0, 2], function)


def test_queries_have_the_classes_of_the_training_samples_and_a_limit_of_their_own() -> None:
    train, query = labelled([0, 1, 2] * 4), labelled([2, 1, 0])
    found = probe_set(train, query, 9, None, 0)
    assert found.query is not None and (len(found.train.index), len(found.query.index)) == (9, 3)
    assert found.num_samples == 12 and found.query_group == ["2", "1", "0"]
    assert probe_set(labelled([0, 0, 0, 0]), query, None, None, 0).query_group is None
    few = probe_set(train, query, None, 2, 0)
    assert few.query is not None and (len(few.train.index), len(few.query.index)) == (12, 2)
    alone = probe_set(train, None, 5, None, 0)
    assert (alone.num_samples, alone.query, alone.query_group) == (5, None, None)
    with pytest.raises(ValueError, match="per_token=True: give query_data"):
        probe_set(train, None, 5, None, 0, per_token=True)


def test_reading_takes_three_tenths_of_what_moving_the_chains_does() -> None:
    """Of a step of two passes and its calls, in fours that are rounded up."""
    for samples, batch, products in ((1000, 64, 10**8), (5000, 10, 26_122), (50, 0, 10**9)):
        steps = reading_interval(samples, batch, products)
        step = 2 * max(batch, 1) * products + CALLS
        assert steps % 4 == 0 and samples * products <= READ_COST * steps * step
        assert steps == 4 or samples * products > READ_COST * (steps - 4) * step
