"""Checkpoints of the authors' implementation, made here by their recipe, come back exactly; broken ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checkpoints import llama, make_reference, mistral, opt
from safetensors.torch import load_file, save_file

from cluscomp_export.sources import linear_tensors, open_source, source_bytes
from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.ir import DTYPES, ClusteredWeight, DenseTensor


@pytest.mark.parametrize("make", [llama, lambda: llama(attention_bias=True, mlp_bias=True), opt, mistral])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_architecture_of_the_authors_comes_back_exactly(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    original = make()
    weights = make_reference(tmp_path, original, num_clusters=37, dim=5, dtype=dtype)
    model = open_source(tmp_path)
    expected_names = [
        name for name in original.state_dict() if name != "lm_head.weight" or not original.config.tie_word_embeddings
    ]
    assert set(model.tensors) == set(expected_names)
    assert sorted(linear_tensors(model)) == sorted(weights)
    for name, tensor in model.tensors.items():
        if name in weights:
            assert isinstance(tensor, ClusteredWeight)
            assert tensor.stages[0].codebook.name == name.removesuffix(".weight")
            assert f"torch.{tensor.stages[0].codebook.values.dtype}" == str(dtype)
            np.testing.assert_array_equal(tensor.decode(), weights[name].float().numpy(), err_msg=name)
        else:
            assert isinstance(tensor, DenseTensor)
            expected = original.state_dict()[name].to(dtype).float().numpy()
            np.testing.assert_array_equal(tensor.decode(), expected, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(
    num_clusters=st.integers(1, 300),
    dim=st.integers(1, 17),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 25)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_shape_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, num_clusters: int, dim: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    heads, half_head, inner = sizes
    hidden = heads * 2 * half_head
    options = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 1, "intermediate_size": inner}
    folder = tmp_path_factory.mktemp("reference")
    weights = make_reference(folder, llama(**options), num_clusters, dim, dtype)
    model = open_source(folder)
    assert set(model.clustered) == set(weights)
    for name, expected in weights.items():
        np.testing.assert_array_equal(model.tensors[name].decode(), expected.float().numpy(), err_msg=name)


def test_a_weight_by_hand(tmp_path: Path) -> None:
    # One input, three outputs, vectors of two: the second vector's last element is padding.
    config = {"hidden_size": 3, "num_attention_heads": 3, "intermediate_size": 1, "num_clusters": 2, "cluster_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    module = "model.layers.0.mlp.down_proj"
    tensors = {f"{module}.cluster": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), f"{module}.index": torch.tensor([1, 0])}
    save_file(tensors, tmp_path / "model.safetensors")
    model = open_source(tmp_path)
    weight = model.tensors[f"{module}.weight"]
    np.testing.assert_array_equal(weight.decode(), [[3.0], [4.0], [1.0]])
    assert model.config == {"hidden_size": 3, "num_attention_heads": 3, "intermediate_size": 1, "model_type": "llama"}


def test_settings_move_from_the_config_to_the_provenance(tmp_path: Path) -> None:
    original = llama()
    make_reference(tmp_path, original, 16, 4, torch.float16)
    model = open_source(tmp_path)
    assert model.config == json.loads(original.config.to_json_string(use_diff=False))
    assert model.provenance == {
        "format": "cluscomp-reference",
        "weight_files": 1,
        "weight_bytes": source_bytes(tmp_path),
        "stored_bits": {},
        "num_clusters": 16,
        "cluster_dim": 4,
    }


def test_the_file_itself_may_be_named(tmp_path: Path) -> None:
    weights = make_reference(tmp_path, llama(), 16, 4, torch.float16)
    assert set(open_source(tmp_path / "model.safetensors").clustered) == set(weights)


def test_65536_clusters_fit(tmp_path: Path) -> None:
    weights = make_reference(tmp_path, llama(), 65536, 1, torch.float16)
    model = open_source(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    codes = model.clustered[name].stages[0].codes
    assert codes.read().dtype == DTYPES["uint16"]
    np.testing.assert_array_equal(model.tensors[name].decode(), weights[name].float().numpy())


MODULE = "model.layers.0.self_attn.k_proj"


def broken(tmp_path: Path, change: Any, change_config: Any = None) -> Path:
    """A checkpoint with `change(tensors)` applied; clusters 16 x 4, hidden 24, two key heads of 6."""
    make_reference(tmp_path, llama(attention_bias=True), 16, 4, torch.float32)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    if change_config is not None:
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        change_config(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


STRUCTURAL: list[Any] = [
    ("no codebook", lambda state: state.pop(f"{MODULE}.cluster"), "missing_tensor", f"{MODULE}.cluster"),
    ("no index", lambda state: state.pop(f"{MODULE}.index"), "missing_tensor", f"{MODULE}.index"),
    (
        "too short",
        lambda s: s.update({f"{MODULE}.index": s[f"{MODULE}.index"][:-1].clone()}),
        "wrong_length",
        f"{MODULE}.index",
    ),
    ("float index", lambda s: s.update({f"{MODULE}.index": s[f"{MODULE}.index"].float()}), "bad_index", f"{MODULE}.index"),
    ("2-D index", lambda s: s.update({f"{MODULE}.index": s[f"{MODULE}.index"][None]}), "bad_index", f"{MODULE}.index"),
    ("1-D codebook", lambda s: s.update({f"{MODULE}.cluster": torch.zeros(16)}), "bad_codebook", f"{MODULE}.cluster"),
    (
        "integer codebook",
        lambda s: s.update({f"{MODULE}.cluster": torch.zeros(16, 4).int()}),
        "bad_codebook",
        f"{MODULE}.cluster",
    ),
    (
        "too many clusters",
        lambda s: s.update({f"{MODULE}.cluster": torch.zeros(65537, 4)}),
        "bad_codebook",
        f"{MODULE}.cluster",
    ),
    ("empty vectors", lambda s: s.update({f"{MODULE}.cluster": torch.zeros(16, 0)}), "bad_codebook", f"{MODULE}.cluster"),
    ("other bias", lambda s: s.update({f"{MODULE}.bias": torch.zeros(11)}), "wrong_shape", f"{MODULE}.bias"),
    ("weight too", lambda s: s.update({f"{MODULE}.weight": torch.zeros(12, 24)}), "duplicate_tensor", f"{MODULE}.weight"),
]


@pytest.mark.parametrize(("change", "kind", "tensor"), [case[1:] for case in STRUCTURAL], ids=[case[0] for case in STRUCTURAL])
def test_broken_modules_are_refused_on_opening(tmp_path: Path, change: Any, kind: str, tensor: str) -> None:
    with pytest.raises(InvalidFileError) as caught:
        open_source(broken(tmp_path, change))
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [(kind, tensor)]
    assert caught.value.problems[0].file == str(tmp_path)


def test_problems_of_several_modules_are_reported_together(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[f"{MODULE}.index"], state["model.layers.0.mlp.up_proj.cluster"]

    with pytest.raises(InvalidFileError) as caught:
        open_source(broken(tmp_path, change))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("change", [lambda config: config.pop("hidden_size"), lambda config: config.update(hidden_size="24")])
def test_without_sizes_in_the_config_the_shape_is_not_guessed(tmp_path: Path, change: Any) -> None:
    with pytest.raises(InvalidFileError) as caught:
        open_source(broken(tmp_path, lambda state: None, change))
    assert {problem.kind for problem in caught.value.problems} == {"unknown_shape"}


def test_modules_of_unknown_name_are_refused(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for part in ("cluster", "index"):
            state[f"model.layers.0.mystery.{part}"] = state[f"{MODULE}.{part}"].clone()

    with pytest.raises(InvalidFileError) as caught:
        open_source(broken(tmp_path, change))
    assert [(problem.kind, problem.found) for problem in caught.value.problems] == [("unknown_shape", "mystery")]


def test_a_checkpoint_without_any_codebook_is_refused(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith((".cluster", ".index"))]:
            del state[name]

    with pytest.raises(InvalidFileError) as caught:
        open_source(broken(tmp_path, change))
    assert [problem.kind for problem in caught.value.problems] == ["not_clustered"]


@pytest.mark.parametrize("code", [-1, 16, 70000])
def test_codes_without_a_cluster_are_refused_when_read(tmp_path: Path, code: int) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{MODULE}.index"][7] = code

    model = open_source(broken(tmp_path, change))
    with pytest.raises(InvalidFileError) as caught:
        model.tensors[f"{MODULE}.weight"].decode()
    problem = caught.value.problems[0]
    assert (problem.kind, problem.tensor, problem.expected) == ("code_out_of_range", f"{MODULE}.index", "0 to 15")
    assert str(code) in str(problem.found)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebooks_that_are_not_finite_are_refused_when_read(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        cluster = state[f"{MODULE}.cluster"].to(dtype)
        cluster[3, 1] = value
        state[f"{MODULE}.cluster"] = cluster

    model = open_source(broken(tmp_path, change))
    with pytest.raises(InvalidFileError) as caught:
        model.tensors[f"{MODULE}.weight"].decode()
    problem = caught.value.problems[0]
    assert (problem.kind, problem.tensor, problem.found) == ("not_finite", f"{MODULE}.cluster", "1 of 64 elements")
