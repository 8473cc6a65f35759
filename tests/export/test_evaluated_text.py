"""What is evaluated is the bytes of the file: line ends, byte order mark, special tokens, whatever else is in it.

Two oracles: transformers' tokenizer and model in the same protocol, and what llama-perplexity printed for these texts
(`benchmarks/llama_perplexity.py`, which makes them, beside a build of llama.cpp).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from llama_perplexity import texts

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.evaluation.evaluate import evaluate_files, tokenize
from cluscomp_export.evaluation.protocols import choose_protocol, join_rows
from cluscomp_export.sources import open_source
from cluscomp_export.training.chats import read_chats
from cluscomp_formats.errors import InvalidFileError
from cluscomp_runtime.tokenizer import Tokenizer
from cluscomp_runtime.tokenizer.backend import IsolatedTokenizer, plain_copy

CONTEXT = 128
CHARACTERS = 4000
SPECIAL = ["</s>", "<s>", "<unk>"]

LLAMA_PERPLEXITY = {
    "as it is": 3.6801,
    "Windows line ends": 7.6688,
    "byte order mark": 3.6997,
    "special tokens": 14.6543,
    "emoji and control characters": 241.5627,
    "line ends at the end": 3.6801,
}

ROUNDING = 2e-5
"""Relative: four decimals, and implementations in float32, of which the mean of many losses leaves a few millionths."""


@dataclass
class Peer:
    tokenizer: Any
    model: Any

    @torch.inference_mode()
    def perplexity(self, text: str, **how: Any) -> float:
        """Of the second half of each window but its first token, the begin token in place of the window's first."""
        ids = torch.tensor(self.tokenizer(text, **how)["input_ids"])
        windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT).clone()
        windows[:, 0] = self.tokenizer.bos_token_id
        predicted = self.model(windows).logits.double().log_softmax(-1)[:, CONTEXT // 2 : -1]
        return math.exp(-float(predicted.gather(-1, windows[:, CONTEXT // 2 + 1 :, None]).mean()))


@pytest.fixture(scope="module")
def peer(stories_folder: Path) -> Peer:
    from transformers import AutoTokenizer, LlamaForCausalLM

    return Peer(AutoTokenizer.from_pretrained(stories_folder), LlamaForCausalLM.from_pretrained(stories_folder))


@pytest.fixture(scope="module")
def contents(stories_text: Path) -> dict[str, bytes]:
    return texts(stories_text.read_text(encoding="utf-8")[:CHARACTERS], SPECIAL)


@pytest.mark.parametrize("kind", LLAMA_PERPLEXITY)
def test_the_bytes_of_the_file_are_evaluated(
    kind: str, contents: dict[str, bytes], stories_folder: Path, tmp_path: Path, peer: Peer
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(contents[kind])
    found = evaluate_files(stories_folder, text=file, context=CONTEXT).perplexity
    assert found == pytest.approx(LLAMA_PERPLEXITY[kind], rel=ROUNDING)
    assert found == pytest.approx(peer.perplexity(contents[kind].decode(), split_special_tokens=True), rel=ROUNDING)


def test_the_texts_differ_in_what_they_ask(contents: dict[str, bytes]) -> None:
    assert contents.keys() == LLAMA_PERPLEXITY.keys()
    assert b"\r\n" in contents["Windows line ends"]
    assert b"\n" not in contents["Windows line ends"].replace(b"\r\n", b"")
    assert contents["byte order mark"][:3] == b"\xef\xbb\xbf"
    assert all(token.encode() in contents["special tokens"] for token in SPECIAL)


def test_special_tokens_are_found_by_the_other_protocol_alone(stories_folder: Path, peer: Peer) -> None:
    tokenizer = Tokenizer.from_files(open_source(stories_folder).files)
    assert tokenizer is not None
    text = "Once</s><s>upon <unk>a time"
    gptq, _ = tokenize(tokenizer, text, choose_protocol("gptq"))
    llama, begins = tokenize(tokenizer, f"{text}\n", choose_protocol("llama.cpp"))
    assert gptq == tokenizers.Tokenizer.from_file(str(stories_folder / "tokenizer.json")).encode(text).ids
    assert llama == peer.tokenizer(text, split_special_tokens=True)["input_ids"]
    assert gptq != llama
    assert begins == peer.tokenizer.bos_token_id
    # A text that is written to begin with the begin token: its characters come after that token.
    written, _ = tokenize(tokenizer, "<s>Once", choose_protocol("llama.cpp"))
    assert written == peer.tokenizer("<s>Once", split_special_tokens=True)["input_ids"]


def test_rows_are_those_of_a_file_that_python_reads_as_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b" \r\n = A = \r\n\r\nb\rc\x85d\x0be\n")
    with file.open(encoding="utf-8", errors="replace") as lines:
        rows = [line if line.strip() else "" for line in lines]
    assert join_rows(file.read_bytes().decode(errors="replace")) == "\n\n".join(rows)


def test_a_tokenizer_in_a_process_of_its_own_does_the_same(stories_folder: Path) -> None:
    content = (stories_folder / "tokenizer.json").read_text(encoding="utf-8")
    isolated = IsolatedTokenizer(content, "a test")
    plain = plain_copy(isolated)
    here = Tokenizer.from_files(open_source(stories_folder).files)
    assert here is not None
    assert plain.encode("a</s>b").ids == here.encode("a</s>b", parse_special=False)
    assert isolated.encode("a</s>b").ids == here.encode("a</s>b")


def test_texts_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    for content in (b"a\r\nb\rc\n\n", b"\xef\xbb\xbfa", b"a\x00\x1b[1m\x1a b", "😀\u2028\x85".encode()):
        file.write_bytes(content)
        assert read_text(file).encode() == content


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("ü".encode() + b"caf\xe9")
    with pytest.raises(InvalidFileError, match="not UTF-8") as caught:
        read_text(file)
    assert caught.value.problems[0].found == "byte 5"


def test_chats_that_windows_programs_wrote(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\r\\n", "completion": "b"}\r\n\r\n{"question": "c", "answer": "d"}\r\n')
    first, second = read_chats(file)
    assert [(message["role"], message["content"]) for message in first.messages] == [("user", "a\r\n"), ("assistant", "b")]
    assert second.number == 3
