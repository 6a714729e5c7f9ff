"""Runs on disk as a monitor leaves them, without a model: for the report, the terminal and the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.publish.influence_tables import media_id
from lightning_slt.record import RunRecord
from lightning_slt.transition_record import TransitionLog
from tests.publish.helpers import make_estimate, make_influence, make_report, make_transition

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>{{data}}"
STEPS = (100, 200, 300, 400, 500)
DIVERGED = 400
COMPONENTS = ("attn", HOSTILE)


def write_run(folder: Path, firings: int = 5, samples: int = 30, draws: int = 100, pictures: bool = False) -> Path:
    """A run of a model with two components: one firing has lost a chain, a transition stands at step 300.

    Args:
        folder: of the run.
        firings: of each monitor, one every 100 steps.
        samples: whose influence was read.
        draws: of each of 4 chains.
        pictures: samples are noise of 28 x 28; else texts, one of them hostile.
    """
    main = folder / "slt"
    estimates = RunRecord(main)
    influences = InfluenceRecord(main)
    for k in range(firings):
        step = 100 * (k + 1)
        bad = int(step == DIVERGED)
        mean = 10.0 if step < 300 else 25.0
        loss = 1.5 if step < 300 else 1.0
        estimates.append(make_estimate(mean=mean, bad_chains=bad, step=step, init_loss=loss, num_draws=draws))
        influence = make_influence(n=samples, step=step)
        influences.save(influence.replace(train_group=tuple(f"{HOSTILE} {i % 3}" for i in range(samples))))
        shown = [int(influence.train_index[j]) for j in influence.suspects(20)]
        (main / "samples").mkdir(exist_ok=True)
        for index in shown:
            place = main / "samples" / media_id(index)
            if pictures:
                noise = np.random.default_rng(index).integers(0, 255, (28, 28), dtype=np.uint8)
                Image.fromarray(noise).save(place.with_suffix(".png"))
            else:
                place.with_suffix(".txt").write_text(f"sample {index} {HOSTILE}", encoding="utf-8")
    confirmed = make_report(make_transition(state="confirmed"))
    TransitionLog("slt", 8.0, (confirmed,), boundaries=(450.0,)).write(main)
    settings = {"num_chains": 4, "note": HOSTILE}
    (main / "summary.json").write_text(json.dumps({"status": "finished", "config": settings}))
    for number, name in enumerate(COMPONENTS):
        record = RunRecord(main / f"slt_part{number}")
        for k in range(firings):
            record.append(make_estimate(mean=3.0 + k, step=100 * (k + 1), component=name, num_draws=draws))
    return main
