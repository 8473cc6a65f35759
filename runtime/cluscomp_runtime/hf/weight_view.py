"""A tensor that represents the decoded weight of a module, and decodes it when its values are read.

Much code in transformers, PEFT and applications reads the dtype, device or shape of `module.weight`, which decodes nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from cluscomp_formats.errors import Problem, UnsupportedError

__all__ = ["WeightView"]


class WeightView(torch.Tensor):
    """A tensor without memory, with the dtype, device and shape of the decoded weight of `module`, a ClusteredModule.

    Operations use the decoded values and return ordinary tensors, except for views of the weight, such as rows or the
    transpose, which are WeightViews too. Raises UnsupportedError for operations that would write to the weight, since the
    written values would be lost.
    """

    _module: Any
    _shared: torch.Tensor | None

    # torch and transformers do not initialize a tensor that has this.
    _is_hf_initialized = True

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, module: Any, values: torch.Tensor | None = None) -> WeightView:
        like = torch.empty(module.clustered.shape, dtype=module._placement.dtype, device="meta") if values is None else values
        view: WeightView = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=module._placement.device, requires_grad=False
        )
        view._module, view._shared = module, values
        return view

    def _decoded(self) -> torch.Tensor:
        values: torch.Tensor = self._module.decoded() if self._shared is None else self._shared
        return values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        named = kwargs or {}
        if func is torch.ops.aten.detach.default:
            # Detaching must not decode.
            return cls(args[0]._module, args[0]._shared)
        given = [args[place] if place < len(args) else named.get(of.name) for place, of in enumerate(func._schema.arguments)]
        for argument, value in zip(func._schema.arguments, given, strict=True):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                refuse_write(value._module)
        result = func(*tree_map_only(cls, cls._decoded, args), **tree_map_only(cls, cls._decoded, named))
        if isinstance(given[0], cls) and func.is_view:
            return tree_map_only(torch.Tensor, functools.partial(cls, given[0]._module), result)
        return result

    @property
    def data(self) -> WeightView:
        return WeightView(self._module, self._shared)

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        refuse_write(self._module)

    def numpy(self, *, force: bool = False) -> Any:
        return self._decoded().clone().numpy(force=force)

    def tolist(self) -> Any:
        return self._decoded().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({self._module.clustered.name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def refuse_write(module: Any) -> None:
    """Raise UnsupportedError, because the weight of `module` cannot be written."""
    message = "the weight is clustered: it consists of codes and codebooks, so single values cannot be changed"
    remedy = "call model.dequantize() first, which makes the model dense; or keep adapters, such as LoRA, unmerged"
    raise UnsupportedError(Problem("weight_is_clustered", message, None, module.clustered.name, remedy=remedy))
