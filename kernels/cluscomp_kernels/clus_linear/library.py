"""The torch operator library `cluscomp`, in which the modules of this folder define their operators.

It uses `torch.library.Library` rather than `custom_op`, whose wrapper costs 2 to 7 us more per call: decoding one token makes
hundreds of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["define_operator", "set_backward"]

_LIBRARY = torch.library.Library("cluscomp", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(schema: str, dispatch_key: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define `cluscomp::<schema>` with an implementation for one dispatch key and a fake (meta) kernel."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, implementation, dispatch_key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cluscomp::{name}", fake, lib=_LIBRARY)


def set_backward(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Make `cluscomp::<name>` differentiable."""
    torch.library.register_autograd(f"cluscomp::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
