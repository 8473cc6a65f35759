"""Native files for generic GGUF readers (keys, names, types, sizes), and the writing of files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from clustered_models import KEY, QUERY, VALUE, clustered, codebook, with_clusters
from model_builders import tiny_llama

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidRequestError, OutputExistsError, StorageError
from cluscomp_formats.gguf import open_gguf, write_gguf
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_formats.sections.bits import unpack_bits


@pytest.fixture
def model() -> Model:
    return with_clusters(tiny_llama())


@pytest.fixture
def path(model: Model, tmp_path: Path) -> Path:
    write_gguf(model, tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_keys(model: Model, path: Path) -> None:
    keys = keys_of(path)
    assert keys["general.architecture"] == "cluscomp"
    assert keys["general.name"] == "Tiny"
    assert "general.file_type" not in keys
    assert keys["cluscomp.version"] == 1
    assert keys["cluscomp.base_architecture"] == "llama"
    assert keys["cluscomp.row_order"] == "huggingface"
    assert keys["cluscomp.original_parameter_count"] == sum(tensor.num_weights for tensor in model.tensors.values())
    assert keys["cluscomp.digest"] == model.digest()
    assert json.loads(keys["cluscomp.config"]) == model.config
    assert "cluscomp.self_test" not in keys
    expected = {
        "context_length": 64,
        "embedding_length": 24,
        "block_count": 2,
        "feed_forward_length": 40,
        "attention.head_count": 3,
        "attention.head_count_kv": 1,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "vocab_size": 50,
    }
    assert {key: keys[f"llama.{key}"] for key in expected} == expected
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_names_and_types(path: Path) -> None:
    stored = {name: (tensor.tensor_type.name, tensor.shape.tolist()[::-1]) for name, tensor in tensors_of(path).items()}
    clustered_ones = {name: form for name, form in stored.items() if name.startswith(("blk.0.attn_", "codebook", "cluscomp"))}
    # 40000 clusters: 16 bits. 300 clusters: 9 bits. 5 clusters: 3 bits. 9 clusters: 4 bits.
    assert clustered_ones == {
        "blk.0.attn_norm.weight": ("F32", [24]),
        "blk.0.attn_output.codebook": ("I8", [300, 6]),
        "blk.0.attn_output.codes": ("I8", [24 * 4 * 9 // 8]),
        "blk.0.attn_output.row_scale": ("F16", [24]),
        "blk.0.attn_q.codebook": ("F16", [40000, 4]),
        "blk.0.attn_q.codes": ("I8", [24 * 6 * 2]),
        "codebook.kv": ("F16", [5, 3]),
        "blk.0.attn_k.codebook.1": ("F32", [9, 2]),
        "blk.0.attn_k.codes": ("I8", [24 * 4 * 3 // 8]),
        "blk.0.attn_k.codes.1": ("I8", [24 * 4 * 4 // 8]),
        "blk.0.attn_k.row_scale": ("F16", [8]),
        "blk.0.attn_v.codes": ("I8", [8 * 8 * 3 // 8]),
        "blk.0.attn_v.column_scale": ("F32", [24]),
        "blk.0.attn_v.outlier_positions": ("I32", [2]),
        "blk.0.attn_v.outlier_values": ("F32", [2]),
        "cluscomp.file.notes.txt": ("I8", [5]),
    }
    assert {"token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"} <= stored.keys()


def test_a_reader_made_of_gguf_py_and_numpy_decodes_the_weights(model: Model, path: Path) -> None:
    tensors, layout = tensors_of(path), json.loads(keys_of(path)["cluscomp.layout"])
    names = keys_of(path)["cluscomp.sections"]
    for name in (QUERY, KEY, VALUE):
        entry = layout["tensors"][name]
        out_features, in_features = entry["shape"]
        along, across = (out_features, in_features) if entry["group_axis"] == "out" else (in_features, out_features)
        total = np.zeros((across, along), np.float32)
        for stage in entry["stages"]:
            book = tensors[names[layout["codebooks"][stage["codebook"]]["section"]]].data.astype(np.float32)
            stored = tensors[names[stage["codes"]]]
            bits = max(1, int(np.ceil(np.log2(len(book)))))
            groups = -(-along // book.shape[1])
            if entry["group_axis"] == "in":
                codes = unpacked(stored.data, across * groups, bits).reshape(across, groups)
            else:
                assert across % 4 == 0
                assert groups < 16
                width = groups + groups % 2
                tiled = unpacked(stored.data, across * width, bits).reshape(across // 4, width, 4)
                codes = tiled.swapaxes(1, 2).reshape(across, width)[:, :groups]
            total += book[codes].reshape(across, -1)[:, :along]
        weight = total.T.copy() if entry["group_axis"] == "out" else total
        if "row_scale" in entry:
            weight *= tensors[names[entry["row_scale"]["section"]]].data.astype(np.float32)[:, None]
        if "column_scale" in entry:
            weight *= tensors[names[entry["column_scale"]["section"]]].data[None, :]
        if "outliers" in entry:
            positions = tensors[names[entry["outliers"]["positions"]["section"]]].data.view(np.uint32)
            weight.reshape(-1)[positions] += tensors[names[entry["outliers"]["values"]["section"]]].data
        np.testing.assert_array_equal(weight, model.tensors[name].decode())


def unpacked(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Unpack bit by bit, as in the specification."""
    stream = np.unpackbits(data.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    codes = stream.astype(np.int64) @ (1 << np.arange(bits))
    assert np.array_equal(codes, unpack_bits(data.view(np.uint8), count, bits))
    return codes


def test_three_bit_codes_by_hand(tmp_path: Path) -> None:
    weight = clustered("w", (3, 2), [codebook("c", 8, 1, 0)], 0)
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.uint16)
    weight = replace(weight, stages=(replace(weight.stages[0], codes=Array.of(codes)),))
    write_gguf(Model({}, {"w": weight}), tmp_path / "m.gguf")
    # Four codes for each group, two of them padding: 1 | 4 << 3, 2 | 5 << 3, 3 | 6 << 3, 0, with 12 bits each.
    assert tensors_of(tmp_path / "m.gguf")["w.codes"].data.view(np.uint8).tolist() == [0x21, 0xA0, 0x02, 0x33, 0, 0]


