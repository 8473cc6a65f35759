"""Write ONNX folders: the arrays in one data file, streamed, then the graph that refers to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.files.atomic_folder import atomic_folder, check_output_folder
from cluscomp_formats.files.side_files import json_bytes, side_file_problems, write_json, write_synced
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx.functions import functions
from cluscomp_formats.onnx.graph import Graph
from cluscomp_formats.onnx.initializers import initializer
from cluscomp_formats.onnx.reader import holds_only_onnx, open_onnx
from cluscomp_formats.onnx.spec import (
    CONFIG,
    DATA_FILE,
    DOMAIN,
    DOMAIN_VERSION,
    IR_VERSION,
    MAX_MODEL_BYTES,
    METADATA_PREFIX,
    MODEL_FILE,
    OPSET,
    SUBFOLDER,
    VERSION,
    data_offset,
    stored_spec,
)
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_formats.sections.header import Section, header_of, header_value
from cluscomp_formats.sections.model_problems import json_problems, model_problems
from cluscomp_formats.sections.payload_stream import SelfTest, WriteReport, write_side_files
from cluscomp_formats.sections.section_stream import place_sections, write_sections
from cluscomp_formats.sections.stored_arrays import StoredArray, stored_arrays
from cluscomp_formats.strict_json import canonical_json
from cluscomp_formats.version import __version__

__all__ = ["onnx_size", "write_onnx"]


def write_onnx(
    model: Model,
    folder: Path,
    graph: Graph,
    *,
    force: bool = False,
    self_test: SelfTest | None = None,
    on_progress: Progress = silent,
) -> WriteReport:
    """Write `model` as an ONNX folder that computes `graph`, atomically, with about one payload in memory at a time.

    `graph` must have been built for this model; it refers to arrays by the names of `stored_arrays`. If `self_test` is given,
    it is called with the model as opened from the finished payloads, and its result is stored as the self-test record;
    otherwise `model.self_test` is stored. `on_progress` is called with payload bytes done and in total. An empty folder can be
    filled; with `force`, a folder of this format without other files is replaced.

    Raises OutputExistsError if the output exists and must not be replaced; StorageError if the system refuses to read or write;
    InvalidFileError if the model's digest does not match its recorded one; InvalidRequestError if the format cannot store the
    model. Names, configuration, shapes and graph are checked before anything is written; values are checked before the output
    appears. Each payload's loader is called once; its exceptions are passed on, except OSError, which becomes a StorageError
    that names the tensor.
    """
    check_output_folder(folder, force=force, replaceable=holds_only_onnx)
    arrays = list(stored_arrays(model))
    problems = list(_request_problems(model, arrays, graph, str(folder)))
    if problems:
        raise InvalidRequestError(problems)
    side_bytes = sum(array.nbytes for array in model.files.values())
    total = side_bytes + sum(stored_spec(array.payload)[0].stored_bytes for array in arrays)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress("writing", done, total)

    with atomic_folder(folder, force=force, replaceable=holds_only_onnx) as temporary:
        (temporary / SUBFOLDER).mkdir()
        write_side_files(model, temporary, folder, advance)
        write_json(temporary / CONFIG, _config_for_others(model))
        sections, digest = _write_data(temporary / SUBFOLDER / DATA_FILE, model, arrays, folder, done, total, on_progress)
        record = model.self_test if self_test is None else None
        _write_model(temporary, _model_proto(model, arrays, graph, sections, digest, record), folder)
        if self_test is not None:
            record = self_test(open_onnx(temporary))
            faults = list(json_problems({"self_test": record}, str(folder)))
            if faults:
                raise InvalidRequestError(faults)
            _write_model(temporary, _model_proto(model, arrays, graph, sections, digest, record), folder)
        file_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    return WriteReport(folder, digest, file_bytes, total, len(arrays) + len(model.files))


def onnx_size(model: Model, graph: Graph) -> int:
    """Return an upper bound of the bytes of the folder of `model`, including its self-test record; reads no payload.

    A checksum is counted with ten digits and may have fewer; everything else is exact.
    """
    arrays = list(stored_arrays(model))
    sections, data_bytes = place_sections([stored_spec(array.payload)[0] for array in arrays], 0, data_offset)
    proto = _model_proto(model, arrays, graph, sections, NO_DIGEST, model.self_test)
    side_bytes = sum(array.nbytes for array in model.files.values())
    return side_bytes + len(json_bytes(_config_for_others(model))) + data_bytes + int(proto.ByteSize())


def _config_for_others(model: Model) -> dict[str, Any]:
    """Return a `config.json` for transformers.js, which would look for 8-bit weights otherwise; ours is in the metadata."""
    return {**model.config, "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True}}


def _write_data(
    path: Path,
    model: Model,
    arrays: Sequence[StoredArray],
    output: Path,
    done: int,
    total: int,
    on_progress: Progress,
) -> tuple[list[Section], str]:
    """Write the data file. Return the section of each array and the model's digest."""
    payloads = [(stored_spec(array.payload)[0], array.array) for array in arrays]

    def progress(phase: str, count: int, _: int) -> None:
        on_progress(phase, done + count, total)

    try:
        with path.open("w+b") as stream:
            sections, digest = write_sections(stream, 0, model, payloads, output, progress, data_offset)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise storage_error(output, error) from error
    return sections, digest


