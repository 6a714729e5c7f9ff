"""What is read off the draws, as torchmetrics.Metric classes."""

from lightning_slt.measures.learning_coefficient import LearningCoefficient

__all__ = ["LearningCoefficient"]
