"""The `quantization_config` of a folder, which describes the clustered weights: making and strict parsing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.hf.spec import METHOD, VERSION
from cluscomp_formats.ir import FLOAT_DTYPES, DenseTensor, Model
from cluscomp_formats.limits import name_fault

__all__ = ["Quantization", "WeightEntry", "join_config", "parse_quantization", "split_config"]

MEMBER = "quantization_config"

# The required and optional members, as in the specification's table.
MEMBERS = ("digest", "quant_method", "version", "weights")
OPTIONAL_MEMBERS = ("added", "replaced")
WEIGHT_MEMBERS = ("codebooks", "extra_arrays", "group_axis", "shape")
EXTRA_ARRAYS = ("row_scale", "column_scale", "outlier_positions", "outlier_values")
GROUP_AXES = ("in", "out")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_SIZE_LIMIT = 1 << 62


@dataclass(frozen=True)
class WeightEntry:
    """A clustered weight of `shape (out_features, in_features)`: its codebooks, one per stage, and its other arrays."""

    shape: tuple[int, int]
    group_axis: Literal["out", "in"]
    codebooks: tuple[str, ...]
    extra_arrays: tuple[str, ...]


@dataclass(frozen=True)
class Quantization:
    """The content of a `quantization_config`. `digest` is the recorded digest, which `Model.digest()` recomputes."""

    digest: str
    weights: Mapping[str, WeightEntry]


def _quantization_value(model: Model, digest: str) -> dict[str, Any]:
    """Return the `quantization_config` of a model. If its configuration has one already, that is kept as `replaced`."""
    value: dict[str, Any] = {
        "quant_method": METHOD,
        "version": VERSION,
        "digest": digest,
        "weights": {
            name: {
                "shape": list(weight.shape),
                "group_axis": weight.group_axis,
                "codebooks": [stage.codebook.name for stage in weight.stages],
                "extra_arrays": [part for part, _ in weight.extra_arrays],
            }
            for name, weight in model.clustered.items()
        },
    }
    if MEMBER in model.config:
        value["replaced"] = model.config[MEMBER]
    added = _missing_dtypes(model.config, _dense_dtype(model))
    if added:
        value["added"] = added
    return value


def _missing_dtypes(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the dtypes to add to a configuration without one and to its parts, such as the text part of a multimodal model.

    `dtype` is that of the enclosing configuration.
    """
    own = config.get("dtype", config.get("torch_dtype"))
    added: dict[str, Any] = {} if config.keys() & {"dtype", "torch_dtype"} else {"dtype": dtype}
    for name, part in config.items():
        if isinstance(part, dict) and (name == "text_config" or isinstance(part.get("model_type"), str)):
            nested = _missing_dtypes(part, own if own in FLOAT_DTYPES else dtype)
            if nested:
                added[name] = nested
    return added


