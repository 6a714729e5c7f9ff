"""A firing is published beside the network, not through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="wandb's own process is found through /proc")
def test_firings_are_published_while_the_server_answers_nothing(tmp_path: Path) -> None:
    """Were one of them to wait for an answer, the process would never come to its last line."""
    with (tmp_path / "out.txt").open("w") as out:  # a file: a pipe would stay open in wandb's own process
        subprocess.run(
            [sys.executable, "-m", "tests.publish.hanging", str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=True,
        )
    found = json.loads((tmp_path / "out.txt").read_text().strip().splitlines()[-1])
    assert any(found["online"])
    assert len(found["answered"]) == 1 and len(found["waiting"]) >= 1
    assert found["pictures"] and found["handed over"] > 0
    assert found["tables wait"] == [True], "wandb asks its server before it keeps a table, beside the firings"
