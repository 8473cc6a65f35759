"""Infinity and NaN in config.json: read as transformers reads them, stored as it writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hf_models
import pytest
import torch
import transformers

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.evaluation.transformers_model import TransformersModel
from cluscomp_export.sources import open_source
from cluscomp_export.sources.special_floats import load_config, with_floats
from cluscomp_formats.errors import InvalidFileError

STORED = '{"limit": [0.0, Infinity], "deep": {"low": -Infinity, "none": NaN}, "huge": 1e999, "small": -1e999, "one": 1.5}'


def test_they_become_what_transformers_writes() -> None:
    assert load_config(STORED) == {
        "limit": [0.0, {"__float__": "Infinity"}],
        "deep": {"low": {"__float__": "-Infinity"}, "none": {"__float__": "NaN"}},
        "huge": {"__float__": "Infinity"},
        "small": {"__float__": "-Infinity"},
        "one": 1.5,
    }
    ours = transformers.PreTrainedConfig._encode_special_floats(json.loads(STORED))
    assert ours == load_config(STORED)


def test_and_back() -> None:
    numbers = with_floats(load_config(STORED))
    assert numbers["limit"] == [0.0, math.inf]
    assert math.isnan(numbers["deep"].pop("none"))
    assert (numbers["deep"], numbers["huge"], numbers["small"]) == ({"low": -math.inf}, math.inf, -math.inf)
    assert with_floats({"a": {"__float__": "many"}, "b": {"__float__": "NaN", "c": 1}}) == {
        "a": {"__float__": "many"},
        "b": {"__float__": "NaN", "c": 1},
    }


@pytest.mark.parametrize("form", ["Infinity", '{"__float__": "Infinity"}'])
def test_a_configuration_with_infinity_is_converted_opened_and_run(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    )
    peer = transformers.Mamba2ForCausalLM(config).eval()
    source = tmp_path / "source"
    peer.save_pretrained(source)
    stored = json.loads((source / "config.json").read_text()) | {"time_step_limit": [0.0, None]}
    (source / "config.json").write_text(json.dumps(stored).replace("null]", f"{form}]", 1))
    assert transformers.AutoConfig.from_pretrained(source).time_step_limit == [0.0, math.inf]
    convert(source, tmp_path / "hf", ConversionOptions(dim=4, clusters=60000, to="hf"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").time_step_limit == [0.0, math.inf]
    ids = torch.randint(0, 64, (1, 8))
    with torch.no_grad():
        expected = peer(ids).logits
    found = TransformersModel(open_source(tmp_path / "hf")).forward(ids)
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def test_an_index_has_no_use_for_them(tmp_path: Path) -> None:
    hf_models.llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = math.inf
    index.write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match=r"weight_map|outside the folder"):
        open_source(tmp_path)
