"""The decoder against transformers, with and without the key-value cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtime_models import EPSILON, clustered_model, oracle, rounding, small_config, token_ids

from cluscomp_formats.architectures import Rope
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.frequencies import inverse_frequencies
from cluscomp_runtime.rope import apply_rope, rope_tables


def test_only_the_last_logits() -> None:
    _, model = oracle("llama-gqa")
    decoder = LanguageModel.from_model(model, dtype="float64").decoder
    ids = token_ids(2, 9)
    torch.testing.assert_close(decoder(ids, last_only=True), decoder(ids)[:, -1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str) -> None:
    _, model = oracle("qwen3")
    ids = token_ids(1, 20)
    exact = LanguageModel.from_model(model, dtype="float64").forward(ids)
    single = LanguageModel.from_model(model).forward(ids)
    half = LanguageModel.from_model(model, dtype=dtype).forward(ids)
    assert half.dtype == getattr(torch, dtype)
    tolerance = rounding(single, exact) / EPSILON * torch.finfo(half.dtype).eps
    assert (half.double() - exact).abs().max().item() <= tolerance


def test_rope_tables_grow_with_the_sequence() -> None:
    _, model = oracle("llama-gqa")
    longer = Model({**model.config, "max_position_embeddings": 700}, model.tensors)
    ids = token_ids(1, 600)
    whole = LanguageModel.from_model(longer, dtype="float64").forward(ids)
    language_model = LanguageModel.from_model(longer, dtype="float64")
    with torch.inference_mode():
        cache = language_model.decoder.cache(600)
        parts = [language_model.decoder(ids[:, begin : begin + 100], cache) for begin in range(0, 600, 100)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


def test_inverse_frequencies_by_hand() -> None:
    plain = inverse_frequencies(Rope(10000.0), 4)
    assert plain.tolist() == pytest.approx([1.0, 0.01])
    assert inverse_frequencies(Rope(10000.0, "linear", 4.0), 4).tolist() == pytest.approx([0.25, 0.0025])
    # Turns over 100 positions: 15.9 (kept), 0.159 (divided by 8).
    llama3 = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 100)
    assert inverse_frequencies(llama3, 4).tolist() == pytest.approx([1.0, 0.00125])
    # With 1571 positions the second makes 2.5 turns, half-way from 1 to 4: the mean of 0.01 and 0.00125.
    halfway = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, round(2.5 * 2 * np.pi / 0.01))
    assert inverse_frequencies(halfway, 4).tolist() == pytest.approx([1.0, 0.005625], rel=1e-3)


def test_rope_by_hand() -> None:
    cosines, sines = rope_tables(Rope(100.0), 4, 3, dtype=torch.float64, device=torch.device("cpu"))
    heads = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)
    rotated = apply_rope(heads, cosines[2:3], sines[2:3]).flatten().tolist()
    # Pairs (1, 3) and (2, 4), turned by 2 and by 0.2 radians.
    c, s, d, t = np.cos(2.0), np.sin(2.0), np.cos(0.2), np.sin(0.2)
    assert rotated == pytest.approx([c - 3 * s, 2 * d - 4 * t, s + 3 * c, 2 * t + 4 * d])


def test_a_head_of_its_own_wins_over_a_tied_embedding() -> None:
    _, model = oracle("llama-tied")
    head = np.random.default_rng(5).standard_normal((97, 32)).astype(np.float32)
    both = Model(model.config, {**model.tensors, "lm_head.weight": DenseTensor("lm_head.weight", Array.of(head))})
    untied = Model({**model.config, "tie_word_embeddings": False}, both.tensors)
    ids = token_ids(1, 5)
    found, expected = LanguageModel.from_model(both).forward(ids), LanguageModel.from_model(untied).forward(ids)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, LanguageModel.from_model(model).forward(ids))


def test_bfloat16_sources_are_widened_exactly() -> None:
    _, model = oracle("llama-gqa")
    bits = {
        name: Array.of((tensor.decode().view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
        for name, tensor in model.tensors.items()
    }
    narrow = Model(model.config, {name: DenseTensor(name, array) for name, array in bits.items()})
    wide = Model(model.config, {name: DenseTensor(name, Array.of(array.to_float32())) for name, array in bits.items()})
    ids = token_ids(1, 6)
    assert torch.equal(LanguageModel.from_model(narrow).forward(ids), LanguageModel.from_model(wide).forward(ids))


def test_reference_mode_keeps_nothing_and_reads_again_at_every_pass() -> None:
    model = clustered_model(small_config())
    reads: list[str] = []

    def counted(name: str, array: Array) -> Array:
        def load() -> np.ndarray:
            reads.append(name)
            return array.read()

        return Array(array.shape, array.dtype, load)

    name = "model.layers.1.mlp.up_proj.weight"
    dense = DenseTensor(name, counted(name, Array.of(model.tensors[name].decode())))
    language_model = LanguageModel.from_model(
        Model(model.config, {**model.tensors, name: dense}), kernel="reference", dtype="float64"
    )
    assert reads == []
    language_model.forward(token_ids(1, 3))
    language_model.forward(token_ids(1, 3))
    assert reads == [name, name]
    assert set(language_model.kernels.values()) == {"reference"}
