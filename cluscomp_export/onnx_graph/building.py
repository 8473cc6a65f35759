"""Which graph to build for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.package import require_onnx
from cluscomp_runtime.architecture import DecoderSettings, check_tensors

if TYPE_CHECKING:
    from cluscomp_formats.onnx.graph import Graph

__all__ = ["build_graph"]


def build_graph(model: Model) -> Graph:
    """The graph of a model; reads no payload.

    Raises UnsupportedError for an architecture that no builder knows, or without the package onnx; InvalidFileError for
    tensors that do not fit the configuration.
    """
    require_onnx()
    from cluscomp_export.onnx_graph.llama import llama_graph

    settings = DecoderSettings.from_config(model.config)
    check_tensors(model, settings)
    return llama_graph(model, settings)
