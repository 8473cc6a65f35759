"""Graphs that use every weight of any model, and the running of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from cluscomp_export.inspection import onnxruntime as running
from cluscomp_formats.ir import ClusteredWeight, DenseTensor, Model
from cluscomp_formats.onnx.graph import FLOAT, Graph, GraphBuilder, value
from cluscomp_formats.onnx.spec import MODEL_FILE, SUBFOLDER
from cluscomp_formats.onnx.weights import embedding, linear

Arrays = dict[str, npt.NDArray[Any]]

COMPACT = dict([running.COMPACT])


def matrices(model: Model) -> list[str]:
    """Names of what a linear can be made of: clustered weights, and dense matrices of floats."""
    floats = ("float16", "float32", "bfloat16")
    names = []
    for name, tensor in sorted(model.tensors.items()):
        dense = isinstance(tensor, DenseTensor) and tensor.values.dtype in floats and len(tensor.shape) == 2
        if isinstance(tensor, ClusteredWeight) or (dense and min(tensor.shape) > 0):
            names.append(name)
    return names


def graph_of(model: Model, *, transposed: bool = False) -> Graph:
    """For the matrix of number N a linear `xN -> yN` and an embedding `idsN -> rowsN`."""
    builder = GraphBuilder()
    inputs, outputs = [], []
    for number, name in enumerate(matrices(model)):
        builder.scope = f"graph {number}"
        weight = model.tensors[name]
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        builder.node("Identity", [linear(builder, weight, f"x{number}", transposed=transposed)], name=f"y{number}")
        builder.node("Identity", [embedding(builder, weight, f"ids{number}")], name=f"rows{number}")
        inputs.append(value(f"x{number}", FLOAT, ["batch_size", "tokens", in_features]))
        inputs.append(value(f"ids{number}", TensorProto.INT64, ["batch_size", "tokens"]))
        outputs.append(value(f"y{number}", FLOAT, ["batch_size", "tokens", out_features]))
        outputs.append(value(f"rows{number}", FLOAT, ["batch_size", "tokens", weight.shape[1]]))
    return Graph(builder.nodes, inputs, outputs)


def feeds_of(model: Model, *, transposed: bool = False, seed: int = 0) -> Arrays:
    """Random inputs for `graph_of`."""
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    for number, name in enumerate(matrices(model)):
        shape = model.tensors[name].shape
        feeds[f"x{number}"] = rng.standard_normal((2, 3, shape[0] if transposed else shape[1])).astype(np.float32)
        feeds[f"ids{number}"] = rng.integers(0, shape[0], (2, 3))
    return feeds


def session(folder: Path, config: dict[str, str] | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, text in (config or {}).items():
        options.add_session_config_entry(key, text)
    return onnxruntime.InferenceSession(folder / SUBFOLDER / MODEL_FILE, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(folder: Path, feeds: Arrays, config: dict[str, str] | None = None) -> Arrays:
    """Every output by name."""
    running = session(folder, config)
    names = [output.name for output in running.get_outputs()]
    return dict(zip(names, running.run(names, feeds), strict=True))


def run_reference(folder: Path, feeds: Arrays) -> Arrays:
    """The same with the evaluator of the package onnx, in plain numpy."""
    proto = onnx.load(folder / SUBFOLDER / MODEL_FILE)
    names = [output.name for output in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(names, feeds), strict=True))


def check_strictly(folder: Path, scratch: Path) -> None:
    """What the package onnx finds wrong with a file. `scratch` is a file it may write."""
    path = str(folder / SUBFOLDER / MODEL_FILE)
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes_path(path, str(scratch), check_type=True, strict_mode=True, data_prop=True)
