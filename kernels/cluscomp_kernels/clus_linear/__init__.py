"""The compressed linear operator `y = (x @ W^T) * row_scale + bias`, with W stored as codes into a codebook.

`linear` is the trainable operator on canonical codes. `prepare` lays a weight out for inference on the fastest path that a
device has. `reference.py` defines the result of both.
"""

from cluscomp_kernels.clus_linear.dispatch import PathStatus, choose_path, paths, prepare, prepare_codebook
from cluscomp_kernels.clus_linear.prepared import PreparedCodebook, PreparedWeight
from cluscomp_kernels.clus_linear.trainable import linear

__all__ = [
    "PathStatus",
    "PreparedCodebook",
    "PreparedWeight",
    "choose_path",
    "linear",
    "paths",
    "prepare",
    "prepare_codebook",
]
