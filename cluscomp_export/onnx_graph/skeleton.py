"""A transformers model without its weights, ready to be traced: from its configuration alone.

Parameters are fake tensors, which have a shape and no memory, so that a model of any size can be traced. The modules that
multiply by a weight or look up its rows are replaced by placeholders, which leave one node each in the trace.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cluscomp_export.sources.special_floats import with_floats
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.hf.replacement import WEIGHT, module_kind
from cluscomp_runtime.hf.stored_names import Places

__all__ = [
    "PLACEHOLDER_DOMAIN",
    "REMEDY",
    "Skeleton",
    "build_skeleton",
    "compute_buffers",
    "make_traceable",
    "named_class",
    "refusing",
    "tensors_by_key",
]

PLACEHOLDER_DOMAIN = "cluscomp_trace"
REMEDY = "run it with transformers: convert it with `to='hf'`"
"""For what transformers builds, and only the tools here do not take."""

MAX_MODULES = 4096
"""Layers, blocks or experts of a configuration."""

_COUNTS = re.compile(r"layers?$|blocks$|experts$|experts_per_|depths?$")

_IGNORED = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")
"""Buffers that old checkpoints store although they follow from the configuration."""


@dataclass(frozen=True)
class Skeleton:
    """`module` is the transformers model, on the meta device.

    `cached` says that it is a decoder with a key-value cache; `options` are the names of the inputs it takes.
    """

    module: Any
    cached: bool
    options: frozenset[str]


def build_skeleton(config: Mapping[str, Any]) -> Skeleton:
    """The skeleton of the model that a configuration describes.

    Raises UnsupportedError if transformers does not know it, or its graph would not be one of text with one input.
    """
    model_class = _model_class(config)
    cached = model_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values()
    name = model_class.__name__
    with refusing(f"transformers cannot build {name} from this configuration"), torch.device("meta"):
        settings = model_class.config_class.from_dict(with_floats(config))
        if settings.is_encoder_decoder:
            message, found = f"{name} is not run on one text", "an encoder with a decoder, which takes more than one graph"
            raise UnsupportedError(Problem("untraceable", message, "config.json", None, found, None, REMEDY))
        # Attention in plain operators; what is stored in 16 bits is computed with in 32.
        settings._attn_implementation = "eager"
        settings.dtype = torch.float32
        settings.use_cache = cached
        module = model_class(settings).eval()
    return Skeleton(module, cached, frozenset(inspect.signature(module.forward).parameters))


def make_traceable(module: Any) -> None:
    """Put placeholders and fake parameters into the module of a skeleton, and compute its constant buffers."""
    fake = FakeTensorMode()
    for key, value in module.state_dict(keep_vars=True).items():
        owner, _, leaf = key.rpartition(".")
        with fake:
            placed: Any = torch.empty(value.shape, dtype=value.dtype)
        is_parameter = isinstance(value, nn.Parameter)
        if is_parameter:
            placed = nn.Parameter(placed, requires_grad=False)
        placed._is_hf_initialized = True
        holder = module.get_submodule(owner)
        (holder._parameters if is_parameter else holder._buffers)[leaf] = placed
    compute_buffers(module, torch.device("cpu"))
    for name, child in list(module.named_modules()):
        kind = module_kind(child)
        if kind is not None:
            module.set_submodule(name, _Placeholder(kind, name + WEIGHT, child))


def compute_buffers(module: Any, device: torch.device) -> None:
    """Give values to the buffers that no checkpoint stores, the way transformers itself does.

    Everything else has its value and is marked with `_is_hf_initialized`, or transformers would draw it at random.
    """
    for key, value in list(module.named_non_persistent_buffers()):
        if value.is_meta:
            owner, _, leaf = key.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = torch.empty_like(value, device=device)
    module.initialize_weights()


def tensors_by_key(skeleton: Skeleton, model: Model, places: Places) -> dict[str, Tensor]:
    """The model's tensors by key of the module's state, merged ones left out; of tied keys both have the one tensor.

    Raises InvalidFileError for shapes that the module does not have, UnsupportedError for tensors it has no use for.
    """
    module = skeleton.module
    state, prefix = module.state_dict(), module.base_model_prefix
    buffers = {key for key, _ in module.named_buffers()}
    ignored = re.compile("|".join([*_IGNORED, *(module._keys_to_ignore_on_load_unexpected or ())]))
    placed: dict[str, Tensor] = {}
    unused, wrong = [], []
    merged = {name for merge in places.merges for name in merge.names}
    for name, tensor in model.tensors.items():
        if name in merged:
            continue
        key = places.keys.get(name)
        if key is None or key in placed:
            renamed = places.unplaced.get(name, name)
            keys = {renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}.")}
            if buffers.isdisjoint(keys) and not ignored.search(name) and not ignored.search(renamed):
                message = f"{type(module).__name__} has no use for this tensor; running without it could give wrong results"
                unused.append(Problem("unused_tensor", message, None, name, remedy=REMEDY))
            continue
        placed[key] = tensor
        if tuple(state[key].shape) != tensor.shape:
            message = "the model's configuration calls for another shape"
            found, expected = str(tensor.shape), str(tuple(state[key].shape))
            wrong.append(Problem("wrong_shape", message, None, name, found, expected))
    if wrong:
        raise InvalidFileError(wrong)
    if unused:
        raise UnsupportedError(unused)
    for first, second in module.all_tied_weights_keys.items():
        for key, other in ((first, second), (second, first)):
            if key not in placed and other in placed:
                placed[key] = placed[other]
    return placed


class _Placeholder(nn.Module):
    """Stands for a linear, a `Conv1D` or an embedding: an operator of its kind's name with the weight's key as attribute.

    Keeps the weight, for models that look at it.
    """

    def __init__(self, kind: str, key: str, original: Any) -> None:
        super().__init__()
        self.kind, self.key = kind, key
        self.weight = original.weight
        self.bias: nn.Parameter | None = getattr(original, "bias", None)
        self.width: int = original.weight.shape[0 if kind == "linear" else 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        leading = x.shape if self.kind == "embedding" else x.shape[:-1]
        y = torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{self.kind}",
            (x,),
            {"key": self.key},
            dtype=torch.float32,
            shape=(*leading, self.width),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def _model_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that the configuration names, one of text. Raises UnsupportedError."""
    model_class = named_class(config)
    if model_class.main_input_name != "input_ids":
        message, found = "the model takes other inputs than text", f"{model_class.__name__}: {model_class.main_input_name}"
        raise UnsupportedError(Problem("unsupported_architecture", message, "config.json", None, found, None, REMEDY))
    return model_class


