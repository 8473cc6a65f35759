"""Find the parts of a model that a format cannot store, without reading payloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluscomp_formats.errors import Problem
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.limits import MAX_RANK, name_fault, side_file_name_fault
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_formats.sections.header import MAX_HEADER_LENGTH, Section, header_of, header_value
from cluscomp_formats.sections.payloads import Payload
from cluscomp_formats.strict_json import canonical_json, json_faults

__all__ = ["json_problems", "model_problems", "request_problems"]


def model_problems(model: Model, payloads: Sequence[tuple[Payload, Array]], file: str) -> Iterator[Problem]:
    """Yield the problems of names, side files and shapes."""
    for label, names, fault_of in (
        ("tensor", model.tensors, name_fault),
        ("codebook", model.codebooks, name_fault),
        ("side file", model.files, side_file_name_fault),
    ):
        for name in names:
            fault = fault_of(name)
            if fault is not None:
                yield Problem("bad_name", f"the name of a {label} {fault}", file, repr(name[:200]))
    for name, array in model.files.items():
        if array.dtype != "uint8" or len(array.shape) != 1:
            found = f"{array.dtype} {list(array.shape)}"
            yield Problem("bad_side_file", "a side file must be stored as its bytes", file, name, found, "uint8 [bytes]")
    for payload, _ in payloads:
        if len(payload.shape) > MAX_RANK:
            found, expected = f"{len(payload.shape)} dimensions", f"at most {MAX_RANK}"
            yield Problem("bad_shape", f"{payload.part} has too many dimensions", file, payload.owner, found, expected)
    values = {"config": model.config, "provenance": model.provenance, "self_test": model.self_test}
    yield from json_problems(values, file)


def json_problems(values: Mapping[str, Any], file: str) -> Iterator[Problem]:
    """Yield a problem for each part of the labelled values that JSON cannot represent; `self_test` may be None."""
    for label, value in values.items():
        if not isinstance(value, dict) and not (value is None and label == "self_test"):
            found = f"a {type(value).__name__}"
            yield Problem("not_json", f"{label} is not a JSON object", file, found=found, expected="a dict")
            continue
        for where, fault in json_faults(value, label):
            yield Problem("not_json", f"{where} is {fault}, which JSON cannot represent", file)


def request_problems(model: Model, payloads: Sequence[tuple[Payload, Array]], file: str) -> Iterator[Problem]:
    """Yield the problems of a model, including the length of its header. Packed and GGUF files share these rules."""
    problems = list(model_problems(model, payloads, file))
    yield from problems
    if not any(problem.kind == "not_json" for problem in problems):
        # Sections whose numbers have the longest possible text.
        sections = [Section(1 << 62, 1 << 62, (1 << 32) - 1)] * len(payloads)
        header = header_of(model, [payload for payload, _ in payloads], sections, NO_DIGEST, model.self_test)
        length = len(canonical_json(header_value(header)))
        if length > MAX_HEADER_LENGTH:
            yield Problem("header_too_long", "the header is too long", file, None, str(length), f"at most {MAX_HEADER_LENGTH}")
