"""What a conversion needs of device, host and disk, phase by phase, from shapes, plan and options alone.

Every formula is an upper bound on what the phase adds to a process that has loaded this package (`process_bytes`), counted as
resident memory: pages of the source that are mapped while a tensor is read count too. Terms are arrays that are there at the
same time, in bytes; `benchmarks/memory.py` holds them against real peaks. Who changes what a phase holds changes its formula
here. `docs/memory.md` shows the model on known architectures.

Letters in the formulas: W weights of a matrix, P the same with out_features filled up to a multiple of cluster_dim, V vectors
(P / cluster_dim), k clusters, d cluster_dim, n in_features, T tokens run at a time.
"""

from cluscomp_export.conversion.memory.conversion import (
    LIBRARY_BYTES,
    PROCESS_BYTES,
    Peak,
    conversion_memory,
    memory_warnings,
    process_bytes,
)

__all__ = ["LIBRARY_BYTES", "PROCESS_BYTES", "Peak", "conversion_memory", "memory_warnings", "process_bytes"]