def _model_proto(
    model: Model,
    arrays: Sequence[StoredArray],
    graph: Graph,
    sections: Sequence[Section],
    digest: str,
    record: Mapping[str, Any] | None,
) -> onnx.ModelProto:
    """Return the content of `model.onnx`."""
    initializers = [initializer(array, section) for array, section in zip(arrays, sections, strict=True)]
    name = model.provenance.get("name")
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name if isinstance(name, str) and name else "model",
            graph.inputs,
            graph.outputs,
            initializers,
        ),
        functions=[function for name, function in functions().items() if name in _operators(graph)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        producer_name="cluscomp-export",
        producer_version=__version__,
    )
    payloads = [array.payload for array in arrays]
    value = header_value(header_of(Model(model.config, model.tensors), payloads, sections, digest, record))
    entries: dict[str, Any] = {
        "version": VERSION,
        "digest": digest,
        "config": model.config,
        "provenance": model.provenance,
        "files": sorted(model.files),
        "layout": {key: value[key] for key in ("codebooks", "tensors")},
        "sections": [array.key for array in arrays],
        "crc32": [section.crc32 for section in sections],
    }
    if record is not None:
        entries["self_test"] = record
    helper.set_model_props(proto, {METADATA_PREFIX + key: canonical_json(entries[key]) for key in sorted(entries)})
    return proto


def _operators(graph: Graph) -> set[str]:
    return {node.op_type for node in graph.nodes if node.domain == DOMAIN}


def _write_model(folder: Path, proto: onnx.ModelProto, output: Path) -> None:
    content = proto.SerializeToString(deterministic=True)
    if len(content) > MAX_MODEL_BYTES:
        found, expected = f"{len(content)} bytes", f"at most {MAX_MODEL_BYTES}"
        raise InvalidRequestError(
            Problem("model_too_long", f"{MODEL_FILE} would be too long", str(output), None, found, expected)
        )
    write_synced(folder / SUBFOLDER / MODEL_FILE, content)


def _request_problems(model: Model, arrays: Sequence[StoredArray], graph: Graph, file: str) -> Iterator[Problem]:
    """Yield the problems of the model and graph that can be found without reading payloads."""
    yield from model_problems(model, [(array.payload, array.array) for array in arrays], file)
    yield from side_file_problems(model, (CONFIG, SUBFOLDER), file)
    values = {output for node in graph.nodes for output in node.output} | {value.name for value in graph.inputs}
    owners = dict.fromkeys(values, "the graph")
    for array in arrays:
        if owners.setdefault(array.key, array.payload.owner) != array.payload.owner:
            found, expected = f"{array.key}, also of {owners[array.key]}", "names that differ"
            message = "two arrays would have the same name in the graph"
            yield Problem("name_collision", message, file, array.payload.owner, found, expected)
    known = owners.keys()
    for node in graph.nodes:
        for name in node.input:
            if name and name not in known:
                message = "the graph uses an array the model does not have"
                yield Problem("missing_tensor", message, file, name, remedy="the configuration and the tensors do not fit")
