"""k-means: the clustering kernel.

`kmeans` clusters vectors into at most 65536 centroids; `assign` gives vectors the exact nearest of given centroids, and
`assign_with_feedback` does so channel after channel, each making up for the errors of those before. The meaning of all is
`reference.py`; the inner loops are C, with a torch path where the library is missing and a Triton search for GPUs.
"""

from cluscomp_kernels.kmeans.clustering import KMeansResult, assign, kmeans
from cluscomp_kernels.kmeans.feedback import assign_with_feedback, feedback_factor

__all__ = ["KMeansResult", "assign", "assign_with_feedback", "feedback_factor", "kmeans"]
