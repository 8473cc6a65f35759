"""For evaluation: architectures that the runtime's decoder does not know, run by transformers with our kernels.

Models are built from the IR, so that any format and source works. transformers makes the modules for the configuration,
clustered weights replace its linear layers and embeddings, and dense tensors are read one at a time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from cluscomp_export.onnx_graph.skeleton import build_skeleton, compute_buffers, named_class, refusing, tensors_by_key
from cluscomp_export.sources.special_floats import with_floats
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_runtime.devices import check_device, compute_dtype
from cluscomp_runtime.hf.modules import MatrixStore
from cluscomp_runtime.hf.replacement import merged_values, replace_modules
from cluscomp_runtime.hf.stored_names import places_of
from cluscomp_runtime.linear import decoded
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["TransformersModel", "opening_fault"]


class TransformersModel:
    """A decoder that transformers runs, with the members of `LanguageModel` that scoring needs.

    Raises UnsupportedError if transformers does not know the architecture, if it is not a causal language model or does not use
    a tensor; InvalidFileError for missing tensors and wrong shapes.
    """

    def __init__(self, model: Model, *, device: str = "cpu", dtype: str | None = None) -> None:
        self.device = check_device(device)
        self.dtype = compute_dtype(dtype, self.device)
        self.tokenizer = Tokenizer.from_files(model.files)
        skeleton = build_skeleton(model.config)
        self._module = skeleton.module
        name = type(self._module).__name__
        if not skeleton.cached:
            problem = Problem("no_decoder", "only causal language models predict a text", "config.json", None, name)
            raise UnsupportedError(problem)
        places = places_of(self._module, model.tensors)
        tensors = tensors_by_key(skeleton, model, places)
        self._replaced = replace_modules(self._module, model, MatrixStore(), self.dtype).modules
        for module in self._replaced.values():
            module._placement = torch.empty(0, dtype=self.dtype, device=self.device)
        placed: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            if key in self._replaced:
                continue
            if tensor.name not in placed:
                placed[tensor.name] = self._in_place(decoded(tensor))
            self._set(key, placed[tensor.name])
        self._merged = sum(name in model.clustered for merge in places.merges for name in merge.names)
        for merge in places.merges:
            for key, values in merged_values(self._module, model, merge).items():
                self._set(key, self._in_place(values))
        state: dict[str, Any] = self._module.state_dict(keep_vars=True)
        missing = [key for key, value in state.items() if value.is_meta]
        if missing:
            message = "the model lacks a tensor that its configuration requires"
            raise InvalidFileError([Problem("missing_tensor", message, None, key) for key in missing])
        for value in state.values():
            value._is_hf_initialized = True
        compute_buffers(self._module, self.device)

    def _in_place(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, self.dtype if values.is_floating_point() else values.dtype)

    def _set(self, key: str, values: torch.Tensor) -> None:
        owner, _, leaf = key.rpartition(".")
        holder = self._module.get_submodule(owner)
        if leaf in holder._parameters:
            holder._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        else:
            holder._buffers[leaf] = values

    @property
    def max_positions(self) -> int:
        """The most tokens that the model takes."""
        return int(getattr(self._module.config, "max_position_embeddings", None) or 2048)

    @property
    def kernel_summary(self) -> str:
        counts = Counter(module.kernel for module in self._replaced.values()).most_common()
        merged = [f"dense, decoded ({self._merged} matrices that transformers merges)"] if self._merged else []
        return ", ".join(["transformers", *(f"{path} ({count} modules)" for path, count in counts), *merged])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` int64 `[batch, tokens]`."""
        with torch.inference_mode():
            logits: torch.Tensor = self._module(input_ids.to(self.device), use_cache=False).logits
            return logits


def opening_fault(model: Model) -> str | None:
    """Why `from_pretrained` will not open a folder of this model; None if it will, or if only the model's own code can tell.

    Builds the class that the configuration names, without weights, and looks for a place for each clustered weight.
    """
    if "auto_map" in model.config:
        return None
    try:
        model_class = named_class(model.config)
    except UnsupportedError as error:
        # A problem with a remedy: transformers may still open the model by its model_type.
        return error.problems[0].message if error.problems[0].remedy is None else None
    try:
        with refusing(f"{model_class.__name__} cannot be built from this configuration"), torch.device("meta"):
            module = model_class(model_class.config_class.from_dict(with_floats(model.config)))
        replace_modules(module, model, MatrixStore(), torch.float32)
    except (InvalidFileError, UnsupportedError) as error:
        problem = error.problems[0]
        return problem.message if problem.tensor is None else f"{problem.message} ({problem.tensor}, ...)"
    return None
