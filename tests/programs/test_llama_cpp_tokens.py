"""llama.cpp has the same tokens as our runtime: in files that we write, and in files of others that we read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_surgery import rewrite
from model_builders import tiny_llama
from runtime_models import side_file
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import write_dense_gguf
from cluscomp_formats.tokens.word_schemes import SCHEMES
from cluscomp_runtime import LanguageModel

SIZE = 520
# With a space in front llama.cpp puts another before it, which the Metaspace of this tokenizer.json does not.
TEXTS = ["Once<|im_start|>upon<x>a time</s>", "<x><|end|>", "<s>Once"]


@pytest.fixture(scope="module")
def resized(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with eight more embeddings, tokens in every side file, and three tokens that end a text."""
    folder = tmp_path_factory.mktemp("tokens") / "model"
    shutil.copytree(stories_folder, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding[: SIZE - 512] * 0.5])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", vocab_size=SIZE)
    change(folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>", "<|end|>"])
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 512}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 426, 512]}))
    return folder


def change(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **members}))


def test_files_that_we_write(resized: Path, tmp_path: Path, node: Callable[..., Any]) -> None:
    ours = LanguageModel.from_model(open_source(resized))
    assert ours.tokenizer is not None
    write_dense_gguf(open_source(resized), tmp_path / "m.gguf", gguf_type="f32")
    theirs = node("end_tokens.mjs", {"path": str(tmp_path / "m.gguf"), "texts": TEXTS})
    assert theirs["ids"] == [ours.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert (theirs["add_bos"], theirs["add_eos"]) == (True, False)
    # Of its own accord llama.cpp also ends at <|end|>, whose text it knows.
    assert set(theirs["end_ids"]) == {*ours.end_tokens, 514}
    back = LanguageModel.from_model(open_source(tmp_path / "m.gguf"))
    assert back.end_tokens == set(theirs["end_ids"])
    assert back.tokenizer is not None
    assert [back.tokenizer.encode(text) for text in TEXTS] == [ours.tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("begins", [True, False])
def test_byte_level_files_that_we_write(begins: bool, tmp_path: Path, node: Callable[..., Any]) -> None:
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SCHEMES["qwen2"].patterns[0]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<b>"], show_progress=False)
    backend.train_from_iterator(["Once upon a time, there was a time"], trainer)
    size = backend.get_vocab_size()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    config = {"bos_token": "<b>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<stop>"]}
    values = {
        "tokenizer": json.loads(backend.to_str()),
        "tokenizer_config": config,
        "added_tokens": {"<tool>": size},
        "generation_config": {"eos_token_id": [size + 2, size + 3]},
    }
    files = {f"{name}.json": side_file(json.dumps(value)) for name, value in values.items()}
    model = replace(tiny_llama(vocabulary=size + 6), files=files)
    ours = LanguageModel.from_model(model)
    assert ours.tokenizer is not None
    write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="f32")
    texts = ["<|im_start|>Once upon<tool> a  time<|im_end|>", "a<stop>b", "it's 123"]
    theirs = node("end_tokens.mjs", {"path": str(tmp_path / "m.gguf"), "texts": texts})
    assert theirs["ids"] == [ours.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert set(theirs["end_ids"]) == ours.end_tokens == {size + 2, size + 3}
    assert (theirs["add_bos"], theirs["add_eos"]) == (begins, False)
    back = LanguageModel.from_model(open_source(tmp_path / "m.gguf"))
    assert back.tokenizer is not None
    assert back.end_tokens == ours.end_tokens
    assert [back.tokenizer.encode(text) for text in texts] == [ours.tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, {"eot": 426, "eom": 300}),
        ({511: ("<|im_end|>", 3), 510: ("<end_of_turn>", 1)}, {}),
        ({511: ("[PAD]", 3), 510: ("<|file_sep|>", 3)}, {"eos": 509}),
        ({511: ("<|end|>", 3), 510: ("<|return|>", 3), 509: ("<|call|>", 3)}, {}),
    ],
)
def test_files_that_we_read(
    changes: dict[int, tuple[str, int]], ids: dict[str, int], stories_folder: Path, tmp_path: Path, node: Callable[..., Any]
) -> None:
    write_dense_gguf(open_source(stories_folder), tmp_path / "m.gguf", gguf_type="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    for number, (text, kind) in changes.items():
        tokens[number], types[number] = text, kind
    keys = {f"tokenizer.ggml.{key}_token_id": number for key, number in ids.items()}
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", keys, architecture="llama", alignment=32)
    theirs = node("end_tokens.mjs", {"path": str(tmp_path / "n.gguf"), "texts": [text for text, _ in changes.values()]})
    ours = LanguageModel.from_model(open_source(tmp_path / "n.gguf"))
    assert ours.end_tokens == set(theirs["end_ids"])
    assert ours.tokenizer is not None
    assert theirs["ids"] == [ours.tokenizer.encode(text, add_special_tokens=False) for text, _ in changes.values()]
