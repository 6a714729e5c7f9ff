"""A line that shows a long firing at work, where the trainer shows progress at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Optional

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

log = logging.getLogger(__name__)

DELAY = 2.0
"""Seconds before a firing counts as long."""


class FiringProgress:
    """Counts chain-steps; after :data:`DELAY` seconds shows them below the trainer's bar, and clears them at the end.

    Silent where the trainer has no progress bar, where it is disabled, and on ranks other than zero. No steps are no
    news, and checked all the same.

    Args:
        trainer: its ``progress_bar_callback`` is respected.
        label: what is being measured.
        check: called between stretches of steps, on every rank; what it raises ends the firing. None for nothing.
    """

    def __init__(self, trainer: Trainer, label: str, check: Optional[Callable[[], None]] = None) -> None:
        bar = trainer.progress_bar_callback
        self._bar: Optional[ProgressBar] = bar if trainer.is_global_zero and _enabled(bar) else None
        self._label, self._check = label, check
        self._start = time.monotonic()
        self._done = 0
        self._line: Any = None
        self._task: Any = None

    def __call__(self, steps: int) -> None:
        if self._check is not None:
            self._check()
        self._done += steps
        if not steps or self._bar is None or time.monotonic() - self._start < DELAY:
            return
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        try:
            self._show(f"{self._label}: {self._done} chain-steps, {rate:.0f}/s")
        except Exception as error:
            # a measurement is worth more than its progress line
            log.debug(f"no progress line: {type(error).__name__}: {error}")
            self._bar = None

    def _show(self, text: str) -> None:
        if isinstance(self._bar, RichProgressBar):
            if self._bar.progress is not None:
                if self._task is None:
                    self._task = self._bar.progress.add_task(text, total=float("inf"))
                self._bar.progress.update(self._task, description=text)
            return
        if self._line is None:
            from tqdm.auto import tqdm

            self._line = tqdm(total=0, bar_format="{desc}", leave=False, position=2)
        self._line.set_description_str(text)

    def __enter__(self) -> FiringProgress:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._line is not None:
            self._line.close()
        if self._task is not None and isinstance(self._bar, RichProgressBar) and self._bar.progress is not None:
            self._bar.progress.remove_task(self._task)


def _enabled(bar: Optional[ProgressBar]) -> bool:
    if bar is None or getattr(bar, "is_disabled", False):
        return False
    return bool(getattr(bar, "is_enabled", True))
