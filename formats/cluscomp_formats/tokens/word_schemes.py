"""Schemes for splitting text into words before byte-level BPE, by their names in GGUF (`tokenizer.ggml.pre`).

The schemes are those of llama.cpp's `llama-vocab.cpp` and of the models' own `tokenizer.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPT2_WORDS", "SCHEMES", "Scheme"]

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Scheme:
    """A scheme for splitting text into words. Each pattern in turn splits the results of the previous one.

    `ignore_merges`: a word that is a token itself needs no merges. `add_bos`: the default if the file does not set it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: str | None = None


_GPT2 = Scheme((GPT2_WORDS,))
_DIGITS_GPT2 = Scheme((r"\p{N}", GPT2_WORDS))
_LLAMA3 = Scheme((_LLAMA3_WORDS,), ignore_merges=True, add_bos=True)
_QWEN2 = Scheme((_QWEN2_WORDS,))
_DEFAULT = Scheme((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))

SCHEMES: dict[str, Scheme] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "trillion", "granite-docling", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Scheme((_LLAMA3_WORDS,))),
    # Qwen's own tokenizer.json normalises to NFC; llama.cpp leaves that to its caller.
    "qwen2": Scheme((_QWEN2_WORDS,), normalizer="NFC"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "kormo"), _QWEN2),
    "tekken": Scheme((_TEKKEN_WORDS,), ignore_merges=True, add_bos=True),
}
