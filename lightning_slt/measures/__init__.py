"""What is read off the draws of chains, as torchmetrics."""

from lightning_slt.measures.influence import Influence
from lightning_slt.measures.learning_coefficient import LearningCoefficient

__all__ = ["Influence", "LearningCoefficient"]
