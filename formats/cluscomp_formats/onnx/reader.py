"""Open ONNX folders. Folders are untrusted; `docs/onnx-format.md` says what is checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluscomp_formats.errors import MAX_PROBLEMS, ClusCompError, InvalidFileError, Problem
from cluscomp_formats.files.regular_file import first_bytes, read_whole
from cluscomp_formats.files.side_files import names_in, open_side_files
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.package import require_onnx
from cluscomp_formats.onnx.spec import (
    CONFIG,
    DATA_FILE,
    MAX_ENTRIES,
    MAX_MODEL_BYTES,
    METADATA_KEYS,
    METADATA_PREFIX,
    MODEL_FILE,
    OPTIONAL_METADATA_KEYS,
    SUBFOLDER,
    VERSION,
    data_offset,
    stored_spec,
)
from cluscomp_formats.sections.assembly import build_model, reference_problems
from cluscomp_formats.sections.digest import content_problems
from cluscomp_formats.sections.header import PackedHeader, Section, align
from cluscomp_formats.sections.header_parsing import parse_header
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import stored_payloads
from cluscomp_formats.sections.stored_arrays import stored_arrays
from cluscomp_formats.strict_json import StrictJsonError, parse_canonical

if TYPE_CHECKING:
    import onnx

__all__ = ["holds_only_onnx", "looks_onnx", "open_onnx"]

_BEGIN = b"\x08"
"""First byte of a ModelProto: the tag of the field `ir_version`."""
_MARK = (METADATA_PREFIX + "layout").encode()
_LAYOUT_MEMBERS = ("codebooks", "tensors")
_TAKEN = (CONFIG, SUBFOLDER)
_CONVERT_AGAIN = "copy, download or convert it again"


def looks_onnx(path: Path) -> bool:
    """Return whether `path` is an ONNX folder of a codebook model, or its `model.onnx`, by its metadata. Never raises."""
    try:
        file = _model_file(path)
        return first_bytes(file, len(_BEGIN)) == _BEGIN and _MARK in read_whole(file, MAX_MODEL_BYTES)
    except (OSError, ValueError, ClusCompError):
        return False


def holds_only_onnx(folder: Path) -> bool:
    """Return whether a folder is of this format without other files, so that deleting it loses only the model. Never raises."""
    try:
        known = {CONFIG, f"{SUBFOLDER}/", *open_onnx(folder).files}
        others = {*names_in(folder)} - known
        inner = {path.name for path in (folder / SUBFOLDER).iterdir()} - {MODEL_FILE, DATA_FILE}
        return not others and not inner
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the folder is then kept
        return False


def open_onnx(path: Path, *, check: bool = False) -> Model:
    """Open an ONNX folder, or the `model.onnx` in it, as a lazy model.

    The structure, and the use of the weights in the graph, are checked immediately. A payload's checksum and values are checked
    when it is first read, which may raise InvalidFileError; with `check`, all payloads and the digest are checked immediately.
    The data file stays open, as with `open_packed`. The other computations of the graph are not checked.

    Raises InvalidFileError if the folder is not valid; StorageError if it cannot be read; UnsupportedError without the package
    onnx.
    """
    require_onnx()
    file = _model_file(path)
    name = str(file)
    proto = _read_proto(file)
    metadata = _metadata(proto, name)
    header, keys = _read_header(proto, metadata, name)
    data = _open_data(file.with_name(DATA_FILE), header.sections)
    model = build_model(header, data, tiled=False)
    problems = list(reference_problems(header, model, name, lambda payload: stored_spec(payload)[0]))
    if not problems:
        problems = list(islice(_model_problems(proto, header, model, keys, name), MAX_PROBLEMS))
    files, faults = open_side_files(_folder_of(file), metadata["files"], _TAKEN, name)
    problems += faults
    if problems:
        raise InvalidFileError(problems)
    data.payloads = [stored_spec(payload)[0] for payload, _ in stored_payloads(model)]
    model = replace(model, files=files)
    if check:
        problems = list(content_problems(header, replace(model, files={}), data))
        if problems:
            raise InvalidFileError(problems)
    return model


def _model_file(path: Path) -> Path:
    # Path.is_dir() raises for a long name or a folder without permission.
    return path / SUBFOLDER / MODEL_FILE if os.path.isdir(path) else path  # noqa: PTH112


def _folder_of(file: Path) -> Path:
    """Return the folder of a `model.onnx`. `file` may be a plain name in the current folder."""
    inner = Path(os.path.abspath(file)).parent  # noqa: PTH100 - resolve() would follow links
    return inner.parent if inner.name == SUBFOLDER else inner


def _read_proto(file: Path) -> onnx.ModelProto:
    """Parse `model.onnx` without reading weights. All its texts are valid UTF-8, except possibly those of nodes and functions.

    Raises InvalidFileError if the file is damaged or too long; StorageError if it cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    content = read_whole(file, MAX_MODEL_BYTES)
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        found = str(error)[:200]
        raise InvalidFileError(Problem("bad_protobuf", "not an ONNX file, or damaged", str(file), found=found)) from None
    if not content.startswith(_BEGIN):
        message, expected = "not an ONNX file, or damaged", "the field ir_version first"
        raise InvalidFileError(Problem("bad_protobuf", message, str(file), None, None, expected))
    graph = proto.graph
    longest = max(map(len, (proto.metadata_props, proto.functions, graph.node, graph.initializer, graph.input)))
    if longest > MAX_ENTRIES:
        message, found = "a list in the file is too long", f"{longest} entries"
        raise InvalidFileError(Problem("too_many_entries", message, str(file), None, found, f"at most {MAX_ENTRIES}"))
    # protobuf returns texts that are not UTF-8 as bytes.
    fault = next((text for text in _texts(proto) if not isinstance(text, str)), None)
    if fault is not None:
        raise InvalidFileError(Problem("bad_text", "a text that is not UTF-8", str(file), found=repr(fault)[:200]))
    return proto


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    for entry in proto.metadata_props:
        yield entry.key
        yield entry.value
    for tensor in proto.graph.initializer:
        yield tensor.name
        for entry in tensor.external_data[:4]:
            yield entry.key
            yield entry.value


