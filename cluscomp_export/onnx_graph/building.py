"""Which graph to build for a model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cluscomp_export.calibration.runnable import decoder_settings
from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.package import require_onnx
from cluscomp_runtime.architecture import MODEL_TYPES, DecoderSettings, check_tensors

if TYPE_CHECKING:
    from cluscomp_formats.onnx.graph import Graph

__all__ = ["build_graph"]


def build_graph(model: Model) -> Graph:
    """The graph of a model; reads no payload. Any but those of the Llama family are traced, which takes longer.

    Raises UnsupportedError for an architecture that cannot be traced, or without the packages that this takes;
    InvalidFileError for tensors that do not fit the configuration.
    """
    require_onnx()
    if model.config.get("model_type") not in MODEL_TYPES:
        _require_tracing()
        from cluscomp_export.onnx_graph.traced import traced_graph

        return traced_graph(model)
    from cluscomp_export.onnx_graph.decoder import llama_graph

    settings = DecoderSettings.from_config(model.config)
    check_tensors(model, settings, head=False)
    return llama_graph(model, settings, predicts=decoder_settings(model) is not None)


def _require_tracing() -> None:
    missing = [name for name in ("onnxscript", "transformers") if find_spec(name) is None]
    if missing:
        message = f"graphs of other architectures than {', '.join(MODEL_TYPES)} take the package {' and '.join(missing)}"
        raise UnsupportedError(Problem("no_tracing", message, remedy="pip install cluscomp-export[onnx-trace]"))
