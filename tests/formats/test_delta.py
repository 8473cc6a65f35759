"""Deltas as files and as changes of a model: exact, strict, the same in every format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from clustered_models import KEY, with_clusters
from fuzzing.containers import join_safetensors, seal_delta, split_safetensors
from model_builders import tiny_llama

from cluscomp_formats.delta import Delta, changes, combine, is_delta, open_delta, spec, write_delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, OutputExistsError
from cluscomp_formats.ir import Array, Model, float32_to_bfloat16
from cluscomp_formats.parameters import KINDS, parameters, with_parameters
from cluscomp_formats.strict_json import canonical_json
from cluscomp_runtime import LanguageModel

NORM = "norm.model.norm.weight"
BOOK, SECOND, SCALE = "codebook.kv", "codebook.k second", f"row_scale.{KEY}"
DOCS = Path(__file__).parents[2] / "docs" / "delta-format.md"


@pytest.fixture(scope="module")
def model() -> Model:
    """A model with shared codebooks, several dtypes (one int8) and stages, row scales, and float32 and bfloat16 norms."""
    base = with_clusters(tiny_llama())
    name = "model.layers.0.input_layernorm.weight"
    narrow = Array.of(float32_to_bfloat16(np.linspace(0.5, 1.5, 24, dtype=np.float32)), "bfloat16")
    whole = Array.of(np.random.default_rng(0).integers(-100, 100, parameters(base)[SECOND].shape).astype(np.int8))
    return with_parameters(base, {f"norm.{name}": narrow, SECOND: whole})


def shifted(model: Model, by: float, names: tuple[str, ...] = (BOOK, SECOND, SCALE, NORM)) -> Model:
    """Return the model with `by` added to these parameters, or 20 times `by` to integer ones."""
    known = {name: parameters(model)[name] for name in names}
    steps = {name: 20 * by if array.dtype == "int8" else by for name, array in known.items()}
    changed = {name: Array.of((array.read() + steps[name]).astype(array.dtype)) for name, array in known.items()}
    return with_parameters(model, changed)


def delta_of(base: Model, changed: Model, record: Mapping[str, Any] | None = None) -> Delta:
    return Delta(base.digest(), changed.digest(), changes(base, changed), record or {"tool": "test"})


@pytest.fixture
def file(model: Model, tmp_path: Path) -> Path:
    path = tmp_path / "some.delta"
    write_delta(delta_of(model, shifted(model, 0.25)), path)
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(InvalidFileError) as caught:
        open_delta(path)
    return [problem.kind for problem in caught.value.problems]


def test_parameters_are_codebooks_row_scales_and_norms(model: Model) -> None:
    kinds = [name.split(".")[0] for name in parameters(model)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"codebook": 4, "row_scale": 2, "norm": 5}


def test_applying_gives_the_very_model(model: Model, file: Path) -> None:
    delta = open_delta(file)
    assert sorted(delta.arrays) == sorted((BOOK, SECOND, SCALE, NORM))
    applied = delta.apply(model)
    assert applied.digest() == delta.result == applied.claimed_digest == shifted(model, 0.25).digest()
    assert applied.self_test is None


def test_only_what_changed_is_kept(model: Model) -> None:
    assert list(changes(model, shifted(model, 0.25, (SCALE,)))) == [SCALE]
    assert changes(model, model) == {}


def test_an_empty_delta_changes_nothing(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "empty.delta"
    write_delta(delta_of(model, model), path)
    assert open_delta(path).apply(model).digest() == model.digest()


def test_the_same_delta_has_the_same_bytes(model: Model, file: Path, tmp_path: Path) -> None:
    write_delta(open_delta(file), tmp_path / "again.delta")
    assert (tmp_path / "again.delta").read_bytes() == file.read_bytes()


def test_another_library_reads_it(model: Model, file: Path) -> None:
    with safetensors.safe_open(file, "np") as opened:
        metadata = opened.metadata()
        values = opened.get_tensor(SCALE)
    assert sorted(metadata) == list(spec.METADATA)
    assert json.loads(metadata["record"]) == {"tool": "test"}
    np.testing.assert_array_equal(values, open_delta(file).arrays[SCALE].read())


def test_the_checksum_is_what_the_specification_says(file: Path) -> None:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.pop("__metadata__")
    stated = metadata.pop("sha256")
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
    forms = {name: [names[entry["dtype"]], entry["shape"]] for name, entry in header.items()}
    checksum = hashlib.sha256(f"{canonical_json([metadata, forms])}\n".encode())
    start = 8 + int.from_bytes(data[:8], "little")
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        checksum.update(data[start + begin : start + end])
    assert checksum.hexdigest() == stated


def test_the_specification_names_every_member() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")]
    assert [name for name in rows if name in spec.METADATA] == list(spec.METADATA)
    assert [name.split(".")[0] for name in rows if "." in name] == list(KINDS)
    assert f"`{spec.FORMAT}`" in text
    assert f"version {spec.VERSION}" in text


def test_an_existing_file_is_not_replaced_unless_asked(model: Model, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(OutputExistsError):
        write_delta(delta_of(model, model), file)
    assert file.read_bytes() == before
    write_delta(delta_of(model, model), file, force=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize("bad", ["unknown.x", "codebook.", "norm.a\nb"])
def test_names_the_format_cannot_hold_are_not_written(model: Model, tmp_path: Path, bad: str) -> None:
    delta = replace(delta_of(model, model), arrays={bad: Array.of(np.zeros(3, np.float32))})
    with pytest.raises(InvalidRequestError):
        write_delta(delta, tmp_path / "bad.delta")
    assert list(tmp_path.iterdir()) == []


# Hostile files.


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray[Any, Any]], dict[str, str]], None]) -> Path:
    """Write the delta with other arrays and metadata; if it has a checksum, that is recomputed."""
    header, data = split_safetensors(path.read_bytes())
    metadata = header.pop("__metadata__")
    arrays = safetensors.numpy.load_file(path)
    change(arrays, metadata)
    header, data = {"__metadata__": metadata}, b""
    stored = {
        np.dtype(dtype): name for name, dtype in (("F64", "f8"), ("F32", "f4"), ("F16", "f2"), ("I32", "i4"), ("I8", "i1"))
    }
    for name, values in arrays.items():
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": stored[values.dtype], "shape": values.shape, "data_offsets": offsets}
        data += values.tobytes()
    content = join_safetensors(header, data)
    path.write_bytes(seal_delta(content) if "sha256" in metadata else content)
    return path


def test_every_flipped_bit_is_found(file: Path) -> None:
    data = file.read_bytes()
    # The padding at the end of the header is not covered by the checksum: other white space has the same meaning.
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1
        file.write_bytes(bytes(damaged))
        assert problems(file)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    assert problems(file) == ["truncated"]


def test_a_file_that_goes_on(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    assert problems(file) == ["trailing_bytes"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(file: Path, value: float) -> None:
    def spoil(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        arrays[SCALE][1] = value
        arrays[NORM][0] = value

    assert problems(rewritten(file, spoil)) == ["not_finite", "not_finite"]


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("tensor.x", np.zeros(3, np.float32), "bad_name"),
        ("codebook.", np.zeros((2, 2), np.float32), "bad_name"),
        ("norm.a\x1bb", np.zeros(3, np.float32), "bad_name"),
        ("codebook.kv", np.zeros(3, np.float32), "wrong_form"),
        ("codebook.kv", np.zeros((2, 2), np.float64), "wrong_form"),
        ("norm.x", np.zeros((2, 2), np.float32), "wrong_form"),
        ("row_scale.x", np.zeros(3, np.int32), "wrong_form"),
    ],
)
def test_arrays_that_no_model_can_have(file: Path, name: str, values: Any, kind: str) -> None:
    assert problems(rewritten(file, lambda arrays, metadata: arrays.__setitem__(name, values))) == [kind]


@pytest.mark.parametrize(
    ("member", "value", "kind"),
    [
        ("format", "pt", "not_a_delta"),
        ("format", None, "not_a_delta"),
        ("version", "2", "newer_version"),
        ("version", "0", "bad_version"),
        ("version", "1.0", "bad_version"),
        ("version", "9" * 5000, "bad_version"),
        ("base", "sha256:12", "bad_digest"),
        ("result", "md5:" + "0" * 64, "bad_digest"),
        ("record", "[]", "wrong_type"),
        ("record", '{"a": 1}', "not_canonical"),
        ("record", '{"a":NaN}', "bad_json"),
        ("record", '{"a":1,"a":1}', "duplicate_key"),
        ("record", None, "bad_metadata"),
        ("sha256", None, "bad_metadata"),
        ("more", "x", "bad_metadata"),
    ],
)
def test_metadata_that_is_not_that_of_a_delta(file: Path, member: str, value: str | None, kind: str) -> None:
    def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata.pop(member, None)
        if value is not None:
            metadata[member] = value

    assert problems(rewritten(file, change)) == [kind]


def test_a_wrong_checksum(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"sha256":"', b'"sha256":"0', 1))
    assert problems(file) != []


def test_a_delta_of_another_model_is_refused_with_both_digests(model: Model, file: Path) -> None:
    other = shifted(model, 1.0)
    with pytest.raises(InvalidFileError) as caught:
        open_delta(file).apply(other)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.found, problem.expected) == ("other_base", other.digest(), model.digest())


def test_every_parameter_that_does_not_fit_is_named(model: Model, file: Path) -> None:
    def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        arrays["codebook.gone"] = np.zeros((2, 2), np.float16)
        arrays["norm.model.embed_tokens.weight"] = np.zeros(3, np.float32)
        arrays[SCALE] = np.zeros(9, np.float16)
        arrays[NORM] = arrays[NORM].astype(np.float16)

    delta = open_delta(rewritten(file, change))
    with pytest.raises(InvalidFileError) as caught:
        delta.apply(model)
    found = {problem.tensor: problem.kind for problem in caught.value.problems}
    assert found == {
        "codebook.gone": "unknown_parameter",
        "norm.model.embed_tokens.weight": "unknown_parameter",
        SCALE: "wrong_form",
        NORM: "wrong_form",
    }


def test_what_is_a_delta_and_what_is_not(file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3)}, plain, {"format": "pt"})
    assert is_delta(file)
    assert not any(is_delta(path) for path in (plain, tmp_path, tmp_path / "missing"))


# Several deltas.


def test_a_weighted_sum_of_differences(model: Model) -> None:
    deltas = [delta_of(model, shifted(model, 0.5)), delta_of(model, shifted(model, -0.25, (SCALE,)))]
    combined = parameters(combine(model, deltas, (0.5, 2.0), model.digest()))
    known = parameters(model)
    np.testing.assert_array_equal(combined[NORM].read(), known[NORM].read() + np.float32(0.25))
    np.testing.assert_array_equal(combined[SECOND].read(), known[SECOND].read() + 5)
    expected = known[SCALE].read().astype(np.float64)
    halves = [0.5 * (delta.arrays[SCALE].read().astype(np.float64) - expected) for delta in deltas]
    np.testing.assert_array_equal(combined[SCALE].read(), (expected + halves[0] + 4 * halves[1]).astype(np.float16))


def test_one_delta_of_weight_one_is_not_computed_but_taken(model: Model) -> None:
    changed = shifted(model, 0.1)
    assert combine(model, [delta_of(model, changed)], (1.0,), model.digest()).digest() == changed.digest()


def test_no_difference_gives_the_model_back(model: Model) -> None:
    bfloat = "norm.model.layers.0.input_layernorm.weight"
    values = float32_to_bfloat16(np.ones(24, np.float32))
    changed = with_parameters(shifted(model, 0.1), {bfloat: Array.of(values, "bfloat16")})
    assert combine(model, [delta_of(model, changed)], (0.0,), model.digest()).digest() == model.digest()


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (np.nan,), (1e9,)])
def test_weights_that_cannot_be(model: Model, weights: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        combine(model, [delta_of(model, shifted(model, 0.25))], weights, model.digest())


# In the runtime.


@pytest.mark.parametrize("kernel", ["auto", "embedding_bag", "dense", "reference"])
@pytest.mark.filterwarnings("ignore:1 clustered matrices", "ignore:this model runs in torch")
def test_swapping_in_the_runtime_is_the_same_as_loading(model: Model, kernel: str) -> None:
    ids = [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    first, second = (delta_of(model, shifted(model, by, names)) for by, names in ((0.25, (BOOK, NORM)), (0.5, (SCALE,))))
    loaded = LanguageModel.from_model(model, kernel=kernel)
    base = loaded.forward(ids)
    for delta in (first, second, first):
        loaded.apply_delta(delta)
        expected = LanguageModel.from_model(delta.apply(model), kernel=kernel).forward(ids)
        assert not np.array_equal(expected, base)
        np.testing.assert_array_equal(loaded.forward(ids), expected)
    loaded.apply_delta(None)
    np.testing.assert_array_equal(loaded.forward(ids), base)
    # The model in memory has not been modified.
    assert model.digest() == first.base


def test_a_delta_of_another_model_changes_nothing(model: Model) -> None:
    ids = [[1, 2, 3]]
    loaded = LanguageModel.from_model(model, kernel="reference")
    base = loaded.forward(ids)
    with pytest.raises(InvalidFileError, match="another model"):
        loaded.apply_delta(delta_of(shifted(model, 1.0), model))
    np.testing.assert_array_equal(loaded.forward(ids), base)
