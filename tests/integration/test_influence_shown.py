"""Influence while a model trains: what a sample is shown by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_slt.callbacks.data.samples import tokenizer_of
from lightning_slt.publish import render as render_module
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
    quiet_trainer,
    seed_everything,
)
from tests.integration.models import BATCH, Net, Plain, loaders, tensors
from tests.integration.probing import probing, refuses


def samples_in(monitor: SLTMonitor) -> dict[str, str]:
    """What was written of the suspects."""
    assert monitor.folder is not None
    return {path.stem: path.read_text().strip() for path in (monitor.folder / "samples").glob("*.txt")}


def test_a_hook_shows_each_suspect_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def show(sample: Any) -> str:
        asked.append(1)
        return f"label {int(sample[1])}"

    monitor = probing(render=show)
    Scenario(Net, loaders).run(tmp_path, monitor)
    suspects = {int(e.train_index[j]) for e in monitor.influences for j in e.suspects(20)}
    labels = tensors().tensors[1]
    assert samples_in(monitor) == {f"sample_{i}": f"label {int(labels[i])}" for i in suspects}
    assert len(asked) == len(suspects) >= 20


def test_a_hook_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "_warned", set())
    monitor = probing(render=refuses)
    with pytest.warns(UserWarning, match="render failed") as caught:
        Scenario(Net, loaders).run(tmp_path, monitor)
    assert len([w for w in caught if "render failed" in str(w.message)]) == 1
    assert len(monitor.influences) == 3
    assert all(text.startswith("[4] ") for text in samples_in(monitor).values())


class Words:
    """A tokenizer of two words."""

    def __init__(self, words: tuple[str, str] = ("yes", "no")) -> None:
        self.words = words

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def token_data(n: int = 12) -> TensorDataset:
    ids = torch.randint(0, 2, (n, 3), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids[:, 0])


class Reads(Plain):
    """Takes token ids."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(torch.cat([batch[0], batch[0][:, :1]], 1).float()), batch[1])


class WithTokenizer(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Words()


class TokenData(LightningDataModule):
    def __init__(self, tokenizer: Any = None, dataset: Any = None) -> None:
        super().__init__()
        self.tokenizer, self.dataset = tokenizer, dataset if dataset is not None else token_data()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, BATCH)


class Texts(Dataset[Any]):
    tokenizer = Words(("ja", "nein"))

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return token_data()[index]


OWNERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[str, str]]] = {
    "the LightningModule": (WithTokenizer, TokenData, ("yes", "no")),
    "the datamodule": (Reads, lambda: TokenData(Words(("oui", "non"))), ("oui", "non")),
    "the datamodule before the module": (WithTokenizer, lambda: TokenData(Words(("oui", "non"))), ("oui", "non")),
    "the dataset": (Reads, lambda: TokenData(dataset=Texts()), ("ja", "nein")),
    "the dataset of a subset": (Reads, lambda: TokenData(dataset=Subset(Texts(), range(12))), ("ja", "nein")),
    "nobody": (Reads, TokenData, ("0", "1")),
    "one that cannot decode": (Reads, lambda: TokenData(str.split), ("0", "1")),
}


@pytest.mark.parametrize(("module", "data", "words"), OWNERS.values(), ids=OWNERS)
def test_token_ids_are_shown_by_the_tokenizer_of(
    module: Callable[[], Any], data: Callable[[], Any], words: tuple[str, str], tmp_path: Path
) -> None:
    monitor = probing(at_steps=[1])
    seed_everything()
    quiet_trainer(tmp_path, callbacks=[monitor], max_epochs=1).fit(module(), datamodule=data())
    ids = token_data().tensors[0].tolist()
    start = "tokens " if words == ("0", "1") else ""
    assert samples_in(monitor) == {f"sample_{i}": start + Words(words).decode(row) for i, row in enumerate(ids)}


def test_a_tokenizer_is_looked_for_in_finitely_many_places() -> None:
    class Mirror(Dataset[Any]):
        @property
        def dataset(self) -> Any:
            return self

    assert tokenizer_of(Mirror()) is None and tokenizer_of(None) is None and tokenizer_of(Plain()) is None
    assert isinstance(tokenizer_of(Subset(Subset(Texts(), [0, 1]), [0])), Words)


# ------------------------------------------------------------------------------------------ history, files and loggers
