"""The nodes that multiply by a weight or look up its rows, for every kind of weight in the IR.

A clustered weight is one `ClusLinear` or `ClusEmbedding` per stage. Scales, biases and the sum over stages are standard
operators, and outliers are an `OutlierLinear` or `OutlierEmbedding`, in the order in which the IR decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluscomp_formats.ir import ClusteredWeight, DenseTensor, Stage, Tensor
from cluscomp_formats.onnx.functions import CLUS_EMBEDDING, CLUS_LINEAR, OUTLIER_EMBEDDING, OUTLIER_LINEAR
from cluscomp_formats.onnx.graph import FLOAT, GraphBuilder
from cluscomp_formats.onnx.spec import DOMAIN
from cluscomp_formats.sections.stored_arrays import codebook_key, part_key

__all__ = ["add_bias", "as_float", "embedding", "linear"]

GROUP_AXES = {"out": 0, "in": 1}
"""Values of the attribute `group_axis`: an axis of the weight `[out_features, in_features]`."""


def as_float(builder: GraphBuilder, name: str, dtype: str) -> str:
    """Return the name of an initialiser's values in float32."""
    return name if dtype == "float32" else str(builder.node("Cast", [name], to=FLOAT))


def linear(builder: GraphBuilder, weight: Tensor, x: str, *, transposed: bool = False) -> str:
    """Add nodes for `x [..., in_features] -> x @ weight.T [..., out_features]`, in float32.

    With `transposed` they compute `x @ weight`, for models that store their weights as `[in_features, out_features]`.
    """
    if isinstance(weight, DenseTensor):
        matrix = as_float(builder, weight.name, weight.values.dtype)
        return str(builder.node("MatMul", [x, matrix if transposed else builder.node("Transpose", [matrix], perm=[1, 0])]))
    before, after = ("column_scale", "row_scale") if not transposed else ("row_scale", "column_scale")
    scaled = _scaled(builder, weight, before, x)
    axis = GROUP_AXES[weight.group_axis]
    terms = [_term(builder, weight, number, scaled, 1 - axis if transposed else axis) for number in range(len(weight.stages))]
    y = _sum(builder, terms)
    y = _scaled(builder, weight, after, y)
    if weight.outliers is None:
        return y
    lengths = weight.shape[::-1] if transposed else weight.shape
    positions, values = (part_key(weight.name, part) for part in ("outlier_positions", "outlier_values"))
    extra = builder.node(
        OUTLIER_LINEAR,
        [x, positions, values],
        domain=DOMAIN,
        out_features=lengths[0],
        in_features=lengths[1],
        transposed=int(transposed),
    )
    return str(builder.node("Add", [y, extra]))


def embedding(builder: GraphBuilder, weight: Tensor, indices: str) -> str:
    """Add nodes for rows of the weight, `indices [...] -> [..., in_features]`, in float32."""
    if isinstance(weight, DenseTensor):
        return as_float(builder, builder.node("Gather", [weight.name, indices]), weight.values.dtype)
    axis = GROUP_AXES[weight.group_axis]
    stages = []
    for number, stage in enumerate(weight.stages):
        rows = as_float(builder, _stage(builder, CLUS_EMBEDDING, indices, weight, number, axis), stage.codebook.values.dtype)
        stages.append(rows if axis == 0 else _cut(builder, rows, weight, stage))
    rows = _sum(builder, stages)
    if weight.row_scale is not None:
        picked = builder.node("Gather", [part_key(weight.name, "row_scale"), indices])
        scale = as_float(builder, picked, weight.row_scale.dtype)
        rows = builder.node("Mul", [rows, builder.node("Unsqueeze", [scale, builder.ints(-1)])])
    rows = _scaled(builder, weight, "column_scale", rows)
    if weight.outliers is None:
        return rows
    values = as_float(builder, part_key(weight.name, "outlier_values"), weight.outliers.values.dtype)
    inputs = [indices, part_key(weight.name, "outlier_positions"), values]
    extra = builder.node(OUTLIER_EMBEDDING, inputs, domain=DOMAIN, in_features=weight.shape[1])
    return str(builder.node("Add", [rows, extra]))


def add_bias(builder: GraphBuilder, y: str, bias: Tensor | None) -> str:
    """Add nodes for `y + bias`, with a dense bias `[out_features]`; return `y` if there is none."""
    if bias is None:
        return y
    if not isinstance(bias, DenseTensor):
        raise TypeError(f"{bias.name}: a bias must not be clustered")
    return str(builder.node("Add", [y, as_float(builder, bias.name, bias.values.dtype)]))


def _term(builder: GraphBuilder, weight: ClusteredWeight, number: int, x: str, axis: int) -> str:
    """Add nodes for the term of one stage. If the last group is incomplete, `x` is padded with zeros or the result is cut."""
    stage = weight.stages[number]
    if axis == 0:
        return _cut(builder, _stage(builder, CLUS_LINEAR, x, weight, number, axis), weight, stage)
    excess = _excess(weight, stage)
    if excess:
        x = builder.node("Pad", [x, builder.ints(0, excess), "", builder.ints(-1)])
    return _stage(builder, CLUS_LINEAR, x, weight, number, axis)


def _cut(builder: GraphBuilder, values: str, weight: ClusteredWeight, stage: Stage) -> str:
    """Cut the last axis to the weight's length."""
    if not _excess(weight, stage):
        return values
    length = weight.shape[GROUP_AXES[weight.group_axis]]
    return str(builder.node("Slice", [values, builder.ints(0), builder.ints(length), builder.ints(-1)]))


def _excess(weight: ClusteredWeight, stage: Stage) -> int:
    return -weight.shape[GROUP_AXES[weight.group_axis]] % stage.codebook.cluster_dim


def _stage(builder: GraphBuilder, op: str, operand: str, weight: ClusteredWeight, number: int, axis: int) -> str:
    arrays = [codebook_key(weight.stages[number].codebook.name), part_key(weight.name, "codes", number)]
    return str(builder.node(op, [operand, *arrays], domain=DOMAIN, group_axis=axis))


def _sum(builder: GraphBuilder, terms: Sequence[str]) -> str:
    total = terms[0]
    for term in terms[1:]:
        total = builder.node("Add", [total, term])
    return total


def _scaled(builder: GraphBuilder, weight: ClusteredWeight, part: str, x: str) -> str:
    scale = dict(weight.extra_arrays).get(part)
    return x if scale is None else str(builder.node("Mul", [x, as_float(builder, part_key(weight.name, part), scale.dtype)]))
