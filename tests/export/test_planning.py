"""The planner: budgets hold, counts are honest, bad requests are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_builders import tiny_llama

from cluscomp_export.planning import CLUSTER_DIMS, expected_error, plan_bits, plan_fixed
from cluscomp_export.planning.candidates import adaptation
from cluscomp_export.planning.planned_model import planned_model
from cluscomp_export.planning.sizes import model_sizes
from cluscomp_formats.errors import InvalidRequestError, UnsupportedError
from cluscomp_formats.ir import Array, DenseTensor, Model


@given(bits=st.floats(0.3, 8), share=st.sampled_from([None, "none", "kind", "model"]))
@settings(max_examples=40, deadline=None)
def test_a_budget_is_never_exceeded(bits: float, share: str | None) -> None:
    source = tiny_llama(hidden=48, intermediate=96, layers=3)
    try:
        plan = plan_bits(source, bits=bits, share=share, embedding_bits=16)  # type: ignore[arg-type]
    except InvalidRequestError:
        # The smallest codebook, 4 clusters, with row scales takes less than this even on these small matrices.
        assert bits < 2
        return
    assert model_sizes(planned_model(source, plan)).bits_per_weight()["linears"] <= bits


@pytest.mark.parametrize("codebook_bits", [8, 16])
def test_sizes_count_codes_codebooks_scales_and_what_stays_dense(codebook_bits: int) -> None:
    source = tiny_llama(hidden=24, intermediate=40, layers=1, vocabulary=50)
    plan = plan_fixed(source, cluster_dim=4, num_clusters=32, share="kind", embedding_bits=16, codebook_bits=codebook_bits)
    sizes = model_sizes(planned_model(source, plan))
    # q, k, v, o, gate, up, down: [out, in]; 5-bit codes, a codebook of 32 x 4 and float16 row scales for each.
    shapes = [(24, 24), (8, 24), (8, 24), (24, 24), (40, 24), (40, 24), (24, 40)]
    weights = sum(out * into for out, into in shapes)
    bits = sum(out // 4 * into * 5 + 32 * 4 * codebook_bits + out * 16 for out, into in shapes)
    assert (sizes.linear_weights, sizes.linear_bits) == (weights, bits)
    assert sizes.all_bits == bits + 50 * 24 * 16 + 3 * 24 * 32


def test_the_paper_setting_has_a_float16_codebook_per_matrix_and_no_scales() -> None:
    source = tiny_llama()
    plan = plan_fixed(source, cluster_dim=4, num_clusters=16, share="none", embedding_bits=16, codebook_bits=8)
    assert {book.dtype for book in plan.codebooks} == {"float16"}
    assert len(plan.codebooks) == len(plan.schemes) == 14
    assert not any(scheme.row_scale for scheme in plan.schemes.values())


def test_codebooks_are_int8_where_that_buys_more_than_it_costs() -> None:
    source = tiny_llama(hidden=96, intermediate=192, layers=2)

    def dtypes(bits: float, codebook_bits: int | None = None) -> set[str]:
        plan = plan_bits(source, bits=bits, share="kind", embedding_bits=16, codebook_bits=codebook_bits)
        return {book.dtype for book in plan.codebooks}

    assert "int8" in dtypes(3)
    # So near to the original, a step of the codebook is what errs most.
    assert dtypes(12) == {"float16"}
    assert (dtypes(3, 16), dtypes(12, 8)) == ({"float16"}, {"int8"})


def test_sharing_by_kind_joins_the_layers() -> None:
    plan = plan_fixed(tiny_llama(), cluster_dim=4, num_clusters=16, share="kind", embedding_bits=16)
    assert sorted(len(book.members) for book in plan.codebooks) == [2] * 7
    plan = plan_fixed(tiny_llama(), cluster_dim=4, num_clusters=16, share="model", embedding_bits=16)
    assert [len(book.members) for book in plan.codebooks] == [14]


def test_more_clusters_than_vectors_are_not_planned() -> None:
    plan = plan_fixed(tiny_llama(), cluster_dim=4, num_clusters=65536, share="none", embedding_bits=16)
    assert plan.schemes["model.layers.0.self_attn.k_proj.weight"].codebook.num_clusters == 2 * 24


def test_embeddings_are_clustered_on_request() -> None:
    source = tiny_llama(vocabulary=400)
    assert "model.embed_tokens.weight" not in plan_bits(source, bits=4, share=None, embedding_bits=16).schemes
    plan = plan_bits(source, bits=4, share=None, embedding_bits=6)
    scheme = plan.schemes["model.embed_tokens.weight"]
    tensor = planned_model(source, plan).clustered["model.embed_tokens.weight"]
    assert scheme.row_scale
    assert tensor.own_bits + 8 * tensor.stages[0].codebook.values.nbytes <= 6 * 400 * 24


@pytest.mark.parametrize("cluster_dim", CLUSTER_DIMS)
def test_expected_error_falls_with_clusters_and_vanishes_when_every_vector_has_its_own(cluster_dim: int) -> None:
    errors = [expected_error(cluster_dim, 2**bits, 10**6) for bits in range(1, 17)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert expected_error(cluster_dim, 4096, 4096) == 0


def test_expected_error_of_a_scalar_codebook_follows_that_of_a_lloyd_max_quantiser() -> None:
    # Panter-Dite: sqrt(3) pi / 2 * n^-2 for a Gaussian of variance 1.
    gaussian = np.sqrt(3) * np.pi / 2 * 256**-2
    assert expected_error(1, 256, 10**9) == pytest.approx(gaussian * adaptation(256), rel=1e-4)


def test_many_clusters_adapt_better_to_real_weights() -> None:
    # The ends of what was measured: 1.31 at 16, .78 at 16384 clusters.
    assert adaptation(16) == pytest.approx(1.31)
    assert adaptation(16384) == pytest.approx(0.78)
    assert adaptation(65536) > 0.6


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [({"cluster_dim": 0, "num_clusters": 4}, "bad_option"), ({"cluster_dim": 4, "num_clusters": 65537}, "bad_option")],
)
def test_impossible_codebooks_are_refused(arguments: dict[str, int], kind: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan_fixed(tiny_llama(), **arguments, share="none", embedding_bits=16)  # type: ignore[arg-type]
    assert caught.value.problems[0].kind == kind


def test_an_impossible_budget_names_the_remedy() -> None:
    with pytest.raises(InvalidRequestError, match="allow more bits"):
        plan_bits(tiny_llama(), bits=0.01, share=None, embedding_bits=16)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = Model({}, {"norm.weight": DenseTensor("norm.weight", Array.of(np.ones(4, np.float32)))})
    with pytest.raises(UnsupportedError) as caught:
        plan_bits(model, bits=4, share=None, embedding_bits=16)
    assert caught.value.problems[0].kind == "no_linears"
