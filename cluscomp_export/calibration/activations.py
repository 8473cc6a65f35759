"""Which input channels of a matrix matter: their share of the energy of what flows in on a calibration text.

Clustering can weight each vector by the energy of its input channel, which turns the error of the weights into the error of
the layer's output (for uncorrelated inputs, exactly). In the reference layout a vector lies in one input channel, so the weight
is one number per vector.

Runs the source in reference mode: memory stays bounded by the largest matrix and the activations of a few windows of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.progress import Progress, silent
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.regular_file import read_whole
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_runtime.language_model import observe_inputs
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = [
    "ENERGY_WINDOWS",
    "calibration_context",
    "calibration_tokens",
    "calibration_windows",
    "channel_energies",
    "most_windows",
    "normalised",
    "read_text",
    "shipped_text",
    "token_shares",
]

CONTEXT = 512
"""Tokens of a window, unless the model was trained for fewer or another number is asked for."""
ENERGY_WINDOWS = 16
"""Windows that tell the energies of channels."""
BATCH = 4
"""Windows run at a time: every batch decodes every matrix once more, and activations take memory by the batch."""
MAX_TEXT_BYTES = 1 << 30
"""1 GB. A text is held in memory as a whole, and its tokens take many times that."""
NEGLIGIBLE = 1e-8
"""Of the mean energy of tokens: what float32 leaves of a gradient that is zero, as that of a text's first query, has less."""


def shipped_text() -> str:
    """The calibration text of this package; see `data/README.md` for what it is made of."""
    return resources.files("cluscomp_export.calibration.data").joinpath("calibration.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """A UTF-8 text file of at most `MAX_TEXT_BYTES`, as it is, line ends included. Raises InvalidFileError, StorageError."""
    content = read_whole(path, MAX_TEXT_BYTES, "name a text file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        remedy = "convert it to UTF-8"
        raise InvalidFileError(
            Problem("not_utf8", "not UTF-8", str(path), found=f"byte {error.start}", remedy=remedy)
        ) from error


def calibration_tokens(model: Model, text: str) -> list[int]:
    """The text's token ids, at least one.

    Raises InvalidRequestError without a tokenizer or tokens, and for tokens that the model does not have.
    """
    tokenizer = Tokenizer.from_files(model.files)
    if tokenizer is None:
        message = "the source has no tokenizer to read a calibration text with"
        raise InvalidRequestError(replace(no_tokenizer(model), message=message))
    token_ids = tokenizer.encode(text)
    # Of an empty text a tokenizer may still make a token that begins it.
    if not token_ids or not text.strip():
        raise InvalidRequestError(Problem("text_too_short", "the calibration text is empty"))
    vocab_size = model.config.get("vocab_size")
    if isinstance(vocab_size, int) and max(token_ids) >= vocab_size:
        message, found = "the tokenizer has tokens that the model does not have", str(max(token_ids))
        raise InvalidRequestError(Problem("token_out_of_range", message, found=found, expected=f"ids below {vocab_size}"))
    return token_ids


def calibration_context(model: Model, asked: int | None) -> int:
    """Tokens of a calibration window. Raises InvalidRequestError for more than the model was trained for, or fewer than 2."""
    trained = model.config.get("max_position_embeddings")
    longest = trained if isinstance(trained, int) and trained >= 2 else None
    if asked is None:
        return CONTEXT if longest is None else min(CONTEXT, longest)
    if asked < 2 or (longest is not None and asked > longest):
        expected = "2 or more tokens" + (f", at most the model's {longest}" if longest is not None else "")
        raise InvalidRequestError(
            Problem("bad_option", "`calibration_context` is out of range", found=str(asked), expected=expected)
        )
    return asked


def calibration_windows(token_ids: Sequence[int], most: int, context: int = CONTEXT) -> torch.Tensor:
    """Up to `most` windows of `context` ids, int64 `[windows, tokens]`, spread over a text; a shorter text is one window."""
    length = min(context, len(token_ids))
    count = len(token_ids) // length
    windows = torch.tensor(token_ids[: count * length]).reshape(count, length)
    chosen = min(most, count)
    return windows[[(2 * number + 1) * count // (2 * chosen) for number in range(chosen)]]


def most_windows(text: str, most: int, context: int) -> int:
    """As many windows as `calibration_windows` can give with any tokenizer: a token takes a byte of the text or more."""
    return max(1, min(most, len(text.encode()) // context))


def channel_energies(
    model: Model, windows: torch.Tensor, on_progress: Progress = silent
) -> Mapping[str, npt.NDArray[np.float32]]:
    """Energy of each input channel on windows of token ids `[windows, tokens]`, float32 `[in_features]` with mean 1, by name of
    the matrix.

    The mean over all tokens of the channel's square over the mean square of that token's channels.

    Computed in float64 and rounded to float32, so that the result does not depend on the order in which threads add. Raises
    UnsupportedError if the runtime does not know the architecture.
    """
    # Made beforehand: small results among large temporaries would keep the heap from shrinking, by gigabytes.
    sums = {
        name: torch.zeros(tensor.shape[1], dtype=torch.float64)
        for name, tensor in model.tensors.items()
        if len(tensor.shape) == 2
    }
    batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]

    def observe(name: str, inputs: torch.Tensor) -> None:
        sums[name] += token_shares(inputs)

    for done, batch in enumerate(batches):
        on_progress("calibrating", done, len(batches))
        observe_inputs(model, batch, observe)
    on_progress("calibrating", len(batches), len(batches))
    return {name: normalised(energy) for name, energy in sums.items()}


def token_shares(values: torch.Tensor) -> torch.Tensor:
    """Each channel's share of a token's energy, summed over all tokens of `[..., channels]`, float64 `[channels]`.

    So every token counts alike: the first of a text can have a thousand times the energy of the others, in few channels. Only
    what has less than `NEGLIGIBLE` of their mean energy counts less.
    """
    energy = values.double().square().flatten(0, -2)
    least = max(NEGLIGIBLE * float(energy.mean()), torch.finfo(energy.dtype).tiny)
    return (energy / energy.mean(1, keepdim=True).clamp(min=least)).sum(0)


def normalised(sums: torch.Tensor) -> npt.NDArray[np.float32]:
    """Scaled to mean 1; where there is nothing but zeros all channels, or rows, count alike."""
    mean = sums.mean()
    scaled = sums / mean if mean > 0 else torch.ones_like(sums)
    values: npt.NDArray[np.float32] = scaled.numpy().astype(np.float32)
    return values
