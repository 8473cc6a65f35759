"""Building a graph: nodes in order, with names made on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["FLOAT", "Graph", "GraphBuilder", "value"]

FLOAT = TensorProto.FLOAT
"""What a graph computes in, whatever its arrays are stored in."""

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Graph:
    """What a model computes: nodes, and its inputs and outputs in order. Arrays are referred to by their initialiser's name."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[onnx.ValueInfoProto]
    outputs: Sequence[onnx.ValueInfoProto]


def value(name: str, element_type: int, shape: Shape) -> onnx.ValueInfoProto:
    """An input or output; a string in the shape names a length that varies."""
    return helper.make_tensor_value_info(name, element_type, list(shape))


@dataclass
class GraphBuilder:
    """Collects nodes. Names of nodes and values tell where in the model they are: `scope/OpType`, numbered from the second."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    scope: str = ""
    _counts: Counter[str] = field(default_factory=Counter)
    _constants: dict[tuple[str, Any], str] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[str], *, outputs: int = 1, name: str | None = None, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node and return the name of its output, or the list of names of several. `name` names a single output."""
        label = self._unique(f"{self.scope}/{op}")
        results = [name] if name else [label] if outputs == 1 else [f"{label}:{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=label, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self._constant("ints", values, value_ints=list(values))

    def int(self, number: int) -> str:
        """A constant scalar of int64."""
        return self._constant("int", number, value_int=number)

    def float(self, number: float) -> str:
        """A constant scalar of float32."""
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
