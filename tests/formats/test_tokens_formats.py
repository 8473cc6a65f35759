"""A model has the same tokens in every format, with more embeddings than tokens and with more tokens than embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.conversion.prepare import prepare
from cluscomp_export.conversion.tokenizer_warnings import tokenizer_warnings
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import silent
from cluscomp_runtime import LanguageModel

TEXTS = ["Once<|im_start|>upon<x>a time</s>", "Once", "<|im_start|>", "[PAD513]"]


def model_folder(original: Path, folder: Path, *, rows: int, **files: Mapping[str, Any]) -> Path:
    """Return stories260K with another number of embeddings and changed members of JSON files."""
    shutil.copytree(original, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding * 0.5])[:rows].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, members in {**files, "config": {"vocab_size": rows, **files.get("config", {})}}.items():
        path = folder / f"{name}.json"
        stored = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps({**stored, **members}))
    return folder


@pytest.fixture(scope="module")
def resized(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(
        stories_folder,
        tmp_path_factory.mktemp("resized") / "model",
        rows=520,
        tokenizer_config={"extra_special_tokens": ["<|im_start|>"], "tokenizer_class": "PreTrainedTokenizerFast"},
        added_tokens={"<x>": 512},
        special_tokens_map={"pad_token": "<|im_start|>"},
        generation_config={"eos_token_id": [2, 512]},
    )


def written(model: Model, to: str, gguf_type: str | None, path: Path) -> Model:
    output_format(to, gguf_type).write(model, path, force=False, self_test=None, on_progress=silent)
    return open_source(path)


@pytest.mark.parametrize(("to", "gguf_type"), [("packed", None), ("hf", None), ("onnx", None), ("gguf", None), ("gguf", "f32")])
def test_a_model_in_every_format(to: str, gguf_type: str | None, resized: Path, tmp_path: Path) -> None:
    source = open_source(resized)
    theirs = AutoTokenizer.from_pretrained(resized)
    found = written(source, to, gguf_type, tmp_path / "out")
    ours = LanguageModel.from_model(found)
    assert ours.tokenizer is not None
    for text in TEXTS:
        assert ours.tokenizer.encode(text) == theirs(text).input_ids, text
    assert ours.end_tokens == {2, 512}
    assert ours.tokenizer.special_tokens == theirs.special_tokens_map
    assert ours.tokenizer.decode([403, 513, 519]) == "Once"
    if to != "gguf":
        assert {name: array.read().tobytes() for name, array in found.files.items()} == {
            name: array.read().tobytes() for name, array in source.files.items()
        }
    if to == "hf":
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]).input_ids == theirs(TEXTS[0]).input_ids
        assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 512]


def test_more_embeddings_than_tokens_is_usual(resized: Path) -> None:
    assert tokenizer_warnings(open_source(resized)) == []


def test_more_tokens_than_embeddings(stories_folder: Path, tmp_path: Path) -> None:
    extra = {"pad_token": "[PAD]", "extra_special_tokens": [f"<{number}>" for number in range(7)]}
    folder = model_folder(stories_folder, tmp_path / "model", rows=514, tokenizer_config=extra)
    source = open_source(folder)
    warning = tokenizer_warnings(source)[0]
    assert warning.startswith("the tokenizer has 6 tokens beyond the 514 embeddings")
    assert warning.endswith("'<1>', '<2>', '<3>', '<4>', '<5>' and 1 more")
    ours = LanguageModel.from_model(source)
    assert ours.generate("<0>", max_new_tokens=1).new_tokens == 1
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        ours.generate("<1>")
    notes = output_format("gguf", "f32").notes(source)
    assert notes == (f"added tokens beyond the 514 embeddings are omitted: {warning.split(': ')[1]}",)
    written(source, "gguf", "f32", tmp_path / "m.gguf")
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[512:]) == (514, ["[PAD]", "<0>"])


NOTES: list[tuple[dict[str, Any], str]] = [
    ({"generation_config": {"eos_token_id": [2, 426, 427, 428]}}, "llama.cpp does not end at 'g'"),
    ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}, "llama.cpp then ends at token 2, '</s>'"),
    (
        {"tokenizer_config": {"added_tokens_decoder": {"512": {"content": "<x>", "rstrip": True}}}},
        "llama.cpp ignores that added tokens strip spaces around them, or match whole words only: '<x>'",
    ),
]


@pytest.mark.parametrize(("files", "note"), NOTES)
def test_what_a_dense_gguf_cannot_say(
    files: dict[str, dict[str, Any]], note: str, stories_folder: Path, tmp_path: Path
) -> None:
    folder = model_folder(stories_folder, tmp_path / "model", rows=514, **files)
    options = ConversionOptions(to="gguf", gguf_type="f32", bits=4, effort="fast")
    warnings = prepare(folder, options).warnings
    assert any(note in warning for warning in warnings), warnings
    assert not any(note in warning for warning in prepare(folder, ConversionOptions(bits=4, effort="fast")).warnings)


def test_ids_that_a_file_claims_in_vain_are_told(stories_folder: Path, tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"519": {"content": "<x>", "special": True}}}
    folder = model_folder(stories_folder, tmp_path / "model", rows=520, tokenizer_config=decoder)
    assert tokenizer_warnings(open_source(folder)) == [
        "added tokens have other ids than their file says, as in transformers: '<x>' 512, not 519"
    ]


@pytest.mark.parametrize("name", ["tokenizer.model", "none"])
def test_a_source_without_a_tokenizer_is_told(name: str, stories_folder: Path, tmp_path: Path) -> None:
    folder = model_folder(stories_folder, tmp_path / "model", rows=512)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    if name != "none":
        (folder / name).write_bytes(b"IQ== 0\nIg== 1\n")
    expected = "tiktoken" if name != "none" else "put the model's own"
    (warning,) = tokenizer_warnings(open_source(folder))
    assert warning.startswith("no tokenizer: ")
    assert expected in warning
    assert warning.endswith("The artefact will work with token ids only")
