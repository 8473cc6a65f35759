"""Numbers in a configuration that contradict the tensors do not cost time or memory in proportion to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_models import byte_tokenizer_files, clustered_model, small_config

from cluscomp_export.onnx_graph.skeleton import build_skeleton
from cluscomp_export.sources.config_only import open_config
from cluscomp_formats.errors import ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_formats.gguf import open_gguf, write_dense_gguf, write_gguf
from cluscomp_formats.ir import Model
from cluscomp_runtime import LanguageModel

LARGEST = 2**31 - 1
CLAIMS = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")


def claiming(name: str) -> Model:
    model = clustered_model(small_config(vocab_size=258), byte_tokenizer_files())
    return replace(model, config={**model.config, name: LARGEST})


@pytest.mark.parametrize("name", CLAIMS[:-1])
def test_the_runtime_refuses_them(name: str) -> None:
    with pytest.raises(ClusCompError):
        LanguageModel.from_model(claiming(name))


def test_a_configuration_alone_claims_no_layers_without_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(claiming("num_hidden_layers").config))
    with pytest.raises(InvalidFileError, match="num_hidden_layers"):
        open_config(tmp_path)


def test_tables_of_positions_grow_with_the_text() -> None:
    model = LanguageModel.from_model(claiming("max_position_embeddings"))
    assert model.context == 2048
    assert model.generate([1], max_new_tokens=2).new_tokens == 2


@pytest.mark.parametrize("name", CLAIMS)
def test_gguf_of_ours_carries_the_configuration_only(name: str, tmp_path: Path) -> None:
    write_gguf(claiming(name), tmp_path / "model.gguf")
    assert open_gguf(tmp_path / "model.gguf").config[name] == LARGEST


@pytest.mark.parametrize("name", CLAIMS[:-2])
def test_gguf_of_stock_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClusCompError):
        write_dense_gguf(claiming(name), tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_transformers_is_not_asked_to_build_layers_without_end(name: str, nested: bool) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    claim = {name: LARGEST}
    with pytest.raises(UnsupportedError, match=name):
        build_skeleton(config | ({"text_config": claim} if nested else claim))
