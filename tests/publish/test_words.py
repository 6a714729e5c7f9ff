"""What the report and the terminal say of a run."""

from __future__ import annotations

import time
from pathlib import Path

from lightning_slt.publish.run import load_run
from lightning_slt.publish.words import diagnostics, headline
from lightning_slt.record import RunRecord
from tests.publish.helpers import make_estimate

NOT_MIXED = "chains have not mixed: R-hat 1.38 > 1.1, error 5.9"


def test_estimates_that_suffer_from_the_same_are_one_remark_however_many_reasons_each_has():
    estimates = [make_estimate(step=step, reasons=(NOT_MIXED, NOT_MIXED) * (step != 30)) for step in (10, 20, 30, 40)]
    [remark] = diagnostics(estimates)
    assert remark.steps == (10, 20, 40)
    assert remark.text.startswith("Chains disagree with each other (3 estimates: steps 10 to 20 and 40).")


def test_the_diagnostics_of_a_long_run_take_time_in_proportion_to_it():
    estimate = make_estimate(reasons=(NOT_MIXED,), num_draws=1)
    seconds = []
    for count in (2_000, 16_000):
        begin = time.process_time()
        [remark] = diagnostics([estimate] * count)
        seconds.append(time.process_time() - begin)
        assert f"({count:,} estimates: " in remark.text
    assert seconds[1] < 25 * seconds[0]  # 8 times as many; 64 times as long where each is compared with all


def test_what_measuring_took_is_that_of_all_monitors(tmp_path: Path):
    for name, seconds, share in (("", 20.0, 0.25), ("attn", 10.0, 0.125)):
        record = RunRecord(tmp_path / (f"slt_{name}" if name else "slt"))
        for step in (10, 20):
            record.append(make_estimate(step=step, component=name, seconds=seconds, overhead=share))
    assert "Measuring took 1 min 0 s in all, 38% of the run's wall-clock" in headline(load_run(tmp_path))[-2]
