"""Open native GGUF files. Files are untrusted; `docs/gguf-format.md` says what is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.gguf.container import Container, architecture_of, read_container
from cluscomp_formats.gguf.spec import ALIGNMENT, ARCHITECTURE, ROW_ORDER, VERSION, stored_spec
from cluscomp_formats.ir import Model
from cluscomp_formats.sections.assembly import build_model, reference_problems
from cluscomp_formats.sections.digest import content_problems
from cluscomp_formats.sections.header import PackedHeader, align
from cluscomp_formats.sections.header_parsing import parse_header
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import Payload, stored_payloads
from cluscomp_formats.strict_json import StrictJsonError, parse_canonical

__all__ = ["looks_gguf", "open_gguf"]

_LAYOUT_MEMBERS = ("codebooks", "files", "tensors")
_FETCH_AGAIN = "copy, download or convert it again"


def looks_gguf(path: Path) -> bool:
    """Return whether `path` is a native GGUF file, by its metadata. Never raises."""
    return architecture_of(path) == ARCHITECTURE


def open_gguf(path: Path, *, check: bool = False) -> Model:
    """Open a native GGUF file as a lazy model.

    The structure is checked immediately. A payload's checksum and values are checked when it is first read, which may raise
    InvalidFileError; with `check`, all payloads and the digest are checked immediately. The file stays open, as with
    `open_packed`.

    Raises InvalidFileError if the file is not a valid native file; StorageError if it cannot be read; UnsupportedError if its
    GGUF version or a tensor type is not supported.
    """
    try:
        container = read_container(path)
        _check_version(path, container.metadata)
        header, names = _read_header(path, container)
        stored = StoredFile(path)
    except OSError as error:
        raise storage_error(path, error) from error
    end = max((align(tensor.offset + tensor.nbytes) for tensor in container.tensors.values()), default=0)
    if stored.length < end:
        found, expected = f"{stored.length} bytes", f"{end} bytes"
        raise InvalidFileError(Problem("truncated", "the file ends early", str(path), None, found, expected, _FETCH_AGAIN))
    file = MappedFile(stored, header.sections)
    model = build_model(header, file)
    problems = list(reference_problems(header, model, str(path)))
    payloads = [payload for payload, _ in stored_payloads(model)]
    if not problems:
        problems = list(_spec_problems(payloads, names, container, str(path)))
    if problems:
        raise InvalidFileError(problems)
    file.payloads = payloads
    if check:
        problems = list(content_problems(header, model, file))
        if problems:
            raise InvalidFileError(problems)
    return model


def _check_version(path: Path, metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        found, message = ascii(architecture)[:80], "a GGUF file, but not of a codebook model"
        raise InvalidFileError(Problem("not_native", message, str(path), "general.architecture", found, ARCHITECTURE))
    for key, expected in (("cluscomp.version", VERSION), ("cluscomp.row_order", ROW_ORDER), ("general.alignment", ALIGNMENT)):
        value = metadata.get(key)
        if type(value) is type(expected) and value == expected:
            continue
        if key == "cluscomp.version" and type(value) is int and value > VERSION:
            message, remedy = "written by a newer version", "upgrade cluscomp-export"
            raise InvalidFileError(Problem("newer_version", message, str(path), key, str(value), str(expected), remedy))
        found = "nothing" if value is None else ascii(value)[:80]
        raise InvalidFileError(Problem("bad_key", f"{key} has an unexpected value", str(path), key, found, str(expected)))


def _read_header(path: Path, container: Container) -> tuple[PackedHeader, list[str]]:
    """Return the metadata as the header of a packed file, and the tensor's name of each section.

    Raises InvalidFileError if the metadata is malformed.
    """
    keys = _Keys(str(path), container.metadata)
    names, checksums = keys.array("cluscomp.sections", str), keys.array("cluscomp.crc32", int)
    layout = keys.json("cluscomp.layout", _LAYOUT_MEMBERS)
    value = {
        **{member: layout.get(member) for member in _LAYOUT_MEMBERS},
        "config": keys.json("cluscomp.config"),
        "provenance": keys.json("cluscomp.provenance"),
        "self_test": keys.json("cluscomp.self_test") if "cluscomp.self_test" in container.metadata else None,
        "digest": keys.metadata.get("cluscomp.digest"),
    }
    problems = keys.problems or list(_section_problems(names, checksums, container, str(path)))
    if problems:
        raise InvalidFileError(problems)
    value["sections"] = [
        {
            "offset": container.tensors[name].offset if name else 0,
            "length": container.tensors[name].nbytes if name else 0,
            "crc32": checksum,
        }
        for name, checksum in zip(names, checksums, strict=True)
    ]
    header, problems = parse_header(value, str(path))
    if header is None:
        raise InvalidFileError(problems)
    return header, names


class _Keys:
    """Reads our metadata keys, and collects the problems of those that are missing or of the wrong type."""

    def __init__(self, file: str, metadata: Mapping[str, Any]) -> None:
        self.file, self.metadata = file, metadata
        self.problems: list[Problem] = []

    def array(self, key: str, item: type) -> list[Any]:
        value = self.metadata.get(key)
        if isinstance(value, list) and all(type(member) is item for member in value):
            return value
        self.problems.append(Problem("bad_key", f"{key} is missing or not an array of {item.__name__}", self.file, key))
        return []

    def json(self, key: str, members: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return a JSON object, which must have exactly these members if they are given."""
        text = self.metadata.get(key)
        if not isinstance(text, str):
            self.problems.append(Problem("bad_key", f"{key} is missing or not a string", self.file, key))
            return {}
        try:
            value = parse_canonical(text.encode("utf-8", "surrogateescape"))
        except StrictJsonError as error:
            self.problems.append(Problem(error.kind, str(error), self.file, key))
            return {}
        if not isinstance(value, dict) or (members is not None and sorted(value) != sorted(members)):
            expected = "a JSON object" + (f" of {', '.join(members)}" if members else "")
            self.problems.append(Problem("bad_key", f"{key} is malformed", self.file, key, None, expected))
            return {}
        return value


def _section_problems(names: Sequence[str], checksums: Sequence[int], container: Container, file: str) -> Iterator[Problem]:
    """Yield a problem for each section that does not have exactly one tensor, and for each tensor that is not a section."""
    if len(names) != len(checksums):
        found, expected = f"{len(checksums)} checksums", f"{len(names)}, one per section"
        yield Problem("bad_key", "cluscomp.crc32 has the wrong length", file, "cluscomp.crc32", found, expected)
    for name, count in Counter(name for name in names if name).items():
        if count > 1:
            yield Problem("section_shared", "the tensor belongs to more than one section", file, name, f"{count} sections", "1")
        if name not in container.tensors:
            shown = name if name.isprintable() else ascii(name)
            yield Problem("missing_tensor", "a section's tensor is missing", file, shown[:80])
    known = set(names)
    for name in container.tensors:
        if name not in known:
            yield Problem("unknown_tensor", "the tensor belongs to no section", file, name)


def _spec_problems(payloads: Sequence[Payload], names: Sequence[str], container: Container, file: str) -> Iterator[Problem]:
    """Yield a problem for each tensor whose type or shape does not match its payload."""
    for payload, name in zip(payloads, names, strict=True):
        if not name:
            continue
        tensor = container.tensors[name]
        expected = stored_spec(payload)
        if (tensor.type_name, tensor.shape) != expected:
            found = f"{tensor.type_name} {list(tensor.shape)}"
            message = f"the tensor of {payload.part} has the wrong type or shape"
            yield Problem("wrong_form", message, file, name, found, f"{expected[0]} {list(expected[1])}")
