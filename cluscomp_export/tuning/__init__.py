"""Training what a clustered model stores beside its codes."""

from cluscomp_export.tuning.parameters import TrainableModel
from cluscomp_export.tuning.recovery import Recovery, RecoveryOptions, recover

__all__ = ["Recovery", "RecoveryOptions", "TrainableModel", "recover"]
