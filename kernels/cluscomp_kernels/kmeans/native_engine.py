"""Clustering on the CPU with the C functions: scans of neighbour lists over points sorted by a tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans.groups import Groups, group, scan, update_means
from cluscomp_kernels.kmeans.means import Indices, Means
from cluscomp_kernels.kmeans.tiles import Tiles, neighbour_lists, pack_tiles, refresh_lists
from cluscomp_kernels.kmeans.tree import Tree, build_tree

__all__ = ["NativeEngine", "SearchSpace", "assign_native", "list_length", "spatial_order"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]

REFRESH_EVERY = 2
LARGEST_LIST_DIM = 10


def list_length(dim: int, num_clusters: int) -> int:
    """Return the number of neighbours to list per centroid. It grows with the dimension, as the distance to be scanned does."""
    wanted = 48 if dim <= 4 else 96 if dim <= 6 else 128 if dim <= 8 else 256
    return min(wanted, num_clusters - 1)


class NativeEngine:
    """An `Engine` over `points` `[n, dim]` that are roughly sorted by cluster in memory.

    The first search for the nearest centroid of each point starts at `codes`. Exact assignments build exact neighbour lists;
    others refresh the existing lists every `REFRESH_EVERY` assignments. With more than `LARGEST_LIST_DIM` dimensions, lists are
    rarely long enough to prove that a centroid is the nearest, so exact assignments search all centroids and do not rebuild
    the lists.
    """

    def __init__(
        self, points: Floats, weights: Floats | None, codes: Codes, num_clusters: int, *, threads: int, tick: Callable[[], None]
    ) -> None:
        self._codes = codes
        self._points = points
        self._weights = weights
        self._threads = threads
        self._tick = tick
        self._length = list_length(points.shape[1], num_clusters)
        self._groups: Groups = group(codes, num_clusters)
        self._distances: Floats = np.empty(0, dtype=np.float32)
        self._lists: Ints | None = None
        self._age = 0

    @property
    def codes(self) -> Codes:
        return self._codes

    def assign(self, centroids: Floats, *, exact: bool) -> None:
        tiles = pack_tiles(centroids)
        stale = exact and centroids.shape[1] > LARGEST_LIST_DIM
        if self._lists is None or (exact and not stale):
            self._lists = neighbour_lists(
                tiles, centroids, self._length, threads=self._threads, previous=self._lists, tick=self._tick
            )
            self._age = 0
        elif self._age >= REFRESH_EVERY:
            self._lists = refresh_lists(centroids, self._lists, threads=self._threads, tick=self._tick)
            self._age = 0
        self._age += 1
        state = (tiles, self._lists, self._points, self._groups, centroids)
        found = scan(*state, exact=exact, stale=stale, threads=self._threads, tick=self._tick)
        self._codes, self._distances = found.codes, found.distances
        self._groups = group(self._codes, len(centroids))

    def update(self, centroids: Floats) -> Means:
        return update_means(self._points, self._weights, self._distances, self._groups, centroids, threads=self._threads)

    def points_at(self, indices: Ints) -> Floats:
        return self._points[indices]

    def centroids_revived(self, revived: Indices, donors: Indices) -> None:
        # A revived centroid gets a copy of its donor's neighbours, and the two list each other; the next refresh adds it to
        # further lists. Entries must stay distinct: the exact search bounds distances by the previous lists.
        lists = self._lists
        if lists is None or lists.shape[1] == 0:
            return
        taken = lists[donors]
        itself = taken == revived[:, None]
        place = np.where(itself.any(1), itself.argmax(1), lists.shape[1] - 1)
        taken[np.arange(len(revived)), place] = donors
        unknown = ~itself.any(1)
        lists[donors[unknown], -1] = revived[unknown]
        lists[revived] = taken
        self._age = REFRESH_EVERY


def spatial_order(centroids: Floats, threads: int) -> Ints:
    """Return an order of the centroids, int32 `[k]`, that puts near ones next to each other."""
    order = np.arange(len(centroids), dtype=np.int32)
    build_tree(centroids.copy(), None, order, len(centroids), threads)
    return order


def assign_native(points: Floats, space: SearchSpace, threads: int, tick: Callable[[], None], *, exact: bool = True) -> Codes:
    """Return the nearest centroid of each point, uint16 `[n]`; unless `exact`, a near one.

    A tree over the centroids gives a first guess, and a scan of its neighbour list a better one, which leaves little work for
    the exact scan.
    """
    codes = space.order[space.tree.starts[:-1]].astype(np.uint16)[space.tree.descend(points, threads)]
    for last in (False, True):
        groups = group(codes, len(space.centroids))
        state = (space.tiles, space.lists, points, groups, space.centroids)
        codes = scan(*state, exact=exact and last, stale=False, threads=threads, tick=tick).codes
    return codes


@dataclass(frozen=True)
class SearchSpace:
    """Data structures for searching `centroids` `[k, dim]`: a `tree` over them, with its `order`, and neighbour `lists`."""

    centroids: Floats
    order: Ints
    tree: Tree
    tiles: Tiles
    lists: Ints

    _last: ClassVar[SearchSpace | None] = None

    @classmethod
    def cached(cls, centroids: Floats, threads: int, tick: Callable[[], None]) -> SearchSpace:
        """Return the cached search space if it has these centroids; otherwise build and cache a new one.

        Matrices that share a codebook benefit: building the lists takes longer than assigning most matrices.
        """
        last = cls._last
        if last is None or not np.array_equal(last.centroids, centroids):
            cls.clear_cache()
            last = cls._last = cls.build(centroids.copy(), threads, tick)
        return last

    @classmethod
    def clear_cache(cls) -> None:
        """Free the memory of the cached search space."""
        cls._last = None

    @classmethod
    def build(cls, centroids: Floats, threads: int, tick: Callable[[], None]) -> SearchSpace:
        order = np.arange(len(centroids), dtype=np.int32)
        tree = build_tree(centroids.copy(), None, order, len(centroids), threads)
        tiles = pack_tiles(centroids, order)
        length = list_length(centroids.shape[1], len(centroids))
        lists = neighbour_lists(tiles, centroids, length, threads=threads, previous=None, tick=tick)
        return cls(centroids, order, tree, tiles, lists)
