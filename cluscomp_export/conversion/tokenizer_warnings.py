"""What a user should know of a source's tokenizer before the work: that there is none, or that it does not fit the model."""

from __future__ import annotations

from cluscomp_export.sources import embedding_tensor
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens import no_tokenizer, read_tokenizer

__all__ = ["tokenizer_warnings"]

_SHOWN = 5
"""Tokens named in a warning, at most."""


def tokenizer_warnings(source: Model) -> list[str]:
    """Warnings for people. Raises InvalidFileError for files that are malformed."""
    stored = read_tokenizer(source.files)
    if stored is None:
        problem = no_tokenizer(source)
        return [f"no tokenizer: {problem.found}; {problem.remedy}. The artefact will take and give token ids only"]
    warnings = []
    if stored.moved:
        moves = [f"{text!a} {real}, not {claimed}" for text, (claimed, real) in stored.moved.items()]
        warnings.append(f"added tokens have other ids than their file says, in transformers as here: {_listed(moves)}")
    embedding = embedding_tensor(source)
    if embedding is not None:
        rows = source.tensors[embedding].shape[0]
        beyond = [ascii(text) for text, number in stored.ids.items() if number >= rows]
        if beyond:
            found = f"the tokenizer has {len(beyond)} tokens past the {rows} embeddings of the model"
            warnings.append(f"{found}, and a text that has one is refused: {_listed(beyond)}")
    return warnings


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
