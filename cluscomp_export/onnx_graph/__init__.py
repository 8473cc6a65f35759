"""The graphs of ONNX files: what a model computes, as nodes over its arrays."""

from cluscomp_export.onnx_graph.building import build_graph

__all__ = ["build_graph"]
