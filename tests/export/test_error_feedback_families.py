"""What error feedback encodes matrices for where a block is more than Llama's: norms after a branch, and experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feedback_targets import compressed, inputs_of, ridge
from runtime_models import oracle, token_ids

from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.blocks import BlockRunner

LAYER = "model.layers.0"


def weight_of(model: Model, name: str) -> torch.Tensor:
    return torch.from_numpy(model.tensors[name].decode().astype(np.float64))


def test_before_a_norm_the_output_projection_aims_at_what_the_original_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = oracle("gemma3")
    ids, name = token_ids(6, 40), f"{LAYER}.self_attn.o_proj.weight"
    targets, tensors = compressed(source, ids, monkeypatch)
    weight = weight_of(source, name)
    wanted = inputs_of(source, {}, ids, name) @ weight.t()
    given = inputs_of(source, {**tensors, name: source.tensors[name]}, ids, name)
    scale = wanted.square().mean(1, keepdim=True).sqrt()
    damped, correction = ridge(given / scale, (wanted - given @ weight.t()) / scale)
    target = targets[name]
    assert target is not None
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(target.correction).double(), correction, rtol=1e-3, atol=1e-4)


def expert_inputs(source: Model, tensors: dict[str, Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The normed stream before the experts of the first layer, float64 `[tokens, hidden_size]`."""
    runner = BlockRunner(source)
    stream = runner.branch(0, 0, {**source.tensors, **tensors})(runner.embed(ids))
    return runner.branch(0, 1, source.tensors).normed(stream).flatten(0, -2).double()


def routed(source: Model, normed: torch.Tensor) -> torch.Tensor:
    """The weight of every expert for every token, `[tokens, experts]`; 0 for those it does not go to."""
    probabilities = torch.softmax(normed @ weight_of(source, f"{LAYER}.mlp.gate.weight").t(), dim=-1)
    best = probabilities.topk(source.config["num_experts_per_tok"], dim=-1)
    weights = best.values / best.values.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, best.indices, weights)


def test_an_expert_is_encoded_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = oracle("qwen3-moe")
    ids = token_ids(6, 60)
    targets, tensors = compressed(source, ids, monkeypatch)
    attention = {name: tensor for name, tensor in tensors.items() if f"{LAYER}.self_attn" in name}
    wanted_inputs = expert_inputs(source, {}, ids)
    inputs = expert_inputs(source, attention, ids)
    weights = routed(source, inputs)
    expert = int((weights > 0).sum(0).argmax())
    here = weights[:, expert] > 0
    assert here.sum() > 32, "too few tokens for this test"

    x = inputs[here]
    scale = x.square().mean(1, keepdim=True).sqrt()
    name = f"{LAYER}.mlp.experts.{expert}.up_proj.weight"
    damped, correction = ridge(x / scale, (wanted_inputs[here] - x) @ weight_of(source, name).t() / scale)
    target = targets[name]
    assert target is not None
    assert target.moments is getattr(targets[name.replace("up", "gate")], "moments", None)
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(target.correction).double(), correction, rtol=1e-3, atol=1e-4)

    # The output projections are the original's, the input projections compressed.
    name = f"{LAYER}.mlp.experts.{expert}.down_proj.weight"
    partly = {other: source.tensors[other] if "down_proj" in other else tensor for other, tensor in tensors.items()}
    runner = BlockRunner(source)
    wanted = runner.past(0, source.tensors, [runner.embed(ids)])[0].flatten(0, -2).double()
    reached = runner.past(0, {**source.tensors, **partly}, [runner.embed(ids)])[0].flatten(0, -2).double()
    share = weights[here, expert, None] ** 2 / weights[here].square().sum(1, keepdim=True)
    scale = wanted[here].square().mean(1, keepdim=True).sqrt()
    x = inputs_of(source, partly, ids, name)
    damped, correction = ridge(x / scale, share * (wanted - reached)[here] / scale)
    target = targets[name]
    assert target is not None
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(target.correction).double(), correction, rtol=1e-3, atol=1e-4)


def test_an_expert_with_few_tokens_is_encoded_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = oracle("qwen3-moe")
    ids = token_ids(1, 30)
    targets, tensors = compressed(source, ids, monkeypatch)
    attention = {name: tensor for name, tensor in tensors.items() if f"{LAYER}.self_attn" in name}
    inputs = expert_inputs(source, attention, ids)
    weights = routed(source, inputs)
    assert (weights > 0).sum(0).max() < 32
    scale = inputs.square().mean(1, keepdim=True).sqrt()
    damped, _ = ridge(inputs / scale, inputs)
    for expert in range(weights.shape[1]):
        for part in ("gate", "up"):
            target = targets[f"{LAYER}.mlp.experts.{expert}.{part}_proj.weight"]
            assert target is not None
            torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
        down = targets[f"{LAYER}.mlp.experts.{expert}.down_proj.weight"]
        assert down is not None
        few = int((weights[:, expert] > 0).sum()) < down.moments.damped.shape[0]
        assert (down.correction is None) == few
    assert any(targets[f"{LAYER}.mlp.experts.{expert}.down_proj.weight"].correction is None for expert in range(6))
