"""What is read off the draws of chains, as torchmetrics."""

from lightning_slt.measures.influence import Influence
from lightning_slt.measures.learning_coefficient import LearningCoefficient
from lightning_slt.measures.susceptibility import Susceptibility

__all__ = ["Influence", "LearningCoefficient", "Susceptibility"]
