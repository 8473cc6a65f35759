"""Which files of a model's folder are kept with its weights, and which are left out.

Kept are the files that transformers and sentence-transformers open in addition to the weights: tokenizers, processors,
templates, the modules of an embedding model. Licences are kept, too, and the model's own code if a configuration refers to it:
as data, which is never run here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.side_files import names_in, read_side_file
from cluscomp_formats.ir import Array
from cluscomp_formats.limits import SIDE_FOLDER, side_file_name_fault

__all__ = ["SIDE_FILES", "left_behind", "read_side_files"]

SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)

_MORE = re.compile(
    r"sentence_[a-z]{1,32}_config\.json|[^/]*\.tiktoken|(?i:licen[cs]e|notice|use_policy|copying)(\.(?i:md|txt))?"
)
_CODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py")
_IN_FOLDERS = (".jinja", ".json", ".safetensors", ".txt")
_AUTO_MAP = b'"auto_map"'

_OF_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot)(\.index\.json)?")
_ELSEWHERE = {"config.json", "adapter_config.json", "quantize_config.json"}


def read_side_files(folder: Path, config: Mapping[str, Any] | None) -> dict[str, Array]:
    """The files of the folder that are kept with the model of that configuration, by name, as uint8 `[bytes]`.

    Raises InvalidFileError with all problems: a name that is not a file, a file that is too long, a link out of the folder (see
    `cluscomp_formats.files.model_folder`). Raises StorageError.
    """
    files: dict[str, Array] = {}
    problems: list[Problem] = []

    def read(names: Collection[str]) -> None:
        for name in sorted(names):
            if side_file_name_fault(name) is None:
                try:
                    files[name] = read_side_file(folder, name, files)
                except InvalidFileError as error:
                    problems.extend(error.problems)

    there = _names(folder)
    inner = [f"{name}/{file}" for name in there if SIDE_FOLDER.fullmatch(name) for file in _names(folder / name)]
    read([name for name in there if name in SIDE_FILES or _MORE.fullmatch(name)])
    read([name for name in inner if name.endswith(_IN_FOLDERS)])
    if "auto_map" in (config or {}) or any(_AUTO_MAP in array.read().tobytes() for array in _configurations(files)):
        read([name for name in there if _CODE.fullmatch(name)])
    if problems:
        raise InvalidFileError(problems)
    return files


def _configurations(files: Mapping[str, Array]) -> Iterator[Array]:
    return (array for name, array in files.items() if name.endswith("config.json") and "/" not in name)


def _names(folder: Path) -> list[str]:
    """Names in a folder; none if it is not a folder. Raises OSError."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def left_behind(folder: Path, files: Collection[str]) -> list[str]:
    """Names in the folder that are not among `files`, not weights and not hidden. Raises OSError."""
    taken = {*files, *_ELSEWHERE}
    return sorted(
        name for name in names_in(folder) if name not in taken and not _OF_WEIGHTS.fullmatch(name) and not name.startswith(".")
    )
