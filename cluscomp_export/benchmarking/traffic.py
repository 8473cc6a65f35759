"""How many bytes of weights a token reads, and how fast this machine reads memory."""

from __future__ import annotations

import threading
import time

import numpy as np

from cluscomp_formats.architectures import DecoderDescription, Experts
from cluscomp_formats.ir import ClusteredWeight, Codebook, Model

__all__ = ["read_gigabytes_per_second", "weight_bytes"]

_PASSES = 8
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 1 << 30


def weight_bytes(model: Model, description: DecoderDescription) -> int:
    """Bytes of weights, as the file stores them, that one token of decoding reads; reads no payload.

    Codes at their width, codebooks (once, if shared), scales, dense values. Of an embedding that is not the head as well, a
    token reads one row; of experts, those it goes through.
    """
    shares = dict.fromkeys(model.tensors, 1.0)
    if not description.tied or description.head.weight in model.tensors:
        shares[description.embedding.weight] = 1 / description.vocab_size
    for block in description.blocks:
        for network in block.networks:
            if isinstance(network, Experts):
                taken = network.top_k / len(network.experts)
                shares |= {spec.name: taken for expert in network.experts for spec in expert.tensors()}
    stored = model.provenance.get("stored_bits", {})
    codebooks: dict[str, Codebook] = {}
    bits = 0.0
    for name, tensor in model.tensors.items():
        bits += shares[name] * (tensor.num_weights * stored[name] if name in stored else tensor.own_bits)
        if isinstance(tensor, ClusteredWeight) and shares[name] * tensor.shape[0] > 1:
            codebooks |= {stage.codebook.name: stage.codebook for stage in tensor.stages}
    return round(bits / 8) + sum(codebook.values.nbytes for codebook in codebooks.values())


def read_gigabytes_per_second(size: int, threads: int) -> float:
    """GB/s at which `threads` threads together read a buffer of `size` bytes, best of several passes.

    The buffer has at least 32 MiB and at most 1 GiB. It is as large as the weights of a model so that it lies where they do:
    some last-level caches hold hundreds of megabytes.
    """
    buffer = np.ones(min(max(size, _LEAST_BYTES), _MOST_BYTES), np.uint8)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    for _ in range(_PASSES):
        # numpy releases the interpreter's lock meanwhile, and takes the maximum with the widest vectors there are.
        helpers = [threading.Thread(target=np.maximum.reduce, args=(part,)) for part in parts[1:]]
        start = time.perf_counter()
        for helper in helpers:
            helper.start()
        np.maximum.reduce(parts[0])
        for helper in helpers:
            helper.join()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9
