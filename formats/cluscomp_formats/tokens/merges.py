"""The ranked list of merges that byte-pair encoding with scores amounts to."""

from __future__ import annotations

from collections.abc import Mapping

from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer

__all__ = ["merges_from_scores"]

_MAX_TOKEN = 1024
"""Characters of a token. Splitting one takes time in the square of its length; SmolLM2's longest has 81."""
_MAX_SPLITS = 16
"""Characters of all splits of tokens into two others, per character of the vocabulary. SmolLM2's would have 2.3."""


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token of the best score first.

    Among the ways to make one token the longer left part goes first; which one applies is decided by what is there. Raises
    UnsupportedTokenizer for a vocabulary made to have too many.
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
            raise UnsupportedTokenizer("its tokens can be made of others in more ways than those of any real vocabulary")
        ways += [(-score, number, -at, token) for at in splits]
    return [(token[:-at], token[-at:]) for _, _, at, token in sorted(ways, key=lambda way: way[:3])]
