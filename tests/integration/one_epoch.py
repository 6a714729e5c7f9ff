"""The estimates of one epoch of six steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_slt import Estimate
from tests.integration.harness import quiet_trainer, seed_everything, steps_of, tiny_monitor
from tests.integration.models import BATCH, loaders


def estimates(make: Callable[[], Any], tmp_path: Path, data: Any = None, **settings: Any) -> list[Estimate]:
    """Of one epoch of six steps, fired at after the third and the sixth."""
    seed_everything()
    monitor = tiny_monitor(**{"every_n_train_steps": 3, **settings})
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
    trainer.fit(make(), **(data or loaders(6 * BATCH)))
    assert steps_of(monitor) == [3, 6]
    return list(monitor.estimates)
