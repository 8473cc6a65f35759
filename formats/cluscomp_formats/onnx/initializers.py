"""The initialisers of a file; each refers to one array of the model in the data file."""

from __future__ import annotations

import onnx

from cluscomp_formats.onnx.spec import DATA_FILE, ELEMENT_TYPES, stored_spec
from cluscomp_formats.sections.header import Section
from cluscomp_formats.sections.stored_arrays import StoredArray

__all__ = ["initializer", "place"]


def initializer(array: StoredArray, section: Section) -> onnx.TensorProto:
    """Return the initialiser of an array that is stored in `section` of the data file."""
    _, dtype, shape = stored_spec(array.payload)
    tensor = onnx.TensorProto(
        name=array.key,
        data_type=ELEMENT_TYPES[dtype],
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, text in (("location", DATA_FILE), ("offset", str(section.offset)), ("length", str(section.length))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def place(tensor: onnx.TensorProto) -> tuple[int, int] | None:
    """Return the offset and length of an array in the data file, in bytes; None if it is stored elsewhere."""
    values = {entry.key: entry.value for entry in tensor.external_data[:4]}
    numbers = [values.get(key, "") for key in ("offset", "length")]
    valid = (
        len(tensor.external_data) == 3
        and values.get("location") == DATA_FILE
        and all(text.isascii() and text.isdecimal() and len(text) < 20 for text in numbers)
    )
    return (int(numbers[0]), int(numbers[1])) if valid else None
