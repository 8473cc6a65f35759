"""Time of codebooks and of tokens on a machine, predicted from shapes alone.

A token multiplies by every matrix of the blocks (of experts, those that its router takes) and by the head. A matrix takes its
look-ups, distributed over the cores, or the time that its bytes take from memory, whichever is longer: kernels prefetch codes
while they compute. Attention over a long text and sampling are not included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluscomp_export.planning.machines import Machine
from cluscomp_export.sources.linears import linear_tensors, logits_tensor
from cluscomp_formats.architectures import describe_loosely
from cluscomp_formats.architectures.description import DecoderDescription, Experts
from cluscomp_formats.ir import ClusteredWeight, Model, code_bits

__all__ = ["PredictedSpeed", "dense_ns", "entry_bytes", "predicted_speed", "shares_read", "weight_ns"]

CACHED_TOKENS = 1024
"""Tokens whose keys and values count as memory, at 16 bits."""
PROGRAM_BYTES = 40_000_000
"""Resident memory of a program that only generates, besides the model and its cache."""


@dataclass(frozen=True)
class PredictedSpeed:
    """A prediction for `machine`, a profile's name, which was `measured` or derived on paper.

    Tokens per second by number of `threads`, decoding one text, and resident bytes with a cache of `CACHED_TOKENS` tokens.
    """

    machine: str
    measured: bool
    tokens_per_second: Mapping[int, float]
    resident_bytes: int


def entry_bytes(cluster_dim: int, value_bits: int) -> int:
    """Bytes of a centroid as gathering kernels hold it: padded to 4, 8 or a multiple of 16."""
    values = cluster_dim * value_bits // 8
    return 4 if values <= 4 else 8 if values <= 8 else -(-values // 16) * 16


def weight_ns(machine: Machine, cluster_dim: int, num_clusters: int, value_bits: int, threads: int | None = None) -> float:
    """Nanoseconds per weight of a matrix with such a codebook, on that many threads (all cores if None)."""
    threads = machine.cores if threads is None else min(threads, machine.cores)
    held = next((ns for most, ns in machine.registers if num_clusters <= most), None)
    if held is not None:
        # A value of 16 bits is two of 8, each looked up.
        look_up = held * (value_bits // 8)
    else:
        size = (1 << code_bits(num_clusters)) * entry_bytes(cluster_dim, value_bits)
        look_up = next(ns for most, ns in machine.gathers if size <= most) / cluster_dim
    return max(look_up / threads, _memory_ns(machine, code_bits(num_clusters) / cluster_dim, threads))


def dense_ns(machine: Machine, bits: float, threads: int | None = None) -> float:
    """Nanoseconds per weight of a dense matrix of that many bits per weight."""
    return _memory_ns(machine, bits, machine.cores if threads is None else min(threads, machine.cores))


def _memory_ns(machine: Machine, bits: float, threads: int) -> float:
    """Nanoseconds to read that many bits from memory."""
    one, every = machine.bandwidth
    return bits / 8 / min(threads * one, every)


def shares_read(model: Model) -> dict[str, float]:
    """For every matrix that a token multiplies by, the share of its weights that the average token reads."""
    shares = dict.fromkeys(linear_tensors(model), 1.0)
    description = describe_loosely(model.config)
    parts = [] if description is None else [part for block in description.blocks for part in block.networks]
    for part in parts:
        if isinstance(part, Experts):
            share = min(1.0, part.top_k / max(1, len(part.experts)))
            shares |= {name: share for step in part.steps for name in step.weights if name in shares}
    head = logits_tensor(model)
    return shares if head is None else shares | {head: 1.0}


def predicted_speed(model: Model, machine: Machine, threads: int | None = None) -> PredictedSpeed:
    """The speed of a model on `machine`: on one thread and on `threads` (all cores if None); reads no payload."""
    description = describe_loosely(model.config)
    layers = 0 if description is None else description.num_layers
    most = machine.cores if threads is None else min(threads, machine.cores)
    rates = {count: 1e9 / (_token_ns(model, machine, count) + 1e3 * layers * machine.layer_us) for count in sorted({1, most})}
    stored = sum(tensor.own_bits for tensor in model.tensors.values())
    books = {
        stage.codebook.name: stage.codebook.values.nbytes for weight in model.clustered.values() for stage in weight.stages
    }
    cache = 0 if description is None else _cache_bytes(description)
    resident = -(-stored // 8) + sum(books.values()) + cache + PROGRAM_BYTES
    return PredictedSpeed(machine.name, machine.measured, rates, resident)


def _token_ns(model: Model, machine: Machine, threads: int) -> float:
    total = 0.0
    for name, share in shares_read(model).items():
        tensor = model.tensors[name]
        if isinstance(tensor, ClusteredWeight):
            ns = 0.0
            for book in (stage.codebook for stage in tensor.stages):
                value_bits = 8 * book.values.nbytes // book.values.size
                ns += weight_ns(machine, book.cluster_dim, book.num_clusters, value_bits, threads)
        else:
            ns = dense_ns(machine, tensor.own_bits / tensor.num_weights, threads) if tensor.num_weights else 0.0
        total += share * ns * tensor.num_weights
    # A model without a matrix takes no time, but has a rate.
    return max(total, math.ulp(1.0))


def _cache_bytes(description: DecoderDescription) -> int:
    widths = sum(part.kv_heads * part.head_dim for block in description.blocks for part in block.attentions)
    # Keys and values, two bytes each.
    return 4 * widths * CACHED_TOKENS
