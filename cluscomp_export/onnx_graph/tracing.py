"""Tracing a skeleton to ONNX operators with torch.onnx, and the inputs and outputs it is traced with.

Names are those of Optimum and transformers.js:

    input_ids int64 [batch_size, sequence_length]
    attention_mask int64 [batch_size, sequence_length], of a decoder [batch_size, total_sequence_length]
    position_ids, of decoders that take it, or token_type_ids, of encoders that have types: as input_ids
    past_key_values.N.key, .value float32 [batch_size, heads, past_sequence_length, head_dim]
    -> logits, or last_hidden_state (and pooler_output), float32
       present.N.key, .value float32 [batch_size, heads, total_sequence_length, head_dim]
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnx import TensorProto
from torch import nn
from torch.fx.experimental import _config
from transformers import DynamicCache

from cluscomp_export.onnx_graph.skeleton import REMEDY, Skeleton, build_skeleton, make_traceable, refusing
from cluscomp_formats.onnx.spec import OPSET

__all__ = ["Port", "Trace", "trace"]

_CONTEXT = 65536
"""Number of tokens that a trace must be valid for, if the configuration has no limit."""

_OUTPUTS = ("logits", "last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; a string in the shape names a length that varies."""

    name: str
    element_type: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Trace:
    """`graph` takes the inputs, then the arrays of the module's state it uses, under the names of their keys."""

    graph: onnx_ir.Graph
    inputs: Sequence[Port]
    outputs: Sequence[Port]


