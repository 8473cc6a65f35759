"""Importance of the input channels of each matrix: the second moments of its activations on a calibration text.

Clustering can weight each vector by the second moment of its input channel. That turns the error of the weights into the error
of the layer's output, exactly so for uncorrelated inputs. In the paper's layout a vector is in one input channel, so the weight
is one number per vector.

The source runs with the reference kernel. Memory is bounded by the largest matrix and the activations of a few windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.regular_file import read_whole
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_runtime.observing import observe_inputs
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = [
    "MOMENT_WINDOWS",
    "calibration_context",
    "calibration_tokens",
    "calibration_windows",
    "channel_second_moments",
    "most_windows",
    "normalised",
    "read_text",
    "shipped_text",
    "token_shares",
]

CONTEXT = 512
"""Default tokens of a window, if the model was trained for so many."""
MOMENT_WINDOWS = 16
"""Windows on which second moments are measured."""
BATCH = 4
"""Windows run together. Every batch decodes every matrix again; activations need memory in proportion to the batch."""
MAX_TEXT_BYTES = 1 << 30
"""1 GiB. The whole text is in memory, and its tokens need many times as much."""
NEGLIGIBLE = 1e-8
"""Relative to the mean over tokens. Float32 rounding of zero gradients, such as those of a text's first query, is less."""


def shipped_text() -> str:
    """The calibration text of this package; `data/README.md` says where it comes from."""
    return resources.files("cluscomp_export.calibration.data").joinpath("calibration.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """A UTF-8 text file of at most `MAX_TEXT_BYTES`, unchanged, line ends included. Raises InvalidFileError, StorageError."""
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
        message = "the source has no tokenizer for a calibration text"
        raise InvalidRequestError(replace(no_tokenizer(model), message=message))
    token_ids = tokenizer.encode(text)
    # For an empty text, a tokenizer may still give a begin token.
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
    """At most `most` windows of `context` ids, int64 `[windows, tokens]`, spaced evenly; a shorter text is one window."""
    length = min(context, len(token_ids))
    count = len(token_ids) // length
    windows = torch.tensor(token_ids[: count * length]).reshape(count, length)
    chosen = min(most, count)
    return windows[[(2 * number + 1) * count // (2 * chosen) for number in range(chosen)]]


def most_windows(text: str, most: int, context: int) -> int:
    """The most windows that `calibration_windows` can give with any tokenizer: a token has at least one byte of the text."""
    return max(1, min(most, len(text.encode()) // context))


def channel_second_moments(
    model: Model, windows: torch.Tensor, on_progress: Progress = silent
) -> Mapping[str, npt.NDArray[np.float32]]:
    """Second moment of each input channel, float32 `[in_features]` with mean 1, by name of the matrix.

    It is the mean over the tokens of `windows`, ids `[windows, tokens]`, of the channel's square divided by the mean square of
    that token's channels. Computed in float64 and rounded to float32, so that the result does not depend on the order in which
    threads add. Raises UnsupportedError if the runtime does not know the architecture.
    """
    # Allocated first: small results between large temporaries would keep the heap from shrinking, by gigabytes.
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
    return {name: normalised(total) for name, total in sums.items()}


def token_shares(values: torch.Tensor) -> torch.Tensor:
    """Each channel's share of a token's sum of squares, added over all tokens of `[..., channels]`, float64 `[channels]`.

    All tokens count alike: the first token of a text can have a thousand times the sum of squares of the others, in few
    channels. Only tokens with less than `NEGLIGIBLE` of the mean count less.
    """
    squares = values.double().square().flatten(0, -2)
    least = max(NEGLIGIBLE * float(squares.mean()), torch.finfo(squares.dtype).tiny)
    return (squares / squares.mean(1, keepdim=True).clamp(min=least)).sum(0)


def normalised(sums: torch.Tensor) -> npt.NDArray[np.float32]:
    """Scaled to mean 1; all ones if everything is zero."""
    mean = sums.mean()
    scaled = sums / mean if mean > 0 else torch.ones_like(sums)
    values: npt.NDArray[np.float32] = scaled.numpy().astype(np.float32)
    return values
