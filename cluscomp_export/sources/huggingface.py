"""Hugging Face model folders and single safetensors files, as dense models.

Tensors keep their names and dtypes, with two exceptions. First, an output head that the configuration ties to the embedding is
dropped if it repeats the embedding byte for byte. If it differs, the tensors win, as in transformers, and `tie_word_embeddings`
becomes false. Second, a checkpoint saved from the base class, such as one of an embedding model, has names without `model.`.
For the families of the runtime the prefix is added; transformers reads both kinds into either class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.sources.checkpoint import Checkpoint, open_checkpoint, read_config
from cluscomp_export.sources.foreign import refuse_foreign_tensors, refuse_quantized_config
from cluscomp_export.sources.linears import embedding_tensor, head_tensor
from cluscomp_formats.architectures import find_family
from cluscomp_formats.errors import UnsupportedError
from cluscomp_formats.ir import Array, DenseTensor, Model

__all__ = ["open_huggingface", "untie"]

_COMPARE_BYTES = 1 << 24

_PREFIX = "model."
_IN_BASE_CLASS = re.compile(r"(?:embed_tokens|layers\.\d+|norm)\..*")


def open_huggingface(folder: Path, weights: Path | None = None) -> Model:
    """Open a Hugging Face folder, or its one file `weights`, as a dense model.

    Raises InvalidFileError with every problem found; UnsupportedError if the checkpoint is already quantised, an adapter, or in
    Mistral's own format.
    """
    try:
        checkpoint = open_checkpoint(folder, weights)
    except UnsupportedError:
        # The configuration may explain an unusual dtype.
        refuse_quantized_config(folder, read_config(folder))
        raise
    refuse_quantized_config(folder, checkpoint.config)
    refuse_foreign_tensors(folder, checkpoint.tensors.keys())
    arrays, record = checkpoint.tensors, provenance("huggingface", checkpoint)
    if find_family(checkpoint.config) is not None and not any(name.startswith(_PREFIX) for name in arrays):
        arrays = {_PREFIX + name if _IN_BASE_CLASS.fullmatch(name) else name: values for name, values in arrays.items()}
        record["added_prefix"] = _PREFIX
    tensors = {name: DenseTensor(name, values) for name, values in arrays.items()}
    return untie(Model(checkpoint.config, tensors, checkpoint.files, record))


def provenance(source: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The provenance of a safetensors source. It does not depend on where or when the files were read."""
    num_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
    return {"format": source, "weight_files": len(checkpoint.weight_files), "weight_bytes": num_bytes, "stored_bits": {}}


def untie(model: Model) -> Model:
    """The model without a tied head that repeats the embedding; if the two differ, the model declared as not tied."""
    embedding, head = embedding_tensor(model), head_tensor(model)
    if not model.config.get("tie_word_embeddings") or embedding is None or head is None:
        return model
    first, second = model.tensors[embedding], model.tensors[head]
    if not isinstance(first, DenseTensor) or not isinstance(second, DenseTensor):
        return model
    if _same_bytes(first.values, second.values):
        tensors = {name: tensor for name, tensor in model.tensors.items() if name != head}
        return Model(model.config, tensors, model.files, model.provenance, model.self_test)
    config = {**model.config, "tie_word_embeddings": False}
    return Model(config, model.tensors, model.files, model.provenance, model.self_test)


def _same_bytes(first: Array, second: Array) -> bool:
    """Whether two arrays are identical bit for bit, compared in pieces: both are memory maps, often large."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    left, right = (array.read().reshape(-1).view(np.uint8) for array in (first, second))
    pieces = range(0, left.size, _COMPARE_BYTES)
    return all(np.array_equal(left[at : at + _COMPARE_BYTES], right[at : at + _COMPARE_BYTES]) for at in pieces)
