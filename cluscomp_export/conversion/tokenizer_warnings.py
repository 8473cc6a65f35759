"""Warnings about a source's tokenizer: it is missing, or it does not fit the model."""

from __future__ import annotations

from cluscomp_export.sources import embedding_tensor
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens import no_tokenizer, read_tokenizer

__all__ = ["tokenizer_warnings"]

_SHOWN = 5
"""Most tokens named in a warning."""


def tokenizer_warnings(source: Model) -> list[str]:
    """The warnings. Raises InvalidFileError for invalid files."""
    stored = read_tokenizer(source.files)
    if stored is None:
        problem = no_tokenizer(source)
        return [f"no tokenizer: {problem.found}; {problem.remedy}. The artefact will work with token ids only"]
    warnings = []
    if stored.moved:
        moves = [f"{text!a} {real}, not {claimed}" for text, (claimed, real) in stored.moved.items()]
        warnings.append(f"added tokens have other ids than their file says, as in transformers: {_listed(moves)}")
    embedding = embedding_tensor(source)
    if embedding is not None:
        rows = source.tensors[embedding].shape[0]
        beyond = [ascii(text) for text, number in stored.ids.items() if number >= rows]
        if beyond:
            found = f"the tokenizer has {len(beyond)} tokens beyond the {rows} embeddings of the model"
            warnings.append(f"{found}; a text with one of them is refused: {_listed(beyond)}")
    return warnings


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
