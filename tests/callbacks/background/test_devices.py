"""Devices by their names, and those that training leaves over."""

from __future__ import annotations

import os

import pytest
import torch

from lightning_slt.callbacks.background.devices import WorkerDevice, worker_devices


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def test_cores_by_their_names() -> None:
    assert WorkerDevice.parse("cpu:4,0-2").cores == (0, 1, 2, 4) and WorkerDevice.parse("cpu:3").cores == (3,)
    assert WorkerDevice.parse("cpu") == WorkerDevice("cpu", ()) and WorkerDevice.parse("cuda").device == "cuda:0"
    for name in ("cpu:2-1", "cpu:a", "cuda:a", "tpu"):
        with pytest.raises(ValueError, match=f"devices='{name}': expected"):
            WorkerDevice.parse(name)


def test_gpus_that_training_does_not_use_are_spare(three_gpus: None) -> None:
    def spare(training: str, used: int = 1) -> list[str]:
        return [found.device for found in worker_devices(None, torch.device(training), used)]

    assert spare("cuda:1") == ["cuda:0", "cuda:2"] and spare("cuda") == ["cuda:1", "cuda:2"]
    assert spare("cuda:0", 2) == spare("cuda:1", 2) == ["cuda:2"] and spare("cpu") == ["cpu"]
    with pytest.raises(ValueError, match="devices=None: training uses every GPU"):
        spare("cuda:0", 3)


def test_the_first_device_that_is_not_there_is_refused(three_gpus: None) -> None:
    WorkerDevice("cuda:2").check()
    with pytest.raises(ValueError, match="devices='cuda:3': this machine shows 3 GPUs"):
        WorkerDevice("cuda:3").check()
    count = os.cpu_count() or 1
    WorkerDevice("cpu", (count - 1,)).check()
    with pytest.raises(ValueError, match=f"there is no core {count}; this machine has {count}"):
        WorkerDevice("cpu", (0, count)).check()


def test_a_worker_on_cores_of_its_own_has_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: pinned.append(tuple(cores)), raising=False)
    assert WorkerDevice("cpu", (0, 1, 4)).enter(7) == torch.device("cpu")
    assert torch.get_num_threads() == 3 and pinned == [(0, 1, 4)]
    WorkerDevice("cpu").enter(2)
    assert torch.get_num_threads() == 2 and pinned == [(0, 1, 4)]
