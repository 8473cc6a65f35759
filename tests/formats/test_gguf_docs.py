"""The tables of docs/gguf-format.md match the code exactly."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
from clustered_models import with_clusters
from model_builders import tiny_llama

from cluscomp_formats.gguf import DENSE_TYPES, open_gguf, write_gguf
from cluscomp_formats.gguf.container_encoding import _TENSOR_TYPES
from cluscomp_formats.gguf.spec import GGML_TYPES
from cluscomp_formats.gguf.tokenizer_metadata import _SCHEME_NAMES
from cluscomp_formats.ir import ClusteredWeight

TEXT = (Path(__file__).parents[2] / "docs" / "gguf-format.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table with this heading."""
    table = TEXT.split(heading, 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_keys_and_their_types(tmp_path: Path) -> None:
    write_gguf(with_clusters(tiny_llama()), tmp_path / "m.gguf", self_test=lambda _: {"n": 1})
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    documented = {words(key)[0]: kind for key, kind, _ in rows("| key | type | value |")}
    written = {name: field for name, field in fields.items() if name.startswith("cluscomp.")}
    assert {key for key in documented if key.startswith("cluscomp.")} == {*written, "cluscomp.tokenizer_note"}
    names = {"uint32": "UINT32", "uint64": "UINT64", "string": "STRING"}
    for key, field in written.items():
        kind = documented[key].removeprefix("array of ").removesuffix("s")
        assert field.types[-1].name == names[kind], key
        assert (field.types[0].name == "ARRAY") == documented[key].startswith("array of "), key


def test_types() -> None:
    documented = {dtype: kind for dtypes, kind in rows("| dtype in the layout | GGUF type |") for dtype in words(dtypes)}
    assert documented == GGML_TYPES
    dense = {words(kind)[0]: float(bits) for kind, bits in rows("| type | bits per weight |")}
    assert dense == {name: 8 * kind.block_bytes / kind.block_weights for name, kind in DENSE_TYPES.items()}


def test_numbers_and_sizes_are_those_of_gguf_py() -> None:
    assert {name: int(gguf.GGMLQuantizationType[name]) for name in _TENSOR_TYPES} == _TENSOR_TYPES
    for kind in DENSE_TYPES.values():
        assert (kind.block_weights, kind.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]


def test_schemes() -> None:
    sentence = TEXT.split("byte-level BPE whose word pattern is one of", 1)[1].split(";", 1)[0]
    assert set(words(sentence)) == set(_SCHEME_NAMES)


def test_the_example_reads_a_weight(tmp_path: Path) -> None:
    write_gguf(with_clusters(tiny_llama()), tmp_path / "model.gguf")
    example = TEXT.split("for 16-bit codes along the output axis:", 1)[1].split("\n\n", 2)[1]
    code = "\n".join(line[4:] for line in example.splitlines())
    scope: dict[str, object] = {}
    exec("import gguf, json\nimport numpy as np\n" + code.replace("model.gguf", str(tmp_path / "model.gguf")), scope)  # noqa: S102
    weight = open_gguf(tmp_path / "model.gguf").tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, ClusteredWeight)
    assert (scope["weight"] == weight.decode()).all()  # type: ignore[attr-defined]
