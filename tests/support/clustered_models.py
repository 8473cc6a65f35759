"""Clustered models of known content, built without k-means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, Model, Outliers, Stage, Tensor

QUERY, KEY, VALUE, OUTPUT = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo")


def codes_of(rng: np.random.Generator, shape: tuple[int, int], codebook: Codebook) -> Array:
    return Array.of(rng.integers(0, codebook.num_clusters, shape).astype(np.uint16))


def clustered(
    name: str, shape: tuple[int, int], codebooks: list[Codebook], seed: int, axis: Any = "out", **extras: Any
) -> ClusteredWeight:
    """A weight of random codes, a stage for each codebook."""
    rng = np.random.default_rng(seed)
    along, across = shape if axis == "out" else shape[::-1]
    stages = [Stage(book, codes_of(rng, (across, -(-along // book.cluster_dim)), book)) for book in codebooks]
    return ClusteredWeight(name, shape, tuple(stages), axis, **extras)


def codebook(name: str, num_clusters: int, cluster_dim: int, seed: int, dtype: str = "float16") -> Codebook:
    """Random centroids; those of int8 fill its range, so weights that use them want a row scale."""
    values = np.random.default_rng(seed).normal(0, 0.3, (num_clusters, cluster_dim))
    return Codebook(name, Array.of((np.clip(100 * values, -127, 127) if dtype == "int8" else values).astype(dtype)))


def with_clusters(model: Model) -> Model:
    """A Llama of `model_builders.tiny_llama` whose layer 0 attention is clustered in four ways.

    q: one stage of 16-bit codes into a codebook of its own; k and v share a 3-bit codebook, k with a second stage of its
    own and a row scale, v along the other axis with a column scale and outliers; o has a codebook of int8 and a row scale.
    """
    tensors: dict[str, Tensor] = dict(model.tensors)
    own, shared, second = codebook(QUERY, 40000, 4, 1), codebook("kv", 5, 3, 2), codebook("k second", 9, 2, 3, "float32")
    shape_of: Callable[[str], Any] = lambda name: model.tensors[name].shape  # noqa: E731
    rows, columns = shape_of(KEY)[0], shape_of(VALUE)[1]
    tensors[QUERY] = clustered(QUERY, shape_of(QUERY), [own], 4)
    scale = np.linspace(0.5, 2, rows).astype(np.float16)
    tensors[KEY] = clustered(KEY, shape_of(KEY), [shared, second], 5, row_scale=Array.of(scale))
    outliers = Outliers(Array.of(np.array([1, 7], np.uint32)), Array.of(np.array([3.0, -4.0], np.float32)))
    column_scale = Array.of(np.linspace(0.5, 2, columns).astype(np.float32))
    tensors[VALUE] = clustered(VALUE, shape_of(VALUE), [shared], 6, "in", column_scale=column_scale, outliers=outliers)
    whole = codebook("o", 300, 6, 7, "int8")
    steps = Array.of(np.linspace(0.005, 0.02, shape_of(OUTPUT)[0]).astype(np.float16))
    tensors[OUTPUT] = clustered(OUTPUT, shape_of(OUTPUT), [whole], 8, row_scale=steps)
    return Model(model.config, tensors, {"notes.txt": Array.of(np.frombuffer(b"hello", np.uint8))}, {"name": "Tiny"})
