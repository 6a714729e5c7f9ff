"""Files that are there whole or not at all, also where the disk is full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_slt.durable import write_durably, write_whole
from lightning_slt.publish import RunPublisher
from lightning_slt.record import RunRecord
from tests.publish.helpers import make_estimate

resource = pytest.importorskip("resource")


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """What is longer fails half-way, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("function", [write_whole, write_durably])
def test_a_file_that_does_not_fit_leaves_the_one_before_and_no_half(
    function: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "file"
    function(path, lambda temporary: temporary.write_bytes(b"before"))
    with files_of_at_most(4096), pytest.raises(OSError, match="too large"):
        function(path, lambda temporary: temporary.write_bytes(bytes(10_000)))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {"file": b"before"}


def test_a_record_that_does_not_fit_leaves_no_half_files(tmp_path: Path) -> None:
    estimate = make_estimate(step=100, num_draws=1000)
    with files_of_at_most(1024), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        publisher = RunPublisher([], tmp_path / "run")
        publisher.start({"num_chains": 4})
        publisher.estimate(estimate)
        publisher.finish([estimate], "finished")
        with pytest.raises(OSError, match="too large"):
            RunRecord(tmp_path / "other").append(estimate)
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.npz"), *tmp_path.rglob("*.png")]
