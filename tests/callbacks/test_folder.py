"""The folder of a record: each monitor says by its name what is the matter with its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_slt.callbacks.folder import restore_record
from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.record import RunRecord
from tests.publish.helpers import make_estimate, make_influence


@pytest.mark.parametrize(("prefix", "who"), [("slt", "SLTMonitor"), ("slt_head", r"SLTMonitor \(slt_head\)")])
def test_what_cannot_be_read_or_restored_is_said_by_the_monitor_that_it_is_of(
    prefix: str, who: str, tmp_path: Path
) -> None:
    record, samples = RunRecord(tmp_path), InfluenceRecord(tmp_path)
    record.append(make_estimate(step=2))
    samples.save(make_influence(step=2))
    samples.paths(2)[0].write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"^{who}: the influence at step 2 could not be read, and is left out"):
        found = restore_record(record, 2, [], [], prefix)
    assert [estimate.step for estimate, _ in found.values()] == [2] and found[2][1] is None
    record.path.unlink()
    record.path.mkdir()
    with pytest.warns(UserWarning, match=rf"^{who}: the record in .* could not be restored"):
        assert restore_record(record, 2, [], [], prefix) == {}
