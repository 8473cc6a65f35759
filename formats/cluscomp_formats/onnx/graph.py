"""Build a graph: nodes in order, with generated names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["FLOAT", "Graph", "GraphBuilder", "value"]

FLOAT = TensorProto.FLOAT
"""The element type that graphs compute in, for arrays of all dtypes."""

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Graph:
    """The computation of a model: nodes, inputs and outputs, in order. Nodes refer to arrays by their initialisers' names."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[onnx.ValueInfoProto]
    outputs: Sequence[onnx.ValueInfoProto]


def value(name: str, element_type: int, shape: Shape) -> onnx.ValueInfoProto:
    """Return an input or output; a string in the shape names a variable length."""
    return helper.make_tensor_value_info(name, element_type, list(shape))


@dataclass
class GraphBuilder:
    """Collects nodes. Nodes and values are named by their place in the model: `scope/OpType`, numbered from the second on."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    scope: str = ""
    _counts: Counter[str] = field(default_factory=Counter)
    _constants: dict[tuple[str, Any], str] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[str], *, outputs: int = 1, name: str | None = None, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node. Return the name of its output, or the list of names of several outputs. `name` names a single output."""
        label = self._unique(f"{self.scope}/{op}")
        results = [name] if name else [label] if outputs == 1 else [f"{label}:{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=label, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        return self._constant("ints", values, value_ints=list(values))

    def int(self, number: int) -> str:
        """Return the name of a constant int64 scalar."""
        return self._constant("int", number, value_int=number)

    def float(self, number: float) -> str:
        """Return the name of a constant float32 scalar."""
        return self._constant("float", number, value_float=number)

    def _constant(self, kind: str, key: Any, **attributes: Any) -> str:
        if (kind, key) not in self._constants:
            label = self._unique("constants/" + kind)
            self.nodes.append(helper.make_node("Constant", [], [label], name=label, **attributes))
            self._constants[kind, key] = label
        return self._constants[kind, key]

    def _unique(self, label: str) -> str:
        self._counts[label] += 1
        count = self._counts[label]
        return label if count == 1 else f"{label}_{count}"
