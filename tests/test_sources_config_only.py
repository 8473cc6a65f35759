"""Planning from a `config.json` alone: the shapes of known models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluscomp_export.convert import ConversionOptions, convert, prepare
from cluscomp_export.sources import CONFIG_ONLY, open_source
from cluscomp_formats.errors import InvalidFileError, UnsupportedError


def config(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
    }


# Shapes as their makers publish them, and the parameters counted by hand from their papers and cards.
KNOWN = {
    "Llama-2-7B": (config("llama", 4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "Llama-2-70B": (config("llama", 8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
    "Llama-3-70B": (config("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Mistral-7B": (config("mistral", 4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Qwen2.5-72B": (config("qwen2", 8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    "SmolLM2-135M": (config("llama", 576, 1536, 30, 9, 3, 49152) | {"tie_word_embeddings": True}, 134_515_008),
}


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
    assert len(prepared.plan.treatments) == 7 * 32


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
    assert "--dry-run" in str(caught.value)


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
