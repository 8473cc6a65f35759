"""Incremental decoding of tokens, compared with the tokenizer's decoding of all of them at once.

CLUSCOMP_STREAM_EXAMPLES sets the number of texts for each kind of tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runtime_models import byte_tokenizer_files
from tokenizer_kinds import DECODERS, KINDS, MODELS, tokenizer_of

from cluscomp_runtime.tokenizer import Tokenizer

EXAMPLES = int(os.environ.get("CLUSCOMP_STREAM_EXAMPLES", "100"))
"""Texts and sequences of tokens for each kind of tokenizer."""

TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abc .,한글世界é😀▁\n")), max_size=40)


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.push(token) for token in ids), stream.flush()]


def right(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the new part of a text; if the end of the prompt's text changed, all from the first different character."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    if before.endswith("\ufffd") and not after.startswith(before):
        return after[next(at for at in range(len(before)) if after[: at + 1] != before[: at + 1]) :]
    return after[len(before) :]


@pytest.mark.parametrize("kind", MODELS)
def test_the_pieces_of_a_text_are_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=EXAMPLES)
    @given(TEXTS, TEXTS)
    @example("", "안녕하세요 여러분")
    @example("Tom said 天", "地玄黃宇宙洪荒")
    @example("x", "😀😀😀y")
    @example(" ", " \n a")
    @example("\ufffd", "\ufffd")
    def run(prompt: str, text: str) -> None:
        before, ids = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
        pieces = streamed(tokenizer, before, ids)
        assert "".join(pieces) == tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
        assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_any_tokens_are_what_the_tokenizer_makes_of_them(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = st.integers(0, tokenizer.vocab_size - 1)
    if kind in DECODERS:
        # Few byte tokens, and tokens that the vocabulary does not have.
        tokens = st.one_of(st.integers(0, 14), st.sampled_from([15 + byte for byte in (0x41, 0x80, 0xBD, 0xE4)]), tokens)

    @settings(max_examples=EXAMPLES)
    @given(st.lists(tokens, max_size=30), st.lists(st.one_of(tokens, st.just(10**6)), max_size=60))
    def run(prompt: list[int], ids: list[int]) -> None:
        pieces = streamed(tokenizer, prompt, ids)
        assert "".join(pieces) == right(tokenizer, prompt, ids)

    run()


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte-fallback BPE"])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [("e4", "bd a0", "你"), ("41 e4 bd a0 e4", "bd a0", None), ("80", "80", "�"), ("e4 bd a0", "41", "A")],
)
def test_an_unfinished_character_of_the_prompt_comes_whole(kind: str, before: str, after: str, expected: str | None) -> None:
    tokenizer = tokenizer_of(kind)
    spelling = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    if kind == "byte-level BPE":
        spelling = {0x41: "A", 0x80: "Ģ", 0xA0: "ł", 0xBD: "½", 0xE4: "ä"}
    prompt, ids = ([tokenizer.backend.token_to_id(spelling[byte]) for byte in bytes.fromhex(part)] for part in (before, after))
    text = "".join(streamed(tokenizer, prompt, ids))
    assert text == right(tokenizer, prompt, ids)
    assert expected in (None, text)


def test_characters_are_given_out_as_soon_as_they_are_certain() -> None:
    tokenizer = tokenizer_of("byte-level BPE")
    ids = tokenizer.encode("한글 text", add_special_tokens=False)
    pieces = streamed(tokenizer, [], ids)
    assert pieces.index("한") < pieces.index("글") < len(pieces) - 2
    assert pieces[-1] == ""


def test_special_tokens_within_a_character_do_not_cut_it() -> None:
    tokenizer = tokenizer_of("byte-fallback BPE")
    first, second, third = (tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode())
    assert "".join(streamed(tokenizer, [1], [first, 1, second, third, 2])) == "你"


@pytest.mark.parametrize("kind", ["byte-fallback BPE", "byte-level BPE", "Replace across tokens"])
def test_work_per_token_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand byte tokens in a row, then a word."""
    tokenizer = tokenizer_of(kind)
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    spellings = [f"<0x{byte:02X}>" for byte in "你".encode()] if kind != "byte-level BPE" else ["ä", "½", "ł"]
    run = [tokenizer.backend.token_to_id(spelling) for spelling in spellings] * 3333
    word = [tokenizer.backend.token_to_id("a")] * 100
    pieces = streamed(tokenizer, run[:3], [*run, *word])
    assert "".join(pieces) == right(tokenizer, run[:3], [*run, *word])
    assert sum(decoded) < 50 * (len(run) + len(word)) + 3 * len(run)


def test_the_stream_keeps_the_space_between_words() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1, "▁a": 2}))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, {})
    assert tokenizer.decode([1, 2]) == "upon a", "alone, the decoder strips the first space"
    assert streamed(tokenizer, [0], [1, 2]) == [" upon", " a", ""]


def test_a_long_stream_is_its_text() -> None:
    tokenizer = Tokenizer.from_files(byte_tokenizer_files())
    assert tokenizer is not None
    text = "αβγ äöü 世界 😀😀 plain text, over and over. " * 5
    pieces = streamed(tokenizer, tokenizer.encode("prompt "), list(text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=20)
@given(TEXTS)
def test_an_isolated_tokenizer_streams_alike(text: str) -> None:
    from cluscomp_runtime.tokenizer.backend import IsolatedTokenizer

    peer = tokenizer_of("byte-fallback BPE")
    isolated = _isolated[0] if _isolated else Tokenizer(IsolatedTokenizer(peer.backend.to_str(), "no reason"), {})
    _isolated[:] = [isolated]
    ids = peer.encode(text)
    assert streamed(isolated, [1], ids) == streamed(peer, [1], ids)


_isolated: list[Tokenizer] = []
