"""Names of the tensors in a native file: those of llama.cpp, so that people and tools recognise them.

Names have no meaning for readers, which only require them to be unique: `cluscomp.layout` describes the tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluscomp_formats.architectures import TensorSpec, describe_loosely
from cluscomp_formats.gguf.container import gguf_package
from cluscomp_formats.gguf.container_encoding import MAX_TENSOR_NAME_BYTES
from cluscomp_formats.ir import Model
from cluscomp_formats.sections.payloads import Payload

__all__ = ["tensor_names"]

_MAX_BLOCKS = 10_000
_RESERVED = "cluscomp."


def tensor_names(model: Model, payloads: Sequence[Payload], architecture: str | None) -> list[str]:
    """Return a name per payload, in order; an empty payload needs no tensor and gets an empty name.

    `architecture` is gguf-py's name of the base architecture, None if it has none. A name that is longer than 63 bytes, not
    printable, already used or reserved is replaced by `cluscomp.<number of the payload>.<part>`.
    """
    stem_of = _stems(model.config, architecture)
    readable = _Readable(model, stem_of)
    names: list[str] = []
    taken: set[str] = set()
    for number, payload in enumerate(payloads):
        if payload.stored_bytes == 0:
            names.append("")
            continue
        name = readable.name(payload)
        reserved = payload.part != "bytes" and name.startswith(_RESERVED)
        if reserved or name in taken or not name.isprintable() or len(name.encode()) > MAX_TENSOR_NAME_BYTES:
            name = f"{_RESERVED}{number}.{payload.part}"
        taken.add(name)
        names.append(name)
    return names


class _Readable:
    """Makes readable names. `name` must be called once per payload, in order, because it counts stages."""

    def __init__(self, model: Model, stem_of: Callable[[str], str]) -> None:
        self._stem_of = stem_of
        self._stage: Counter[str] = Counter()
        users: dict[str, list[tuple[str, int]]] = {}
        for name, weight in model.clustered.items():
            for number, stage in enumerate(weight.stages):
                users.setdefault(stage.codebook.name, []).append((name, number))
        self._only_use = {codebook: uses[0] for codebook, uses in users.items() if len(uses) == 1}

    def name(self, payload: Payload) -> str:
        owner, part = payload.owner, payload.part
        if part == "bytes":
            return f"{_RESERVED}file.{owner}"
        if part == "centroids":
            if owner not in self._only_use:
                return f"codebook.{owner}"
            tensor, stage = self._only_use[owner]
            return self._numbered(f"{self._base(tensor)}.codebook", stage)
        if part == "values":
            return self._stem_of(owner)
        if part == "codes":
            stage = self._stage[owner]
            self._stage[owner] += 1
            return self._numbered(f"{self._base(owner)}.codes", stage)
        return f"{self._base(owner)}.{part}"

    def _base(self, tensor: str) -> str:
        return self._stem_of(tensor).removesuffix(".weight")

    @staticmethod
    def _numbered(name: str, stage: int) -> str:
        return name if stage == 0 else f"{name}.{stage}"


def _stems(config: Mapping[str, Any], architecture: str | None) -> Callable[[str], str]:
    """Return a function from Hugging Face names of tensors to llama.cpp's; names without one are unchanged.

    The names of the decoder's tensors are those of its description, the names of others gguf-py's.
    """
    description = describe_loosely(config)
    described = {} if description is None else {spec.name: _unstacked(spec) for spec in description.tensors.values()}
    other = _gguf_py_names(config, architecture)
    return lambda name: described.get(name) or other(name)


def _unstacked(spec: TensorSpec) -> str:
    """llama.cpp stacks the experts of a layer; in native files each has its own tensors: `blk.0.ffn_up.7.weight`."""
    return spec.gguf_name if spec.expert is None else spec.gguf_name.replace("_exps", f".{spec.expert}")


def _gguf_py_names(config: Mapping[str, Any], architecture: str | None) -> Callable[[str], str]:
    blocks = config.get("num_hidden_layers")
    if architecture is None or type(blocks) is not int or not 0 < blocks <= _MAX_BLOCKS:
        return str
    gguf = gguf_package()
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        return str
    table = gguf.get_tensor_name_map(number, blocks)
    return lambda name: str(table.get_name(name, try_suffixes=(".weight", ".bias")) or name)
