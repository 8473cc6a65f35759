"""Training what a clustered model stores beside its codes."""

from cluscomp_export.tuning.recovery import Recovery, RecoveryOptions, recover

__all__ = ["Recovery", "RecoveryOptions", "recover"]
