"""Train what a clustered model stores in addition to its codes."""

from cluscomp_export.training.loop import Trained, TrainingOptions
from cluscomp_export.training.parameters import TrainableModel
from cluscomp_export.training.recovery import RecoveryOptions, recover

__all__ = ["RecoveryOptions", "TrainableModel", "Trained", "TrainingOptions", "recover"]
