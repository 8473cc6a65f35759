"""The memory and disk space that each phase of a conversion needs, from shapes, plan and options alone.

Every formula is an upper bound of what the phase adds to a process that has loaded this package (`process_bytes`). It counts
resident memory, which includes mapped pages of the source while a tensor is read. Terms are arrays that exist at the same time,
in bytes; `benchmarks/memory.py` compares them with measured peaks. A change of what a phase keeps must change its formula here.
`docs/memory.md` shows the model on known architectures.

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
