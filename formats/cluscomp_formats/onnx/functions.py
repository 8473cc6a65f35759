"""The operators of the domain `ai.cluscomp`, version 1, as functions of standard operators.

Every file contains these functions, so that any runtime can run the operators; a runtime that knows the operators can bind its
own kernels to their names instead. The texts below are in ONNX's notation and are also in `docs/onnx-format.md`.

`ClusLinear` computes the zero in the shape of `weight` from the leading length of `X`, which varies. A runtime that folds
constants then decodes `vectors` once, but does not fold the `Reshape`: that would copy all weights, as would packing a constant
operand, while the `Reshape` is free at run time.
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx.parser

from cluscomp_formats.onnx.spec import DOMAIN, OPSET

__all__ = ["CLUS_EMBEDDING", "CLUS_LINEAR", "FUNCTION_TEXTS", "OUTLIER_EMBEDDING", "OUTLIER_LINEAR", "functions"]

CLUS_LINEAR = "ClusLinear"
CLUS_EMBEDDING = "ClusEmbedding"
OUTLIER_LINEAR = "OutlierLinear"
OUTLIER_EMBEDDING = "OutlierEmbedding"

FUNCTION_TEXTS = {
    CLUS_LINEAR: """
ClusLinear <group_axis> (X, codebook, codes) => (Y)
{
    first = Constant <value_int = 0> ()
    last = Constant <value_int = -1> ()
    low = Gather (codes, first)
    high = Gather (codes, last)
    low_part = Cast <to = 6> (low)
    high_part = Cast <to = 6> (high)
    one = Constant <value_ints = [1]> ()
    byte = Constant <value_ints = [256]> ()
    width = Shape <start = 0, end = 1> (codes)
    more = Sub (width, one)
    more_bytes = Mul (more, byte)
    place = Cast <to = 6> (more_bytes)
    high_index = Mul (high_part, place)
    index = Add (low_part, high_index)
    centroids = CastLike (codebook, X)
    vectors = Gather (centroids, index)
    outer = Shape <end = -1> (X)
    inner = Shape <start = -1> (X)
    rest = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    leading = Shape <start = 0, end = 1> (X)
    same = Mul (leading, zero)
    weight_shape = Concat <axis = 0> (same, rest)
    weight = Reshape (vectors, weight_shape)
    matrix_shape = Concat <axis = 0> (rest, inner)
    X2 = Reshape (X, matrix_shape)
    Y2 = Gemm <transB: int = @group_axis> (X2, weight)
    y_shape = Concat <axis = 0> (outer, rest)
    Y = Reshape (Y2, y_shape)
}""",
    CLUS_EMBEDDING: """
ClusEmbedding <group_axis> (indices, codebook, codes) => (Y)
{
    rest = Constant <value_ints = [-1]> ()
    column_shape = Constant <value_ints = [-1, 1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis = Constant <value_int: int = @group_axis> ()
    along_columns = Cast <to = 9> (axis)
    across_1d = Shape <start = 1, end = 2> (codes)
    across = Squeeze (across_1d)
    groups = Shape <start = 2, end = 3> (codes)
    dim = Shape <start = 1, end = 2> (codebook)
    row_length = Mul (groups, dim)
    along = Squeeze (row_length)
    columns = Where (along_columns, along, across)
    positions = Cast <to = 7> (indices)
    i = Reshape (positions, column_shape)
    j = Range (zero, columns, one)
    a = Where (along_columns, i, j)
    b = Where (along_columns, j, i)
    group = Div (b, dim)
    skipped = Mul (group, dim)
    element = Sub (b, skipped)
    before = Mul (a, groups)
    code_position = Add (before, group)
    width = Shape <start = 0, end = 1> (codes)
    planes_shape = Concat <axis = 0> (width, rest)
    planes = Reshape (codes, planes_shape)
    bytes = Gather <axis = 1> (planes, code_position)
    last = Constant <value_int = -1> ()
    low = Gather (bytes, zero)
    high = Gather (bytes, last)
    low_part = Cast <to = 7> (low)
    high_part = Cast <to = 7> (high)
    byte = Constant <value_int = 256> ()
    more = Sub (width, one)
    place = Mul (more, byte)
    high_code = Mul (high_part, place)
    code = Add (low_part, high_code)
    centroid_start = Mul (code, dim)
    value_position = Add (centroid_start, element)
    flat_codebook = Reshape (codebook, rest)
    rows = Gather (flat_codebook, value_position)
    outer = Shape (indices)
    y_shape = Concat <axis = 0> (outer, rest)
    Y = Reshape (rows, y_shape)
}""",
    OUTLIER_LINEAR: """
OutlierLinear <in_features, out_features, transposed> (X, positions, values) => (Y)
{
    rest = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    swap = Constant <value_int: int = @transposed> ()
    swapped = Cast <to = 9> (swap)
    inputs = Constant <value_int: int = @in_features> ()
    outputs = Constant <value_int: int = @out_features> ()
    columns = Where (swapped, outputs, inputs)
    place = Cast <to = 7> (positions)
    row = Div (place, columns)
    skipped = Mul (row, columns)
    column = Sub (place, skipped)
    source = Where (swapped, row, column)
    target = Where (swapped, column, row)
    outer = Shape <end = -1> (X)
    inputs_1d = Reshape (inputs, one)
    matrix_shape = Concat <axis = 0> (rest, inputs_1d)
    X2 = Reshape (X, matrix_shape)
    picked = Gather <axis = 1> (X2, source)
    weights = CastLike (values, X)
    products = Mul (picked, weights)
    products_shape = Shape (products)
    targets = Expand (target, products_shape)
    count = Shape <start = 0, end = 1> (X2)
    outputs_1d = Reshape (outputs, one)
    base_shape = Concat <axis = 0> (count, outputs_1d)
    zeros = ConstantOfShape (base_shape)
    base = CastLike (zeros, X)
    Y2 = ScatterElements <axis = 1, reduction = "add"> (base, targets, products)
    y_shape = Concat <axis = 0> (outer, rest)
    Y = Reshape (Y2, y_shape)
}""",
    OUTLIER_EMBEDDING: """
OutlierEmbedding <in_features> (indices, positions, values) => (Y)
{
    rest = Constant <value_ints = [-1]> ()
    column_shape = Constant <value_ints = [-1, 1]> ()
    one = Constant <value_ints = [1]> ()
    inputs = Constant <value_int: int = @in_features> ()
    place = Cast <to = 7> (positions)
    row = Div (place, inputs)
    skipped = Mul (row, inputs)
    column = Sub (place, skipped)
    wanted = Cast <to = 7> (indices)
    i = Reshape (wanted, column_shape)
    hit = Equal (i, row)
    weights = CastLike (hit, values)
    products = Mul (weights, values)
    products_shape = Shape (products)
    targets = Expand (column, products_shape)
    count = Shape <start = 0, end = 1> (i)
    inputs_1d = Reshape (inputs, one)
    base_shape = Concat <axis = 0> (count, inputs_1d)
    zeros = ConstantOfShape (base_shape)
    base = CastLike (zeros, values)
    rows = ScatterElements <axis = 1, reduction = "add"> (base, targets, products)
    outer = Shape (indices)
    y_shape = Concat <axis = 0> (outer, rest)
    Y = Reshape (rows, y_shape)
}""",
}


@cache
def functions() -> dict[str, onnx.FunctionProto]:
    """Return the operators by name, as functions of standard operators."""
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
    return {name: onnx.parser.parse_function(head + text) for name, text in FUNCTION_TEXTS.items()}
