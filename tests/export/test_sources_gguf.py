"""GGUF models against the `transformers` models they were written from and against transformers' own GGUF loader."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from sources_gguf_writer import add_tensors, finish, interleave_halves, start_writer, tiny_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cluscomp_export.sources import linear_tensors, open_source, source_bytes
from cluscomp_export.sources.gguf import decoding
from cluscomp_export.sources.gguf.decoding import undo_rope_permutation
from cluscomp_formats.errors import ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_formats.files.stored_file import Stamp, read_again
from cluscomp_formats.ir import Model


def decoded(model: Model) -> dict[str, np.ndarray]:
    return {name: tensor.decode() for name, tensor in model.tensors.items()}


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By name; of tied parameters the first."""
    return {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def load_with_transformers(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


CASES: list[Any] = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3-biases"),
]


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_float32_files_give_back_the_model_they_were_written_from(tmp_path: Path, arch: str, options: Any) -> None:
    original = tiny_model(arch, **options)
    model = open_source(write_gguf(tmp_path / "model.gguf", original, arch))
    assert_same(decoded(model), parameters(original))
    assert model.provenance["stored_bits"] == {}


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_the_configuration_makes_the_same_model(tmp_path: Path, arch: str, options: Any) -> None:
    original = tiny_model(arch, **options)
    model = open_source(write_gguf(tmp_path / "model.gguf", original, arch))
    config = AutoConfig.for_model(**{key: value for key, value in model.config.items() if key != "architectures"})
    rebuilt = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert type(rebuilt) is type(original)
    assert model.config["architectures"] == [type(original).__name__]
    state = {name: torch.from_numpy(values.copy()) for name, values in decoded(model).items()}
    missing, unexpected = rebuilt.load_state_dict(state, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert not unexpected
    rebuilt.tie_weights()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(tokens).logits, original.eval()(tokens).logits)


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_decodes_like_transformers(tmp_path: Path, arch: str, type_name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model(arch), arch, type_name)
    assert_same(decoded(open_source(path)), parameters(load_with_transformers(path)))


def test_plain_types_keep_their_dtype_and_bits(tmp_path: Path) -> None:
    original = tiny_model("llama").to(torch.bfloat16).float()
    half = open_source(write_gguf(tmp_path / "f16.gguf", original, "llama", "F16"))
    brain = open_source(write_gguf(tmp_path / "bf16.gguf", original, "llama", "BF16"))
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = dict(original.named_parameters())[name].detach()
    assert (half.config["torch_dtype"], brain.config["torch_dtype"]) == ("float16", "bfloat16")
    for model, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        array = model.tensors[name].values
        assert array.dtype == str(dtype).removeprefix("torch.")
        bits = array.read().view(np.int16)
        np.testing.assert_array_equal(bits, expected.to(dtype).view(torch.int16).numpy())


@pytest.mark.parametrize(("type_name", "bits"), [("Q8_0", 8.5), ("Q4_1", 5.0), ("Q4_0", 4.5), ("F16", None)])
def test_stored_bits_name_what_is_stored_in_less_than_sixteen(tmp_path: Path, type_name: str, bits: float | None) -> None:
    model = open_source(write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", type_name))
    matrices = ["model.embed_tokens.weight", *linear_tensors(model), "lm_head.weight"]
    assert model.provenance["stored_bits"] == ({} if bits is None else dict.fromkeys(matrices, bits))


def test_permutation_by_hand() -> None:
    # Two heads of four rows. Stored, the halves (0, 1) and (2, 3) of a head are interleaved: 0 2 1 3.
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    np.testing.assert_array_equal(undo_rope_permutation(stored, 2)[:, 0], np.arange(8))
    rows = np.random.default_rng(1).standard_normal((48, 5))
    np.testing.assert_array_equal(undo_rope_permutation(interleave_halves(rows, 3), 3), rows)


def test_opening_reads_no_payload_and_every_read_is_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", "Q8_0")
    mapped: list[str] = []

    def spy(path: Path, stamp: Stamp, offset: int, length: int, owner: str) -> Any:
        mapped.append(owner)
        return read_again(path, stamp, offset, length, owner)

    monkeypatch.setattr(decoding, "read_again", spy)
    model = open_source(path)
    assert sum(tensor.num_weights for tensor in model.tensors.values()) > 0
    assert mapped == []
    model.tensors["model.layers.0.mlp.up_proj.weight"].decode()
    assert len(mapped) == 1


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", "Q8_0")
    model = open_source(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InvalidFileError, match="changed or deleted"):
        model.tensors["model.layers.0.mlp.up_proj.weight"].decode()


def test_opening_twice_gives_the_same_content_and_provenance(tmp_path: Path) -> None:
    original = tiny_model("llama")
    first = open_source(write_gguf(tmp_path / "a.gguf", original, "llama", "Q4_1"))
    second = open_source(write_gguf(tmp_path / "b.gguf", original, "llama", "Q4_1"))
    assert first.digest() == second.digest()
    assert first.provenance == second.provenance
    assert str(tmp_path) not in repr(first.provenance)


def with_extra(path: Path, change: Any, **options: Any) -> Path:
    """A tiny Llama file with metadata or tensors added by `change(writer)`."""
    model = tiny_model("llama", **options)
    writer = start_writer(path, "llama", model.config)
    change(writer)
    add_tensors(writer, model, "llama", "F32")
    finish(writer)
    return path


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    divisors = (plain / scaled).numpy().astype(np.float32)

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", divisors)

    sizes = {"head_dim": 128, "hidden_size": 512, "rope_theta": 500000.0}
    model = open_source(with_extra(tmp_path / "model.gguf", change, **sizes))
    # transformers adds rope_theta to the dictionary it was given.
    assert model.config["rope_scaling"] == {key: value for key, value in scaling.items() if key != "rope_theta"}
    assert "rope_freqs.weight" not in model.tensors


def test_divisors_of_another_formula_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 5, 8, dtype=np.float32)
    path = with_extra(tmp_path / "model.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(UnsupportedError) as caught:
        open_source(path)
    assert caught.value.problems[0].kind == "rope_scaling"


def test_divisors_of_one_mean_no_scaling(tmp_path: Path) -> None:
    divisors = np.ones(8, dtype=np.float32)
    path = with_extra(tmp_path / "model.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    assert "rope_scaling" not in open_source(path).config


def test_declared_scalings(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    assert open_source(with_extra(tmp_path / "l.gguf", linear)).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert open_source(with_extra(tmp_path / "y.gguf", yarn)).config["rope_scaling"] == expected
    with pytest.raises(UnsupportedError, match="longrope"):
        open_source(with_extra(tmp_path / "r.gguf", longrope))


def refusal(path: Path) -> ClusCompError:
    with pytest.raises((InvalidFileError, UnsupportedError)) as caught:
        open_source(path)
    assert all(problem.file for problem in caught.value.problems)
    return caught.value


def test_unknown_architectures_are_named_with_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    problem = refusal(tmp_path / "model.gguf").problems[0]
    assert (problem.kind, problem.found) == ("unknown_architecture", "mamba")
    assert problem.expected == "llama, qwen2, qwen3, gemma3, qwen3moe"


def test_missing_and_misshapen_tensors_are_reported_together(tmp_path: Path) -> None:
    model = tiny_model("llama")
    writer = start_writer(tmp_path / "model.gguf", "llama", model.config)
    writer.add_tensor("token_embd.weight", np.zeros((160, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    for number in range(2):
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.zeros(64, np.float32))
    finish(writer)
    problems = refusal(tmp_path / "model.gguf").problems
    assert {problem.kind for problem in problems} == {"missing_tensor", "wrong_shape"}
    # Eight tensors of each of two layers are missing, the final norm is too short.
    assert len(problems) == 17
    shape = next(problem for problem in problems if problem.kind == "wrong_shape")
    assert (shape.tensor, shape.found, shape.expected) == ("output_norm.weight", "[32]", "[64]")


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    extra = np.zeros((4, 64), np.float32)
    path = with_extra(tmp_path / "model.gguf", lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", extra))
    problem = refusal(path).problems[0]
    assert (problem.kind, problem.found) == ("unknown_tensor", "blk.0.ffn_gate_inp.weight")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda writer: writer.add_expert_count(4), "experts"),
        (lambda writer: writer.add_sliding_window(32), "sliding_window"),
        (lambda writer: writer.add_key_length(8), "head_sizes"),
        (lambda writer: writer.add_key_length(0), "bad_key"),
        (lambda writer: writer.add_string("llama.rope.scaling.factor", "four"), "bad_key"),
        (lambda writer: writer.add_float64("llama.rope.scaling.factor", 1e300), "bad_key"),
        (lambda writer: writer.add_float64("llama.rope.scaling.factor", 1e-300), "bad_key"),
    ],
)
def test_models_hugging_face_has_no_equal_of_are_refused(tmp_path: Path, change: Any, kind: str) -> None:
    assert refusal(with_extra(tmp_path / "model.gguf", change)).problems[0].kind == kind


def test_a_vocabulary_that_is_no_list_is_no_size(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key in ("embedding_length", "block_count", "feed_forward_length", "context_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.attention.key_length", 2)
    writer.add_uint32("tokenizer.ggml.tokens", 7)
    for number in range(2):
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.zeros(2, np.float32))
    finish(writer)
    problems = refusal(tmp_path / "model.gguf").problems
    assert ("missing_tensor", "token_embd.weight", "[1, 2]") in {(p.kind, p.tensor, p.expected) for p in problems}


def test_a_name_that_is_no_text_does_not_reach_the_provenance(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    path.write_bytes(path.read_bytes().replace(b"tiny", b"ti\xffy", 1))
    assert open_source(path).provenance["name"] == "ti\ufffdy"


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_names_that_are_no_part_of_a_split_file(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / name, tiny_model("llama"), "llama")
    assert open_source(path).tensors


def test_all_missing_hyperparameters_are_reported_at_once(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((160, 64), np.float32))
    finish(writer)
    messages = [problem.message for problem in refusal(tmp_path / "model.gguf").problems]
    for key in ("embedding_length", "block_count", "attention.head_count", "feed_forward_length", "context_length"):
        assert any(f"llama.{key} " in message for message in messages), key


def test_types_gguf_py_cannot_decode_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    q8_1 = gguf.GGMLQuantizationType.Q8_1
    block_bytes = gguf.GGML_QUANT_SIZES[q8_1][1]
    writer.add_tensor("token_embd.weight", np.zeros((4, block_bytes), np.uint8), raw_dtype=q8_1)
    finish(writer)
    problem = refusal(tmp_path / "model.gguf").problems[0]
    assert (problem.kind, problem.tensor, problem.found) == ("unsupported_type", "token_embd.weight", "Q8_1")


def split_model(tmp_path: Path) -> list[Path]:
    """A tiny model in parts, cut by gguf-py itself."""
    model = tiny_model("llama")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=8)
    whole = start_writer(tmp_path / "unused.gguf", "llama", model.config)
    writer.kv_data = whole.kv_data
    add_tensors(writer, model, "llama", "F32")
    finish(writer)
    return sorted(tmp_path.glob("model-*.gguf"))


def test_split_files_open_from_any_part(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    assert len(parts) == 3
    expected = parameters(tiny_model("llama"))
    for part in parts:
        assert_same(decoded(open_source(part)), expected)
    assert source_bytes(parts[1]) == sum(part.stat().st_size for part in parts)


def test_split_files_with_parts_missing_or_exchanged_are_refused(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    content = parts[1].read_bytes()
    parts[1].unlink()
    problems = refusal(parts[0]).problems
    assert [(problem.kind, problem.file) for problem in problems] == [("missing", str(parts[1]))]
    parts[1].write_bytes(parts[2].read_bytes())
    assert {problem.kind for problem in refusal(parts[0]).problems} == {"bad_split", "duplicate_tensor", "missing_tensor"}
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(content)
    assert refusal(alone).problems[0].kind == "split_name"


def test_without_the_gguf_package_the_remedy_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"pip install cluscomp-export\[gguf\]"):
        open_source(path)


def test_a_file_that_shrinks_after_opening_is_reported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    model = open_source(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidFileError, match="changed or deleted"):
        model.tensors["model.norm.weight"].decode()
