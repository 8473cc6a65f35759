"""Recovery: distillation end to end, which trains codebooks, row scales and norms to predict what the original predicts.

This is the last phase of ClusComp (Liao et al., arXiv 2503.13089, recovery training). The loss is the Kullback-Leibler
divergence from the original's predictions on the calibration text; codes are fixed. The end of the text is held out, and the
divergence there decides which state is kept.

Memory: the original as float32 (a large one is read matrix by matrix at every pass), the compressed model's codes, the
activations between blocks (each block is computed again in the backward pass), and a few copies of one window's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluscomp_export.store import Store
from cluscomp_export.training.loop import Trained, Training, TrainingOptions
from cluscomp_export.training.losses import Batch, PredictionLoss
from cluscomp_export.training.parameters import TrainableModel
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.language_model import LanguageModel

__all__ = ["RecoveryOptions", "recover", "teacher_kernel"]

HELD_OUT_WINDOWS = 4
KEPT_TEACHER_BYTES = 4 << 30
"""An original up to this size as float32 is kept in memory."""


@dataclass(frozen=True)
class RecoveryOptions(TrainingOptions):
    """Windows have `context` tokens, or as many as the model was trained for, and are drawn from the text at random."""

    context: int = 512
    rate: float | None = None

    def held_out(self, tokens: int) -> int:
        """How many of a text's `tokens`, at its end, are held out: four windows, or a tenth of a short text."""
        return min(HELD_OUT_WINDOWS * self.context, max(2, round(tokens / 10)))


def recover(
    trainable: TrainableModel,
    source: Model,
    token_ids: Sequence[int],
    options: RecoveryOptions,
    on_progress: Progress = silent,
    *,
    work: Store | None = None,
) -> Trained:
    """Train a clustered model towards its source on a text of `token_ids`, on its decoder's device; codes are fixed.

    With a store `work`, it resumes an interrupted training from its checkpoint there. A loss that is not finite ends the
    training with the best state so far. Raises UnsupportedError for an architecture that the runtime does not know,
    InvalidRequestError for a text of fewer than 20 tokens.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64)
    if len(ids) < 20:
        problem = Problem("text_too_short", "the text is too short to train on", found=f"{len(ids)} tokens", expected="20")
        raise InvalidRequestError(problem)
    reserved = options.held_out(len(ids))
    context = min(options.context, reserved, trainable.decoder.description.max_position_embeddings)
    text, judge = ids[:-reserved], ids[-reserved:]
    held_out = judge[: reserved // context * context].reshape(-1, context)

    def batch(step: int) -> Batch:
        length = min(context, len(text))
        starts = np.random.default_rng((options.seed, step)).integers(0, len(text) - length + 1, options.batch)
        return _every_prediction(torch.stack([text[start : start + length] for start in starts.tolist()]))

    place = trainable.decoder.device
    teacher = LanguageModel.from_model(source, kernel=teacher_kernel(source), dtype="float32", device=place).decoder
    loss = PredictionLoss(trainable.decoder, teacher, task=0.0, kl=1.0)
    windows = [_every_prediction(window[None]) for window in held_out]
    return Training(trainable, loss, batch, windows, options, work=work, name="recovery", on_progress=on_progress).run()


def teacher_kernel(source: Model) -> str:
    """The kernel for the original: decoded once if it is small enough, otherwise decoded again at every pass.

    Decoding again costs little, because a pass multiplies every weight with thousands of tokens. The results are the same bit
    for bit.
    """
    decoded = sum(4 * tensor.num_weights for tensor in source.tensors.values())
    return "dense" if decoded <= KEPT_TEACHER_BYTES else "reference"


def _every_prediction(ids: torch.Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool))
