"""What can run a model, asked before the work: the runtime, a calibration text through it, transformers."""

from __future__ import annotations

from importlib.util import find_spec

from cluscomp_export.calibration import calibration_tokens
from cluscomp_export.sources import CONFIG_ONLY
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_runtime.architecture import DecoderSettings, check_tensors

__all__ = ["calibration_fault", "decoder_settings", "nowhere_to_run", "prediction_fault"]


def decoder_settings(model: Model, *, head: bool = True) -> DecoderSettings | None:
    """What the runtime reads from the configuration; None if it cannot run the model, without `head` up to its last hidden
    states."""
    try:
        settings = DecoderSettings.from_config(model.config)
        check_tensors(model, settings, head=head)
    except ClusCompError:
        return None
    return settings


def prediction_fault(model: Model) -> UnsupportedError | None:
    """Why the runtime gets no predictions from a model; None if it does. Raises InvalidFileError."""
    try:
        check_tensors(model, DecoderSettings.from_config(model.config))
    except UnsupportedError as error:
        return error
    return None


def calibration_fault(source: Model, text: str) -> ClusCompError | None:
    """Why a calibration text cannot be run through the blocks of a source; None if it can. Raises InvalidFileError."""
    try:
        check_tensors(source, DecoderSettings.from_config(source.config), head=False)
        if source.provenance.get("format") != CONFIG_ONLY:
            calibration_tokens(source, text)
    except (InvalidRequestError, UnsupportedError) as error:
        return error
    return None


def nowhere_to_run(model: Model) -> str | None:
    """Why nothing will run a clustered model; None if the runtime or transformers does, or if that cannot be told here.

    Builds a model of transformers without weights where the runtime does not know the architecture: takes seconds.
    """
    ours = prediction_fault(model)
    if ours is None or find_spec("transformers") is None:
        return None
    from cluscomp_export.transformers_model import opening_fault

    theirs = opening_fault(model)
    if theirs is None:
        return None
    return f"nothing will run the result: in the runtime, {ours.problems[0].message}; in transformers, {theirs}"
