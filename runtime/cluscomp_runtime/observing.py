"""Run a model once and show what its matrices multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.ir import Model
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["observe_inputs"]


def observe_inputs(model: Model, input_ids: torch.Tensor, observe: Callable[[str, torch.Tensor], None]) -> None:
    """Run a model once on `input_ids` `[batch, tokens]` and show `observe` each matrix's name and input.

    Inputs are `[batch, tokens, in_features]`; the head, if there is one, does not multiply. In float64 reference mode: nothing
    is kept, so memory is bounded by the largest matrix and the activations. Raises UnsupportedError, InvalidFileError,
    InvalidRequestError.
    """
    description = describe(model.config)
    check_tensors(model, description, head=False)
    for row in input_ids.tolist():
        check_prompt(row, description.vocab_size, description.max_position_embeddings)
    builder = MatrixBuilder("reference", torch.float64, torch.device("cpu"), observe)
    with torch.inference_mode():
        decoder = Decoder(model, description, builder)
        last = decoder.norm(decoder.stream(input_ids))
        if description.head.weight in model.tensors:
            observe(description.head.weight, last)
        elif description.tied:
            observe(description.embedding.weight, last)
