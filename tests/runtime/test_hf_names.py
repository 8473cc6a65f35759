"""Stored tensors are mapped to the same parameters as in transformers, and no parameter is without a value."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_checkpoints
import hf_models
import pytest
import torch
import transformers
from hf_checkpoints import checkpoint, run, tolerance
from hf_models import clustered_model, random_weight, weights_of
from runtime_models import byte_tokenizer_files

from cluscomp_export.evaluation.transformers_model import TransformersModel
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_runtime.hf.modules import ClusteredModule

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (hf_checkpoints.llava, "AutoModelForImageTextToText"),
    "vit": (hf_checkpoints.vit, "AutoModelForImageClassification"),
    "gpt_neox": (hf_checkpoints.gpt_neox, "AutoModelForCausalLM"),
    "granitemoe": (hf_checkpoints.granitemoe, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("name", CASES)
def test_renamed_tensors_find_their_modules(name: str, tmp_path: Path) -> None:
    make, auto = CASES[name]
    made = checkpoint(make, tmp_path, r"\.\d+\.|embed", "router")
    expected = run(getattr(transformers, auto).from_pretrained(made.plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = getattr(transformers, auto).from_pretrained(made.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(isinstance(module, ClusteredModule) for module in model.modules()) == len(made.stored.clustered) > 0
    assert (run(model) - expected).abs().max().item() <= tolerance(expected)
    model.save_pretrained(tmp_path / "again")
    assert open_hf(tmp_path / "again", check=True).digest() == made.stored.digest()


def test_a_base_model_of_renamed_parts_gets_them(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.llava, tmp_path)
    expected = run(transformers.AutoModel.from_pretrained(made.plain))
    found = run(transformers.AutoModel.from_pretrained(made.folder))
    assert (found - expected).abs().max().item() <= tolerance(expected)


# With one dense expert in the first layer, and with none.
@pytest.mark.parametrize("dense", [r"layers\.0\.mlp\.experts\.(0|2)\.", r"layers\.0\.mlp\.experts\.3\.up_proj", "$^"])
def test_merged_experts_are_decoded_and_said_to_be(dense: str, tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.qwen3_moe, tmp_path, dense=rf"mlp\.gate\.|{dense}")
    expected = run(transformers.AutoModelForCausalLM.from_pretrained(made.plain))
    experts = sum(".experts." in name for name in made.stored.clustered)
    with pytest.warns(UserWarning, match=rf"{experts} clustered weights .* merged by transformers.* decoded to dense, 0\.0 MB"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (run(model) - expected).abs().max().item() <= tolerance(expected)
    model.save_pretrained(tmp_path / "again")
    assert open_hf(tmp_path / "again", check=True).digest() == made.stored.digest()


def test_evaluation_finds_renamed_and_merged_tensors(tmp_path: Path) -> None:
    for number, make in enumerate((hf_checkpoints.gpt_neox, hf_checkpoints.qwen3_moe)):
        made = checkpoint(make, tmp_path / str(number), r"\.\d+\.|embed")
        model = transformers.AutoModelForCausalLM.from_pretrained(made.plain)
        files = byte_tokenizer_files()
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            expected = model(ids).logits
        evaluated = TransformersModel(replace(made.stored, files=files))
        experts = sum(".experts." in name for name in made.stored.clustered)
        assert (f"{experts} matrices that transformers merges" in evaluated.kernel_summary) == (experts > 0)
        found = evaluated.forward(ids)
        assert (found - expected).abs().max().item() <= tolerance(expected)


def test_a_merge_that_does_not_work_out_is_refused(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.qwen3_moe, tmp_path)
    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = {name: tensor for name, tensor in made.stored.tensors.items() if name != lost}
    write_hf(replace(made.stored, tensors=tensors), tmp_path / "n")
    with pytest.raises((UnsupportedError, InvalidFileError, RuntimeError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")


def test_a_parameter_without_a_value_is_named(tmp_path: Path) -> None:
    """transformers would initialize it at random."""
    original = hf_models.llama(tie_word_embeddings=False)
    stored = clustered_model(original, weights_of("llama", original))
    for lost in ("lm_head.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors = {name: tensor for name, tensor in stored.tensors.items() if name != lost}
        write_hf(replace(stored, tensors=tensors), tmp_path / "m", force=True)
        with pytest.raises(InvalidFileError) as caught:
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("missing_tensor", lost)]


def test_a_class_with_another_head_is_refused(tmp_path: Path) -> None:
    hf_models.written("llama", tmp_path / "m")
    with pytest.raises(InvalidFileError, match=r"score\.weight"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")


def test_weights_that_transformers_ignores_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example layers for multi-token prediction, which no class of transformers has."""
    original = hf_models.llama()
    further = random_weight("model.layers.2.mlp.up_proj.weight", (48, 32))
    stored = clustered_model(original, [])
    stored = replace(stored, tensors={**stored.tensors, further.name: further})
    write_hf(stored, tmp_path / "m")
    with pytest.raises(UnsupportedError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert [problem.tensor for problem in caught.value.problems] == [further.name]
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^model\.layers\.2\."])
    with pytest.warns(UserWarning, match="were not loaded"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "n")
    assert open_hf(tmp_path / "n").digest() == stored.digest()


def test_the_text_part_of_a_multimodal_model_computes_in_the_dtype_of_the_whole(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.llama4, tmp_path, "language_model")
    expected = transformers.AutoModelForCausalLM.from_pretrained(made.plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    assert type(model) is transformers.Llama4ForCausalLM
    assert model.dtype == expected.dtype == torch.float32
    assert (run(model) - run(expected)).abs().max().item() <= tolerance(run(expected))


def test_four_ends_of_one_tie_share_the_clustered_embedding(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.t5, tmp_path, "shared")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.folder)
    expected = run(transformers.AutoModelForSeq2SeqLM.from_pretrained(made.plain))
    ends = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    assert len({id(end.matrix()) for end in ends}) == 1
    assert (run(model) - expected).abs().max().item() <= tolerance(expected)
    # Tying again only ties dense weights.
    model.tie_weights()


def test_what_transformers_keeps_in_float32_is_kept(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.t5, tmp_path, r"DenseReluDense")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.folder, dtype=torch.float16)
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert (layer.wi.weight.dtype, layer.wo.weight.dtype) == (torch.float16, torch.float32)


def test_of_two_names_of_one_parameter_the_second_is_refused(tmp_path: Path) -> None:
    made = checkpoint(hf_checkpoints.gpt_neox, tmp_path, "embed")
    second = replace(made.stored.clustered["embed_out.weight"], name="lm_head.weight")
    write_hf(replace(made.stored, tensors={**made.stored.tensors, second.name: second}, claimed_digest=None), tmp_path / "n")
    with pytest.raises(UnsupportedError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("no_module", second.name)]