def test_offsets_are_aligned_and_the_file_holds_nothing_else(path: Path) -> None:
    end = None
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset):
        assert tensor.data_offset % 64 == 0
        assert end is None or tensor.data_offset == -(-end // 64) * 64
        end = int(tensor.data_offset + tensor.n_bytes)
    assert end is not None
    assert path.stat().st_size == -(-end // 64) * 64


@pytest.mark.parametrize("script", ["gguf_dump", "gguf_hash"])
def test_tools_of_gguf_py_read_it(path: Path, script: str) -> None:
    command = [sys.executable, "-m", f"gguf.scripts.{script}", str(path)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0, result.stderr
    assert "blk.0.attn_q.codes" in result.stdout


def test_names_that_do_not_fit_give_way(tmp_path: Path) -> None:
    names = ["x" * 63, "x" * 64, "é" * 32, "bell\a"[:4] + "\u200b", "cluscomp.0.values", "w.codes", "plain"]
    tensors: dict[str, Any] = {name: DenseTensor(name, Array.of(np.ones(1, np.float32))) for name in names}
    tensors["w"] = clustered("w", (2, 2), [codebook("c", 3, 2, 0)], 0)
    model = Model({}, tensors)
    write_gguf(model, tmp_path / "m.gguf")
    stored = tensors_of(tmp_path / "m.gguf")
    # In order of code points: bell, cluscomp.0, plain, w (codebook, codes), w.codes, x 63, x 64, é.
    assert list(stored) == [
        "cluscomp.0.values",
        "cluscomp.1.values",
        "plain",
        "w.codebook",
        "w.codes",
        "cluscomp.5.values",
        "x" * 63,
        "cluscomp.7.values",
        "cluscomp.8.values",
    ]
    assert open_gguf(tmp_path / "m.gguf", check=True).digest() == model.digest()


def test_an_architecture_without_gguf_names_keeps_its_own(tmp_path: Path) -> None:
    model = Model(
        {"model_type": "opt", "num_hidden_layers": 1},
        {"decoder.fc1.weight": clustered("decoder.fc1.weight", (4, 4), [codebook("c", 3, 2, 0)], 0)},
    )
    write_gguf(model, tmp_path / "m.gguf")
    assert set(tensors_of(tmp_path / "m.gguf")) == {"decoder.fc1.codebook", "decoder.fc1.codes"}
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["cluscomp.base_architecture"] == "opt"
    assert not [key for key in keys if key.startswith(("opt.", "tokenizer."))]


def test_each_loader_is_called_once_and_progress_ends_at_the_total(model: Model, tmp_path: Path, stories_folder: Path) -> None:
    calls: dict[str, int] = {}

    def counted(name: str, array: Array) -> Array:
        def load() -> Any:
            calls[name] = calls.get(name, 0) + 1
            return array.read()

        return Array(array.shape, array.dtype, load)

    tensors = {
        name: DenseTensor(name, counted(name, tensor.values))
        for name, tensor in model.tensors.items()
        if isinstance(tensor, DenseTensor)
    }
    files = {name: counted(name, array) for name, array in open_source(stories_folder).files.items()}
    assert "tokenizer.json" in files
    steps: list[tuple[int, int]] = []
    counting = Model(model.config, tensors, files)
    report = write_gguf(counting, tmp_path / "c.gguf", on_progress=lambda phase, done, total: steps.append((done, total)))
    assert calls == dict.fromkeys([*tensors, *files], 1)
    assert steps[-1] == (report.payload_bytes, report.payload_bytes)


def test_the_self_test_sees_the_model_and_its_record_is_stored(model: Model, tmp_path: Path) -> None:
    record = {"version": 1, "long": "x" * 100_000}
    seen: list[str] = []

    def run(opened: Model) -> dict[str, Any]:
        seen.append(opened.digest())
        return record

    path = tmp_path / "m.gguf"
    report = write_gguf(model, path, self_test=run)
    assert seen == [model.digest()]
    found = open_gguf(path, check=True)
    assert found.self_test == record
    assert report.file_bytes == path.stat().st_size
    write_gguf(replace(model, self_test=record), tmp_path / "kept.gguf")
    assert (tmp_path / "kept.gguf").read_bytes() == path.read_bytes()


def test_moving_the_payloads_up_by_less_than_a_piece(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_formats.gguf.writer._COPY_BYTES", 1000)
    write_gguf(model, tmp_path / "m.gguf", self_test=lambda _: {"n": 1})
    assert open_gguf(tmp_path / "m.gguf", check=True).digest() == model.digest()


def test_a_failed_self_test_leaves_nothing(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        write_gguf(model, tmp_path / "m.gguf", self_test=lambda _: {"nan": float("nan")})
    assert caught.value.problems[0].kind == "not_json"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        write_gguf(model, path)
    assert path.read_bytes() == b"precious"
    write_gguf(model, path, force=True)
    assert open_gguf(path).digest() == model.digest()


def test_codes_past_their_codebook_are_refused(tmp_path: Path) -> None:
    weight = clustered("w", (2, 2), [codebook("c", 4, 1, 0)], 0)
    codes = Array.of(np.full((2, 2), 4, np.uint16))
    faulty = Model({}, {"w": replace(weight, stages=(replace(weight.stages[0], codes=codes),))})
    with pytest.raises(InvalidRequestError) as caught:
        write_gguf(faulty, tmp_path / "m.gguf")
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("code_out_of_range", "w")]
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def fail() -> Any:
        raise OSError(5, "Input/output error")

    for model in (
        Model({}, {"d": DenseTensor("d", Array((2,), "float32", fail))}),
        Model(tiny_llama().config, {}, {"tokenizer.json": Array((2,), "uint8", fail)}),
    ):
        with pytest.raises(StorageError) as caught:
            write_gguf(model, tmp_path / "m.gguf")
        assert caught.value.problems[0].tensor in ("d", "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
