"""Checkpoints that are no causal language models: of the base class, without a head, with another one, with more layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import cluscomp_runtime.hf  # noqa: F401 - registers the quantizer
from cluscomp_export.conversion.convert import ConversionOptions, ConversionReport, convert, prepare
from cluscomp_export.inspection.verify import verify
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_runtime import load

LOSSLESS: dict[str, Any] = {"dim": 4, "clusters": 60000}
"""A cluster for every vector: what is left of the error is that of float16."""


@pytest.fixture
def save(tmp_path: Path, stories_folder: Path) -> Any:
    """Saves a tiny Qwen3 of a class of transformers, with a tokenizer, as the folder `source`."""

    def saved(kind: str = "Qwen3Model", **options: Any) -> Path:
        torch.manual_seed(0)
        settings = {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        config = transformers.Qwen3Config(**{**settings, **options})
        folder = tmp_path / "source"
        getattr(transformers, kind)(config).eval().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(stories_folder / name, folder)
        return folder

    return saved


def calibrated(source: Path, output: Path, **options: Any) -> ConversionReport:
    """Error feedback on a few windows, in the folder beside the source."""
    return convert(source, output, ConversionOptions(**{"bits": 4, "calibration_windows": 2, **options}))


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model(torch.tensor([[1, 403, 407, 261]]))[0]
    return states


def without_prefix(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = {name.removeprefix("model."): values for name, values in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tied_base_checkpoint_is_a_language_model(save: Any, tmp_path: Path) -> None:
    source = save("Qwen3ForCausalLM", tie_word_embeddings=True)
    with_names = open_source(source)
    without_prefix(source)
    assert {*open_source(source).tensors} == {*with_names.tensors}
    assert "added_prefix" not in with_names.provenance
    assert open_source(source).provenance["added_prefix"] == "model."
    report = calibrated(source, tmp_path / "out.clus")
    assert report.self_test
    assert verify(source, tmp_path / "out.clus").verdict == "derived"
    assert load(tmp_path / "out.clus", selftest=True).generate("Once", max_new_tokens=2).new_tokens == 2


def test_a_base_checkpoint_without_a_head_is_calibrated_and_gives_hidden_states(save: Any, tmp_path: Path) -> None:
    source = save()
    report = calibrated(source, tmp_path / "out.clus")
    assert [text for text in report.warnings if "no head" in text] == [
        "no self-test record: the model has no head: it gives hidden states, as embedding models do, and no next token"
    ]
    assert open_source(tmp_path / "out.clus").provenance["options"]["feedback"]
    convert(source, tmp_path / "lossless.clus", ConversionOptions(**LOSSLESS))
    convert(tmp_path / "lossless.clus", tmp_path / "hf", ConversionOptions(to="hf"))
    expected, found = (hidden(transformers.AutoModel.from_pretrained(folder)) for folder in (source, tmp_path / "hf"))
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
    with pytest.raises(UnsupportedError, match="hidden states"):
        load(tmp_path / "out.clus")


@pytest.mark.parametrize("kind", ["Qwen3Model", "Qwen3ForSequenceClassification"])
def test_the_graph_of_a_model_without_a_head_gives_hidden_states(save: Any, tmp_path: Path, kind: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    source = save(kind, tie_word_embeddings=kind != "Qwen3Model")
    convert(source, tmp_path / "out", ConversionOptions(**LOSSLESS, to="onnx"))
    convert(tmp_path / "out", tmp_path / "out.gguf", ConversionOptions(to="gguf"))
    assert open_source(tmp_path / "out.gguf").digest() == open_source(tmp_path / "out").digest()
    session = runtime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    ids = np.array([[1, 403, 407, 261]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
    given |= {port.name: np.zeros((1, 2, 0, 8), np.float32) for port in session.get_inputs() if port.name.startswith("past")}
    expected = hidden(transformers.AutoModel.from_pretrained(source))
    assert session.get_outputs()[0].name == "last_hidden_state"
    found = torch.from_numpy(session.run(["last_hidden_state"], given)[0])
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def test_recovery_needs_predictions(save: Any) -> None:
    with pytest.raises(UnsupportedError, match="no head") as error:
        prepare(save(), ConversionOptions(bits=4, effort="best"))
    assert "`effort='balanced'`" in (error.value.problems[0].remedy or "")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_classifies_stays_dense_and_the_blocks_are_calibrated(save: Any, tmp_path: Path, tied: bool) -> None:
    source = save("Qwen3ForSequenceClassification", num_labels=2, pad_token_id=0, tie_word_embeddings=tied)
    report = calibrated(source, tmp_path / "out.clus", embedding_bits=6)
    assert any("another head" in text for text in report.warnings)
    model = open_source(tmp_path / "out.clus")
    assert {*model.tensors} - {*model.clustered} >= {"score.weight"}
    assert "model.embed_tokens.weight" in model.clustered
    convert(source, tmp_path / "hf", ConversionOptions(**LOSSLESS, to="hf"))
    expected, found = (
        hidden(transformers.AutoModelForSequenceClassification.from_pretrained(folder)) for folder in (source, tmp_path / "hf")
    )
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def test_layers_that_predict_further_tokens_are_kept_and_not_run(save: Any, tmp_path: Path) -> None:
    source = save("Qwen3ForCausalLM")
    tensors = load_file(source / "model.safetensors")
    layer = {
        name.replace("model.layers.0", "mtp.layers.0"): values.clone()
        for name, values in tensors.items()
        if name.startswith("model.layers.0.")
    }
    save_file({**tensors, **layer}, source / "model.safetensors", metadata={"format": "pt"})
    report = calibrated(source, tmp_path / "out.clus")
    assert report.self_test
    assert {*open_source(tmp_path / "out.clus").tensors} == {*tensors, *layer}
    assert load(tmp_path / "out.clus", selftest=True)


def test_a_tensor_that_is_missing_from_the_blocks_is_missing(save: Any) -> None:
    source = save()
    tensors = load_file(source / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        prepare(source, ConversionOptions(bits=4))
