"""What error feedback encodes matrices for, recorded, and the same computed directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cluscomp_export.compression.fit_encode import Encoding
from cluscomp_export.compression.jobs import Jobs
from cluscomp_export.compression.moments import Target
from cluscomp_export.compression.pipeline import BlockByBlock, compress
from cluscomp_export.planning import plan_fixed
from cluscomp_export.sources.linears import block_index
from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.observing import observe_inputs


def compressed(
    source: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *, feedback: bool = True, embedding_bits: float = 16
) -> tuple[dict[str, Target | None], dict[str, Tensor]]:
    """What each matrix was encoded for, in order, and the compressed matrices of the blocks."""
    targets: dict[str, Target | None] = {}
    encoding = Jobs.encoding

    def recorded(self: Jobs, name: str, target: Target | None, *rest: Any) -> Encoding:
        targets[name] = target
        return encoding(self, name, target, *rest)

    monkeypatch.setattr(Jobs, "encoding", recorded)
    plan = plan_fixed(source, cluster_dim=2, num_clusters=16, share="kind", embedding_bits=embedding_bits)
    model = compress(source, plan, blocks=BlockByBlock(ids, feedback)).model
    return targets, {name: tensor for name, tensor in model.tensors.items() if block_index(name) is not None}


def inputs_of(source: Model, tensors: Mapping[str, Tensor], ids: torch.Tensor, matrix: str) -> torch.Tensor:
    """What flows into a matrix, float64 `[tokens, in_features]`."""
    seen: list[torch.Tensor] = []
    model = Model(source.config, {**source.tensors, **tensors}, source.files)
    observe_inputs(model, ids, lambda name, inputs: seen.append(inputs.flatten(0, -2).double()) if name == matrix else None)
    return torch.cat(seen)


def ridge(x: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped moments of inputs `[tokens, in_features]`, and the correction `[in_features, out_features]` that makes up
    for the errors `[tokens, out_features]` of their outputs."""
    damped = x.t() @ x / len(x)
    damped += 0.1 * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    return damped, torch.linalg.solve(damped, x.t() @ error / len(x))
