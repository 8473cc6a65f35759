"""Training what a clustered model stores beside its codes."""

from cluscomp_export.tuning.parameters import TrainableModel
from cluscomp_export.tuning.recovery import RecoveryOptions, recover
from cluscomp_export.tuning.training import Trained, TrainingOptions

__all__ = ["RecoveryOptions", "TrainableModel", "Trained", "TrainingOptions", "recover"]
