"""`save_pretrained` writes the loaded folder with the changes since; nothing is lost, and values are read back unchanged."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import hf_checkpoints
import hf_models
import numpy as np
import pytest
import torch
import transformers
from hf_checkpoints import checkpoint, run, tolerance
from hf_models import MODELS, VOCABULARY, clustered_model, ids, outputs, weights_of, with_decoded_weights, written

from cluscomp_formats.errors import InvalidRequestError, OutputExistsError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import Array
from cluscomp_runtime.hf.modules import ClusteredModule


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
def test_saving_gives_the_folder_back(name: str, tmp_path: Path) -> None:
    _, _, stored = written(name, tmp_path / "m")
    model = MODELS[name][1].from_pretrained(tmp_path / "m")
    for target in ("n", "n", "m"):
        model.save_pretrained(tmp_path / target)
        assert open_hf(tmp_path / target, check=True).digest() == stored.digest()
    assert {path.name: path.read_bytes() for path in (tmp_path / "n").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()
    }


def test_saving_keeps_files_and_records_and_shards(tmp_path: Path) -> None:
    _, _, stored = written("llama", tmp_path / "m")
    stored = replace(
        stored, files={"notes.txt": Array.of(np.frombuffer(b"hello", np.uint8))}, provenance={"a": 1}, self_test={"version": 1}
    )
    write_hf(stored, tmp_path / "n", shard_bytes=2000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    model.save_pretrained(tmp_path / "o", max_shard_size="2KB")
    assert {path.name: path.read_bytes() for path in (tmp_path / "n").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()
    }
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 1
    assert (tmp_path / "o" / "notes.txt").read_bytes() == b"hello"


def test_saving_writes_what_changed_since_loading(tmp_path: Path) -> None:
    _, _, stored = written("llama", tmp_path / "m")
    write_hf(replace(stored, self_test={"version": 1}), tmp_path / "n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    model.model.norm.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "o")
    found = open_hf(tmp_path / "o", check=True)
    assert set(found.tensors["model.norm.weight"].decode()) == {0.25}
    assert found.self_test is None
    others = [key for key in stored.tensors if key != "model.norm.weight"]
    assert all(np.array_equal(found.tensors[key].decode(), stored.tensors[key].decode()) for key in others)


def test_saving_leaves_folders_of_others_alone(tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    (tmp_path / "n").mkdir()
    model.save_pretrained(tmp_path / "n")
    (tmp_path / "n" / "diary.txt").write_text("mine")
    with pytest.raises(OutputExistsError) as caught:
        model.save_pretrained(tmp_path / "n")
    assert caught.value.problems[0].kind == "output_is_foreign"
    assert (tmp_path / "n" / "diary.txt").read_text() == "mine"
    model.save_pretrained(tmp_path / "o", is_main_process=False)
    assert not (tmp_path / "o").exists()
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"max_shard_size": "big"}):
        with pytest.raises(InvalidRequestError):
            model.save_pretrained(tmp_path / "o", **options)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [VOCABULARY + 5, VOCABULARY - 5])
@pytest.mark.parametrize("clustered", [False, True])
def test_a_resized_embedding_is_saved(name: str, rows: int, clustered: bool, tmp_path: Path) -> None:
    original = MODELS[name][0]()
    weights = weights_of(name, original)
    stored = clustered_model(original, weights if clustered else weights[:-1])
    write_hf(replace(stored, self_test={"version": 1}), tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match="decoded to dense for resizing") if clustered else contextlib.nullcontext():
        model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.num_parameters() == sum(parameter.numel() for parameter in MODELS[name][0](vocab_size=rows).parameters())
    inputs = ids() % (VOCABULARY - 5) if rows < VOCABULARY else torch.cat([ids(), torch.full((2, 1), rows - 1)], 1)
    expected = outputs(model, inputs)
    assert expected.shape[-1] == rows
    model.save_pretrained(tmp_path / "n")
    found = open_hf(tmp_path / "n", check=True)
    assert found.self_test is None
    assert found.config["vocab_size"] == rows
    assert found.clustered.keys() == stored.clustered.keys() - {"model.embed_tokens.weight"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert torch.equal(outputs(again, inputs), expected)


def test_resizing_to_the_same_size_changes_nothing(tmp_path: Path) -> None:
    _, _, stored = written("qwen3", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.resize_token_embeddings(VOCABULARY)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.save_pretrained(tmp_path / "n")
    assert open_hf(tmp_path / "n", check=True).digest() == stored.digest()


@pytest.mark.filterwarnings("ignore:.* merged by transformers")
def test_changes_of_renamed_and_of_merged_tensors_are_saved(tmp_path: Path) -> None:
    for number, (make, key) in enumerate(
        [
            (hf_checkpoints.granitemoe, "model.layers.0.block_sparse_moe.experts.gate_up_proj"),
            (hf_checkpoints.qwen3_moe, "model.layers.0.mlp.experts.gate_up_proj"),
        ]
    ):
        made = checkpoint(make, tmp_path / str(number), dense="router|gate")
        model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
        model.get_parameter(key).mul_(2)
        expected = run(model)
        model.save_pretrained(tmp_path / f"{number}n")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}n")
        assert torch.equal(run(again), expected)
        # The experts of the other layer are unchanged.
        kept = open_hf(tmp_path / f"{number}n").clustered
        assert all(name in kept for name in made.stored.clustered if ".layers.1." in name)


def test_a_tie_that_is_broken_is_saved(tmp_path: Path) -> None:
    original = hf_models.qwen3()
    write_hf(clustered_model(original, weights_of("qwen3", original)[:-1]), tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "n")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert torch.equal(outputs(again, ids()), outputs(model, ids()))


def test_settings_are_saved(tmp_path: Path) -> None:
    _, _, stored = written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, pad_token_id=3)
    model.config.use_cache = False
    model.config.id2label = {0: "good", 1: "bad"}
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(tmp_path / "n")
    found = open_hf(tmp_path / "n", check=True)
    # The dtype of loading is not a change.
    expected = {**stored.config, "use_cache": False, "pad_token_id": 3, "id2label": {"0": "good", "1": "bad"}}
    assert {**found.config, "label2id": None} == {**expected, "label2id": None}
    assert all(np.array_equal(found.tensors[name].decode(), stored.tensors[name].decode()) for name in stored.tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert (again.config.use_cache, again.config.id2label) == (False, {0: "good", 1: "bad"})
    assert (again.generation_config.temperature, again.generation_config.do_sample) == (0.5, True)
    again.save_pretrained(tmp_path / "o")
    assert open_hf(tmp_path / "o").digest() == found.digest()


def test_settings_of_the_text_part_are_saved_in_their_place(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.llama4, tmp_path, "language_model")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    model.config.rms_norm_eps = 1e-4
    model.save_pretrained(tmp_path / "n")
    found = open_hf(tmp_path / "n").config
    assert found == {**made.stored.config, "text_config": {**made.stored.config["text_config"], "rms_norm_eps": 1e-4}}


@pytest.mark.parametrize(
    "edit", [{"num_hidden_layers": 1}, {"intermediate_size": 52}, {"vocab_size": 97}, {"hidden_act": "unheard of"}]
)
def test_settings_that_contradict_the_weights_are_refused(edit: dict[str, object], tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for name, value in edit.items():
        setattr(model.config, name, value)
    with pytest.raises(InvalidRequestError) as caught:
        model.save_pretrained(tmp_path / "n")
    assert [(problem.kind, problem.found) for problem in caught.value.problems] == [("cannot_save", next(iter(edit)))]
    assert not (tmp_path / "n").exists()


def test_parameters_that_have_no_place_in_the_folder_are_refused(tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidRequestError) as caught:
        model.save_pretrained(tmp_path / "n")
    keys = ["model.layers.0.mlp.up_proj.weight", "model.extra.weight", "model.extra.bias"]
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("cannot_save", key) for key in keys]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_memory_are_those_the_weights_stand_for(name: str, tmp_path: Path) -> None:
    original, weights, _ = written(name, tmp_path / "m")
    model = MODELS[name][1].from_pretrained(tmp_path / "m")
    for exclude in (False, True):
        found = model.num_parameters(exclude_embeddings=exclude)
        assert found == original.num_parameters(exclude_embeddings=exclude), exclude
    assert model.num_parameters(only_trainable=True) == 0
    stored = sum(-(-weight.own_bits // 8) for weight in weights)
    stored += sum(stage.codebook.values.nbytes for weight in weights for stage in weight.stages)
    dense = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == stored + dense < original.get_memory_footprint()


@pytest.mark.filterwarnings("ignore:.* decoded to dense")
def test_weights_that_a_model_rescales_are_saved_as_they_were(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.rwkv, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    expected = run(transformers.AutoModelForCausalLM.from_pretrained(made.plain))
    for _ in range(2):
        assert (run(model) - expected).abs().max().item() <= tolerance(expected)
        model.save_pretrained(tmp_path / "n")
        assert open_hf(tmp_path / "n", check=True).digest() == made.stored.digest()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_dense_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    original, weights, _ = written(name, tmp_path / "m")
    model = MODELS[name][1].from_pretrained(tmp_path / "m").dequantize()
    assert not any(isinstance(module, ClusteredModule) for module in model.modules())
    oracle = with_decoded_weights(original, weights, torch.float32)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        key: tuple(value.shape) for key, value in oracle.state_dict().items()
    }
    # The two scales of a transposed weight are multiplied in the other order.
    state = oracle.state_dict()
    assert all(torch.allclose(value, state[key], rtol=1e-6, atol=0) for key, value in model.state_dict().items())
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "n")
    again = MODELS[name][1].from_pretrained(tmp_path / "n")
    assert not hasattr(again.config, "quantization_config")
    assert again.num_parameters() == model.num_parameters()
    assert torch.equal(outputs(again, ids()), outputs(model, ids()))


def test_a_model_is_pickled_with_its_arrays(tmp_path: Path) -> None:
    """The folder may not exist where the pickle is read."""
    _, _, stored = written("qwen3", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = outputs(model, ids())
    file = io.BytesIO()
    torch.save(model, file)
    size = file.tell()
    del model
    shutil.rmtree(tmp_path / "m")
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(outputs(again, ids()), expected)
    assert again.lm_head.matrix() is again.model.embed_tokens.matrix()
    again.save_pretrained(tmp_path / "n")
    assert open_hf(tmp_path / "n", check=True).digest() == stored.digest()
    # Each array is stored once, even with several references; modules and names dominate in so small a model.
    assert size < 4 * sum(path.stat().st_size for path in (tmp_path / "n").iterdir())
