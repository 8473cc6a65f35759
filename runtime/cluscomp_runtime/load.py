"""Open a model file and prepare it for inference."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from cluscomp_formats import registry
from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.delta import open_delta
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_runtime.language_model import LanguageModel
from cluscomp_runtime.selftest import run_self_test

if TYPE_CHECKING:
    import torch

__all__ = ["load"]


def load(
    path: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kernel: str = "auto",
    selftest: bool = False,
    context: int | None = None,
    delta: str | PathLike[str] | None = None,
    threads: int | None = None,
    cache_dtype: str | None = None,
) -> LanguageModel:
    """Load a model in any registered format. Other options are as in `LanguageModel.from_model`.

    With `selftest`, the loaded model must reproduce the logits that were recorded at conversion. `delta` is the path of a delta
    file, which is then applied as by `LanguageModel.apply_delta`.

    Raises InvalidFileError if a file is damaged; UnsupportedError if the runtime cannot run the model; InvalidRequestError if
    an option is invalid, or `selftest` is set and the file has no record; SelfTestError if the self-test fails.
    """
    model = registry.open_model(Path(path))
    change = None if delta is None else open_delta(Path(delta))
    if selftest and model.self_test is None:
        # A model that the runtime cannot run has no record. This reports the cause in that case.
        check_tensors(model, describe(model.config))
        remedy = "load it without the self-test"
        raise InvalidRequestError(Problem("no_self_test", "this file has no self-test record", str(path), remedy=remedy))
    language_model = LanguageModel.from_model(
        model, device=device, dtype=dtype, kernel=kernel, context=context, threads=threads, cache_dtype=cache_dtype
    )
    if selftest and model.self_test is not None:
        run_self_test(language_model, model.self_test).raise_if_failed()
    if change is not None:
        language_model.apply_delta(change)
    return language_model
