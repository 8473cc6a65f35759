"""The native engine: a whole decoding step, or a part of a prompt, in one call of C (`cluscomp_kernels.engine`); no torch.

Codes and dense values are used where they lie: those of a packed file are mapped, so memory holds what has been read. Only
codebooks are laid out anew. Products with clustered matrices are computed in integers: activations have 16 bits and a scale for
each 64 channels, entries of codebooks 8 bits, or 16 if they are stored as floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_formats import architectures, check_payloads, tiled_codes
from cluscomp_formats.architectures import DecoderDescription
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor
from cluscomp_formats.parameters import codebook_name, norm_name, row_scale_name
from cluscomp_kernels import engine, native
from cluscomp_runtime.engine import Ids, Logits
from cluscomp_runtime.frequencies import inverse_frequencies
from cluscomp_runtime.memory import check_memory, memory_faults

__all__ = ["NativeEngine", "held_bytes", "why_not_native"]

AS_STORED = ("float32", "float16", "bfloat16")
"""Dense matrices of other dtypes become float32."""


def why_not_native(model: Model) -> str | None:
    """Why the native engine cannot run a model that `check_tensors` has passed, and what to do about it; None if it can.

    A clause that follows "because".
    """
    missing = native.missing_reason("_engine")
    if missing:
        return missing
    reasons: dict[str, list[str]] = {}
    for name, tensor in model.clustered.items():
        reason = _why_not(tensor)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    if not reasons:
        return None
    found = []
    for reason, (first, *others) in reasons.items():
        more = f" and {len(others)} more" if others else ""
        found.append(f"{reason} ({first}{more})")
    return f"it has {'; '.join(found)}; convert the original model again"


def _why_not(tensor: ClusteredWeight) -> str | None:
    if tensor.group_axis == "in":
        return "groups along the in axis, which no kernel supports: decoded to float32, as large as uncompressed weights"
    for part, present in (("a column scale", tensor.column_scale), ("outliers", tensor.outliers)):
        if present is not None:
            return f"{part}, which the native engine does not support"
    if any(stage.codebook.cluster_dim > engine.MAX_DIM for stage in tensor.stages):
        return f"codes for more than {engine.MAX_DIM} weights, the most of the native engine"
    if len(tensor.stages) > engine.MAX_STAGES:
        return f"more than {engine.MAX_STAGES} stages, the most of the native engine"
    return None


def held_bytes(tensor: Tensor) -> int:
    """Bytes that the engine reads of a tensor: its packed codes and scales, or its dense values as stored."""
    return -(-tensor.own_bits // 8)


class NativeEngine:
    """Runs a model that `check_tensors` has passed and `why_not_native` has nothing against, on the CPU.

    `threads` is the number of threads, by default OMP_NUM_THREADS or all cores; `cache_dtype` is that of keys and values.
    Raises UnsupportedError for a model larger than memory; InvalidFileError if codes are out of range; InvalidRequestError if
    the environment variable CLUSCOMP_CPU names instructions that this machine lacks.
    """

    name: Literal["native"] = "native"
    device, dtype, kernel = "cpu", "float32", "auto"
    arithmetic = "int16"

    def __init__(
        self,
        model: Model,
        description: DecoderDescription,
        *,
        threads: int | None = None,
        cache_dtype: engine.CacheType = "float32",
    ) -> None:
        self.description = description
        self.threads = threads
        self.cache_dtype = cache_dtype
        check_memory(model, held_bytes)
        # What a file stores is checked here at once, in parallel; reading it checks no more.
        check_payloads(model, largest=engine.largest_code)
        try:
            self.builder = _Builder(model, engine.best_variant())
        except ValueError as error:
            remedy = "unset CLUSCOMP_CPU"
            raise InvalidRequestError(Problem("unknown_cpu", str(error), remedy=remedy)) from error
        with memory_faults():
            self.program = self.builder.program(description, threads)
        self.kernels = {name: "native" if name in model.clustered else "dense" for name in self.builder.linears}

    def cache(self, capacity: int) -> Any:
        return self.program.cache(capacity, self.cache_dtype)

    def logits(self, ids: Ids, cache: Any, *, last_only: bool = False) -> Logits:
        return self.program.logits(ids, cache, last_only=last_only)

    def forward(self, batch: Ids) -> Logits:
        logits = np.empty((*batch.shape, self.description.vocab_size), dtype=np.float32)
        for ids, row in zip(batch, logits, strict=True):
            row[:] = self.program.logits(ids, self.cache(len(ids)), last_only=False)
        return logits

    def update(self, model: Model, names: Collection[str]) -> None:
        self.builder.update(model, names)


class _Builder:
    """Makes the parts of a program from a model's tensors; matrices share codebooks."""

    def __init__(self, model: Model, variant: int) -> None:
        self._model = model
        self._variant = variant
        self._codebooks: dict[str, engine.Codebook] = {}
        self._row_scales: dict[str, npt.NDArray[np.float32]] = {}
        self._norms: list[tuple[architectures.Norm, engine.EngineNorm]] = []
        self.linears: dict[str, engine.EngineLinear] = {}
        """By the name of the weight."""

    def program(self, description: DecoderDescription, threads: int | None) -> engine.Program:
        embedding = self._linear(description.embedding)
        head = self._linear(description.head) if description.head.weight in self._model.tensors else embedding
        branches = [branch for block in description.blocks for branch in block.branches]
        # All heads of a decoder are equally wide.
        head_dim = next(branch.part.head_dim for branch in branches if isinstance(branch.part, architectures.Attention))
        return engine.Program(
            embedding=embedding,
            branches=[self._branch(branch) for branch in branches],
            norm=self._norm(description.norm),
            head=head,
            ropes=[inverse_frequencies(rope, head_dim) for rope in description.ropes],
            embedding_scale=description.embedding_scale,
            variant=self._variant,
            threads=threads,
        )

    def _branch(self, branch: architectures.Branch) -> engine.Branch:
        post_norm = None if branch.post_norm is None else self._norm(branch.post_norm)
        return engine.Branch(self._norm(branch.norm), self._part(branch.part), post_norm)

    def _part(
        self, part: architectures.Attention | architectures.FeedForward | architectures.Experts
    ) -> engine.Attention | engine.FeedForward | engine.Experts:
        if isinstance(part, architectures.FeedForward):
            return self._feed_forward(part)
        if isinstance(part, architectures.Experts):
            experts = [self._feed_forward(expert) for expert in part.experts]
            return engine.Experts(self._linear(part.router), experts, part.top_k, part.normalised)
        return engine.Attention(
            query=self._linear(part.query),
            key=self._linear(part.key),
            value=self._linear(part.value),
            output=self._linear(part.output),
            heads=part.heads,
            kv_heads=part.kv_heads,
            head_dim=part.head_dim,
            scale=part.scale,
            rope=part.rope,
            window=part.window,
            query_norm=None if part.query_norm is None else self._norm(part.query_norm),
            key_norm=None if part.key_norm is None else self._norm(part.key_norm),
        )

    def _feed_forward(self, part: architectures.FeedForward) -> engine.FeedForward:
        gate, up, down = (self._linear(linear) for linear in (part.gate, part.up, part.down))
        return engine.FeedForward(gate, up, down, part.activation)

    def _norm(self, norm: architectures.Norm) -> engine.EngineNorm:
        made = engine.EngineNorm(self._model.tensors[norm.weight].decode() + np.float32(norm.offset), norm.eps)
        self._norms.append((norm, made))
        return made

    def _linear(self, linear: architectures.Linear) -> engine.EngineLinear:
        tensor = self._model.tensors[linear.weight]
        bias = self._model.tensors[f"{linear.name}.bias"].decode() if linear.bias else None
        shape = (linear.out_features, linear.in_features)
        if isinstance(tensor, DenseTensor):
            stored = tensor.values.dtype if tensor.values.dtype in AS_STORED else "float32"
            values = tensor.values.read() if stored == tensor.values.dtype else tensor.decode()
            made = engine.EngineLinear(shape, values=np.require(values, requirements=["C", "A"]), value_type=stored, bias=bias)
        else:
            row_scale = None
            if tensor.row_scale is not None:
                # A copy, which the stages share: `update` writes to it.
                row_scale = self._row_scales[tensor.name] = np.array(tensor.row_scale.to_float32())
            stages = [engine.Stage(_codes(tensor, stage), self._codebook(stage.codebook), row_scale) for stage in tensor.stages]
            made = engine.EngineLinear(shape, stages=stages, bias=bias)
        self.linears[linear.weight] = made
        return made

    def _codebook(self, codebook: Codebook) -> engine.Codebook:
        if codebook.name not in self._codebooks:
            self._codebooks[codebook.name] = engine.Codebook(_values(codebook), self._variant)
        return self._codebooks[codebook.name]

    def update(self, model: Model, names: Collection[str]) -> None:
        """Overwrite in place the parameters with these names; see `Engine.update`."""
        for name, codebook in model.codebooks.items():
            if name in self._codebooks and codebook_name(name) in names:
                self._codebooks[name].update(_values(codebook))
        for name, row_scale in self._row_scales.items():
            tensor = model.tensors[name]
            if isinstance(tensor, ClusteredWeight) and tensor.row_scale is not None and row_scale_name(name) in names:
                row_scale[:] = tensor.row_scale.to_float32()
        for norm, made in self._norms:
            if norm_name(norm.weight) in names:
                made.weight[:] = model.tensors[norm.weight].decode() + np.float32(norm.offset)


def _values(codebook: Codebook) -> npt.NDArray[Any]:
    return codebook.values.read() if codebook.values.dtype == "int8" else codebook.values.to_float32()


def _codes(tensor: ClusteredWeight, stage: Stage) -> npt.NDArray[np.uint8]:
    if stage.codes.tiled is None:
        largest, clusters = int(stage.codes.read().max()), stage.codebook.num_clusters
        if largest >= clusters:
            message, expected = "codes are out of range", f"below {clusters}, the number of clusters"
            raise InvalidFileError(Problem("code_out_of_range", message, None, tensor.name, str(largest), expected))
    return tiled_codes(stage)
