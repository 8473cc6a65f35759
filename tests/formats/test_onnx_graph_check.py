"""Graphs that do not use the weights as the model describes are rejected; one fault per test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_surgery import (
    QUERY,
    edit,
    kinds,
    make_folder,
    model_file,
    node_of,
    problems_of,
)

from cluscomp_formats.onnx.spec import DOMAIN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "m")


def test_an_initialiser_is_missing(folder: Path) -> None:
    edit(folder, lambda proto: proto.graph.initializer.pop() and None)
    assert kinds(problems_of(folder)) == ["missing_tensor"]


def test_an_initialiser_too_many(folder: Path) -> None:
    edit(folder, lambda proto: proto.graph.initializer.append(numpy_helper.from_array(np.ones(1), "extra")))
    assert "unknown_tensor" in kinds(problems_of(folder))


def test_an_initialiser_twice(folder: Path) -> None:
    edit(folder, lambda proto: proto.graph.initializer.append(proto.graph.initializer[0]))
    assert kinds(problems_of(folder)) == ["duplicate_tensor"]


@pytest.mark.parametrize("change", ["dims", "data_type", "name"])
def test_an_initialiser_of_another_form(folder: Path, change: str) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == f"{QUERY}.codes")
        if change == "dims":
            tensor.dims[:] = tensor.dims[::-1]
        elif change == "data_type":
            tensor.data_type = onnx.TensorProto.INT8
        else:
            other = next(tensor for tensor in proto.graph.initializer if tensor.name == f"{QUERY}.codes_1")
            tensor.name, other.name = other.name, tensor.name

    edit(folder, apply)
    assert "wrong_form" in kinds(problems_of(folder)) or "section_misplaced" in kinds(problems_of(folder))


def test_another_body_of_an_operator(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        function = next(function for function in proto.functions if function.name == "ClusLinear")
        next(node for node in function.node if node.op_type == "Gemm").op_type = "MatMul"

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["other_function"]


def test_a_function_of_another_domain(folder: Path) -> None:
    """A function may even replace a standard operator."""

    def apply(proto: onnx.ModelProto) -> None:
        node = helper.make_node("Neg", ["X"], ["Y"])
        proto.functions.append(helper.make_function("", "Softmax", ["X"], ["Y"], [node], [helper.make_opsetid("", 21)]))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["unknown_function"]


@pytest.mark.parametrize(("domain", "version"), [("", 22), (DOMAIN, 2), ("com.microsoft", 1)])
def test_other_imports(folder: Path, domain: str, version: int) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        imports = {entry.domain: entry.version for entry in proto.opset_import} | {domain: version}
        proto.ClearField("opset_import")
        proto.opset_import.extend(helper.make_opsetid(*entry) for entry in imports.items())

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["bad_imports"]


def test_functions_inlined(folder: Path) -> None:
    """Optimisers inline functions first."""
    import onnx.inliner

    file = model_file(folder)
    inlined = onnx.inliner.inline_local_functions(onnx.load(file, load_external_data=False))
    file.write_bytes(inlined.SerializeToString())
    (problem,) = problems_of(folder)
    assert problem.kind in ("inlined", "bad_imports")
    assert "before an optimiser" in (problem.remedy or "")


@pytest.mark.parametrize("change", ["codebook", "axis", "attribute", "extra", "other operator", "embedding"])
def test_a_weight_used_in_another_way(folder: Path, change: str) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        node = node_of(proto, "ClusEmbedding" if change == "embedding" else "ClusLinear")
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if change == "codebook":
            books = [tensor.name for tensor in proto.graph.initializer if tensor.name.startswith("codebooks.")]
            node.input[1] = next(book for book in books if book != node.input[1])
        elif change in ("axis", "embedding"):
            attributes["group_axis"].i = 2 if change == "axis" else 1
        elif change == "attribute":
            node.attribute.pop()
        elif change == "extra":
            node.attribute.append(helper.make_attribute("more", 1))
        else:
            proto.graph.node.append(helper.make_node("Identity", [node.input[2]], ["copy"]))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["misused_weight"]


def test_a_weight_used_in_another_way_in_a_subgraph(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        codes = node_of(proto, "ClusLinear").input[2]
        branch = helper.make_graph([helper.make_node("Identity", [codes], ["inner"])], "branch", [], [])
        proto.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["misused_weight", "misused_weight"]


def test_subgraphs_without_end(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        graph = helper.make_graph([], "innermost", [], [])
        for _ in range(20):
            graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "outer", [], [])
        proto.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=graph))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["nested_too_deep"]


def test_a_function_is_missing(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        kept = [function for function in proto.functions if function.name != "ClusEmbedding"]
        proto.ClearField("functions")
        proto.functions.extend(kept)

    edit(folder, apply)
    assert {*kinds(problems_of(folder))} == {"missing_function"}


def test_an_overload_of_an_operator(folder: Path) -> None:
    edit(folder, lambda proto: setattr(node_of(proto, "ClusLinear"), "overload", "other"))
    assert kinds(problems_of(folder)) == ["missing_function"]


def test_an_attribute_of_another_type(folder: Path) -> None:
    """The integer is correct, but runtimes check the attribute's type."""

    def apply(proto: onnx.ModelProto) -> None:
        node_of(proto, "ClusLinear").attribute[0].type = onnx.AttributeProto.FLOAT

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["misused_weight"]


@pytest.mark.parametrize("where", ["node", "input", "inner node", "inner input", "inner initialiser"])
def test_a_value_with_the_name_of_an_array(folder: Path, where: str) -> None:
    """It would replace the array."""

    def apply(proto: onnx.ModelProto) -> None:
        name = node_of(proto, "ClusLinear").input[2]
        node = helper.make_node("Identity", ["input_ids"], [name if "node" in where else "fresh"])
        info = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1])]
        if where == "node":
            proto.graph.node.append(node)
        elif where == "input":
            proto.graph.input.extend(info)
        else:
            arrays = [numpy_helper.from_array(np.ones(1), name)] if where == "inner initialiser" else []
            branch = helper.make_graph([node], "branch", info if where == "inner input" else [], [], arrays)
            proto.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["name_collision"]