def _refuse_claims(config: Mapping[str, Any]) -> None:
    """Refuse configurations with huge numbers of layers or experts: transformers would build all of them, tensors or not."""
    # A configuration made in Python may have numbers for keys, as in `id2label`.
    for name, value in config.items():
        if isinstance(value, Mapping):
            _refuse_claims(value)
        elif _COUNTS.search(str(name)) and isinstance(value, (int, float)) and value > MAX_MODULES:
            message, expected = "the configuration claims more modules than any model has", f"at most {MAX_MODULES}"
            raise UnsupportedError(Problem("out_of_range", message, "config.json", None, f"{name}: {value}"[:200], expected))


def named_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that the configuration names. Raises UnsupportedError if it knows none, or never builds it."""
    _refuse_claims(config)
    model_type, named = config.get("model_type"), config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    config_class = transformers.CONFIG_MAPPING[model_type] if model_type in [*transformers.CONFIG_MAPPING] else None
    model_class: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    problem: tuple[str, object] | None = None
    if config_class is None:
        problem = "transformers does not know this architecture (model_type)", repr(model_type)
    elif getattr(model_class, "config_class", None) is not config_class:
        problem = "transformers has no such model class for this architecture (architectures)", f"{name!r} of {model_type}"
    if problem is not None:
        message, found = problem
        # The classes that choose by themselves go by model_type alone.
        remedy = None if config_class is None else REMEDY
        raise UnsupportedError(Problem("unsupported_architecture", message, "config.json", None, str(found), None, remedy))
    return model_class


@contextmanager
def refusing(message: str, remedy: str | None = None) -> Iterator[None]:
    """Turn every exception within into an UnsupportedError, and hide warnings of torch about its own internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnsupportedError:
        raise
    except Exception as error:  # torch, transformers and onnxscript promise no kinds of exceptions
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().split("\n")[0][:300] or type(cause).__name__
        raise UnsupportedError(Problem("untraceable", message, None, None, reason, None, remedy)) from error
    finally:
        logger.setLevel(level)
