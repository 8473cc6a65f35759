"""Check that a graph uses the weights as the model describes; otherwise the digest would not cover what a runtime computes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from cluscomp_formats.errors import MAX_PROBLEMS, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.functions import CLUS_EMBEDDING, CLUS_LINEAR, functions
from cluscomp_formats.onnx.spec import DOMAIN, DOMAIN_VERSION, IR_VERSION, MAX_ENTRIES, OPSET
from cluscomp_formats.onnx.weights import GROUP_AXES
from cluscomp_formats.sections.stored_arrays import codebook_key, part_key

__all__ = ["graph_problems"]

_MAX_DEPTH = 16
_REWRITTEN = "use the file as it was converted, before an optimiser or another tool changed it"
_IMPORTS = [("", OPSET), (DOMAIN, DOMAIN_VERSION)]


def graph_problems(proto: onnx.ModelProto, model: Model, file: str) -> Iterator[Problem]:
    """Yield a problem for each unexpected version or function, and for each node that uses codes or codebooks wrongly.

    A hostile file may have millions of nodes: they are iterated, not collected, and the number of problems is limited.
    """
    if proto.ir_version != IR_VERSION:
        message = "the file has another IR version"
        yield Problem("bad_ir_version", message, file, None, str(proto.ir_version), str(IR_VERSION), _REWRITTEN)
        return
    imports = [(entry.domain, entry.version) for entry in proto.opset_import[: len(_IMPORTS) + 1]]
    if imports not in (_IMPORTS, _IMPORTS[::-1]):
        expected = f"ONNX {OPSET} and {DOMAIN} {DOMAIN_VERSION}"
        message = "the file imports other operators"
        yield Problem("bad_imports", message, file, None, repr(imports)[:200], expected, _REWRITTEN)
        return
    yield from _function_problems(proto, file)
    problems: list[Problem] = []
    check = _NodeCheck(proto, model, file)
    own, size = False, 0
    for graph, depth in _graphs(proto.graph):
        if depth > _MAX_DEPTH:
            yield Problem("nested_too_deep", "subgraphs are nested too deep", file, expected=f"at most {_MAX_DEPTH}")
            return
        size += 1 + len(graph.node)
        if size <= MAX_ENTRIES:
            size += sum(len(node.attribute) for node in graph.node)
        if size > MAX_ENTRIES:
            message, expected = "the file has too many nodes, attributes and subgraphs", f"at most {MAX_ENTRIES}"
            yield Problem("too_many_entries", message, file, expected=expected)
            return
        if len(problems) < MAX_PROBLEMS:
            problems += check.graph_problems(graph, outermost=depth == 0)
        for node in graph.node:
            own = own or node.domain == DOMAIN
            if len(problems) < MAX_PROBLEMS:
                problems += check.node_problems(node)
    if model.clustered and not own:
        message = "the graph has no operators of a codebook model: it has been optimised or inlined"
        yield Problem("inlined", message, file, None, None, f"nodes of {DOMAIN}", _REWRITTEN)
        return
    yield from problems


def _function_problems(proto: onnx.ModelProto, file: str) -> Iterator[Problem]:
    ours = functions()
    for function in proto.functions:
        label = f"{function.domain}::{function.name}"[:200]
        if function.domain != DOMAIN or function.name not in ours:
            yield Problem("unknown_function", "the file defines an unknown function", file, label)
        elif function != ours[function.name]:
            message = "the operator's function differs from the specification"
            yield Problem("other_function", message, file, label, remedy=_REWRITTEN)


def _graphs(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[onnx.GraphProto, int]]:
    """Yield the graph and the graphs in its nodes, with their depths, but nothing below a graph that is too deep."""
    yield graph, depth
    if depth <= _MAX_DEPTH:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from _graphs(attribute.g, depth + 1)
                for inner in attribute.graphs:
                    yield from _graphs(inner, depth + 1)


class _NodeCheck:
    """Checks the use of a model's arrays in nodes."""

    def __init__(self, proto: onnx.ModelProto, model: Model, file: str) -> None:
        self.file = file
        self.arrays = {tensor.name for tensor in proto.graph.initializer}
        self.functions = {function.name for function in proto.functions}
        self.uses: dict[str, tuple[str, int]] = {}
        for name, weight in model.clustered.items():
            for number, stage in enumerate(weight.stages):
                place = part_key(name, "codes", number)
                self.uses[place] = codebook_key(stage.codebook.name), GROUP_AXES[weight.group_axis]
        self.guarded = {*self.uses, *(codebook for codebook, _ in self.uses.values())}

    def graph_problems(self, graph: onnx.GraphProto, *, outermost: bool) -> Iterator[Problem]:
        """Yield a problem for each input of a graph, or initialiser of a subgraph, that has the name of an array."""
        inner = () if outermost else graph.initializer
        if not self.arrays.isdisjoint(entry.name for entries in (graph.input, inner) for entry in entries):
            yield self._collision(graph.name)

    def node_problems(self, node: onnx.NodeProto) -> Iterator[Problem]:
        if not self.arrays.isdisjoint(node.output):
            yield self._collision(node.name)
        if node.domain == DOMAIN and (node.op_type not in self.functions or node.overload):
            found = f"{node.op_type}{node.overload}"[:200]
            message = "the file does not define an operator"
            yield Problem("missing_function", message, self.file, _label(node.name), found, None, _REWRITTEN)
        if not self.guarded.isdisjoint(node.input):
            fault = self._use_fault(node)
            if fault is not None:
                message = f"the node uses a clustered weight wrongly: {fault}"
                yield Problem("misused_weight", message, self.file, _label(node.name))

    def _use_fault(self, node: onnx.NodeProto) -> str | None:
        if node.domain != DOMAIN or node.op_type not in (CLUS_LINEAR, CLUS_EMBEDDING) or len(node.input) != 3:
            return "codes and codebooks may only be inputs of the operators for them"
        _, codebook, codes = node.input
        if codes not in self.uses or self.uses[codes][0] != codebook:
            return "codebook and codes do not belong together"
        axis = self.uses[codes][1]
        # A linear may use the transposed weight, whose groups run along the other axis.
        axes = (0, 1) if node.op_type == CLUS_LINEAR else (axis,)
        found = node.attribute[:2]
        if found not in [[onnx.AttributeProto(name="group_axis", type=onnx.AttributeProto.INT, i=allowed)] for allowed in axes]:
            described = [(attribute.name, attribute.i) for attribute in found]
            return f"its attributes are {described}, expected group_axis {axis}, an int"
        return None

    def _collision(self, name: str) -> Problem:
        return Problem("name_collision", "a value of the graph has the name of an array", self.file, _label(name))


def _label(name: str) -> str:
    """Return a name for a message; protobuf returns names that are not UTF-8 as bytes."""
    return f"{name}"[:200]
