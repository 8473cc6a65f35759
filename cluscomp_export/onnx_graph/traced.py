"""The graph of any model of transformers that can be traced: its operators, over the arrays of the IR.

Where the trace has a placeholder, the graph has the nodes that every form of weight takes (`cluscomp_formats.onnx.weights`);
all else is copied. It computes in float32 what transformers computes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import onnx_ir

from cluscomp_export.onnx_graph.skeleton import PLACEHOLDER_DOMAIN, REMEDY, build_skeleton, tensors_by_key
from cluscomp_export.onnx_graph.tracing import Trace, trace
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import DenseTensor, Model, Tensor
from cluscomp_formats.onnx.graph import Graph, GraphBuilder, value
from cluscomp_formats.onnx.spec import ELEMENT_TYPES
from cluscomp_formats.onnx.weights import embedding, linear
from cluscomp_formats.strict_json import canonical_json
from cluscomp_runtime.hf.stored_names import places_of

__all__ = ["traced_graph"]

_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
_SCOPES = "pkg.torch.onnx.name_scopes"


def traced_graph(model: Model) -> Graph:
    """The graph of a model, traced from its configuration and the names of its tensors; reads no payload.

    Takes seconds for a small model and grows with the number of layers. Raises UnsupportedError if transformers does not
    know the architecture, has no use for a tensor, or cannot be traced; InvalidFileError for missing tensors and wrong shapes.
    """
    skeleton = build_skeleton(model.config)
    places = places_of(skeleton.module, model.tensors)
    if places.merges:
        message = "transformers merges tensors of this model, as experts are: a graph would have to hold them decoded"
        raise UnsupportedError(Problem("merged_tensors", message, None, places.merges[0].names[0], remedy=REMEDY))
    tensors = tensors_by_key(skeleton, model, places)
    return _Translation(trace(canonical_json(model.config)), tensors).graph()


class _Translation:
    """Copies a trace into a graph, with names of its own, so that the same model always gives the same bytes."""

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor]) -> None:
        self.trace = trace
        self.tensors = tensors
        self.builder = GraphBuilder(scope="inputs")
        self.names: dict[onnx_ir.Value, str] = {}
        self.constants: dict[bytes, str] = {}

    def graph(self) -> Graph:
        traced, ports = self.trace.graph, self.trace.inputs
        self.names = {value: port.name for value, port in zip(traced.inputs, ports, strict=False)}
        self._check(traced)
        for node in traced:
            self._node(node)
        for result, port in zip(traced.outputs, self.trace.outputs, strict=True):
            self.builder.scope = "outputs"
            self.builder.node("Identity", [self._name(result)], name=port.name)
        inputs, outputs = (
            [value(port.name, port.element_type, port.shape) for port in side] for side in (ports, self.trace.outputs)
        )
        return Graph(self.builder.nodes, inputs, outputs)

    def _check(self, traced: onnx_ir.Graph) -> None:
        """Raises InvalidFileError for missing tensors, UnsupportedError for anything that an ONNX file cannot hold."""
        used = {value.name or "" for value in traced.inputs[len(self.trace.inputs) :] if value.uses()}
        used |= {_key(node) for node in traced if node.domain == PLACEHOLDER_DOMAIN}
        missing = sorted(used - self.tensors.keys())
        if missing:
            message = "the model lacks a tensor its configuration calls for"
            raise InvalidFileError([Problem("missing_tensor", message, None, name) for name in missing])
        for node in traced:
            nested = any(attribute.type in _GRAPHS for attribute in node.attributes.values())
            if nested or node.domain not in ("", PLACEHOLDER_DOMAIN):
                message = "the trace has control flow or operators that are not ONNX's own"
                found = f"{node.domain}::{node.op_type}"
                raise UnsupportedError(Problem("untraceable", message, None, None, found, None, REMEDY))

    def _node(self, node: onnx_ir.Node) -> None:
        builder = self.builder
        scope = _scope(node)
        if scope is not None:
            builder.scope = scope
        inputs = [self._name(operand) for operand in node.inputs]
        if node.domain == PLACEHOLDER_DOMAIN:
            weight = self.tensors[_key(node)]
            if node.op_type == "embedding":
                y = embedding(builder, weight, *inputs)
            else:
                y = linear(builder, weight, *inputs, transposed=node.op_type == "conv1d")
            self.names[node.outputs[0]] = y
            return
        results = builder.node(node.op_type, inputs, outputs=len(node.outputs))
        attributes = [onnx_ir.to_proto(attribute) for attribute in node.attributes.values()]
        builder.nodes[-1].attribute.extend(sorted(attributes, key=lambda attribute: attribute.name))
        self.names.update(zip(node.outputs, [results] if len(node.outputs) == 1 else results, strict=True))

    def _name(self, operand: onnx_ir.Value | None) -> str:
        """Name of a value in the graph; arrays of the model and constants are added when first used."""
        if operand is None:
            return ""
        if operand not in self.names:
            constant = operand.const_value
            self.names[operand] = self._array(operand) if constant is None else self._constant(constant)
        return self.names[operand]

    def _constant(self, tensor: onnx_ir.TensorProtocol) -> str:
        proto = onnx_ir.to_proto(tensor)
        proto.ClearField("name")
        content = proto.SerializeToString(deterministic=True)
        if content not in self.constants:
            self.constants[content] = self.builder.node("Constant", [], value=proto)
        return self.constants[content]

    def _array(self, operand: onnx_ir.Value) -> str:
        """An array that the model uses otherwise than its placeholders do: in the type it computes with, decoded."""
        tensor = self.tensors[operand.name or ""]
        if not isinstance(tensor, DenseTensor):
            builder = self.builder
            rows = builder.node("Range", [builder.int(0), builder.int(tensor.shape[0]), builder.int(1)])
            return embedding(builder, tensor, rows)
        wanted = int(operand.dtype or 0)
        if ELEMENT_TYPES[tensor.values.dtype] == wanted:
            return tensor.name
        return str(self.builder.node("Cast", [tensor.name], to=wanted))


def _key(placeholder: onnx_ir.Node) -> str:
    return placeholder.attributes["key"].as_string()


def _scope(node: onnx_ir.Node) -> str | None:
    """Name of the module a node comes from; None for one that an optimiser has made."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return None
    modules = [name for name in ast.literal_eval(scopes)[:-1] if name.startswith("model.")]
    return str(modules[-1]).removeprefix("model.") if modules else "inputs"
