"""Which tensors of a model are weights of the linear layers in its decoder blocks, which are the embedding and the head.

Known families use exact names, so that nothing is clustered by accident. Other architectures use documented heuristics
(`docs/sources.md`); a plan can narrow their choice by name. Only names, shapes and dtypes are read, never a payload.

GPT-2 stores its linear layers as `Conv1D`, `[in_features, out_features]`. They are listed as stored: clustering and decoding a
stored matrix gives the same orientation, however the model multiplies with it.
"""

from __future__ import annotations

import re

from cluscomp_formats.architectures import describe_loosely
from cluscomp_formats.ir import FLOAT_DTYPES, ClusteredWeight, Model, Tensor

__all__ = ["block_index", "embedding_tensor", "head_tensor", "kind", "linear_tensors", "logits_tensor"]

_SMOLLM3_LINEAR = re.compile(r"(?:.*\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
_OPT_LINEAR = re.compile(r"(?:.*\.)?decoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|fc[12])\.weight")

_LINEARS_BY_MODEL_TYPE = {"smollm3": _SMOLLM3_LINEAR, "opt": _OPT_LINEAR}
"""Of models that are run by transformers only."""

_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|token_embedding|embeddings|shared)\.weight"
)
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_projection)\.weight|output\.weight")

_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|(?:^|\.)ln_|lm_head|score|classifier|pooler|router|relative_attention_bias")
"""Parts of names that the heuristics treat as embeddings, norms, heads or routers, by common naming."""

_NOT_LINEAR_ENDINGS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".gate.wg.weight", ".indexer.weights_proj.weight")
"""Routers of mixtures of experts, and token selection of sparse attention: tiny, and every token depends on them."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\..*")
_LAYER = re.compile(r"\.\d+\.")
_EXPERTS = ".experts."
_EXPERT = re.compile(r"\.experts\.\d+\.")


def block_index(name: str) -> int | None:
    """The number of the decoder block that a tensor belongs to, or None."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else int(match[1])


def linear_tensors(model: Model) -> list[str]:
    """Names of the weights of the linear layers in the decoder blocks, in the order of the model.

    Of the families in `cluscomp_formats.architectures`: the matrices of the description, whatever their names begin with.
    SmolLM3: q, k, v, o, gate, up, down. OPT: q, k, v, out, fc1, fc2. Any other `config["model_type"]`: every 2-D float tensor
    of a numbered layer whose name ends with `.weight`, which has more than one row and column, and whose name is not that of an
    embedding, norm, head or router. `gate` next to `experts` is a router.
    """
    description = describe_loosely(model.config)
    if description is not None:
        weights = (weight for block in description.blocks for step in block.steps for weight in step.weights)
        kinds = tuple({f".{kind(weight)}".removeprefix(".model") for weight in weights})
        matrices = [name for name, tensor in model.tensors.items() if _is_matrix(tensor)]
        return [name for name in matrices if f".{kind(name)}".endswith(kinds)]
    pattern = _LINEARS_BY_MODEL_TYPE.get(str(model.config.get("model_type", "")))
    if pattern is not None:
        return [name for name, tensor in model.tensors.items() if pattern.fullmatch(name) and _is_matrix(tensor)]
    routers = {f"{name.partition(_EXPERTS)[0]}.gate.weight" for name in model.tensors if _EXPERTS in name}
    names = [name for name, tensor in model.tensors.items() if _is_matrix(tensor) and min(tensor.shape) > 1]
    return [name for name in names if _looks_linear(name) and name not in routers]


def _is_matrix(tensor: Tensor) -> bool:
    floating = isinstance(tensor, ClusteredWeight) or tensor.values.dtype in FLOAT_DTYPES
    return floating and len(tensor.shape) == 2


def _looks_linear(name: str) -> bool:
    if not name.endswith(".weight") or _LAYER.search(name) is None:
        return False
    return not _NOT_LINEAR.search(name) and not name.endswith(_NOT_LINEAR_ENDINGS)


def kind(name: str) -> str:
    """The name with the layer number, and an expert's number, replaced: equal for the same matrix of every layer.

    `model.layers.3.self_attn.q_proj.weight` -> `model.layers.*.self_attn.q_proj.weight`.
    """
    return _EXPERT.sub(".experts.*.", _LAYER.sub(".*.", f".{name}", count=1)[1:])


def embedding_tensor(model: Model) -> str | None:
    """Name of the token embedding, `[vocabulary, hidden_size]`, or None if no tensor has such a name."""
    return next((name for name in model.tensors if _EMBEDDING.fullmatch(name)), None)


def head_tensor(model: Model) -> str | None:
    """Name of the output projection, `[vocabulary, hidden_size]`, or None if the head is tied or missing.

    A classification head does not count: it is tiny and stays dense.
    """
    return next((name for name in model.tensors if _HEAD.fullmatch(name)), None)


def logits_tensor(model: Model) -> str | None:
    """Name of the matrix that gives the logits: the head or, if that is tied, the embedding. None if there are no logits."""
    head = head_tensor(model)
    return embedding_tensor(model) if head is None and model.config.get("tie_word_embeddings") else head
