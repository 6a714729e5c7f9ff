"""What a sweep is told by name, and what of it its results hang on."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_slt.config import load
from lightning_slt.sweep import SweepConfig
from lightning_slt.sweep.settings import find
from tests.sweep import runs


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Beside a module of its own that it imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_sweep_script.py").write_text("size = 3\n", encoding="utf-8")
    path = tmp_path / "sweep_script.py"
    path.write_text(
        "import beside_sweep_script\n\nclass Outer:\n    class Net:\n        size = beside_sweep_script.size\n",
        encoding="utf-8",
    )
    return path


def test_a_script_is_imported_once_under_its_own_name(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called by; what it imports lies beside it, and a pickle finds its classes."""
    found = find(f"{script}:Outer.Net", "module")
    assert found.size == 3  # type: ignore[attr-defined]
    assert found.__module__ == "sweep_script" and pickle.loads(pickle.dumps(found)) is found
    monkeypatch.chdir(script.parent)
    assert find("sweep_script.py:Outer.Net", "module") is found
    for name in ("sweep_script", "beside_sweep_script"):
        sys.modules.pop(name)


def test_another_script_of_the_same_name_is_another(script: Path, tmp_path: Path) -> None:
    """The name is the first one's."""
    first = find(f"{script}:Outer", "module")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / script.name
    other.write_text("class Outer:\n    pass\n", encoding="utf-8")
    second = find(f"{other}:Outer", "module")
    assert second is not first and not hasattr(second, "Net")
    assert find(f"{script}:Outer", "module") is first
    for name in ("sweep_script", "beside_sweep_script"):
        sys.modules.pop(name)


def test_a_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python -m`` finds it, where a console script would not."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "here_for_a_sweep.py").write_text("def data():\n    return 5\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find("here_for_a_sweep:data", "data")() == 5
    sys.modules.pop("here_for_a_sweep")


@pytest.mark.parametrize("name", ["module", ":Net", "module:", ""])
def test_half_a_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"data='.*': write it as package\.module:Name or file\.py:Name\."):
        find(name, "data")


def test_a_class_path_as_the_cli_of_lightning_has_it_is_told_how_to_be_written() -> None:
    given = {"module": {"class_path": "proj.nets.Net", "init_args": {"width": 3}}, "data": "proj:data"}
    with pytest.raises(
        ValueError, match=r"^module=\{.*\}: expected a name, write it as proj.nets:Net\. SweepConfig has "
    ):
        load(given, schema=SweepConfig)


def test_what_cannot_be_called_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss_fn='math:pi': is a float, and no function or class to call\."):
        find("math:pi", "loss_fn")


def test_a_result_hangs_on_all_but_where_it_is_put_and_measured() -> None:
    """And on gamma, which is that of the curve; how often a flag may be false is asked of the curve afterwards."""
    config = load(runs.settings(), schema=SweepConfig)
    changes: dict[str, Any] = {
        "module": "a:b", "data": "a:b", "module_args": {"a": 1}, "data_args": {"a": 1}, "loss_fn": "a:b",
        "weights": "averaged", "folder": "other", "devices": ["cpu"], "sampler": None, "num_chains": 3, "num_draws": 5,
        "num_burnin_steps": 3, "num_steps_bw_draws": 2, "batch_size": 5, "nbeta": 2.0, "localization": 2.0,
        "restrict": ["a"], "seed": 3, "num_samples": 7, "method": "batched", "probe": 2, "query_data": "a:b",
        "query": 2, "false_alarms": 0.1,
    }  # fmt: skip
    assert changes.keys() == vars(config).keys()
    told = config.decides()
    same = [
        name
        for name, value in changes.items()
        if load(runs.settings(**{name: value}), schema=SweepConfig).decides() == told
    ]
    assert same == ["folder", "devices", "localization", "false_alarms"]
