"""When to measure."""

from __future__ import annotations

from lightning_slt.callbacks.schedule import log_spaced_steps


def test_any_number_of_steps_may_be_asked_for_of_a_run_without_a_known_end() -> None:
    """They are a factor of the square root of 2 apart: those of more than a hundred come after any run."""
    assert log_spaced_steps(7, None) == (1, 2, 3, 4, 6, 8)
    many = log_spaced_steps(5000, None)
    assert many[:6] == (1, 2, 3, 4, 6, 8) and many[-1] > 10**18
    assert log_spaced_steps(5000, 1000)[-1] == 1000
