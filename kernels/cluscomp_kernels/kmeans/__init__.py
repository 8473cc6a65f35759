"""k-means, and the assignment of vectors to centroids.

`kmeans` clusters vectors into at most 65536 centroids. `assign` finds the exact nearest of given centroids for each vector.
`assign_with_feedback` assigns channel by channel and feeds each channel's error back into the following channels.
`reference.py` defines the results. The inner loops are C; torch replaces them if the library is missing, and GPUs use a Triton
search.
"""

from cluscomp_kernels.kmeans.clustering import KMeansResult, assign, kmeans
from cluscomp_kernels.kmeans.feedback import assign_with_feedback, feedback_factor

__all__ = ["KMeansResult", "assign", "assign_with_feedback", "feedback_factor", "kmeans"]