class _Traced(nn.Module):
    """The model as a function of plain tensors: `inputs`, then key and value of every layer of its cache."""

    def __init__(self, skeleton: Skeleton, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = skeleton.module
        self.cached, self.inputs, self.outputs = skeleton.cached, inputs, outputs
        self.eval()

    def forward(self, *values: torch.Tensor) -> list[torch.Tensor]:
        given: dict[str, Any] = dict(zip(self.inputs, values, strict=False))
        if not self.cached:
            results = self.model(**given, return_dict=True)
            return [results[name] for name in self.outputs]
        # Of no configuration: its layers then keep all keys, also those that a sliding window has left behind.
        cache = DynamicCache()
        past = values[len(given) :]
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        results = self.model(**given, past_key_values=cache, use_cache=True, return_dict=True)
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return [*(results[name] for name in self.outputs), *present]


# A conversion asks before its work and after: it would take twice as long.
@functools.lru_cache(maxsize=1)
def trace(config: str) -> Trace:
    """The trace of the model of a configuration, given as JSON. Raises UnsupportedError if it cannot be traced."""
    skeleton = build_skeleton(json.loads(config))
    ids = ("batch_size", "sequence_length")
    inputs = [Port("input_ids", TensorProto.INT64, ids), Port("attention_mask", TensorProto.INT64, ids)]
    if skeleton.cached:
        inputs[1] = Port("attention_mask", TensorProto.INT64, ("batch_size", "total_sequence_length"))
    extra = "position_ids" if skeleton.cached else "token_type_ids"
    if extra in skeleton.options and (skeleton.cached or getattr(skeleton.module.config, "type_vocab_size", 0) > 1):
        inputs.append(Port(extra, TensorProto.INT64, ids))
    with refusing(f"{type(skeleton.module).__name__} cannot be traced to ONNX operators", REMEDY):
        names, cache = _dry_run(skeleton)
        make_traceable(skeleton.module)
        past = [Port(f"past_key_values.{name}", TensorProto.FLOAT, _cache_shape("past", *shape)) for name, shape in cache]
        traced = _Traced(skeleton, [port.name for port in inputs], names)
        context = getattr(skeleton.module.config, "max_position_embeddings", None) or _CONTEXT
        graph = _translate(_export(traced, [*inputs, *past], context), skeleton.module)
    # What torch calls the lengths of the inputs, which those of the outputs are made of.
    lengths = {length: name for value, port in zip(graph.inputs, inputs, strict=False) for length, name in _named(value, port)}
    shapes = [tuple(lengths.get(length, length) for length in _lengths(value)) for value in graph.outputs]
    outputs = [Port(name, TensorProto.FLOAT, shape) for name, shape in zip(names, shapes, strict=False)]
    present = [Port(f"present.{name}", TensorProto.FLOAT, _cache_shape("total", *shape)) for name, shape in cache]
    return Trace(graph, [*inputs, *past], [*outputs, *present])


def _dry_run(skeleton: Skeleton) -> tuple[list[str], list[tuple[str, tuple[int, int]]]]:
    """Names of the outputs; parts of the cache, each with its number of heads and their dimension."""
    _check_kind(skeleton)
    given = {"past_key_values": DynamicCache(), "use_cache": True} if skeleton.cached else {}
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    results = skeleton.module(input_ids=ids, return_dict=True, **given)
    names = [name for name in _OUTPUTS if results.get(name) is not None]
    if not names:
        raise ValueError(f"it gives none of {', '.join(_OUTPUTS)}")
    if not skeleton.cached:
        return names, []
    cache = []
    for number, layer in enumerate(results["past_key_values"].layers):
        for part, values in (("key", layer.keys), ("value", layer.values)):
            if values.shape[::2] != (2, 3):
                raise ValueError(f"its cache holds other things than keys and values, of shape {tuple(values.shape)}")
            cache.append((f"{number}.{part}", (values.shape[1], values.shape[3])))
    return names, cache


_OTHER_INPUTS = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values"})
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def _check_kind(skeleton: Skeleton) -> None:
    """Check for what torch and transformers fail on with unclear messages. Raises ValueError with a clear one."""
    others = sorted(_OTHER_INPUTS & skeleton.options)
    if others:
        raise ValueError(f"it takes other inputs than text, too: {', '.join(others)}")
    if not skeleton.cached:
        return
    config = skeleton.module.config
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    if "past_key_values" not in skeleton.options or kinds - _ATTENTION:
        states = ", ".join(sorted(kinds - _ATTENTION)) or "no keys and values at all"
        raise ValueError(f"its cache holds other things than keys and values: {states}")


def _cache_shape(when: str, heads: int, dim: int) -> tuple[int | str, ...]:
    return "batch_size", heads, f"{when}_sequence_length", dim


def _export(traced: _Traced, ports: Sequence[Port], context: int) -> torch.export.ExportedProgram:
    """The traced operators of torch. Raises ValueError if, up to `context` tokens, they hold for some lengths only."""
    dynamic = torch.export.Dim.DYNAMIC
    varying = [{axis: dynamic for axis, length in enumerate(port.shape) if isinstance(length, str)} for port in ports]
    # As torch.onnx does it: lengths of 0 and 1 are taken for lengths like all others.
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(traced, _examples(ports, 2, 3, 5), dynamic_shapes=(tuple(varying),), strict=False)
    # A model may branch on a length; torch then traces the one branch and keeps the condition here, as an expression.
    for tokens, past in ((context - 2, 2), (2, context - 2)):
        names = {"L": {"values": _examples(ports, 3, tokens, past, device="meta")}, "min": min, "max": max}
        for condition in program._guards_code:
            if not eval(condition, {"__builtins__": {}}, names):  # noqa: S307 - torch wrote it, over shapes and integers
                raise ValueError(f"the trace holds only for inputs with {condition}")
    return program


def _examples(ports: Sequence[Port], batch: int, tokens: int, past: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Inputs of these lengths."""
    lengths = {
        "batch_size": batch,
        "sequence_length": tokens,
        "past_sequence_length": past,
        "total_sequence_length": past + tokens,
    }
    shapes = [[lengths[length] if isinstance(length, str) else length for length in port.shape] for port in ports]
    types = [torch.int64 if port.element_type == TensorProto.INT64 else torch.float32 for port in ports]
    return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, types, strict=True))


def _translate(program: torch.export.ExportedProgram, module: nn.Module) -> onnx_ir.Graph:
    """The ONNX operators of a trace, simplified, the arrays of the module's state being inputs that follow the others."""
    translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    if translated is None:
        raise ValueError("torch.onnx gave no program")
    graph = translated.model.graph
    state = {f"model.{key}" for key in module.state_dict()}
    for name, value in list(graph.initializers.items()):
        if name in state:
            del graph.initializers[name]
            # Placeholders without values must not be read.
            value.const_value = None
            value.name = name.removeprefix("model.")
            graph.inputs.append(value)
    translated.optimize()
    return translated.model.graph


def _lengths(value: onnx_ir.Value) -> tuple[int | str, ...]:
    return tuple(length if isinstance(length, int) else str(length.value) for length in value.shape or ())


def _named(value: onnx_ir.Value, port: Port) -> Iterator[tuple[int | str, int | str]]:
    return zip(_lengths(value), port.shape, strict=True)
