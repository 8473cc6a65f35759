"""Dense files against transformers' own GGUF loader, gguf-py's quantisers and a permutation written for the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from clustered_models import KEY, QUERY, with_clusters
from model_builders import tiny_llama
from sources_gguf_writer import gguf_name, interleave_halves, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidRequestError, OutputExistsError, StorageError, UnsupportedError
from cluscomp_formats.gguf import DENSE_TYPES, dense_gguf_notes, write_dense_gguf
from cluscomp_formats.ir import Array, DenseTensor, Model, float32_to_bfloat16

CASES: list[Any] = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen3", {}, id="qwen3"),
]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(24).reshape(1, 24) * 5


def ir_of(model: PreTrainedModel) -> Model:
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    config = {**model.config.to_dict(), "dtype": "float32"}
    return Model(config, {name: DenseTensor(name, Array.of(values)) for name, values in parameters.items()})


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(IDS % model.config.vocab_size).logits.numpy()


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# transformers learns of biases only from a configuration, and GGUF has no key for them, so it ignores these tensors.
@pytest.mark.parametrize(("arch", "options"), [case for case in CASES if "attention_bias" not in case.values[1]])
def test_transformers_computes_the_same_from_a_float32_file(tmp_path: Path, arch: str, options: Any) -> None:
    original = tiny_model(arch, **options)
    report = write_dense_gguf(ir_of(original), tmp_path / "m.gguf", gguf_type="f32")
    loaded = load(tmp_path / "m.gguf")
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == dict(original.named_parameters()).keys()
    for name, parameter in original.named_parameters():
        np.testing.assert_array_equal(parameters[name].detach(), parameter.detach(), err_msg=name)
    np.testing.assert_array_equal(logits(loaded), logits(original))
    assert report.kept_at_f16 == ()
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.num_tensors == len(tensors_of(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_our_own_source_reads_it_back(tmp_path: Path, arch: str, options: Any) -> None:
    original = ir_of(tiny_model(arch, **options))
    write_dense_gguf(original, tmp_path / "m.gguf", gguf_type="f32")
    found = open_source(tmp_path / "m.gguf")
    assert found.tensors.keys() == original.tensors.keys()
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.decode(), original.tensors[name].decode(), err_msg=name)


@pytest.mark.parametrize("gguf_type", DENSE_TYPES)
def test_types_hold_what_gguf_py_makes_of_the_weights(tmp_path: Path, gguf_type: str) -> None:
    original = tiny_model("llama")
    write_dense_gguf(ir_of(original), tmp_path / "m.gguf", gguf_type=gguf_type)
    found = tensors_of(tmp_path / "m.gguf")
    expected_type = gguf.GGMLQuantizationType[gguf_type.upper()]
    heads = {"q_proj": 4, "k_proj": 2}
    for name, parameter in original.named_parameters():
        values = parameter.detach().numpy()
        for kind, count in heads.items():
            if kind in name:
                values = interleave_halves(values, count)
        stored = found.pop(gguf_name(name))
        type_here = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else expected_type
        assert stored.tensor_type == type_here, name
        expected = gguf.quants.quantize(values, type_here)
        assert stored.data.tobytes() == expected.tobytes(), name
    assert found == {}
    keys = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert gguf.LlamaFileType(keys["general.file_type"].contents()).name.endswith(gguf_type.upper())
    assert keys["tokenizer.ggml.model"].contents() == "none"


def test_the_half_precision_file_is_right_to_half_precision(tmp_path: Path) -> None:
    original = tiny_model("llama")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(0.1)
    write_dense_gguf(ir_of(original), tmp_path / "m.gguf")
    half = load(tmp_path / "m.gguf")
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    np.testing.assert_array_equal(logits(half), logits(original))


def test_a_clustered_model_is_decoded(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="f32")
    found = tensors_of(tmp_path / "m.gguf")
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].data, interleave_halves(model.tensors[QUERY].decode(), 3))
    np.testing.assert_array_equal(found["blk.0.attn_k.weight"].data, interleave_halves(model.tensors[KEY].decode(), 1))
    loaded = load(tmp_path / "m.gguf")
    np.testing.assert_array_equal(dict(loaded.named_parameters())[QUERY].detach(), model.tensors[QUERY].decode())


def test_rows_that_are_no_whole_blocks_stay_at_half_precision_and_are_named(tmp_path: Path) -> None:
    model = tiny_llama(hidden=48, intermediate=64)
    report = write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="q8_0")
    matrices = {name for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    assert set(report.kept_at_f16) == {name for name in matrices if "down_proj" not in name}
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "m.gguf").items()}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    kept = [note for note in dense_gguf_notes(model, "q8_0") if "stored as f16" in note]
    assert len(kept) == 1
    assert kept[0].startswith(f"{len(report.kept_at_f16)} tensors")
    assert report.kept_at_f16[0] in kept[0]
    assert not any("stored as f16" in note for note in dense_gguf_notes(model, "f16"))


def test_bfloat16_weights_stay_what_they_are(tmp_path: Path) -> None:
    model = tiny_llama()
    bits = {name: float32_to_bfloat16(tensor.decode()) for name, tensor in model.tensors.items()}
    half = Model(model.config, {name: DenseTensor(name, Array.of(values, "bfloat16")) for name, values in bits.items()})
    write_dense_gguf(half, tmp_path / "m.gguf", gguf_type="bf16")
    stored = tensors_of(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    assert stored.data.tobytes() == bits["model.layers.1.mlp.down_proj.weight"].tobytes()


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_becomes_the_divisors_llama_cpp_reads(tmp_path: Path, spelling: str) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_llama()
    scaled = {**parameters, "rope_theta": 500000.0} if spelling == "rope_parameters" else parameters
    config = {**model.config, "rope_theta": 500000.0, spelling: scaled}
    write_dense_gguf(replace(model, config=config), tmp_path / "m.gguf")
    divisors = tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"].data
    theirs = LlamaConfig(hidden_size=24, num_attention_heads=3, rope_parameters={**parameters, "rope_theta": 500000.0})
    scaled_frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / divisors, scaled_frequencies, rtol=1e-6)
    assert open_source(tmp_path / "m.gguf").config["rope_scaling"] == parameters


def test_linear_scaling(tmp_path: Path) -> None:
    model = tiny_llama()
    config = {**model.config, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write_dense_gguf(replace(model, config=config), tmp_path / "m.gguf")
    assert open_source(tmp_path / "m.gguf").config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    model = tiny_llama()
    config = {**model.config, "model_type": "mistral", "sliding_window": 32}
    write_dense_gguf(replace(model, config=config), tmp_path / "m.gguf")
    keys = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert keys["general.architecture"].contents() == "llama"
    assert keys["llama.context_length"].contents() == 32


@pytest.mark.parametrize(
    ("change", "error", "kind"),
    [
        ({"model_type": "opt"}, UnsupportedError, "unknown_architecture"),
        ({"model_type": None}, UnsupportedError, "unknown_architecture"),
        ({"model_type": "qwen3", "attention_bias": True}, UnsupportedError, "unsupported_config"),
        ({"model_type": "qwen2", "rope_scaling": LLAMA3}, UnsupportedError, "unsupported_config"),
        ({"hidden_act": "gelu"}, UnsupportedError, "unsupported_config"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "unsupported_config"),
        ({"num_local_experts": 8}, UnsupportedError, "unsupported_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedError, "unsupported_config"),
        ({"rope_scaling": {"rope_type": "linear"}}, InvalidRequestError, "invalid_config"),
        ({"rope_scaling": "no"}, InvalidRequestError, "invalid_config"),
        ({"hidden_size": None}, InvalidRequestError, "invalid_config"),
        ({"hidden_size": True}, InvalidRequestError, "invalid_config"),
        ({"rms_norm_eps": -1}, InvalidRequestError, "invalid_config"),
        ({"num_key_value_heads": 2}, InvalidRequestError, "invalid_config"),
        ({"vocab_size": 51}, InvalidRequestError, "wrong_shape"),
        ({"num_hidden_layers": 3}, InvalidRequestError, "missing_tensor"),
        ({"num_hidden_layers": 1}, UnsupportedError, "unused_tensor"),
        ({"tie_word_embeddings": False}, InvalidRequestError, "missing_tensor"),
    ],
)
def test_what_cannot_be_expressed_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], kind: str
) -> None:
    model = tiny_llama()
    with pytest.raises(error) as caught:
        write_dense_gguf(replace(model, config={**model.config, **change}), tmp_path / "m.gguf")
    assert {problem.kind for problem in caught.value.problems} == {kind}  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def with_more(model: Model, name: str, shape: tuple[int, ...]) -> Model:
    return Model(model.config, {**model.tensors, name: DenseTensor(name, Array.of(np.full(shape, 0.5, np.float32)))})


def test_rotary_buffers_are_left_out(tmp_path: Path) -> None:
    write_dense_gguf(with_more(tiny_llama(), "model.layers.0.self_attn.rotary_emb.inv_freq", (4,)), tmp_path / "1.gguf")
    write_dense_gguf(tiny_llama(), tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_layers_that_predict_further_tokens_are_left_out_and_told(tmp_path: Path) -> None:
    model = with_more(tiny_llama(), "mtp.layers.0.mlp.up_proj.weight", (4, 4))
    write_dense_gguf(model, tmp_path / "1.gguf")
    write_dense_gguf(tiny_llama(), tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert any("multi-token prediction are omitted" in note for note in dense_gguf_notes(model, "f16"))


def test_a_head_of_its_own_wins_over_a_tied_one(tmp_path: Path) -> None:
    write_dense_gguf(with_more(tiny_llama(), "lm_head.weight", (50, 24)), tmp_path / "m.gguf")
    assert (tensors_of(tmp_path / "m.gguf")["output.weight"].data == 0.5).all()


@pytest.mark.parametrize(("value", "gguf_type"), [(1e5, "f16"), (np.nan, "f32"), (np.inf, "q8_0"), (np.inf, "bf16")])
def test_values_the_type_cannot_hold(tmp_path: Path, value: float, gguf_type: str) -> None:
    model = tiny_llama(hidden=96)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.tensors[name].decode().copy()
    weight[3, 4] = value
    tensors = {**model.tensors, name: DenseTensor(name, Array.of(weight))}
    with pytest.raises(InvalidRequestError) as caught:
        write_dense_gguf(Model(model.config, tensors), tmp_path / "m.gguf", gguf_type=gguf_type)
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("not_finite", name)]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_and_an_existing_file(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "m.gguf"
    with pytest.raises(InvalidRequestError) as caught:
        write_dense_gguf(model, path, gguf_type="q4_k")
    assert "q4_0" in str(caught.value)
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        write_dense_gguf(model, path)
    assert path.read_bytes() == b"precious"


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def fail() -> Any:
        raise OSError(5, "Input/output error")

    model = tiny_llama()
    name = "model.norm.weight"
    tensors = {**model.tensors, name: DenseTensor(name, Array((24,), "float32", fail))}
    with pytest.raises(StorageError) as caught:
        write_dense_gguf(Model(model.config, tensors), tmp_path / "m.gguf")
    assert caught.value.problems[0].tensor == name
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_aligned_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = write_dense_gguf(
        tiny_llama(), tmp_path / "m.gguf", on_progress=lambda phase, done, total: steps.append((done, total))
    )
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert len(steps) == report.num_tensors
    assert steps[-1] == (report.file_bytes - reader.data_offset,) * 2


def test_a_trained_model_says_the_same(tmp_path: Path, stories_folder: Path) -> None:
    write_dense_gguf(open_source(stories_folder), tmp_path / "m.gguf", gguf_type="f32")
    ours = load(tmp_path / "m.gguf")
    np.testing.assert_array_equal(logits(ours), logits(LlamaForCausalLM.from_pretrained(stories_folder)))
