"""Replace clustered modules by dense ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from cluscomp_runtime.hf.modules import ClusteredEmbedding, ClusteredLinear, ClusteredModule

__all__ = ["make_dense"]


def make_dense(model: Any, modules: Iterable[ClusteredModule]) -> int:
    """Replace these modules, and all others with the same weights, by dense ones. Return the bytes of the new parameters.

    Modules with the same weight share one parameter, which does not require a gradient.
    """
    wanted = {id(module.clustered) for module in modules}
    parameters: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ClusteredModule) and id(module.clustered) in wanted:
            if id(module.clustered) not in parameters:
                values = module._decode()
                values = values.t().contiguous() if module.transposed else values
                parameters[id(module.clustered)] = nn.Parameter(values, requires_grad=False)
            if id(module) not in made:
                made[id(module)] = _dense(module, parameters[id(module.clustered)])
            model.set_submodule(name, made[id(module)])
    return sum(parameter.nbytes for parameter in parameters.values())


def _dense(module: ClusteredModule, weight: nn.Parameter) -> nn.Module:
    rows, columns = weight.shape
    dense: nn.Module
    if isinstance(module, ClusteredEmbedding):
        dense = nn.Embedding(rows, columns, module.padding_idx, device="meta")
    elif module.transposed:
        dense = Conv1D(columns, rows)
    else:
        dense = nn.Linear(columns, rows, bias=False, device="meta")
    dense.weight = weight
    if isinstance(module, ClusteredLinear):
        dense.register_parameter("bias", module.bias)
    return dense.train(module.training)
