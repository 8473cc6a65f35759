"""Convert the scores of byte-pair encoding to an equivalent ranked list of merges."""

from __future__ import annotations

from collections.abc import Mapping

from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer

__all__ = ["merges_from_scores"]

_MAX_TOKEN = 1024
"""Largest number of characters of a token. Splitting takes quadratic time; SmolLM2's longest token has 81 characters."""
_MAX_SPLITS = 16
"""Limit of the characters of all splits of tokens into two, per character of the vocabulary. SmolLM2 would have 2.3."""


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return every way to merge two tokens to a third, sorted by descending score of the third.

    Among the merges to the same token, those with a longer left part come first; the text determines which one applies. Raises
    UnsupportedTokenizer if a hostile vocabulary has too many merges.
    """
    longest = max(map(len, scores), default=0)
    if longest > _MAX_TOKEN:
        raise UnsupportedTokenizer(f"a token has {longest} characters, more than {_MAX_TOKEN}")
    left = _MAX_SPLITS * sum(map(len, scores))
    ways = []
    for number, (token, score) in enumerate(scores.items()):
        splits = [at for at in range(1, len(token)) if token[:at] in scores and token[at:] in scores]
        left -= len(splits) * len(token)
        if left < 0:
            raise UnsupportedTokenizer("its tokens can be split in more ways than those of any real vocabulary")
        ways += [(-score, number, -at, token) for at in splits]
    return [(token[:-at], token[-at:]) for _, _, at, token in sorted(ways, key=lambda way: way[:3])]
