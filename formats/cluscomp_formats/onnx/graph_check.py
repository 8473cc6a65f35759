"""Does a graph use the weights as the model says? Without this a digest would prove nothing of what a runtime computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from cluscomp_formats.errors import Problem
from cluscomp_formats.hf.layout import codebook_key, part_key
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.functions import CLUS_EMBEDDING, CLUS_LINEAR, functions
from cluscomp_formats.onnx.spec import DOMAIN, DOMAIN_VERSION, OPSET
from cluscomp_formats.onnx.weights import GROUP_AXES

__all__ = ["graph_problems"]

_MAX_DEPTH = 16
_REWRITTEN = "name the file as `convert --to onnx` wrote it, before any optimiser or other tool rewrote it"


def graph_problems(proto: onnx.ModelProto, model: Model, file: str) -> Iterator[Problem]:
    """Imports and functions that are not ours, and nodes that use codes or codebooks in any other way than the model says."""
    imports = [(entry.domain, entry.version) for entry in proto.opset_import]
    if sorted(imports) != [("", OPSET), (DOMAIN, DOMAIN_VERSION)]:
        expected = f"ONNX {OPSET} and {DOMAIN} {DOMAIN_VERSION}"
        message = "the file imports other operators"
        yield Problem("bad_imports", message, file, None, repr(imports)[:200], expected, _REWRITTEN)
        return
    yield from _function_problems(proto, file)
    nodes = list(_all_nodes(proto.graph.node))
    if any(depth > _MAX_DEPTH for _, depth in nodes):
        yield Problem("nested_too_deep", "subgraphs are nested too deep", file, expected=f"at most {_MAX_DEPTH}")
        return
    own = [node for node, _ in nodes if node.domain == DOMAIN]
    if model.clustered and not own:
        message = "the graph has none of the operators of a codebook model: it has been optimised or inlined"
        yield Problem("inlined", message, file, None, None, f"nodes of {DOMAIN}", _REWRITTEN)
        return
    yield from _use_problems([node for node, _ in nodes], model, file)


def _function_problems(proto: onnx.ModelProto, file: str) -> Iterator[Problem]:
    ours = functions()
    for function in proto.functions:
        label = f"{function.domain}::{function.name}"[:200]
        if function.domain != DOMAIN or function.name not in ours:
            yield Problem("unknown_function", "the file brings a function of its own", file, label)
        elif function != ours[function.name]:
            message = "the operator's function is not the one of the specification"
            yield Problem("other_function", message, file, label, remedy=_REWRITTEN)


def _all_nodes(nodes: Sequence[onnx.NodeProto], depth: int = 0) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Every node, those of subgraphs included, with its depth; nothing below the greatest depth allowed."""
    for node in nodes:
        yield node, depth
        if depth <= _MAX_DEPTH:
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from _all_nodes(graph.node, depth + 1)


def _use_problems(nodes: Sequence[onnx.NodeProto], model: Model, file: str) -> Iterator[Problem]:
    uses: dict[str, tuple[str, int]] = {}
    for name, weight in model.clustered.items():
        for number, stage in enumerate(weight.stages):
            uses[part_key(name, "codes", number)] = codebook_key(stage.codebook.name), GROUP_AXES[weight.group_axis]
    guarded = {*uses, *(codebook for codebook, _ in uses.values())}
    for node in nodes:
        if guarded.isdisjoint(node.input):
            continue
        fault = _use_fault(node, uses)
        if fault is not None:
            yield Problem("misused_weight", f"the node uses a clustered weight wrongly: {fault}", file, node.name[:200])


def _use_fault(node: onnx.NodeProto, uses: dict[str, tuple[str, int]]) -> str | None:
    if node.domain != DOMAIN or node.op_type not in (CLUS_LINEAR, CLUS_EMBEDDING) or len(node.input) != 3:
        return "codes and codebooks go only into the operators made for them"
    _, codebook, codes = node.input
    if codes not in uses or uses[codes][0] != codebook:
        return "codebook and codes do not belong together"
    axis = uses[codes][1]
    # A linear may use the weight transposed: then its groups run along the other axis.
    axes = (0, 1) if node.op_type == CLUS_LINEAR else (axis,)
    found = [(attribute.name, attribute.i) for attribute in node.attribute]
    if found not in [[("group_axis", allowed)] for allowed in axes]:
        return f"its attributes are {found}, expected group_axis {axis}"
    return None
