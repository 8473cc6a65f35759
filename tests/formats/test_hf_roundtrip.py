"""Any model written as a folder and read back is bit-identical, also via the packed format."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import assert_same, models
from safetensors import safe_open

import cluscomp_formats.hf
from cluscomp_formats.hf import looks_hf, open_hf, write_hf
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.registry import detect, open_model


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from([1, 64, 1000, 5_000_000_000]))
def test_any_model_round_trips(tmp_path_factory: pytest.TempPathFactory, model: Model, shard_bytes: int) -> None:
    base = tmp_path_factory.mktemp("roundtrip")
    report = write_hf(model, base / "a", shard_bytes=shard_bytes)
    found = open_hf(base / "a", check=True)
    assert_same(found, model)
    assert report.digest == model.digest()
    assert report.file_bytes == sum(path.stat().st_size for path in (base / "a").iterdir())
    # To the packed format and back: the same digest, the same bytes.
    assert write_packed(found, base / "model.clus").digest == report.digest
    write_hf(open_packed(base / "model.clus"), base / "b", shard_bytes=shard_bytes)
    assert contents(base / "b") == contents(base / "a")


def small_model() -> Model:
    """Two weights that share a codebook of 5 entries, one weight with its own codebook of 65536, and a norm."""
    rng = np.random.default_rng(3)
    shared = Codebook("shared", Array.of(rng.standard_normal((5, 4)).astype(np.float16)))
    wide = Codebook("wide", Array.of(rng.standard_normal((65536, 2)).astype(np.float16)))

    def weight(name: str, *books: Codebook, scale: bool = False) -> ClusteredWeight:
        stages = [
            Stage(book, Array.of(rng.integers(0, book.num_clusters, (6, -(-8 // book.cluster_dim))).astype(np.uint16)))
            for book in books
        ]
        row_scale = Array.of(rng.standard_normal(8).astype(np.float32)) if scale else None
        return ClusteredWeight(name, (8, 6), tuple(stages), "out", row_scale)

    tensors = [weight("a.weight", shared), weight("b.weight", wide, shared, scale=True)]
    norm = DenseTensor("norm.weight", Array.of(np.ones(6, np.float32)))
    files = {"tokenizer.json": Array.of(np.frombuffer(b"{}", np.uint8))}
    named = {tensor.name: tensor for tensor in tensors}
    return Model({"model_type": "x", "n": 1e-05}, {**named, "norm.weight": norm}, files, {"tool": "t"}, {"version": 1})


def test_safetensors_reads_what_the_specification_says(tmp_path: Path) -> None:
    write_hf(small_model(), tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json",
        "cluscomp.json",
        "model.safetensors",
        "tokenizer.json",
    }
    with safe_open(tmp_path / "m" / "model.safetensors", framework="np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict, has no __iter__
        assert file.metadata() == {"format": "pt"}
    forms = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
    assert forms == {
        # 6 x 2 codes of 3 bits are 4.5 bytes.
        "a.codes": ("uint8", (5,)),
        "b.codes": ("uint16", (6, 4)),
        "b.codes_1": ("uint8", (5,)),
        "b.row_scale": ("float32", (8,)),
        "codebooks.shared": ("float16", (5, 4)),
        "codebooks.wide": ("float16", (65536, 2)),
        "norm.weight": ("float32", (6,)),
    }
    weight = small_model().tensors["a.weight"]
    assert isinstance(weight, ClusteredWeight)
    # The bit stream, unpacked by plain integer arithmetic.
    stream = int.from_bytes(arrays["a.codes"].tobytes(), "little")
    codes = [(stream >> (3 * index)) & 7 for index in range(12)]
    assert codes == weight.stages[0].codes.read().reshape(-1).tolist()


def test_config_is_the_model_s_own_with_one_member_more(tmp_path: Path) -> None:
    report = write_hf(small_model(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_bytes())
    # The configuration has no dtype, so that of the dense tensors is added for transformers.
    assert config.pop("dtype") == "float32"
    assert config.pop("quantization_config") == {
        "added": {"dtype": "float32"},
        "quant_method": "cluscomp",
        "version": 1,
        "digest": report.digest,
        "weights": {
            "a.weight": {"shape": [8, 6], "group_axis": "out", "codebooks": ["shared"], "extra_arrays": []},
            "b.weight": {"shape": [8, 6], "group_axis": "out", "codebooks": ["wide", "shared"], "extra_arrays": ["row_scale"]},
        },
    }
    assert config == small_model().config


@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"dtype": None}])
def test_a_dtype_that_is_there_stays(tmp_path: Path, config: dict[str, object]) -> None:
    write_hf(Model(config, {}), tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_bytes())
    assert "added" not in stored.pop("quantization_config")
    assert stored == config == open_hf(tmp_path / "m", check=True).config


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"dtype": "bfloat16", "text_config": {}}, {"text_config": {"dtype": "bfloat16"}}),
        ({"text_config": {"dtype": "float16"}}, {"dtype": "float32"}),
        (
            {"audio": {"model_type": "a", "text_config": {"n": 1}}, "other": {"n": 1}},
            {"dtype": "float32", "audio": {"dtype": "float32", "text_config": {"dtype": "float32"}}},
        ),
    ],
)
def test_parts_without_a_dtype_get_that_of_the_whole(
    tmp_path: Path, config: dict[str, object], added: dict[str, object]
) -> None:
    """transformers can load the text part of a multimodal model alone, and would use the dtype of a codebook for it."""
    write_hf(Model(config, {}), tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_bytes())
    assert stored["quantization_config"]["added"] == added
    assert open_hf(tmp_path / "m", check=True).config == config


@pytest.mark.parametrize("former", [None, {"quant_method": "gptq"}, "x", {"replaced": 1}])
def test_a_former_quantization_config_comes_back(tmp_path: Path, former: object) -> None:
    model = Model({"quantization_config": former}, {})
    write_hf(model, tmp_path / "m")
    found = open_hf(tmp_path / "m", check=True)
    assert found.config == model.config
    assert found.digest() == model.digest()


def test_shards_are_cut_at_the_size_asked_for(tmp_path: Path) -> None:
    model = Model(
        {}, {f"t{number}": DenseTensor(f"t{number}", Array.of(np.full(25, number, np.float32))) for number in range(5)}
    )
    report = write_hf(model, tmp_path / "m", shard_bytes=250)
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert shards == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": 500}
    assert index["weight_map"] == {f"t{number}": shards[number // 2] for number in range(5)}
    assert open_hf(tmp_path / "m", check=True).digest() == report.digest == model.digest()


def test_arrays_are_aligned_to_their_items(tmp_path: Path) -> None:
    tensors = {
        "a": DenseTensor("a", Array.of(np.arange(3, dtype=np.uint8))),
        "b": DenseTensor("b", Array.of(np.arange(2, dtype=np.float64))),
        "c": DenseTensor("c", Array.of(np.arange(5, dtype=np.float16))),
        "d": DenseTensor("d", Array.of(np.arange(5, dtype=np.float32))),
    }
    write_hf(Model({}, tensors), tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    header_length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_length])
    assert (8 + header_length) % 8 == 0
    assert {name: header[name]["data_offsets"][0] for name in "abcd"} == {"b": 0, "d": 16, "c": 36, "a": 46}
    assert all(array.read().flags.aligned for _, array in open_hf(tmp_path / "m").payloads())


def test_a_misaligned_file_of_another_writer_is_read(tmp_path: Path) -> None:
    write_hf(Model({}, {"a": DenseTensor("a", Array.of(np.arange(3, dtype=np.float32)))}), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    header += b" " * (3 - len(header) % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[-12:])
    values = open_hf(tmp_path / "m", check=True).tensors["a"].decode()
    assert values.tolist() == [0, 1, 2]
    assert values.flags.aligned


def test_a_folder_is_no_larger_than_the_packed_file(tmp_path: Path) -> None:
    model = small_model()
    packed = write_packed(model, tmp_path / "m.clus")
    folder = write_hf(model, tmp_path / "m")
    # Without the padding of tiled codes.
    assert folder.payload_bytes <= packed.payload_bytes
    assert folder.num_sections == packed.num_sections


def test_the_registry_knows_the_format(tmp_path: Path) -> None:
    write_hf(small_model(), tmp_path / "m")
    fmt = detect(tmp_path / "m")
    assert fmt is not None
    assert fmt.name == "hf"
    assert open_model(tmp_path / "m").digest() == small_model().digest()
    assert cluscomp_formats.hf.SHARD_BYTES == 5_000_000_000


def test_sources_open_the_format_without_being_told(tmp_path: Path) -> None:
    write_hf(small_model(), tmp_path / "m")
    code = "import sys, pathlib, cluscomp_export.sources as s; print(s.open_source(pathlib.Path(sys.argv[1])).digest())"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert run.stdout.strip() == small_model().digest()


def test_other_folders_are_not_taken_for_ours(tmp_path: Path) -> None:
    assert not looks_hf(tmp_path)
    assert not looks_hf(tmp_path / "missing")
    for content in (
        b"",
        b"[",
        b"[]",
        b"{}",
        b'{"quantization_config": 1}',
        b'{"quantization_config": {"quant_method": "gptq"}}',
    ):
        (tmp_path / "config.json").write_bytes(content)
        assert not looks_hf(tmp_path), content
    (tmp_path / "config.json").write_bytes(b"[" * 100_000)
    assert not looks_hf(tmp_path)
    assert not looks_hf(tmp_path / "config.json")


def test_weights_alone_are_enough_where_asked_for(tmp_path: Path) -> None:
    write_hf(small_model(), tmp_path / "m")
    for name in ("cluscomp.json", "tokenizer.json"):
        (tmp_path / "m" / name).unlink()
    found = open_hf(tmp_path / "m", weights_only=True, check=True)
    assert found.digest() == small_model().digest()
    assert (found.files, found.provenance, found.self_test) == ({}, {}, None)


def test_a_model_may_be_written_over_the_folder_it_is_read_from(tmp_path: Path) -> None:
    write_hf(small_model(), tmp_path / "m")
    before = contents(tmp_path / "m")
    write_hf(open_hf(tmp_path / "m"), tmp_path / "m", force=True)
    assert contents(tmp_path / "m") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
