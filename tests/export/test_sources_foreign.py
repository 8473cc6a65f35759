"""Checkpoints that would convert into something no program can run: each is refused, with the way to a model."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluscomp_export.sources import embedding_tensor, linear_tensors, open_source
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import Array, DenseTensor, Model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_models.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, config: Any = None, **tensors: torch.Tensor) -> None:
    """Changes members of config.json, and adds tensors under names whose dots are written as two underscores."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "model.safetensors"
    more = {name.replace("__", "."): values for name, values in tensors.items()}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})


def refusal(path: Path, kind: type[UnsupportedError | InvalidFileError] = UnsupportedError) -> Problem:
    with pytest.raises(kind) as error:
        open_source(path)
    return error.value.problems[0]


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"compression_config": {"quant_method": "awq"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"a": {"b": {"quantization_config": "awq"}}},
    ],
)
def test_a_quantised_checkpoint_by_its_configuration(folder: Path, config: dict[str, Any]) -> None:
    edit(folder, config)
    problem = refusal(folder)
    assert (problem.kind, problem.found) == ("already_quantized", "awq")
    assert problem.remedy == "start from the checkpoint from which it was made"


def test_what_transformers_can_decode_has_the_command_for_it(folder: Path, tmp_path: Path) -> None:
    scale = 0.01
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, values in stored.items():
        quantised = name.endswith("_proj.weight")
        tensors[name] = (values / scale).to(torch.float8_e4m3fn) if quantised else values
        if quantised:
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    command = (refusal(folder).remedy or "").split("in Python: ")[1]
    exec(command, {"FOLDER": folder, "NEW_FOLDER": tmp_path / "decoded"})  # noqa: S102 - the remedy is to be tried
    name = "model.layers.0.self_attn.q_proj.weight"
    error = np.abs(open_source(tmp_path / "decoded").tensors[name].decode() - stored[name].numpy()).max()
    assert error < 0.1 * stored[name].abs().max().item()


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "compressed-tensors"])
def test_the_classes_named_decode(folder: Path, method: str) -> None:
    edit(folder, {"quantization_config": {"quant_method": method}})
    name = (refusal(folder).remedy or "").split("AutoModelForCausalLM, ")[1].split(";")[0]
    assert "dequantize" in inspect.signature(getattr(transformers, name)).parameters


def test_a_dtype_that_we_do_not_read_is_explained_by_the_configuration(folder: Path) -> None:
    edit(folder, {"quantization_config": {"quant_method": "fp8"}}, packed=torch.zeros(4).to(torch.float8_e4m3fn))
    assert refusal(folder).kind == "already_quantized"


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "weight_packed", "qweight", "SCB"])
def test_a_quantised_checkpoint_by_its_tensors(folder: Path, name: str) -> None:
    edit(folder, None, **{f"model__layers__0__mlp__up_proj__{name}": torch.ones(3)})
    problem = refusal(folder)
    assert (problem.kind, problem.tensor) == ("already_quantized", f"model.layers.0.mlp.up_proj.{name}")


def test_a_folder_of_autogptq(folder: Path) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert refusal(folder).found == "gptq (quantize_config.json)"


def test_microscaling_blocks_and_their_scales(folder: Path) -> None:
    edit(folder, None, a__experts_blocks=torch.ones(3), b__other_blocks=torch.ones(3))
    assert open_source(folder)
    edit(folder, None, a__experts_scales=torch.ones(3))
    assert (refusal(folder).kind, refusal(folder).tensor) == ("already_quantized", "a.experts_blocks")


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    weights = folder / "adapter_model.safetensors"
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}, weights)
    for problem in (refusal(folder, InvalidFileError), refusal(weights)):
        assert problem.kind == "adapter"
        assert "merge_and_unload" in (problem.remedy or "")


def test_the_own_format_of_mistral(folder: Path) -> None:
    path = folder / "consolidated.safetensors"
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 4), "tok_embeddings.weight": torch.ones(2, 4)}, path)
    assert refusal(path).kind == "foreign_names"
    (folder / "model.safetensors").unlink()
    assert "consolidated" not in (refusal(folder, InvalidFileError).remedy or "")


def test_what_is_quantised_beside_a_model_is_not_asked(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "other.json")
    edit(folder, {"text_config": {"quantization_config": None}})
    assert open_source(folder)


@pytest.mark.parametrize("module", ["feed_forward", "mixer", "mlp", "block"])
def test_a_gate_beside_experts_is_a_router(module: str) -> None:
    names = [f"model.layers.0.{module}.{part}.weight" for part in ("gate", "experts.0.w1", "shared.gate")]
    tensors = {name: DenseTensor(name, Array.of(torch.ones(4, 4).numpy())) for name in names}
    assert linear_tensors(Model({"model_type": "strange"}, tensors)) == names[1:]


def test_shards_without_their_index_are_not_offered_one_by_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "model.safetensors.index.json" in (refusal(folder, InvalidFileError).remedy or "")
    (folder / "model-00001-of-00002.safetensors").rename(folder / "weights.safetensors")
    remedy = refusal(folder, InvalidFileError).remedy or ""
    assert open_source(folder / remedy.rpartition(" ")[2]).tensors


@pytest.mark.parametrize("name", ["shared", "backbone.embeddings", "rwkv.embeddings", "model.shared"])
def test_embeddings_of_other_names(name: str) -> None:
    tensor = DenseTensor(f"{name}.weight", Array.of(torch.ones(4, 4).numpy()))
    assert embedding_tensor(Model({}, {tensor.name: tensor})) == tensor.name
