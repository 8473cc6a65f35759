"""Planning from a `config.json` alone: the shapes of known models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from known_configs import KNOWN

from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.sources import CONFIG_ONLY, open_source
from cluscomp_formats.errors import InvalidFileError, UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Llama-2-7B"][0]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_as_many_parameters_as_published(name: str, tmp_path: Path) -> None:
    values, parameters = KNOWN[name]
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    model = open_source(tmp_path, to_plan=True)
    assert sum(tensor.num_weights for tensor in model.tensors.values()) == parameters
    assert model.provenance["format"] == CONFIG_ONLY


def test_a_plan_needs_no_weights(folder: Path) -> None:
    prepared = prepare(folder, ConversionOptions(bits=3, device="cuda"), to_plan=True)
    assert prepared.source_file_bytes == 2 * KNOWN["Llama-2-7B"][1]
    assert prepared.sizes.linear_bits <= 3 * prepared.sizes.linear_weights
    assert prepared.plan is not None
    # Linear layers, embedding and head.
    assert len(prepared.plan.schemes) == 7 * 32 + 2


@pytest.mark.parametrize(
    ("found", "dtype"), [("float32", "float32"), ("torch.float16", "float16"), (None, "bfloat16")], ids=str
)
def test_the_dtype_is_the_configured_one(found: str | None, dtype: str, folder: Path) -> None:
    values = KNOWN["Llama-2-7B"][0] | {"torch_dtype": found}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensor = open_source(folder, to_plan=True).tensors["model.norm.weight"]
    assert tensor.values.dtype == dtype  # type: ignore[union-attr]


def test_transformers_5_calls_the_dtype_otherwise(folder: Path) -> None:
    values = KNOWN["Llama-2-7B"][0] | {"torch_dtype": None, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensor = open_source(folder, to_plan=True).tensors["model.norm.weight"]
    assert tensor.values.dtype == "float16"  # type: ignore[union-attr]


def test_a_conversion_needs_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="no weights") as caught:
        convert(folder, tmp_path.with_suffix(".clus"), ConversionOptions(bits=3))
    assert "only plans can do without" in str(caught.value)


def test_reading_what_is_not_there_says_so(folder: Path) -> None:
    tensor = open_source(folder, to_plan=True).tensors["model.norm.weight"]
    with pytest.raises(InvalidFileError, match="only the configuration is here"):
        tensor.decode()


def test_other_families_and_dtypes_are_refused(folder: Path) -> None:
    for changes, error in (({"model_type": "gpt2"}, UnsupportedError), ({"torch_dtype": "int8"}, InvalidFileError)):
        (folder / "config.json").write_text(json.dumps(KNOWN["Llama-2-7B"][0] | changes), encoding="utf-8")
        with pytest.raises(error):
            open_source(folder, to_plan=True)


def test_weights_that_are_there_are_not_passed_over(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidFileError, match="pickle"):
        open_source(folder, to_plan=True)
