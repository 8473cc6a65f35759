"""Can the runtime run a model, or run a calibration text through its blocks? Checked before the long job."""

from __future__ import annotations

from cluscomp_export.calibration.activations import calibration_tokens
from cluscomp_export.sources import CONFIG_ONLY
from cluscomp_formats.architectures import DecoderDescription, check_tensors, describe
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, UnsupportedError
from cluscomp_formats.ir import Model

__all__ = ["calibration_fault", "decoder_description", "prediction_fault"]


def decoder_description(model: Model, *, head: bool = True) -> DecoderDescription | None:
    """The runtime's description of the model; None if it cannot run the model. `head=False` asks only for hidden states."""
    try:
        description = describe(model.config)
        check_tensors(model, description, head=head)
    except ClusCompError:
        return None
    return description


def prediction_fault(model: Model) -> UnsupportedError | None:
    """Why the runtime cannot get predictions from a model; None if it can. Raises InvalidFileError."""
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