def _join(config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(config)
    for name, value in added.items():
        joined[name] = _join(config.get(name) or {}, value) if isinstance(value, dict) else value
    return joined


def _split(config: dict[str, Any], added: Any) -> dict[str, Any]:
    """Return the configuration without the added dtypes; `added` may be any value and is checked elsewhere."""
    for name, value in added.items() if isinstance(added, dict) else ():
        part = config.get(name)
        if not isinstance(value, dict):
            config.pop(name, None)
        elif isinstance(part, dict):
            config[name] = _split(dict(part), value)
    return config


def _is_added(value: Any) -> bool:
    """Return whether a value describes added dtypes, of the configuration, of its parts, or of both."""
    if not isinstance(value, dict) or not value:
        return False
    return all(
        member in FLOAT_DTYPES if name == "dtype" and isinstance(member, str) else _is_added(member)
        for name, member in value.items()
    )


def _dense_dtype(model: Model) -> str:
    """Return the dtype of the first dense float tensor by name, float32 if there is none."""
    dense = (tensor.values.dtype for _, tensor in sorted(model.tensors.items()) if isinstance(tensor, DenseTensor))
    return next((dtype for dtype in dense if dtype in FLOAT_DTYPES), "float32")


def join_config(model: Model, digest: str) -> dict[str, Any]:
    """Return the content of `config.json`: the model's own configuration, our `quantization_config`, and missing dtypes.

    If a configuration has no dtype, transformers uses that of the first array, which may be a codebook's, so a dtype is added.
    The `quantization_config` records the additions.
    """
    ours = _quantization_value(model, digest)
    return {**_join(model.config, ours.get("added", {})), MEMBER: ours}


def split_config(stored: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the model's own configuration and our `quantization_config`, given the content of `config.json`."""
    config = dict(stored)
    ours = config.pop(MEMBER, None)
    if isinstance(ours, dict):
        if "replaced" in ours:
            config[MEMBER] = ours["replaced"]
        config = _split(config, ours.get("added"))
    return config, ours


def parse_quantization(value: Any, file: str) -> Quantization:
    """Parse a `quantization_config` made by `join_config`. Raises InvalidFileError, with at most one problem per weight."""

    def fail(kind: str, message: str, found: object, expected: str, remedy: str | None = None) -> InvalidFileError:
        return InvalidFileError(Problem(kind, message, file, MEMBER, repr(found)[:200], expected, remedy))

    method = value.get("quant_method") if isinstance(value, dict) else None
    if not isinstance(value, dict) or method != METHOD:
        raise fail("not_cluscomp", "not a codebook model: quant_method is missing or another", method, METHOD)
    version = value.get("version")
    if type(version) is not int or version < 1:
        raise fail("bad_version", "unknown version", version, str(VERSION))
    if version > VERSION:
        raise fail("newer_version", "written by a newer version", version, str(VERSION), "upgrade cluscomp-export")
    fault = _members_fault(value, MEMBERS, OPTIONAL_MEMBERS)
    if fault is not None:
        raise fail(*fault)
    if not (isinstance(value["digest"], str) and _DIGEST.fullmatch(value["digest"])):
        raise fail("bad_digest", "the digest is malformed", value["digest"], "sha256: and 64 hexadecimal digits")
    if "added" in value and not _is_added(value["added"]):
        raise fail("bad_added", "malformed added", value["added"], f"dtype: one of {', '.join(FLOAT_DTYPES)}; parts alike")
    if not isinstance(value["weights"], dict):
        raise fail("wrong_type", "weights is not an object", value["weights"], "name -> settings")
    problems: list[Problem] = []
    weights: dict[str, WeightEntry] = {}
    for name, member in value["weights"].items():
        entry = _weight(name, member)
        if isinstance(entry, WeightEntry):
            weights[name] = entry
        else:
            kind, message, found, expected = entry
            problems.append(Problem(kind, message, file, name[:200], repr(found)[:200], expected))
    if problems:
        raise InvalidFileError(problems)
    return Quantization(value["digest"], weights)


_Fault = tuple[str, str, object, str]


def _members_fault(value: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> _Fault | None:
    missing = [key for key in required if key not in value]
    if missing:
        return "missing_key", f"there is no {' and no '.join(missing)}", sorted(value), ", ".join(required)
    unknown = [key for key in value if key not in required and key not in optional]
    if unknown:
        return "unknown_key", f"unknown key {unknown[0][:80]!r}", unknown, ", ".join(required + optional)
    return None


def _weight(name: str, value: Any) -> WeightEntry | _Fault:
    fault = name_fault(name)
    if fault is not None:
        return "bad_name", f"the name of a weight {fault}", name, "a plain name"
    if not isinstance(value, dict):
        return "wrong_type", "the settings are not an object", value, ", ".join(WEIGHT_MEMBERS)
    members = _members_fault(value, WEIGHT_MEMBERS)
    if members is not None:
        return members
    shape, codebooks, extra = value["shape"], value["codebooks"], value["extra_arrays"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(_is_length(length) for length in shape)):
        return "bad_shape", "malformed shape", shape, "[out_features, in_features]"
    if value["group_axis"] not in GROUP_AXES:
        return "bad_group_axis", "unknown group_axis", value["group_axis"], " or ".join(GROUP_AXES)
    if not (isinstance(codebooks, list) and codebooks and all(isinstance(codebook, str) for codebook in codebooks)):
        return "bad_codebooks", "malformed codebooks", codebooks, "the names of one codebook per stage"
    for codebook in codebooks:
        fault = name_fault(codebook)
        if fault is not None:
            return "bad_name", f"the name of a codebook {fault}", codebook, "a plain name"
    # In canonical order, each at most once, and both outlier arrays or neither.
    canonical = [part for part in EXTRA_ARRAYS if isinstance(extra, list) and part in extra]
    if extra != canonical or ("outlier_positions" in canonical) != ("outlier_values" in canonical):
        return "bad_extra_arrays", "malformed extra_arrays", extra, f"some of {', '.join(EXTRA_ARRAYS)}, in this order"
    return WeightEntry((shape[0], shape[1]), value["group_axis"], tuple(codebooks), tuple(canonical))


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value < _SIZE_LIMIT
