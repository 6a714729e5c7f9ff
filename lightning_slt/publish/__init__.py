"""Publishing: what was measured, sent to the run's loggers and to files. Reads records only; knows no trainer."""

from lightning_slt.publish.charts import chains_figure, history_figure
from lightning_slt.publish.keys import metrics_of
from lightning_slt.publish.publisher import RunPublisher

__all__ = ["RunPublisher", "chains_figure", "history_figure", "metrics_of"]
