"""A small tokenizer of each kind that models have, and of kinds whose decoders look further than a token."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cluscomp_runtime.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>"]


def _text() -> list[str]:
    lines = (DATA / "stories260K.txt").read_text(encoding="utf-8").splitlines()[:200]
    return [*lines, "Grüße, 世界! Привет мир. 안녕하세요 여러분 😀 e\u0301"]


def _trained(model: Any, trainer: Any, *, normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None) -> Any:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, pre_tokenizer, decoder
    backend.train_from_iterator(_text(), trainer)
    return backend


def _byte_level() -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, pre_tokenizer=parts, decoder=decoders.ByteLevel())


def _byte_fallback() -> Any:
    return tokenizers.Tokenizer.from_str((DATA / "stories260K" / "tokenizer.json").read_text(encoding="utf-8"))


def _unigram() -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *SPECIAL],
        unk_token="<unk>",  # noqa: S106
        show_progress=False,
    )
    return _trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


def _unigram_with_bytes() -> Any:
    trained = json.loads(_unigram().to_str())["model"]["vocab"]
    vocabulary = [("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), *((piece, score) for piece, score in trained[3:])]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(SPECIAL)
    return backend


def _word_piece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    return _trained(
        models.WordPiece(unk_token="[UNK]"),  # noqa: S106
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def _words(decoder: Any) -> Any:
    """A vocabulary of odd tokens, for decoders that few models have."""
    tokens = ["a", "b</w>", "c|", "<pad>", "▁", "▁a▁b", "  ", "aa", ".", " .", "n't", "##x", "é", "y", "x▁", *BYTES]
    backend = tokenizers.Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, "a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    return backend


MODELS = {
    "byte-level BPE": _byte_level,
    "byte-fallback BPE": _byte_fallback,
    "Unigram": _unigram,
    "Unigram with bytes": _unigram_with_bytes,
    "WordPiece": _word_piece,
}

DECODERS: dict[str, Any] = {
    "none": lambda: None,
    "WordPiece without cleanup": lambda: decoders.WordPiece(cleanup=False),
    "BPE": decoders.BPEDecoder,
    "CTC": decoders.CTC,
    "Strip after Fuse": lambda: decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "Strip of each token": lambda: decoders.Sequence([decoders.Strip(" ", 0, 1), decoders.Fuse()]),
    "long Strip": lambda: decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 20, 0)]),
    "Replace of a letter": lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "xy")]),
    "Replace across tokens": lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace("aa", "b")]),
    "Replace at the end": lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace(tokenizers.Regex("a$"), "")]),
    "Replace of each token": lambda: decoders.Sequence([decoders.Replace("aa", "b"), decoders.Fuse()]),
    "Metaspace": decoders.Metaspace,
    "Metaspace after Fuse": lambda: decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
    "bytes, cleaned up": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.WordPiece()]),
}

KINDS = (*MODELS, *DECODERS)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The tokenizer of that kind."""
    return Tokenizer(MODELS[kind]() if kind in MODELS else _words(DECODERS[kind]()), {})
