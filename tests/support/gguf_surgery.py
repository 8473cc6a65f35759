"""Rewrite GGUF files with gguf-py: keys and tensors changed, everything else as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

REMOVED = object()


def json_key(path: Path, key: str) -> Any:
    return json.loads(gguf.GGUFReader(path).fields[key].contents())


def rewrite(
    source: Path,
    target: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    *,
    architecture: str = "cluscomp",
    alignment: int = 64,
) -> Path:
    """Copy `source` to `target` with some keys and tensors given other values, added, or left out (`REMOVED`).

    Dictionaries are stored as canonical JSON.
    """
    changed_keys, changed_tensors = dict(keys or {}), dict(tensors or {})
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_custom_alignment(alignment)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.alignment"):
            continue
        value = changed_keys.pop(name, None)
        if value is REMOVED:
            continue
        kind, item = field.types[0], field.types[-1] if len(field.types) > 1 else None
        # llama.cpp reads an array of int32 there, and no other.
        same = value is None or name == "tokenizer.ggml.token_type"
        _add(writer, name, field.contents() if value is None else value, kind if same else None, item)
    for name, value in changed_keys.items():
        if value is not REMOVED:
            _add(writer, name, value, None, None)
    for tensor in reader.tensors:
        value = changed_tensors.pop(tensor.name, None)
        if value is not REMOVED:
            raw = tensor.tensor_type if value is None else None
            writer.add_tensor(tensor.name, np.array(tensor.data if value is None else value), raw_dtype=raw)
    for name, value in changed_tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: gguf.GGUFWriter, name: str, value: Any, kind: Any, item: Any) -> None:
    if isinstance(value, dict):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"))
    if kind is None:
        # llama.cpp reads ids of this type alone.
        kind = gguf.GGUFValueType.UINT32 if name.endswith("_token_id") else gguf.GGUFValueType.get_type(value)
        item = gguf.GGUFValueType.UINT32 if isinstance(value, list) and value and type(value[0]) is int else None
    writer.add_key_value(name, value, kind, sub_type=item)
