"""Hugging Face folders: lossless reading, tied heads, side files, and every way a folder can be broken."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sources_gguf_writer import SIZES, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from cluscomp_export.sources import linear_tensors, open_source, source_bytes
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import DTYPES, Model

INDEX = "model.safetensors.index.json"


def save(folder: Path, arch: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    model = tiny_model(arch, **options).to(dtype)
    model.save_pretrained(folder)
    return model


def save_sharded(folder: Path) -> list[str]:
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    return names


def change_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))


def problems_of(
    path: Path, error: type[InvalidFileError | UnsupportedError] = InvalidFileError
) -> list[tuple[str, str | None]]:
    with pytest.raises(error) as caught:
        open_source(path)
    assert all(problem.file and problem.message for problem in caught.value.problems)
    return [(problem.kind, problem.tensor) for problem in caught.value.problems]


def assert_equals_state(model: Model, state: dict[str, torch.Tensor]) -> None:
    """Bit for bit, dtype included."""
    assert set(model.tensors) == set(state)
    for name, tensor in state.items():
        array = model.tensors[name].values
        assert (array.shape, f"torch.{array.dtype}") == (tuple(tensor.shape), str(tensor.dtype)), name
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(DTYPES[array.dtype])
        np.testing.assert_array_equal(array.read().reshape(-1).view(np.uint8), raw.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_reads_what_transformers_wrote(tmp_path: Path, arch: str, dtype: torch.dtype) -> None:
    original = save(tmp_path, arch, dtype)
    model = open_source(tmp_path)
    assert_equals_state(model, original.state_dict())
    assert model.config == json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert model.provenance["format"] == "huggingface"
    assert model.provenance["stored_bits"] == {}
    assert len(linear_tensors(model)) == 14


def test_reads_mistral_and_opt(tmp_path: Path) -> None:
    torch.manual_seed(3)
    opt_config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, word_embed_proj_dim=32
    )
    opt = OPTForCausalLM(opt_config)
    opt.save_pretrained(tmp_path / "opt")
    mistral = MistralForCausalLM(MistralConfig(**SIZES))
    mistral.save_pretrained(tmp_path / "mistral")
    # OPT's head is tied, and save_pretrained leaves it out.
    expected = {name: tensor for name, tensor in opt.state_dict().items() if name != "lm_head.weight"}
    assert_equals_state(open_source(tmp_path / "opt"), expected)
    assert_equals_state(open_source(tmp_path / "mistral"), mistral.state_dict())


def test_reads_shards_one_file_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = save_sharded(tmp_path)
    open_now, most = 0, 0
    open_file = StoredFile.__init__

    def counted(file: StoredFile, path: Path, remedy: str | None = None) -> None:
        nonlocal open_now, most
        open_file(file, path, remedy)
        open_now, most = open_now + 1, max(most, open_now + 1)
        weakref.finalize(file, closed)

    def closed() -> None:
        nonlocal open_now
        open_now -= 1

    monkeypatch.setattr(StoredFile, "__init__", counted)
    model = open_source(tmp_path)
    assert_equals_state(model, tiny_model("llama").state_dict())
    assert (open_now, most) == (0, 1)
    assert model.provenance["weight_files"] == len(names)
    assert source_bytes(tmp_path) == sum((tmp_path / name).stat().st_size for name in names)


def test_other_dtypes_and_shapes_are_kept(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(2, 3, 4, generator=generator).half(),
        "flags": torch.tensor([True, False]),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
    }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_equals_state(open_source(tmp_path), state)


def test_a_single_file_with_its_config_beside_it(tmp_path: Path) -> None:
    original = save(tmp_path)
    renamed = (tmp_path / "model.safetensors").rename(tmp_path / "weights.of.mine")
    assert_equals_state(open_source(renamed), original.state_dict())
    assert source_bytes(renamed) == renamed.stat().st_size
    with pytest.raises(InvalidFileError) as caught:
        open_source(tmp_path)
    assert caught.value.problems[0].kind == "missing"
    renamed.rename(tmp_path / "other.safetensors")
    with pytest.raises(InvalidFileError, match=r"name the file itself instead of its folder: other\.safetensors"):
        open_source(tmp_path)


def test_side_files_are_kept_as_they_are(tmp_path: Path) -> None:
    save(tmp_path)
    contents = {"tokenizer.json": b'{"a": 1}', "merges.txt": b"", "chat_template.jinja": "{{ 'ü' }}".encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not a side file")
    model = open_source(tmp_path)
    assert set(model.files) == {*contents, "generation_config.json"}
    for name, content in contents.items():
        assert model.files[name].read().tobytes() == content


def test_opening_is_deterministic_and_names_no_place(tmp_path: Path) -> None:
    save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert first.provenance == second.provenance
    assert first.digest() == second.digest()
    assert str(tmp_path) not in repr(first.provenance)


def tied_folder(folder: Path, change: float) -> dict[str, torch.Tensor]:
    """A checkpoint that declares a tied head and stores it nevertheless, changed in one element."""
    save(folder, tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][-1, -1] += change
    save_file(state, folder / "model.safetensors")
    return state


def test_a_tied_head_that_repeats_the_embedding_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_export.sources.huggingface._COMPARE_BYTES", 1000)
    state = tied_folder(tmp_path, 0.0)
    del state["lm_head.weight"]
    model = open_source(tmp_path)
    assert_equals_state(model, state)
    assert model.config["tie_word_embeddings"] is True


def test_a_tied_head_that_differs_is_kept_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_export.sources.huggingface._COMPARE_BYTES", 1000)
    state = tied_folder(tmp_path, 1.0)
    model = open_source(tmp_path)
    assert_equals_state(model, state)
    assert model.config["tie_word_embeddings"] is False
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(model.tensors["lm_head.weight"].decode(), loaded.lm_head.weight.detach().numpy())


def test_an_untied_head_is_kept_even_if_equal(tmp_path: Path) -> None:
    tied_folder(tmp_path, 0.0)
    change_json(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "lm_head.weight" in open_source(tmp_path).tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "model.pth"])
def test_pickles_are_never_read_and_the_way_to_convert_them_is_told(tmp_path: Path, name: str) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InvalidFileError) as caught:
            open_source(path)
        problem = caught.value.problems[0]
        assert problem.kind == "pickled_checkpoint"
        assert problem.found == name
        assert problem.remedy is not None
        assert "safe_serialization=True" in problem.remedy


def test_missing_shards_and_tensors_are_all_reported(tmp_path: Path) -> None:
    names = save_sharded(tmp_path)
    (tmp_path / names[0]).unlink()
    state = load_file(tmp_path / names[1])
    lost = min(state)
    del state[lost]
    save_file(state, tmp_path / names[1])
    (tmp_path / "config.json").write_text("{")
    assert sorted(problems_of(tmp_path), key=str) == [("bad_json", None), ("missing", None), ("missing_tensor", lost)]


def test_tensors_in_two_shards_or_another_than_listed(tmp_path: Path) -> None:
    names = save_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    first, second = load_file(tmp_path / names[0]), load_file(tmp_path / names[1])
    twice, moved = min(first), min(second)
    change_json(tmp_path / INDEX, lambda content: content["weight_map"].update({moved: names[2]}))
    save_file({**second, twice: first[twice]}, tmp_path / names[1])
    assert set(problems_of(tmp_path)) == {("duplicate_tensor", twice), ("misplaced_tensor", moved)}
    assert index[moved] == names[1]


def test_one_shard_alone_is_not_taken_for_the_model(tmp_path: Path) -> None:
    names = save_sharded(tmp_path)
    assert problems_of(tmp_path / names[0]) == [("one_of_several", None)]
    (tmp_path / INDEX).unlink()
    assert len(open_source(tmp_path / names[0]).tensors) < len(tiny_model("llama").state_dict())


def test_a_tensor_only_its_shard_lists_is_read(tmp_path: Path) -> None:
    names = save_sharded(tmp_path)
    save_file({**load_file(tmp_path / names[0]), "extra": torch.ones(2)}, tmp_path / names[0])
    np.testing.assert_array_equal(open_source(tmp_path).tensors["extra"].decode(), [1, 1])


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "c:x.safetensors", "x.bin", 7],
)
def test_shard_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: Any) -> None:
    save_sharded(tmp_path)
    change_json(tmp_path / INDEX, lambda content: content["weight_map"].update({"model.norm.weight": name}))
    assert problems_of(tmp_path) == [("bad_shard_name", "model.norm.weight")]


@pytest.mark.parametrize(
    "content", ['{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": 1}', "[1]", "not json"]
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    save_sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert problems_of(tmp_path)[0][0] in {"bad_index", "bad_json"}


@pytest.mark.parametrize("value", ["1" + "0" * 400, '"\\ud800"', "[" * 70 + "]" * 70])
def test_a_configuration_that_no_format_could_hold_is_refused(tmp_path: Path, value: str) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "rms_norm_eps": {value}}}')
    assert problems_of(tmp_path) == [("bad_json", None)]


@pytest.mark.parametrize("shape", [[0, 2**62, 4], [0, 2**63], [2**64 - 1, 0], [1] * 9])
def test_impossible_shapes_are_refused_on_opening(tmp_path: Path, shape: list[int]) -> None:
    save(tmp_path)
    length = 0 if 0 in shape else 1
    header = json.dumps({"odd": {"dtype": "U8", "shape": shape, "data_offsets": [0, length]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(length)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert problems_of(tmp_path) == [("bad_shape", "odd")]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [("truncated", "truncated"), ("header", "bad_json"), ("empty", "truncated"), ("trailing", "trailing_bytes")],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, damage: str, kind: str) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "header": content[:9] + b"\xff" + content[10:],
        "empty": b"",
        "trailing": content + b"\0",
    }[damage]
    path.write_bytes(damaged)
    assert [found for found, _ in problems_of(tmp_path)] == [kind]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(None, "missing"), ("{", "bad_json"), ("[]", "bad_json"), ("\xff", "bad_json")],
)
def test_a_missing_or_broken_config_is_refused(tmp_path: Path, content: str | None, kind: str) -> None:
    save(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert problems_of(tmp_path) == [(kind, None)]
    assert problems_of(tmp_path / "model.safetensors") == [(kind, None)]


def test_a_config_without_weights_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    assert problems_of(tmp_path) == [("missing", None)]


def test_dtypes_the_ir_does_not_hold_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn), "v": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert problems_of(tmp_path, UnsupportedError) == [("unsupported_dtype", "w")]


def test_checkpoints_quantised_by_others_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    assert problems_of(tmp_path, UnsupportedError) == [("already_quantized", None)]


def test_a_file_changed_in_place_after_opening_is_reported(tmp_path: Path) -> None:
    save(tmp_path)
    model = open_source(tmp_path)
    path = tmp_path / "model.safetensors"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InvalidFileError, match="changed"):
        next(iter(model.tensors.values())).decode()


def test_a_file_that_goes_away_after_opening_is_reported(tmp_path: Path) -> None:
    save(tmp_path)
    model = open_source(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidFileError, match="changed or deleted"):
        model.tensors["model.norm.weight"].decode()
