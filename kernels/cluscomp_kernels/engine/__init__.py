"""The native engine: a decoder's whole step in one call. Needs numpy only; see engine.h.

Results are the same bits on every instruction set and for any number of threads.
"""

from cluscomp_kernels.engine.measure import memory_bandwidth, time_per_weight
from cluscomp_kernels.engine.program import (
    CACHE_TYPES,
    Attention,
    Branch,
    Cache,
    CacheType,
    Experts,
    FeedForward,
    Pool,
    Program,
    default_threads,
)
from cluscomp_kernels.engine.weights import (
    MAX_DIM,
    MAX_STAGES,
    VARIANTS,
    Codebook,
    EngineLinear,
    EngineNorm,
    Stage,
    best_variant,
    largest_code,
    tiled_bytes,
)

__all__ = [
    "CACHE_TYPES",
    "MAX_DIM",
    "MAX_STAGES",
    "VARIANTS",
    "Attention",
    "Branch",
    "Cache",
    "CacheType",
    "Codebook",
    "EngineLinear",
    "EngineNorm",
    "Experts",
    "FeedForward",
    "Pool",
    "Program",
    "Stage",
    "best_variant",
    "default_threads",
    "largest_code",
    "memory_bandwidth",
    "tiled_bytes",
    "time_per_weight",
]
