"""Open any source. Its kind is recognised by its content, never by its suffix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluscomp_export.sources.checkpoint import CONFIG, INDEX, PICKLED_SUFFIXES, open_checkpoint, pickled_problem, read_config
from cluscomp_export.sources.config_only import FORMAT as CONFIG_ONLY
from cluscomp_export.sources.config_only import open_config
from cluscomp_export.sources.gguf import gguf_parts, is_gguf, model_of, read_gguf
from cluscomp_export.sources.huggingface import open_huggingface
from cluscomp_export.sources.reference import is_reference_config, open_reference
from cluscomp_export.sources.side_files import left_behind
from cluscomp_formats import registry
from cluscomp_formats.delta import is_delta, open_delta
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.files.regular_file import check_there, first_bytes, open_regular
from cluscomp_formats.ir import Model

__all__ = ["CONFIG_ONLY", "files_left_behind", "open_source", "source_bytes", "source_files"]

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


def open_source(path: Path, delta: Path | None = None, *, to_plan: bool = False) -> Model:
    """Open a model for conversion, lazily: shapes and dtypes cost no IO, payloads are read one tensor at a time.

    Reads Hugging Face folders, single safetensors files with `config.json` beside them, GGUF files, folders of the authors'
    ClusComp implementation, and every format of `cluscomp_formats.registry`. `provenance["format"]` of
    the first four is `huggingface`, `huggingface`, `gguf` and `cluscomp-reference`; `provenance["stored_bits"]` maps names of
    tensors that the source stores in less than 16 bits per weight to those bits. `delta` is applied to the model. `to_plan`
    also accepts a folder with a `config.json` and no weights (`config_only`); the format is then `CONFIG_ONLY`.

    Raises InvalidFileError with every problem found, also for a delta of another model, UnsupportedError for valid files this
    version does not read, StorageError if the operating system refuses to read them.
    """
    try:
        model = open_config(path) if to_plan and _is_config_only(path) else _open_by_content(path)
    except OSError as error:
        raise storage_error(path, error) from error
    return model if delta is None else open_delta(delta).apply(model)


def _open_by_content(path: Path) -> Model:
    check_there(path)
    if registry.detect(path) is not None:
        return registry.open_model(path)
    if path.is_dir():
        if os.path.lexists(path / CONFIG) or _has_weights(path):
            return _open_checkpoint(path)
        raise InvalidFileError(_unrecognised(path))
    # The functions that look at the first bytes do not say why they fail.
    os.close(open_regular(path))
    if is_gguf(path):
        return model_of(path, read_gguf(path))
    if is_delta(path):
        message, remedy = "a delta, not a model", "give the model it belongs to, and this file as `delta`; or merge them"
        raise InvalidFileError(Problem("is_delta", message, str(path), remedy=remedy))
    if _is_safetensors(path):
        return _open_checkpoint(path.parent, path)
    raise InvalidFileError(_unrecognised(path))


def _open_checkpoint(folder: Path, weights: Path | None = None) -> Model:
    config = _config_or_none(folder)
    return (open_reference if config and is_reference_config(config) else open_huggingface)(folder, weights)


def _unrecognised(path: Path) -> Problem:
    if path.suffix in PICKLED_SUFFIXES:
        return pickled_problem(path, [path.name])
    expected = "; ".join(
        (
            "a Hugging Face folder",
            "a .safetensors file with config.json next to it",
            "a GGUF file",
            registry.describe_formats(),
        )
    )
    inside = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    remedy = f"name the file itself instead of its folder: {inside[0]}" if inside else None
    return Problem("unknown_format", "not a model in any known format", str(path), expected=expected, remedy=remedy)


def _config_or_none(folder: Path) -> dict[str, Any] | None:
    """The folder's configuration, or None if it cannot be read; opening then reports that with other problems."""
    try:
        return read_config(folder)
    except InvalidFileError:
        return None


def _has_weights(folder: Path) -> bool:
    suffixes = (".safetensors", *PICKLED_SUFFIXES)
    return any(file.suffix in suffixes or file.name == INDEX for file in folder.iterdir())


def _is_config_only(path: Path) -> bool:
    return path.is_dir() and os.path.lexists(path / CONFIG) and not _has_weights(path) and registry.detect(path) is None


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like a safetensors file: a plausible header length, then an opening brace."""
    head = first_bytes(path, 9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES


def source_files(path: Path) -> list[Path]:
    """Files that may be read with `path`: the parts of a split GGUF file, the files next to a safetensors file.

    Some may not exist, and some may not belong to the model.
    """
    beside = _is_safetensors(path) and not is_delta(path)
    return sorted(path.parent.iterdir()) if beside else gguf_parts(path)


def files_left_behind(source: Model, path: Path) -> list[str]:
    """Names in a checkpoint's folder that the model opened from there does not contain; no weights, no hidden files."""
    if source.provenance.get("format") not in ("huggingface", "cluscomp-reference"):
        return []
    try:
        return left_behind(path if path.is_dir() else path.parent, source.files)
    except OSError as error:
        raise storage_error(path, error) from error


def source_bytes(path: Path) -> int:
    """Bytes of a source: all parts of a split GGUF file, the weight files of a checkpoint, all files of a folder of ours.

    Raises InvalidFileError if the source or one of its files is missing.
    """
    if path.is_dir():
        own = registry.detect(path) is not None
        files = [file for file in path.rglob("*") if file.is_file()] if own else list(open_checkpoint(path).weight_files)
    else:
        files = gguf_parts(path) if is_gguf(path) else [path]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InvalidFileError([Problem("missing", "no such file", str(file)) for file in missing])
    return sum(file.stat().st_size for file in files)
