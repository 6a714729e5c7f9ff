"""For the tests of a repository that uses this package: two functions to call in its own CI.

:func:`smoke_test` runs one batch and one minimal chain and says what about a module is in the way;
:func:`assert_training_undisturbed` trains with and without the callbacks and compares everything bit for bit. Both are
plain functions: they need no plugin, and work under pytest as anywhere else.
"""

from lightning_slt.testing.smoke import SmokeReport, SmokeTestFailed, smoke_test
from lightning_slt.testing.trace import Difference, Fingerprint, RecordingLogger, TrainingTrace, first_difference
from lightning_slt.testing.undisturbed import TrainingDisturbed, assert_training_undisturbed

__all__ = [
    "Difference",
    "Fingerprint",
    "RecordingLogger",
    "SmokeReport",
    "SmokeTestFailed",
    "TrainingDisturbed",
    "TrainingTrace",
    "assert_training_undisturbed",
    "first_difference",
    "smoke_test",
]
