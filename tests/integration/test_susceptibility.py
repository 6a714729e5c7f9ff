"""Susceptibility while a model trains: training and the learning coefficient are the same, and it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt import SLTMonitor
from lightning_slt.callbacks import component_firings
from lightning_slt.config import load
from lightning_slt.susceptibility_record import SusceptibilityRecord
from tests.integration.harness import Scenario, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation

BESIDE = ["llc", {"name": "susceptibility", "components": {"all": ["*"]}}]


def test_training_is_the_same_and_every_firing_is_recorded(tmp_path: Path) -> None:
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16)
    Scenario(Net, with_validation).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.susceptibilities) == len(monitor.estimates) >= 2 and not monitor.influences
    assert all(found.matrix.shape == (1, 5) and found.chi.isfinite().all() for found in monitor.susceptibilities)
    assert monitor.folder is not None
    recorded = list(SusceptibilityRecord(monitor.folder).read())
    assert [r.step for r in recorded] == [e.step for e in monitor.estimates]
    assert all(torch.equal(a.chi, b.chi) for a, b in zip(recorded, monitor.susceptibilities, strict=True))


def test_a_checkpoint_brings_the_history_back() -> None:
    from tests.test_susceptibility import measured

    found = measured(num_chains=2, num_draws=16).replace(step=3)
    monitor = tiny_monitor(probe=True, measures=BESIDE)
    monitor.susceptibilities = [found]
    other = tiny_monitor(probe=True, measures=BESIDE)
    other.load_state_dict(monitor.state_dict())
    assert torch.equal(other.susceptibilities[0].matrix, found.matrix) and other.susceptibilities[0].step == 3
    assert other.susceptibilities[0].components == found.components


def test_gamma_is_chosen_at_the_first_firing_and_kept(tmp_path: Path) -> None:
    monitor = tiny_monitor(probe=7, query=5, measures=BESIDE, num_draws=16, localization=None)
    Scenario(Net, with_validation).run(tmp_path, monitor)
    (first, *others) = monitor.susceptibilities
    assert others and all(found.localization == first.localization for found in others)


def test_a_failure_leaves_training_and_the_learning_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(component_firings, "measure_beside", fails)
    monitor = tiny_monitor(probe=7, measures=BESIDE, on_failure="warn")
    with pytest.warns(UserWarning, match="susceptibility at step 4 failed .*RuntimeError: no memory"):
        Scenario(lambda: Plain(lr=0.0), loaders).run(tmp_path, monitor)
    assert len(monitor.estimates) >= 1 and not monitor.susceptibilities


@pytest.mark.parametrize(
    ("measures", "probe", "message"),
    [
        (["susceptability"], True, "there is no 'susceptability' .did you mean 'susceptibility'"),
        (["susceptibility"], None, "'susceptibility' needs samples to look at: give probe="),
        ([{"name": "susceptibility", "component": {}}], True, "'susceptibility' has no component"),
        ([{"name": "susceptibility", "components": {"A b": "*"}}], True, "component 'A b'"),
    ],
)
def test_wrong_measures_are_refused_before_training(
    measures: list[object], probe: object, message: str, tmp_path: Path
) -> None:
    monitor = SLTMonitor(measures=measures, probe=probe)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=message):
        Scenario(Net, loaders).run(tmp_path, monitor)


def test_a_mapping_as_from_yaml_builds_it() -> None:
    config = load({"probe": True, "measures": ["llc", {"name": "susceptibility", "components": {"head": ["fc.*"]}}]})
    built = config.build()
    assert built._measures.components == {"head": ["fc.*"]} and not built._measures.influence
