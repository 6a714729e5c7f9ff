"""Influence in a firing of the monitor: off the chains of the learning coefficient, within a share of their cost."""

from __future__ import annotations

import math
import time
from typing import Optional

from lightning_slt.estimate import ChainSettings, go_on_where_unsettled, run_chains
from lightning_slt.influence.probes import ProbeSet
from lightning_slt.influence.reader import InfluenceReader, least_readings
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.anchor import weighs_together
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.chains import Progress
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.coupled import ALONE
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.segment import STATS_EVERY
from lightning_slt.verdict import read_both

READ_COST = 0.3
"""Cost of reading the samples' losses, in units of that of moving the chains, in a firing of the monitor."""
CALLS = 3_000_000
"""Products that would take as long as the calls of a step do by themselves."""


def reading_interval(num_probed: int, batch_size: int, products: int) -> int:
    """Steps between readings, so that reading costs about 0.3 of what moving the chains does.

    A reading is one forward pass of all the samples; a step is two of a minibatch at the least (three, but for caches
    and for layers whose backward pass is cheap), and calls that take as long as some millions of products. No clock is
    asked: the same run reads at the same steps on every machine.

    Args:
        num_probed: samples.
        batch_size: of the chains.
        products: multiplications that the loss of one sample takes.

    Example:
        >>> [reading_interval(1000, 64, 26_122), reading_interval(1000, 64, 10**8), reading_interval(100, 64, 26_122)]
        [16, 28, 4]
    """
    step = 2 * max(batch_size, 1) * products + CALLS
    return STATS_EVERY * max(1, math.ceil(num_probed * products / step / READ_COST / STATS_EVERY))


def measure_both(
    objective: Objective,
    source: MinibatchSource,
    settings: ChainSettings,
    probes: ProbeSet,
    collective: Optional[Collective] = None,
    progress: Optional[Progress] = None,
    memory: Optional[ChainMemory] = None,
    read_every: Optional[int] = None,
) -> tuple[Estimate, InfluenceEstimate]:
    """The learning coefficient and the influence of samples, from the same chains.

    Arguments and errors are those of :func:`~lightning_slt.estimate.measure_llc`.

    Args:
        probes: the samples.
        read_every: steps between readings; None for :func:`reading_interval`, and never so many that the chains
            are left with fewer readings than a valid covariance asks (3 of each of 4 chains).
    """
    start = time.perf_counter()
    readers: list[InfluenceReader] = []
    together: list[bool] = []

    def interval() -> int:
        if read_every is not None:
            return read_every
        cheap = reading_interval(probes.num_samples, source.batch_size, readers[0].products)
        # a firing may be over in as many steps as it has draws: its readings must be enough to say something
        apart = (settings.num_draws - 1) // (least_readings(settings.num_chains) - 1)
        return min(cheap, STATS_EVERY * max(1, apart // STATS_EVERY))

    def make_reader() -> InfluenceReader:
        readers.append(InfluenceReader(objective, probes, settings.seed, progress))
        if readers[0].slow and (collective is None or collective.rank == 0):
            objective.say("one by one", readers[0].slow)
        together.append(weighs_together(objective, source))
        return readers[0]

    drawn, chains = run_chains(
        objective, source, settings, collective, progress, memory, make_reader, read_every=interval
    )
    estimate, more, notes = read_both(drawn, chains)
    go_on_where_unsettled(drawn, chains, estimate, memory)
    segment = drawn.segment
    assert segment.read is not None
    good = ~diverged(segment, chains.posterior.nbeta, len(objective.anchor))
    influence = readers[0].read(segment.read, good, chains.posterior, source.num_samples)
    influence = influence.with_verdict(more, (*notes, ALONE) if together[0] else notes)
    seconds = time.perf_counter() - start
    return estimate.replace(seconds=seconds), influence.replace(seconds=seconds)
