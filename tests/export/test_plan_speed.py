"""Profiles of machines, predicted times, and plans that weigh time against size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_builders import tiny_llama
from runtime_models import oracle

from cluscomp_export import InvalidRequestError, convert, inspect, plan
from cluscomp_export.planning import Plan, Terms, expected_error, plan_bits, plan_budget
from cluscomp_export.planning.allocation import Separate, allocate
from cluscomp_export.planning.candidates import PLAIN, Group, Member
from cluscomp_export.planning.machines import Machine, machine_from, shipped_machine, shipped_machines
from cluscomp_export.planning.planned_model import planned_model
from cluscomp_export.planning.sizes import model_sizes
from cluscomp_export.planning.speed import entry_bytes, predicted_speed, shares_read, weight_ns
from cluscomp_export.planning.this_machine import THIS_MACHINE, _measured, cache_file, this_machine
from cluscomp_formats.ir import DenseTensor, Model

INFINITE = math.inf
MACHINE = Machine("m", True, "", 2, ((64, 0.01), (256, 0.02)), ((32768, 0.2), (INFINITE, 0.6)), (100.0, 100.0), 10.0)
"""Memory is so fast that look-ups alone count."""


def test_every_shipped_profile_is_valid_and_returns_from_json() -> None:
    machines = shipped_machines()
    assert {"avx512", "avx2", "cortex-a78ae", "orin"} <= machines.keys()
    assert {name: machine_from(name, machine.value()) for name, machine in machines.items()} == machines
    assert all(machine.note for machine in machines.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.pop("cores"), "not an object with"),
        (lambda value: value.update(more=1), "not an object with"),
        (lambda value: value.update(cores=0), "cores"),
        (lambda value: value.update(cores=True), "cores"),
        (lambda value: value.update(measured=1), "measured"),
        (lambda value: value.update(note=None), "note"),
        (lambda value: value.update(gathers=[]), "last step"),
        (lambda value: value.update(gathers=[[10, 0.1]]), "last step"),
        (lambda value: value.update(gathers=[[None, 0.1], [10, 0.1]]), "do not increase"),
        (lambda value: value.update(registers=[[256, 0.1], [64, 0.1]]), "do not increase"),
        (lambda value: value.update(registers=[[256]]), "pairs"),
        (lambda value: value.update(registers=[[256, -1]]), "positive"),
        (lambda value: value.update(registers=[["256", 1]]), "positive"),
        (lambda value: value.update(bandwidth=[1]), "pair"),
        (lambda value: value.update(bandwidth=[1, 0]), "positive"),
        (lambda value: value.update(layer_us=1e999), "positive"),
    ],
)
def test_a_profile_that_says_nonsense_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    value = shipped_machine("avx512").value()
    change(value)
    with pytest.raises(ValueError, match=words):
        machine_from("m", value)


def test_an_unknown_machine_is_refused_with_the_names(stories_folder: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan(stories_folder, machine="abacus")
    assert "avx512, avx2" in str(caught.value.problems[0].expected)


@pytest.mark.parametrize(
    ("dim", "bits", "expected"), [(1, 8, 4), (4, 8, 4), (5, 8, 8), (8, 8, 8), (9, 8, 16), (16, 8, 16), (17, 8, 32), (3, 16, 8)]
)
def test_entries_are_padded_as_the_kernels_hold_them(dim: int, bits: int, expected: int) -> None:
    assert entry_bytes(dim, bits) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2, 64, 8), 0.01),
        ((3, 65, 8), 0.02),
        # A value of 16 bits is two of 8.
        ((3, 256, 16), 0.04),
        ((4, 257, 8), 0.2 / 4),
        # 8192 entries of 4 bytes just fit the L1 cache.
        ((4, 8192, 8), 0.2 / 4),
        ((4, 8193, 8), 0.6 / 4),
        ((4, 8192, 16), 0.6 / 4),
    ],
)
def test_time_depends_on_where_a_codebook_lives(size: tuple[int, int, int], expected: float) -> None:
    assert weight_ns(MACHINE, *size, threads=1) == pytest.approx(expected)
    assert weight_ns(MACHINE, *size) == pytest.approx(expected / 2)


def test_no_weight_is_faster_than_its_bits_come_from_memory() -> None:
    slow = replace(MACHINE, bandwidth=(1.0, 1.5))
    # 8 bits for 2 weights, at 1 or 1.5 bytes per ns.
    assert weight_ns(slow, 2, 256, 8, threads=1) == pytest.approx(0.5)
    assert weight_ns(slow, 2, 256, 8) == pytest.approx(0.5 / 1.5)


def test_a_token_reads_every_matrix_and_the_head_but_not_the_embedding() -> None:
    tied = tiny_llama(vocabulary=50)
    head = DenseTensor("lm_head.weight", tied.tensors["model.embed_tokens.weight"].values)
    untied = Model({**tied.config, "tie_word_embeddings": False}, {**tied.tensors, head.name: head})
    assert shares_read(tied)["model.embed_tokens.weight"] == 1
    assert "model.embed_tokens.weight" not in shares_read(untied)
    assert shares_read(untied)["lm_head.weight"] == 1
    assert predicted_speed(tied, MACHINE).tokens_per_second == predicted_speed(untied, MACHINE).tokens_per_second


def test_predicted_time_is_that_of_the_parts() -> None:
    source = tiny_llama(hidden=24, intermediate=40, layers=2, vocabulary=50)
    planned = planned_model(source, plan_bits(source, bits=4, share="kind", embedding_bits=16))
    speed = predicted_speed(planned, MACHINE)
    assert list(speed.tokens_per_second) == [1, 2]
    blocks = 2 * MACHINE.layer_us * 1e3
    head = 50 * 24 * 2 / 100
    looked_up = sum(
        weight.num_weights
        * weight_ns(MACHINE, book.cluster_dim, book.num_clusters, 8 * book.values.nbytes // book.values.size, 1)
        for weight in planned.clustered.values()
        for book in [weight.stages[0].codebook]
    )
    assert 1e9 / speed.tokens_per_second[1] == pytest.approx(blocks + head + looked_up)
    assert speed.resident_bytes > model_sizes(planned).all_bits // 8


def test_experts_count_as_often_as_tokens_reach_them() -> None:
    _, source = oracle("qwen3-moe")
    shares = shares_read(source)
    assert {share for name, share in shares.items() if ".experts." in name} == {2 / 6}
    assert {share for name, share in shares.items() if ".experts." not in name} == {1}


def linear_bits(source: Model, made: Plan) -> float:
    return model_sizes(planned_model(source, made)).bits_per_weight()["linears"]


def rate(source: Model, made: Plan) -> float:
    return predicted_speed(planned_model(source, made), MACHINE).tokens_per_second[1]


@given(bits=st.sampled_from([2.2, 3.0, 4.0]), share=st.sampled_from([None, "kind", "none"]))
@settings(max_examples=6, deadline=None)
def test_time_that_is_worth_more_is_less(bits: float, share: Any) -> None:
    source = tiny_llama(hidden=96, intermediate=192, layers=3)
    rates = []
    for halving in (0.0, 0.3, 3.0):
        made = plan_bits(source, bits=bits, share=share, embedding_bits=16, terms=Terms(MACHINE), halving=halving)
        assert linear_bits(source, made) <= bits
        rates.append(rate(source, made))
    assert rates == sorted(rates)


def test_a_plan_for_speed_keeps_its_codebooks_in_registers() -> None:
    source = tiny_llama(hidden=192, intermediate=384, layers=2)
    sizes = {}
    for halving in (0.0, 1.0):
        made = plan_bits(source, bits=3, share="kind", embedding_bits=16, terms=Terms(MACHINE), halving=halving)
        sizes[halving] = max(book.num_clusters for book in made.codebooks)
    assert sizes[1.0] <= 256 < sizes[0.0]


def test_a_budget_of_the_whole_holds_when_time_counts() -> None:
    source = tiny_llama(hidden=96, intermediate=192, layers=3, vocabulary=200)

    def size_of(made: Plan) -> int:
        return model_sizes(planned_model(source, made)).payload_bytes

    made = {
        halving: plan_budget(source, budget=120_000, size_of=size_of, share=None, terms=Terms(MACHINE), halving=halving)
        for halving in (0.0, 1.0)
    }
    assert all(0.97 * 120_000 < size_of(found) <= 120_000 for found in made.values())
    assert rate(source, made[0.0]) < rate(source, made[1.0])


def test_without_a_price_time_changes_nothing() -> None:
    source = tiny_llama(hidden=48, intermediate=96, layers=2)
    plans = [plan_bits(source, bits=3, share=None, embedding_bits=16, terms=terms) for terms in (PLAIN, Terms(MACHINE))]
    assert plans[0] == plans[1]


def test_the_time_of_unread_weights_does_not_count() -> None:
    """So an embedding that is not the head takes the codebook with the least error."""
    read, unread = (Member("embed.weight", (4000, 64), 1.0, 1.0, share) for share in (1.0, 0.0))
    times = []
    for member in (read, unread):
        scope = Separate([Group("embed", (member,), row_scale=True)], terms=Terms(MACHINE))
        picks = allocate([scope], budget=5.2 * member.num_weights, halving=2.0).picks
        assert picks is not None
        times.append(weight_ns(MACHINE, *picks[0].size))
    assert times[0] < times[1]


def test_after_error_feedback_large_codebooks_gain_less() -> None:
    ratios = [
        expected_error(4, 65536, 1 << 40, feedback=feedback) / expected_error(4, 4096, 1 << 40, feedback=feedback)
        for feedback in (False, True)
    ]
    # What is left is the theory of Gaussian weights.
    assert ratios[0] < ratios[1] == pytest.approx(16 ** (-2 / 4))
    assert expected_error(6, 32768, 1 << 40, feedback=True) == pytest.approx(expected_error(6, 32768, 1 << 40), rel=0.01)


def test_a_report_predicts_tokens_per_second_and_memory(stories_folder: Path) -> None:
    reports = {way: plan(stories_folder, bits=4, optimize=way, machine="avx2") for way in ("size", "speed")}
    speeds = {way: report.speed["tokens_per_second"] for way, report in reports.items()}
    assert list(speeds["size"]) == [1, 4]
    assert speeds["size"][1] <= speeds["speed"][1]
    assert not reports["size"].speed["measured"]
    assert reports["size"].bits_per_weight["file"] > reports["size"].bits_per_weight["all"]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Machine]]:
    """A machine that has not been measured yet; the list has a profile for each measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured: list[Machine] = []

    def measure() -> Machine:
        measured.append(replace(MACHINE, name=THIS_MACHINE))
        return measured[-1]

    monkeypatch.setattr("cluscomp_export.planning.this_machine._measured", measure)
    this_machine.cache_clear()
    yield measured
    this_machine.cache_clear()


