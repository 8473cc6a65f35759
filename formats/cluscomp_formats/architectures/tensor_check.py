"""Checks that the tensors of a model match its description."""

from __future__ import annotations

import re

from cluscomp_formats.architectures.config_reader import REMEDY
from cluscomp_formats.architectures.description import DecoderDescription
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import FLOAT_DTYPES, DenseTensor, Model

__all__ = ["check_tensors"]

_IGNORED = re.compile(r"(?:model\.)?mtp\..*|.*rotary_emb\.inv_freq")
"""Tensors that the decoder ignores, as transformers does: layers that predict further tokens at once, which training and some
servers use, and in old checkpoints the rotary frequencies, which follow from the configuration."""


def check_tensors(model: Model, description: DecoderDescription, *, head: bool = True) -> None:
    """Check that the tensors of a model match its description.

    Without `head` only what gives the last hidden states is looked at: the embedding, the blocks and the last norm. A tied
    model may bring a head of its own, which then wins over the embedding.

    Raises InvalidFileError with every tensor that is missing or of a wrong shape or type; UnsupportedError for tensors of other
    names than the decoder's, with every tensor it would leave unused, and for a model without the head of a language model.
    """
    head_name = description.head.weight
    expected = {name: spec.shape for name, spec in description.tensors.items() if name != head_name}
    if not expected.keys() & model.tensors.keys():
        message, found = "the tensors have other names than the decoder's", ", ".join(sorted(model.tensors)[:3])
        wanted = ", ".join([*expected][:3])
        raise UnsupportedError(Problem("other_names", message, None, None, f"{found}, ...", f"{wanted}, ...", REMEDY))
    if head_name in model.tensors:
        expected[head_name] = (description.vocab_size, description.hidden_size)
    wrong: list[Problem] = []
    for name, shape in expected.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            wrong.append(Problem("missing_tensor", "the model lacks a tensor its configuration calls for", None, name))
        elif tuple(tensor.shape) != shape:
            wrong.append(Problem("wrong_shape", "wrong shape", None, name, str(tuple(tensor.shape)), str(shape)))
        elif isinstance(tensor, DenseTensor) and tensor.values.dtype not in FLOAT_DTYPES:
            wrong.append(Problem("wrong_dtype", "not a float", None, name, tensor.values.dtype, ", ".join(FLOAT_DTYPES)))
    if wrong:
        raise InvalidFileError(wrong)
    others = sorted(name for name in model.tensors if name not in expected and not _IGNORED.fullmatch(name))
    inside = [name for name in others if name.startswith("model.")]
    if inside:
        message = "the configuration has no use for this tensor; running without it could give wrong results"
        raise UnsupportedError([Problem("unused_tensor", message, None, name, remedy=REMEDY) for name in inside])
    if not head:
        return
    if others:
        message = "the model has another head than a language model's, and gives no next token"
        raise UnsupportedError([Problem("other_head", message, None, name, remedy=REMEDY) for name in others])
    if not description.tied and head_name not in model.tensors:
        message = "the model has no head: it gives hidden states, as embedding models do, and no next token"
        raise UnsupportedError(Problem("no_head", message, None, head_name, "nothing", "a tensor, or a tied head", REMEDY))
