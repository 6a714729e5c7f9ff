"""The points of a run's curves: in order of step, with the pairs of the last influence alone."""

from __future__ import annotations

from lightning_slt.callbacks.history import History
from tests.publish.helpers import make_estimate, make_influence


def test_only_the_last_influence_keeps_its_pairs() -> None:
    history = History()
    for step in (5, 10):
        estimate = make_estimate(step=step, x=step - 1, seconds=float(step), component="head")
        kept = history.add_influence(make_influence(), estimate)
        assert (kept.step, kept.x, kept.seconds, kept.component) == (step, step - 1, float(step), "head")
        assert kept is history.influences[-1]
    first, last = history.influences
    assert first.matrix.numel() == 0 and last.matrix.numel() > 0


def test_what_the_record_has_comes_in_order() -> None:
    history = History()
    history.estimates.append(make_estimate(step=10))
    own = history.estimates
    history.add_recorded([], [], [])
    assert history.estimates is own
    history.add_recorded([make_estimate(step=20), make_estimate(step=5)], [make_influence(step=s) for s in (5, 7)], [])
    assert [e.step for e in history.estimates] == [5, 10, 20]
    assert [i.step for i in history.influences] == [5, 7] and history.influences[0].matrix.numel() == 0


def test_a_checkpoint_brings_it_back() -> None:
    history, other = History(), History()
    history.estimates.append(make_estimate(step=10, mean=4.5))
    history.add_influence(make_influence(), history.estimates[0])
    state = history.state_dict()
    other.load_state_dict(state)
    assert [e.mean for e in other.estimates] == [4.5] and [i.step for i in other.influences] == [10]
    del state["influences"], state["susceptibilities"]  # as of a version before there were any
    other.load_state_dict(state)
    assert other.influences == [] and other.susceptibilities == []
    other.forget()
    assert other.estimates == []
