"""k-means: the clustering kernel.

`kmeans` clusters vectors into at most 65536 centroids; `assign` gives vectors the exact nearest of given centroids. The meaning
of both is `reference.py`; the inner loops are C, with a torch path where the library is missing and a Triton search for GPUs.
"""

from cluscomp_kernels.kmeans.clustering import KMeansResult, assign, kmeans

__all__ = ["KMeansResult", "assign", "kmeans"]
