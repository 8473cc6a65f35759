"""The intermediate representation (IR) of a codebook model, and its file formats. Needs numpy only."""

from cluscomp_formats.errors import (
    ClusCompError,
    InvalidFileError,
    InvalidRequestError,
    OutputExistsError,
    Problem,
    SelfTestError,
    StorageError,
    UnsupportedError,
    WorkersLostError,
)
from cluscomp_formats.format import Format
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.registry import detect, find_format, formats, open_model
from cluscomp_formats.sections.payload_checks import check_payloads
from cluscomp_formats.sections.tiles import tiled_codes
from cluscomp_formats.version import __version__

__all__ = [
    "Array",
    "ClusCompError",
    "ClusteredWeight",
    "Codebook",
    "DenseTensor",
    "Format",
    "InvalidFileError",
    "InvalidRequestError",
    "Model",
    "Outliers",
    "OutputExistsError",
    "Problem",
    "SelfTestError",
    "Stage",
    "StorageError",
    "Tensor",
    "UnsupportedError",
    "WorkersLostError",
    "__version__",
    "check_payloads",
    "detect",
    "find_format",
    "formats",
    "open_model",
    "tiled_codes",
]