def again() -> Machine:
    """The profile as another process finds it."""
    this_machine.cache_clear()
    return this_machine()


def test_this_machine_is_measured_once(unmeasured: list[Machine], tmp_path: Path) -> None:
    assert this_machine() == again() == unmeasured[0]
    assert len(unmeasured) == 1
    assert cache_file().parent == tmp_path / "cache" / "cluscomp-export"


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b"\xff", b'{"cores": 1}', b" " * (1 << 27)])
def test_a_damaged_profile_is_measured_again(content: bytes, unmeasured: list[Machine]) -> None:
    this_machine()
    cache_file().write_bytes(content)
    assert again() == unmeasured[0]
    assert len(unmeasured) == 2
    assert again() == unmeasured[0]
    assert len(unmeasured) == 2


def test_where_nothing_can_be_written_every_process_measures(
    unmeasured: list[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert this_machine() == again()
    assert len(unmeasured) == 2


def test_an_artefact_records_the_profile_that_was_measured(
    unmeasured: list[Machine], stories_folder: Path, tmp_path: Path
) -> None:
    convert(stories_folder, tmp_path / "m.clus", bits=3, effort="fast", machine="this")
    assert inspect(tmp_path / "m.clus", quick=True).provenance["options"]["machine"] == unmeasured[0].value()


def test_measuring_gives_a_valid_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cluscomp_kernels.engine")
    monkeypatch.setattr("cluscomp_kernels.engine.memory_bandwidth", lambda **how: 2e9 * how["threads"])
    monkeypatch.setattr("cluscomp_kernels.engine.time_per_weight", lambda dim, clusters, **how: clusters / 1e6 / dim)
    machine = _measured()
    assert machine.bandwidth == (2.0, 2.0 * machine.cores)
    assert machine.gathers == (
        (32768, pytest.approx(0.004096)),
        (1 << 20, pytest.approx(0.065536)),
        (INFINITE, machine.gathers[2][1]),
    )
    assert machine_from("this", machine.value()) == machine
