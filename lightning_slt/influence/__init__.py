"""Per-sample influence: which training samples shape the model, from chains over the local posterior."""

from lightning_slt.influence.firing import measure_both, reading_interval
from lightning_slt.influence.one_call import estimate_influence
from lightning_slt.influence.probes import ProbeSet, probe_set

__all__ = ["ProbeSet", "estimate_influence", "measure_both", "probe_set", "reading_interval"]
