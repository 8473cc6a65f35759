"""Build a lazy model from a parsed header, and check that the header and its sections match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.sections.bits import LargestCode, largest_code
from cluscomp_formats.sections.header import ArrayEntry, ClusteredEntry, DenseEntry, PackedHeader
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import Payload, stored_payloads

__all__ = ["SectionLoader", "build_model", "reference_problems"]


@dataclass(frozen=True)
class SectionLoader:
    """Reads one section. It keeps the file open as long as it exists."""

    file: MappedFile
    section: int

    def __call__(self) -> AnyArray:
        """Return the values."""
        return self.file.read(self.section)

    @property
    def stored_bytes(self) -> int:
        """Length of the section in bytes."""
        return self.file.stored_bytes(self.section)

    def check(self, largest: LargestCode = largest_code) -> npt.NDArray[np.uint8]:
        """Return the section as stored, after checking it once; see `MappedFile.check`."""
        return self.file.check(self.section, largest)


def build_model(header: PackedHeader, file: MappedFile, *, tiled: bool = True) -> Model:
    """Return the model that the header describes. Raises InvalidFileError if shapes or dtypes do not match.

    `tiled` says whether the format stores codes of weights with vectors along the out axis as tiled codes.
    """
    problems: list[Problem] = []
    codebooks: dict[str, Codebook] = {}
    for name, entry in header.codebooks.items():
        codebook = _codebook(name, entry, file)
        if isinstance(codebook, Problem):
            problems.append(codebook)
        else:
            codebooks[name] = codebook
    tensors: dict[str, Tensor] = {}
    for name, described in header.tensors.items():
        if isinstance(described, DenseEntry):
            tensors[name] = DenseTensor(name, _array(described.values, file))
            continue
        unknown = [stage.codebook for stage in described.stages if stage.codebook not in header.codebooks]
        if unknown:
            expected = "the name of a codebook in the header"
            problems.append(Problem("unknown_codebook", "no such codebook", file.name, name, repr(unknown[0]), expected))
        elif all(stage.codebook in codebooks for stage in described.stages):
            weight = _clustered(name, described, codebooks, file, tiled)
            if isinstance(weight, Problem):
                problems.append(weight)
            else:
                tensors[name] = weight
    if problems:
        raise InvalidFileError(problems)
    files = {
        name: Array((header.sections[number].length,), "uint8", SectionLoader(file, number))
        for name, number in header.files.items()
    }
    return Model(header.config, tensors, files, header.provenance, header.self_test, header.digest)


def _array(entry: ArrayEntry, file: MappedFile) -> Array:
    return Array(entry.shape, entry.dtype, SectionLoader(file, entry.section))


def _codebook(name: str, entry: ArrayEntry, file: MappedFile) -> Codebook | Problem:
    try:
        return Codebook(name, _array(entry, file))
    except ValueError as error:
        return Problem("bad_codebook", str(error), file.name, name)


def _clustered(
    name: str, entry: ClusteredEntry, codebooks: Mapping[str, Codebook], file: MappedFile, tiled: bool
) -> ClusteredWeight | Problem:
    along, across = entry.shape if entry.group_axis == "out" else entry.shape[::-1]
    stages = []
    for stage in entry.stages:
        codebook = codebooks[stage.codebook]
        shape = (across, -(-along // codebook.cluster_dim))
        loader = SectionLoader(file, stage.codes)
        view = loader.check if tiled and entry.group_axis == "out" else None
        stages.append(Stage(codebook, Array(shape, "uint16", loader, view)))
    outliers = entry.outliers
    try:
        return ClusteredWeight(
            name,
            entry.shape,
            tuple(stages),
            entry.group_axis,
            _array(entry.row_scale, file) if entry.row_scale else None,
            _array(entry.column_scale, file) if entry.column_scale else None,
            Outliers(_array(outliers.positions, file), _array(outliers.values, file)) if outliers else None,
        )
    except ValueError as error:
        return Problem("bad_tensor", str(error), file.name, name)


def reference_problems(
    header: PackedHeader, model: Model, name: str, stored: Callable[[Payload], Payload] = lambda payload: payload
) -> Iterator[Problem]:
    """Yield a problem for each section that is not used exactly once and in order, or whose length does not fit its content.

    `stored` maps a payload to the form in which the format stores it.
    """
    for codebook in header.codebooks.keys() - model.codebooks.keys():
        yield Problem("unused_codebook", "no tensor uses the codebook", name, codebook)
    uses: Counter[int] = Counter()
    for number, (described, array) in enumerate(stored_payloads(model)):
        payload = stored(described)
        section = cast(SectionLoader, array.loader).section
        uses[section] += 1
        if uses[section] > 1:
            message = f"the section of {payload.part} is used twice"
            yield Problem("section_shared", message, name, payload.owner, f"section {section}")
        elif section != number:
            message = f"the section of {payload.part} is out of order"
            yield Problem("section_order", message, name, payload.owner, f"section {section}", f"section {number}")
        length = header.sections[section].length
        if length != payload.stored_bytes:
            bits = f" of {payload.code_bits} bits" if payload.code_bits else ""
            expected = f"{payload.stored_bytes} bytes for {payload.dtype} {list(payload.shape)}{bits}"
            message = f"the section of {payload.part} has the wrong length"
            yield Problem("section_length", message, name, payload.owner, f"{length} bytes", expected)
    for number in range(len(header.sections)):
        if not uses[number]:
            yield Problem("section_unused", "nothing refers to the section", name, f"sections[{number}]")
