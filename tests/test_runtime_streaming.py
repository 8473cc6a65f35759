"""Text of tokens as they come."""

from __future__ import annotations

from runtime_models import byte_tokenizer_files

from cluscomp_runtime.tokenizer import Tokenizer


def test_the_stream_keeps_the_space_between_words() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1, "▁a": 2}))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, {})
    assert tokenizer.decode([1, 2]) == "upon a", "alone, the decoder strips the first space"
    stream = tokenizer.stream([0])
    assert [stream.push(1), stream.push(2), stream.flush()] == [" upon", " a", ""]


def test_a_long_stream_is_its_text() -> None:
    tokenizer = Tokenizer.from_files(byte_tokenizer_files())
    assert tokenizer is not None
    text = "αβγ äöü 世界 😀😀 plain text, over and over. " * 5
    stream = tokenizer.stream(tokenizer.encode("prompt "))
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)
