"""The greedy tree: repeatedly split the leaf with the largest squared error at the mean of its widest dimension.

Its leaves are good initial clusters for k-means in few dimensions, and its order puts near points next to each other.

The error of a node never exceeds its parent's, so the greedy order splits exactly the nodes with the largest errors. Many nodes
can therefore be split at once, some of them in vain: each round splits every node whose error is among the `num_leaves - 1`
largest known so far. `_cut` removes the splits that turn out to be unnecessary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import library

__all__ = ["Tree", "build_tree"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tree:
    """Nodes of a tree over points; node 0 is the root.

    `axis`, `threshold`, `child` and `leaf` have one entry per node. A point with `x[axis] <= threshold` belongs to node
    `child`, any other point to node `child + 1`. At a leaf, `child` is -1 and `leaf` is its number; at other nodes `leaf` is
    -1. Leaves are numbered from left to right, so leaves with close numbers are near each other. `means` is float32
    `[num_leaves, dim]`. `starts` is int64 `[num_leaves + 1]`: leaf i is `starts[i]:starts[i + 1]` of the
    reordered points.
    """

    axis: npt.NDArray[np.int32]
    threshold: Floats
    child: npt.NDArray[np.int32]
    leaf: npt.NDArray[np.int32]
    means: Floats
    starts: npt.NDArray[np.int64]

    def codes(self) -> npt.NDArray[np.uint16]:
        """Return the leaf of every reordered point, uint16 `[n]`; there are at most 65536 leaves."""
        return np.repeat(np.arange(len(self.means)).astype(np.uint16), np.diff(self.starts))

    def descend(self, points: Floats, threads: int) -> npt.NDArray[np.uint16]:
        """Return the leaf of each of `points` `[n, dim]`, uint16 `[n]`."""
        codes = np.empty(len(points), dtype=np.uint16)
        splits = (self.axis, self.threshold, self.child, self.leaf)
        library.call("cc_kmeans_tree_descend", points, *points.shape, *splits, codes, threads)
        return codes


class _Nodes:
    """Growable arrays with one entry per node."""

    def __init__(self, capacity: int, dim: int) -> None:
        self.begin = np.zeros(capacity, dtype=np.int64)
        self.end = np.zeros(capacity, dtype=np.int64)
        self.axis = np.zeros(capacity, dtype=np.int32)
        self.child = np.full(capacity, -1, dtype=np.int32)
        self.threshold = np.zeros(capacity, dtype=np.float32)
        self.mean = np.zeros((capacity, dim), dtype=np.float32)
        self.error = np.zeros(capacity, dtype=np.float64)

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self.begin, self.end, self.axis, self.child, self.threshold, self.mean, self.error

    def grow(self, capacity: int) -> None:
        for name, old in vars(self).items():
            new = np.full((capacity, *old.shape[1:]), -1 if name == "child" else 0, dtype=old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)


def _largest(error: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    """Mark the `count` nodes with the largest errors above zero; among equal errors, the first nodes."""
    if count >= len(error):
        return error > 0
    if count <= 0:
        return np.zeros(len(error), dtype=bool)
    least = np.partition(error, len(error) - count)[len(error) - count]
    marked: npt.NDArray[np.bool_] = error > least
    tied = np.flatnonzero(error == least)
    marked[tied[: count - int(marked.sum())]] = True
    marked &= error > 0
    return marked


def build_tree(points: Floats, weights: Floats | None, order: npt.NDArray[np.int32], num_leaves: int, threads: int) -> Tree:
    """Build a tree of `num_leaves` leaves, or fewer if no leaf has an error above 0 left.

    Reorders `points` `[n, dim]`, `weights` `[n]` and `order` int32 `[n]` in place, all in the same way. The result does not
    depend on the number of threads.
    """
    nodes = _Nodes(4 * num_leaves + 16, points.shape[1])
    nodes.end[0] = len(points)
    data = (points, weights, order, points.shape[1])
    library.call("cc_kmeans_tree_root", *data, *nodes.arrays(), library.INSTRUCTION_LEVEL)
    count = 1
    while True:
        chosen = np.flatnonzero(_largest(nodes.error[:count], num_leaves - 1) & (nodes.child[:count] < 0)).astype(np.int32)
        if len(chosen) == 0:
            break
        if count + 2 * len(chosen) > len(nodes.error):
            nodes.grow(2 * (count + 2 * len(chosen)))
        nodes.child[chosen] = count + 2 * np.arange(len(chosen), dtype=np.int32)
        arrays = nodes.arrays()
        library.call("cc_kmeans_tree_split", *data, *arrays, chosen, len(chosen), threads, library.INSTRUCTION_LEVEL)
        count += 2 * len(chosen)
    return _cut(nodes, _largest(nodes.error[:count], num_leaves - 1))


def _cut(nodes: _Nodes, split: npt.NDArray[np.bool_]) -> Tree:
    """Keep only the marked splits and the nodes that they create."""
    count = len(split)
    child = np.where(split, nodes.child[:count], -1).astype(np.int32)
    kept = np.zeros(count, dtype=bool)
    kept[0] = True
    parents = np.flatnonzero(split)
    kept[child[parents]] = True
    kept[child[parents] + 1] = True
    leaves = np.flatnonzero(kept & ~split)
    leaves = leaves[np.argsort(nodes.begin[leaves], kind="stable")]
    leaf = np.full(count, -1, dtype=np.int32)
    leaf[leaves] = np.arange(len(leaves), dtype=np.int32)
    starts = np.append(nodes.begin[leaves], nodes.end[0])
    return Tree(nodes.axis[:count], nodes.threshold[:count], child, leaf, nodes.mean[leaves], starts)
