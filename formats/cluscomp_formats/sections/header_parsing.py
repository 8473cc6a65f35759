"""Parse the JSON value of a header to `PackedHeader`, collecting all problems."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cluscomp_formats.errors import Problem
from cluscomp_formats.ir import DTYPES
from cluscomp_formats.limits import MAX_RANK, can_be_shape, name_fault, side_file_name_fault
from cluscomp_formats.sections.header import (
    ALIGNMENT,
    ArrayEntry,
    ClusteredEntry,
    DenseEntry,
    OutliersEntry,
    PackedHeader,
    Section,
    StageEntry,
    align,
)

__all__ = ["layout_problems", "parse_header"]

# The required and optional members of each kind of object, as in the specification's tables.
HEADER_MEMBERS = ("codebooks", "config", "digest", "files", "provenance", "sections", "self_test", "tensors")
SECTION_MEMBERS = ("crc32", "length", "offset")
ARRAY_MEMBERS = ("dtype", "section", "shape")
DENSE_MEMBERS = ("kind", "values")
CLUSTERED_MEMBERS = ("group_axis", "kind", "shape", "stages")
CLUSTERED_OPTIONAL_MEMBERS = ("column_scale", "outliers", "row_scale")
STAGE_MEMBERS = ("codebook", "codes")
OUTLIERS_MEMBERS = ("positions", "values")
KINDS = ("clustered", "dense")
GROUP_AXES = ("in", "out")

_SIZE_LIMIT = 1 << 63
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_Entry = TypeVar("_Entry")


class _FaultError(Exception):
    """Ends the parsing of one entry; `_Parser.entry` converts it to a problem."""

    def __init__(self, kind: str, message: str, found: object = None, expected: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.expected = kind, message, expected
        self.found = None if found is None else _shortened(repr(found))


def parse_header(value: Any, file: str) -> tuple[PackedHeader | None, list[Problem]]:
    """Return the header in `value`, None if there are problems, and the problems, at most one per entry."""
    parser = _Parser(file)
    header = parser.header(value)
    return (None if parser.problems else header), parser.problems


def layout_problems(sections: tuple[Section, ...], begin: int, header_offset: int, file: str) -> Iterator[Problem]:
    """Yield a problem for each hole or overlap between byte `begin`, the sections and the header."""
    expected = begin
    for number, section in enumerate(sections):
        where = f"sections[{number}]"
        if section.offset != expected:
            kind, message = _misplaced(section.offset, expected)
            yield Problem(kind, message, file, where, str(section.offset), str(expected))
        expected = align(section.offset + section.length)
    if header_offset != expected:
        message = "the header does not follow the last section"
        yield Problem("header_misplaced", message, file, "header", str(header_offset), str(expected))


def _misplaced(offset: int, expected: int) -> tuple[str, str]:
    if offset % ALIGNMENT:
        return "section_misaligned", f"the section does not begin at a multiple of {ALIGNMENT}"
    if offset < expected:
        return "section_overlap", "the section overlaps the previous one"
    return "section_hole", "there is a gap before the section"


class _Parser:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.num_sections = 0

    @contextlib.contextmanager
    def entry(self, where: str) -> Iterator[None]:
        """Convert a fault inside the block to a problem of the entry `where`."""
        try:
            yield
        except _FaultError as fault:
            remedy = "upgrade cluscomp-export if a newer version wrote the file" if fault.kind.startswith("unknown_") else None
            self.problems.append(Problem(fault.kind, fault.message, self.file, where, fault.found, fault.expected, remedy))

    def header(self, value: Any) -> PackedHeader | None:
        with self.entry("header"):
            members = _members(value, HEADER_MEMBERS)
            sections = self.sections(_list(members["sections"], "sections"))
            codebooks = self.entries(members["codebooks"], "codebooks", self.array)
            tensors = self.entries(members["tensors"], "tensors", self.tensor)
            files = self.entries(members["files"], "files", self.section_number, side_file_name_fault)
            config = _object(members["config"], "config")
            provenance = _object(members["provenance"], "provenance")
            self_test = None if members["self_test"] is None else _object(members["self_test"], "self_test")
            digest = members["digest"]
            if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
                raise _FaultError("bad_digest", "the digest is malformed", digest, "sha256: and 64 hexadecimal digits")
            return PackedHeader(config, provenance, self_test, digest, codebooks, tensors, files, sections)
        return None

    def sections(self, values: list[Any]) -> tuple[Section, ...]:
        self.num_sections = len(values)
        sections: list[Section] = []
        for number, value in enumerate(values):
            with self.entry(f"sections[{number}]"):
                members = _members(value, SECTION_MEMBERS)
                offset = _integer(members["offset"], "offset", _SIZE_LIMIT)
                length = _integer(members["length"], "length", _SIZE_LIMIT)
                sections.append(Section(offset, length, _integer(members["crc32"], "crc32", 1 << 32)))
        return tuple(sections)

    def entries(
        self,
        value: Any,
        label: str,
        parse: Callable[[Any, str], _Entry],
        fault_of: Callable[[str], str | None] = name_fault,
    ) -> dict[str, _Entry]:
        parsed: dict[str, _Entry] = {}
        for name, member in _object(value, label).items():
            with self.entry(_shortened(name)):
                fault = fault_of(name)
                if fault is not None:
                    raise _FaultError("bad_name", f"the name in {label} {fault}", name)
                parsed[name] = parse(member, label)
        return parsed

    def tensor(self, value: Any, label: str) -> ClusteredEntry | DenseEntry:
        kind = _object(value, label).get("kind")
        if kind == "dense":
            return DenseEntry(self.array(_members(value, DENSE_MEMBERS)["values"], "values"))
        if kind != "clustered":
            raise _FaultError("unknown_kind", "unknown kind of tensor", kind, " or ".join(KINDS))
        members = _members(value, CLUSTERED_MEMBERS, CLUSTERED_OPTIONAL_MEMBERS)
        shape = _shape(members["shape"])
        if len(shape) != 2:
            raise _FaultError("bad_shape", "a clustered weight must have two dimensions", members["shape"])
        if members["group_axis"] not in GROUP_AXES:
            raise _FaultError("bad_group_axis", "unknown group_axis", members["group_axis"], " or ".join(GROUP_AXES))
        scales = {label: self.array(members[label], label) for label in ("row_scale", "column_scale") if label in members}
        return ClusteredEntry(
            shape=(shape[0], shape[1]),
            group_axis=members["group_axis"],
            stages=tuple(self.stage(stage) for stage in _list(members["stages"], "stages")),
            row_scale=scales.get("row_scale"),
            column_scale=scales.get("column_scale"),
            outliers=self.outliers(members["outliers"]) if "outliers" in members else None,
        )

    def stage(self, value: Any) -> StageEntry:
        members = _members(value, STAGE_MEMBERS)
        if not isinstance(members["codebook"], str):
            raise _FaultError("wrong_type", "codebook is not a string", members["codebook"], "a name")
        return StageEntry(members["codebook"], self.section_number(members["codes"], "codes"))

    def outliers(self, value: Any) -> OutliersEntry:
        members = _members(value, OUTLIERS_MEMBERS)
        return OutliersEntry(self.array(members["positions"], "positions"), self.array(members["values"], "values"))

    def array(self, value: Any, label: str) -> ArrayEntry:
        members = _members(value, ARRAY_MEMBERS)
        dtype, shape = members["dtype"], _shape(members["shape"])
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _FaultError("unknown_dtype", f"unknown dtype in {label}", dtype, ", ".join(DTYPES))
        if not can_be_shape(shape, DTYPES[dtype].itemsize):
            raise _FaultError("bad_shape", f"the shape in {label} is impossible", shape, f"less than {_SIZE_LIMIT} bytes")
        return ArrayEntry(dtype, shape, self.section_number(members["section"], "section"))

    def section_number(self, value: Any, label: str) -> int:
        return _integer(value, label, self.num_sections, "bad_section")


def _object(value: Any, label: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _FaultError("wrong_type", f"{label} is not an object", value, "a JSON object")
    return value


def _list(value: Any, label: str) -> list[Any]:
    if not isinstance(value, list):
        raise _FaultError("wrong_type", f"{label} is not an array", value, "a JSON array")
    return value


def _members(value: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    members = _object(value, "the entry")
    missing = [key for key in required if key not in members]
    if missing:
        raise _FaultError("missing_key", f"there is no {' and no '.join(missing)}", sorted(members), ", ".join(required))
    unknown = [key for key in members if key not in required and key not in optional]
    if unknown:
        raise _FaultError("unknown_key", f"unknown key {_shortened(unknown[0])!r}", unknown, ", ".join(required + optional))
    return members


def _integer(value: Any, label: str, limit: int, kind: str = "bad_integer") -> int:
    # isinstance would accept bool, and comparisons would accept 1.0.
    if type(value) is not int or not 0 <= value < limit:
        raise _FaultError(kind, f"{label} is not an integer in its range", value, f"an integer from 0 to {limit - 1}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    lengths = _list(value, "shape")
    if len(lengths) > MAX_RANK:
        raise _FaultError("bad_shape", f"more than {MAX_RANK} dimensions", value)
    return tuple(_integer(length, "a length in shape", _SIZE_LIMIT, "bad_shape") for length in lengths)


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
