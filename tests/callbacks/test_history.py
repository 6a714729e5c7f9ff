"""The points of a run's curves: in order of step, with the pairs of the last influence alone."""

from __future__ import annotations

import torch

from lightning_slt.callbacks.history import History
from tests.publish.helpers import make_estimate, make_influence, make_susceptibility


def test_only_the_last_influence_keeps_its_pairs() -> None:
    history = History()
    for step in (5, 10):
        estimate = make_estimate(step=step, x=step - 1, seconds=float(step), component="head")
        kept = history.add_influence(make_influence(), estimate)
        assert (kept.step, kept.x, kept.seconds, kept.component) == (step, step - 1, float(step), "head")
        assert kept is history.influences[-1]
    first, last = history.influences
    assert first.matrix.numel() == 0 and last.matrix.numel() > 0


def test_what_a_sample_has_cost_is_of_all_firings_so_far() -> None:
    """It is weighed by steps: log 2 for the first firing, log 3 for one at three times its step."""
    history = History()
    costs = ([4.0, 1.0, 1.0], [1.0, 1.0, 10.0])
    kept = [
        history.add_influence(make_influence(3, 2, mean_loss=torch.tensor(loss).double()), make_estimate(step=step))
        for step, loss in zip((5, 15), costs, strict=True)
    ]
    first, second = torch.tensor([3.0, 0.0, 0.0]).double(), torch.tensor([0.0, 0.0, 3.0]).double()
    two, three = torch.tensor([2.0, 3.0]).double().log()
    assert kept[0].suspicion is None and kept[1].suspicion is not None
    torch.testing.assert_close(kept[1].suspicion, (two * first + three * second) / (two + three))


def test_what_the_record_has_comes_in_order() -> None:
    history = History()
    history.estimates.append(make_estimate(step=10))
    own = history.estimates
    history.add_recorded([], [], [])
    assert history.estimates is own
    history.add_recorded([make_estimate(step=20), make_estimate(step=5)], [make_influence(step=s) for s in (5, 7)], [])
    assert [e.step for e in history.estimates] == [5, 10, 20]
    assert [i.step for i in history.influences] == [5, 7] and history.influences[0].matrix.numel() == 0
    history.add_recorded([], [], [make_susceptibility({"head": [1.0]}, step=step) for step in (9, 3)])
    assert [found.step for found in history.susceptibilities] == [3, 9] and len(history.estimates) == 3


def test_a_checkpoint_brings_it_back() -> None:
    history, other = History(), History()
    history.estimates.append(make_estimate(step=10, mean=4.5))
    history.add_influence(make_influence(), history.estimates[0])
    history.susceptibilities.append(make_susceptibility({"head": [1.5]}, step=10))
    history.skipped = 3
    state = history.state_dict()
    other.load_state_dict(state)
    assert [e.mean for e in other.estimates] == [4.5] and [i.step for i in other.influences] == [10]
    assert [float(found.chi) for found in other.susceptibilities] == [1.5] and other.skipped == 3
    del state["influences"], state["susceptibilities"]  # as of a version before there were any
    other.load_state_dict(state)
    assert other.influences == [] and other.susceptibilities == []
    other.forget()
    assert other.estimates == [] and other.skipped == 0