def _metadata(proto: onnx.ModelProto, file: str) -> dict[str, Any]:
    """Return our parsed metadata, by key without the prefix. Raises InvalidFileError with every problem found."""
    problems: list[Problem] = []
    keys: set[str] = set()
    values: dict[str, Any] = {}
    for entry in proto.metadata_props:
        key = entry.key.removeprefix(METADATA_PREFIX)
        if key == entry.key:
            continue
        if key in keys:
            raise InvalidFileError(Problem("duplicate_key", "a key of the metadata occurs twice", file, entry.key[:200]))
        keys.add(key)
        if key not in (*METADATA_KEYS, *OPTIONAL_METADATA_KEYS):
            continue
        try:
            values[key] = parse_canonical(entry.value.encode())
        except StrictJsonError as error:
            problems.append(Problem(error.kind, str(error), file, entry.key))
    version = values.get("version")
    if type(version) is int and version > VERSION:
        message, remedy = "written by a newer version", "upgrade cluscomp-export"
        raise InvalidFileError(Problem("newer_version", message, file, None, str(version), str(VERSION), remedy))
    missing = [key for key in METADATA_KEYS if key not in values]
    unknown = keys - {*METADATA_KEYS, *OPTIONAL_METADATA_KEYS}
    if not values or (missing and not problems):
        message = "not a codebook model: its metadata is missing"
        remedy = "use a folder that was converted with `to='onnx'`; tools that change a graph may drop its metadata"
        problems.append(Problem("bad_metadata", message, file, None, f"no {', '.join(missing)}", None, remedy))
    elif unknown:
        found, expected = ", ".join(sorted(unknown))[:200], ", ".join(METADATA_KEYS)
        problems.append(Problem("bad_metadata", "unknown keys in the metadata", file, None, found, expected))
    elif type(version) is not int or version != VERSION:
        problems.append(Problem("bad_version", "unknown version", file, None, repr(version)[:80], str(VERSION)))
    if problems:
        raise InvalidFileError(problems)
    return values


