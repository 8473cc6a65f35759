"""Chooses how the graph of a model is built."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cluscomp_export.calibration.runnable import decoder_description
from cluscomp_formats.architectures import FAMILIES, check_tensors, describe, find_family
from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.package import require_onnx

if TYPE_CHECKING:
    from cluscomp_formats.onnx.graph import Graph

__all__ = ["build_graph"]


def build_graph(model: Model) -> Graph:
    """Build the graph of a model; reads no payload. A model of an unknown family is traced, which takes longer.

    Raises UnsupportedError for an architecture that cannot be traced, or without the packages that this takes;
    InvalidFileError for tensors that do not fit the configuration.
    """
    require_onnx()
    if find_family(model.config) is None:
        _require_tracing()
        from cluscomp_export.onnx_graph.traced import traced_graph

        return traced_graph(model)
    from cluscomp_export.onnx_graph.decoder import decoder_graph

    description = describe(model.config)
    check_tensors(model, description, head=False)
    return decoder_graph(model, description, predicts=decoder_description(model) is not None)


def _require_tracing() -> None:
    missing = [name for name in ("onnxscript", "transformers") if find_spec(name) is None]
    if missing:
        message = f"graphs of other architectures than {', '.join(FAMILIES)} take the package {' and '.join(missing)}"
        raise UnsupportedError(Problem("no_tracing", message, remedy="pip install cluscomp-export[onnx-trace]"))
