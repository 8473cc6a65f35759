"""Training with clustered weights: gradients pass through, PEFT's adapters work, and nothing writes to the weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_checkpoints
import hf_models
import numpy as np
import pytest
import torch
import transformers
from hf_checkpoints import checkpoint, run, tolerance
from hf_models import clustered_model, ids, outputs, random_weight, weights_of, with_decoded_weights, written
from torch import nn

from cluscomp_formats.errors import InvalidRequestError, UnsupportedError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import ClusteredWeight
from cluscomp_runtime.hf.modules import ClusteredLinear, ClusteredModule, MatrixStore
from cluscomp_runtime.hf.replacement import module_kind

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def decoding() -> Iterator[list[str]]:
    """Collect the names of the weights that are decoded in the block."""
    names: list[str] = []
    decode = ClusteredWeight.decode

    def counting(self: ClusteredWeight) -> Any:
        names.append(self.name)
        return decode(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusteredWeight, "decode", counting)
        yield names


def linear(dtype: torch.dtype = torch.float32, *, axis: Any = "out") -> tuple[ClusteredLinear, torch.Tensor]:
    weight = random_weight("w", (12, 20), axis, stages=2, extras=True)
    bias = nn.Parameter(torch.randn(12, dtype=dtype))
    return ClusteredLinear(weight, MatrixStore(), dtype, CPU, bias), torch.from_numpy(weight.decode())


@pytest.mark.filterwarnings("ignore:.* no kernel handles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_gradients_pass_through_a_linear(dtype: torch.dtype, axis: Any) -> None:
    module, weight = linear(dtype, axis=axis)
    x = torch.randn(3, 5, 20, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 12, dtype=dtype)
    module(x).backward(grad)
    assert x.grad is not None
    assert module.bias is not None
    assert module.bias.grad is not None
    expected = grad.double() @ weight.double()
    # Sums of 12 products in the dtype of x.
    bound = 12 * torch.finfo(dtype).eps * (grad.double().abs() @ weight.double().abs())
    assert ((x.grad.double() - expected).abs() <= bound).all()
    assert torch.allclose(module.bias.grad, grad.sum((0, 1)), rtol=1e-5 if dtype != torch.bfloat16 else 0.05, atol=1e-2)


def test_nothing_is_decoded_where_nothing_is_trained() -> None:
    module, _ = linear()
    module.matrix()
    with decoding() as names:
        module(torch.randn(2, 20, requires_grad=True))
        with torch.no_grad():
            module(torch.randn(2, 20))
    assert names == []


def test_a_model_first_run_for_inference_trains_after_all(tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").to(torch.float64)
    with torch.inference_mode():
        model(ids())
    embedded = model.get_input_embeddings()(ids()).requires_grad_()
    model(inputs_embeds=embedded, labels=ids()).loss.backward()
    assert embedded.grad.abs().sum() > 0


def test_gradients_of_a_model_are_those_of_the_decoded_weights(tmp_path: Path) -> None:
    original, weights, _ = written("llama", tmp_path / "m")
    oracle = with_decoded_weights(original, weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    grads = []
    for one in (model, oracle):
        norm = one.model.layers[0].input_layernorm.weight.requires_grad_()
        one(ids(), labels=ids()).loss.backward()
        grads.append(norm.grad.double())
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()


def test_looking_at_a_weight_decodes_nothing() -> None:
    module, expected = linear(torch.bfloat16)
    with decoding() as names:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, CPU, (12, 20))
        assert (weight.ndim, weight.numel(), weight.requires_grad, weight.is_floating_point()) == (2, 240, False, True)
        assert weight.data.dtype == weight.detach().dtype == torch.bfloat16
        assert "w" in repr(weight)
    assert names == []
    assert torch.equal(weight.float(), expected.bfloat16().float())


def test_values_of_a_weight_are_the_decoded_ones() -> None:
    x = torch.randn(3, 20)
    for read in (
        lambda weight: weight.clone(),
        lambda weight: weight[:],
        lambda weight: torch.cat(weight.split(5)),
        lambda weight: torch.stack([row.view(4, 5).reshape(20) for row in weight]),
        lambda weight: weight.detach().cpu() * 1,
        lambda weight: weight.T.contiguous().T,
        lambda weight: torch.from_numpy(weight.detach().numpy()),
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: torch.zeros(12, 20).copy_(weight),
    ):
        module, expected = linear()
        assert torch.equal(read(module.weight), expected)
    module, expected = linear()
    assert torch.allclose(nn.functional.linear(x, module.weight), x @ expected.T)


def test_a_weight_that_is_read_time_and_again_is_kept() -> None:
    module, expected = linear()
    module.weight.sum()
    with decoding() as names:
        with pytest.warns(UserWarning, match="its decoded values are kept, 960 bytes"):
            module.weight.sum()
        for _ in range(3):
            assert torch.equal(module.weight.clone(), expected)
    assert names == ["w"]
    # Not after a move to another dtype.
    assert module.to(torch.float64).weight.clone().dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.* decoded values are kept")
def test_writing_to_a_weight_is_refused() -> None:
    """The written values would be lost silently."""
    module, expected = linear()

    def assign_data() -> None:
        module.weight.data = torch.zeros(12, 20)

    def add_to_data() -> None:
        module.weight.data += 1

    def assign() -> None:
        module.weight = nn.Parameter(torch.zeros(12, 20))

    def write_rows() -> None:
        module.weight.detach()[:2] = 0

    def write_row() -> None:
        module.weight.data[3] *= 2

    def write_column() -> None:
        module.weight.T[0].view(3, 4)[1].zero_()

    for write in [
        assign_data,
        add_to_data,
        assign,
        write_rows,
        write_row,
        write_column,
        lambda: module.weight.mul_(2),
        lambda: module.weight.copy_(torch.zeros(12, 20)),
        lambda: nn.init.normal_(module.weight),
        lambda: torch.add(expected, 1, out=module.weight),
    ]:
        with pytest.raises(UnsupportedError) as caught:
            write()
        assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("weight_is_clustered", "w")]
    assert torch.equal(module.weight.clone(), expected)


def test_who_means_to_train_a_clustered_weight_is_told() -> None:
    module, _ = linear()
    with pytest.warns(UserWarning, match="w is clustered: it is not trained"):
        module.requires_grad_()
    assert module.requires_grad_(requires_grad=False) is module


def test_a_model_that_looks_at_the_dtype_of_a_weight_runs_on_the_codes(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.t5, tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.folder)
    expected = run(transformers.AutoModelForSeq2SeqLM.from_pretrained(made.plain))
    with decoding() as names:
        assert (run(model) - expected).abs().max().item() <= tolerance(expected)
    assert names == []


def test_a_model_that_multiplies_by_a_weight_itself_decodes_it_twice_at_most(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.mamba, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    expected = run(transformers.AutoModelForCausalLM.from_pretrained(made.plain))
    with decoding() as names, pytest.warns(UserWarning, match="decoded values are kept"):
        found = [run(model) for _ in range(4)]
    assert all((one - expected).abs().max().item() <= tolerance(expected) for one in found)
    assert {names.count(name) for name in names} == {2}
    assert all("dt_proj" in name for name in names)


def test_linears_of_a_class_of_their_own_are_known_by_what_they_do(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.falcon, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    expected = run(transformers.AutoModelForCausalLM.from_pretrained(made.plain))
    assert sum(isinstance(module, ClusteredModule) for module in model.modules()) == len(made.stored.clustered) > 0
    assert (run(model) - expected).abs().max().item() <= tolerance(expected)


def test_linears_that_do_more_are_not_taken_for_linears() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return super().forward(input) * 2

    class Configured(nn.Linear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = 1.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return input @ self.weight.T * self.scale + self.bias

    class Noisy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return super().forward(input) + (torch.rand(1) if self.training else 0)

    class Plain(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return input @ self.weight.T + self.bias

    class Derived(Plain):
        pass

    kinds = [module_kind(kind(4, 3)) for kind in (Scaled, Configured, Noisy, Derived, Plain)]
    assert kinds == [None, None, None, None, "linear"]


def test_copies_share_no_state_but_the_weight() -> None:
    module, _ = linear()
    x = torch.randn(2, 20)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), module(x))
    assert other.bias is not module.bias
    assert other.matrix() is module.matrix()


if importlib.util.find_spec("peft"):
    import peft


def needs_peft(test: Any) -> Any:
    test = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")(test)
    return pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")(test)


def models(folder: Path) -> tuple[Any, Any]:
    """Return a codebook model with a dense embedding, and the same model with decoded weights."""
    original = hf_models.llama()
    weights = weights_of("llama", original)[:-1]
    write_hf(clustered_model(original, weights), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, with_decoded_weights(original, weights, torch.float32).requires_grad_(requires_grad=False)


def gradients(model: Any, config: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted(ids(), labels=ids(), attention_mask=torch.ones_like(ids())).loss.backward()
    return {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@needs_peft
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_adapters_train_as_on_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    configs = {
        "lora": lambda: peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model, oracle = models(tmp_path / "m")
    found, expected = gradients(model, configs[kind]()), gradients(oracle, configs[kind]())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * max(grad.abs().max(), 1e-6), name
    assert any(grad.abs().max() > 0 for grad in expected.values())


@needs_peft
def test_an_adapter_of_the_original_fits_and_cannot_be_merged(tmp_path: Path) -> None:
    model, oracle = models(tmp_path / "m")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(oracle, config)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    expected = outputs(adapted.eval(), ids())
    assert (outputs(ours.eval(), ids()) - expected).abs().max().item() <= tolerance(expected)
    with pytest.raises(InvalidRequestError, match="save adapters separately"):
        model.save_pretrained(tmp_path / "n")
    with pytest.raises(UnsupportedError, match=r"call model.dequantize\(\) first"):
        ours.merge_and_unload()


@needs_peft
def test_an_adapter_is_merged_into_a_dense_model(tmp_path: Path) -> None:
    model, oracle = models(tmp_path / "m")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(oracle, config)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted.eval(), ids())
    merged = peft.PeftModel.from_pretrained(model.dequantize(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "n")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert (outputs(again, ids()) - expected).abs().max().item() <= tolerance(expected)


@needs_peft
def test_transformers_own_adapters_are_saved_as_such(tmp_path: Path) -> None:
    _, _, stored = written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = outputs(model.eval(), ids())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(again.eval(), ids()), expected)
    again.delete_adapter("default")
    assert open_hf(tmp_path / "m", check=True).digest() == stored.digest()
    assert np.isfinite(expected.numpy()).all()
