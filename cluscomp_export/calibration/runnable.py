"""Whether the runtime can run a model, or a calibration text through its blocks; asked before the work."""

from __future__ import annotations

from cluscomp_export.calibration.activations import calibration_tokens
from cluscomp_export.sources import CONFIG_ONLY
from cluscomp_formats.architectures import DecoderDescription, check_tensors, describe
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, UnsupportedError
from cluscomp_formats.ir import Model

__all__ = ["calibration_fault", "decoder_description", "prediction_fault"]


def decoder_description(model: Model, *, head: bool = True) -> DecoderDescription | None:
    """What the runtime reads from the configuration; None if it cannot run the model, without `head` up to its last hidden
    states."""
    try:
        description = describe(model.config)
        check_tensors(model, description, head=head)
    except ClusCompError:
        return None
    return description


def prediction_fault(model: Model) -> UnsupportedError | None:
    """Why the runtime gets no predictions from a model; None if it does. Raises InvalidFileError."""
    try:
        check_tensors(model, describe(model.config))
    except UnsupportedError as error:
        return error
    return None


def calibration_fault(source: Model, text: str) -> ClusCompError | None:
    """Why a calibration text cannot be run through the blocks of a source; None if it can. Raises InvalidFileError."""
    try:
        check_tensors(source, describe(source.config), head=False)
        if source.provenance.get("format") != CONFIG_ONLY:
            calibration_tokens(source, text)
    except (InvalidRequestError, UnsupportedError) as error:
        return error
    return None
