"""A tensor that stands for the decoded weight of a module, and decodes it when its values are asked for.

Many modules of transformers, PEFT and users look at `module.weight` for its dtype, device or shape. That costs nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from cluscomp_formats.errors import Problem, UnsupportedError

__all__ = ["WeightView"]


class WeightView(torch.Tensor):
    """Of the dtype, device and shape of the decoded weight of `module`, a ClusteredModule; without memory of its own.

    Any operation on it is done on the decoded values, and its result is an ordinary tensor. Raises UnsupportedError for
    operations that would write to it, which nobody would ever read.
    """

    _module: Any

    # torch's initialization and transformers' leave alone what has this.
    _is_hf_initialized = True

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, module: Any) -> WeightView:
        place = module._placement
        view: WeightView = torch.Tensor._make_wrapper_subclass(
            cls, module.clustered.shape, dtype=place.dtype, device=place.device, requires_grad=False
        )
        view._module = module
        return view

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            # `.data`, `.detach()`: still a stand-in, so that writing to those is refused as well.
            return cls(args[0]._module)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                refuse_write(value._module)
        args, kwargs = tree_map_only(cls, lambda view: view._module.decoded(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def data(self) -> WeightView:
        return WeightView(self._module)

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        refuse_write(self._module)

    def numpy(self, *, force: bool = False) -> Any:
        return self._module.decoded().numpy(force=force)

    def tolist(self) -> Any:
        return self._module.decoded().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({self._module.clustered.name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def refuse_write(module: Any) -> None:
    """Raise UnsupportedError: the weight of `module` is being written to."""
    message = "the weight is clustered: it has codes and codebooks, no values to change one by one"
    remedy = "train adapters beside it, such as LoRA, without merging them; or change the original model and convert that"
    raise UnsupportedError(Problem("weight_is_clustered", message, None, module.clustered.name, remedy=remedy))