def _read_header(proto: onnx.ModelProto, metadata: Mapping[str, Any], file: str) -> tuple[PackedHeader, list[str]]:
    """Return the metadata as the header of a packed file, and the initialiser's name of each section.

    Raises InvalidFileError if the metadata is malformed.
    """
    from cluscomp_formats.onnx.initializers import place

    keys, checksums, layout = metadata["sections"], metadata["crc32"], metadata["layout"]
    problems = []
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys)):
        problems.append(Problem("bad_metadata", "sections is not a list of distinct names", file))
    elif not isinstance(checksums, list) or len(checksums) != len(keys):
        problems.append(Problem("bad_metadata", "crc32 is not a list of one checksum per section", file))
    if not isinstance(layout, dict) or sorted(layout) != sorted(_LAYOUT_MEMBERS):
        expected = f"an object of {', '.join(_LAYOUT_MEMBERS)}"
        problems.append(Problem("bad_metadata", "layout is malformed", file, expected=expected))
    if not problems:
        problems = list(islice(_initializer_problems(proto, keys, file), MAX_PROBLEMS))
    if problems:
        raise InvalidFileError(problems)
    places = {tensor.name: place(tensor) for tensor in proto.graph.initializer}
    value = {
        **layout,
        **{key: metadata[key] for key in ("config", "digest", "provenance")},
        "files": {},
        "self_test": metadata.get("self_test"),
        "sections": [
            {"offset": offset, "length": length, "crc32": checksum}
            for (offset, length), checksum in zip([places[key] or (0, 0) for key in keys], checksums, strict=True)
        ],
    }
    header, problems = parse_header(value, file)
    if header is None:
        raise InvalidFileError(problems)
    return header, keys


def _initializer_problems(proto: onnx.ModelProto, keys: Sequence[str], file: str) -> Iterator[Problem]:
    """Yield a problem for each difference between the initialisers and the sections, and for arrays outside the data file."""
    from cluscomp_formats.onnx.initializers import place

    found = [tensor.name for tensor in proto.graph.initializer]
    for name in sorted(set(keys) - set(found)):
        yield Problem("missing_tensor", "an array of the model is missing", file, name[:200], remedy=_CONVERT_AGAIN)
    for name in sorted(set(found) - set(keys)):
        yield Problem("unknown_tensor", "the graph has an array that the model does not", file, name[:200])
    if len(set(found)) != len(found) or proto.graph.sparse_initializer:
        yield Problem("duplicate_tensor", "two arrays have the same name, or one is sparse", file)
    for tensor in proto.graph.initializer:
        if place(tensor) is None:
            entries = {entry.key: entry.value for entry in tensor.external_data[:4]}
            expected = f"location {DATA_FILE}, offset and length in bytes"
            message = "the array is not in the data file"
            yield Problem("bad_external_data", message, file, tensor.name[:200], repr(entries)[:200], expected)


def _open_data(path: Path, sections: Sequence[Section]) -> MappedFile:
    """Open the data file, after checking that its sections fill it.

    Raises InvalidFileError if they do not; StorageError if the file cannot be read.
    """
    stored = StoredFile(path)
    problems = []
    end = 0
    for number, section in enumerate(sections):
        expected = data_offset(end, section.length)
        if section.offset != expected:
            message = "the array does not begin at the end of the previous one"
            found = str(section.offset)
            problems.append(Problem("section_misplaced", message, str(path), f"sections[{number}]", found, str(expected)))
        end = section.offset + section.length
    if stored.length != align(end):
        kind, message = (
            ("truncated", "the file ends early") if stored.length < end else ("trailing_bytes", "the file is too long")
        )
        found, expected_length = f"{stored.length} bytes", f"{align(end)} bytes"
        problems.append(Problem(kind, message, str(path), None, found, expected_length, _CONVERT_AGAIN))
    if problems:
        raise InvalidFileError(problems)
    return MappedFile(stored, sections)


def _model_problems(
    proto: onnx.ModelProto, header: PackedHeader, model: Model, keys: Sequence[str], file: str
) -> Iterator[Problem]:
    """Yield a problem for each initialiser that does not match its payload, and for wrong uses of weights in the graph."""
    from cluscomp_formats.onnx.graph_check import graph_problems
    from cluscomp_formats.onnx.initializers import initializer

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    for key, array, section in zip(keys, stored_arrays(model), header.sections, strict=True):
        expected, found = initializer(array, section), initializers[key]
        if found != expected:
            message = f"{array.payload.part} are stored with another name, dtype or shape"
            forms = [f"{form.name[:200]}, element type {form.data_type} {list(form.dims)}" for form in (found, expected)]
            yield Problem("wrong_form", message, file, array.payload.owner, *forms)
    yield from graph_problems(proto, model, file)
