"""`bench`: what it measures, what it refuses to measure, what it says of processes that die."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from runtime_models import oracle

from cluscomp_export import InvalidRequestError, SelfTestError, Speed, WorkersLostError, bench
from cluscomp_export.benchmarking.bench import Spread, default_threads, run_process
from cluscomp_export.benchmarking.process import Request
from cluscomp_export.benchmarking.traffic import read_gigabytes_per_second, weight_bytes
from cluscomp_export.cli.main import cli
from cluscomp_export.cli.tables import print_speeds
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_formats.architectures import describe
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, Stage
from cluscomp_formats.packed import open_packed, write_packed


@pytest.fixture(scope="module")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "stories.clus"
    convert(stories_folder, output, ConversionOptions(bits=4, share="kind", effort="fast"))
    return output


class Measured(NamedTuple):
    rows: list[Speed]
    warnings: list[str]
    phases: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def measured(packed: Path, stories_folder: Path) -> Measured:
    """The artefact against its source, on two threads."""
    warnings: list[str] = []
    phases: list[tuple[str, int, int]] = []
    rows = bench(
        packed,
        against=[stories_folder],
        threads=[2],
        prompt_tokens=40,
        new_tokens=6,
        repetitions=1,
        on_progress=lambda *step: phases.append(step),
        on_warning=warnings.append,
    )
    return Measured(rows, warnings, phases)


def test_a_row_for_each_model_and_number_of_threads(measured: Measured, packed: Path, stories_folder: Path) -> None:
    rows = measured.rows
    expected = [(str(packed), 2, "passed"), (str(stories_folder), 2, "none")]
    assert [(row.path, row.threads, row.self_test) for row in rows] == expected
    assert [text.split()[0] for text in measured.warnings if "no self-test record" in text] == [str(stories_folder)]
    assert ("measuring", 2, 2) in measured.phases
    for row in rows:
        assert (row.prompt_tokens, row.new_tokens, row.repetitions) == (40, 6, 1)
        assert row.decode_spread == Spread.of([row.decode_tokens_per_second])
        assert min(row.decode_tokens_per_second, row.prefill_tokens_per_second, row.load_seconds, row.import_seconds) > 0
        assert row.gigabytes_per_second == pytest.approx(row.weight_bytes * row.decode_tokens_per_second / 1e9)
        assert row.bandwidth_share == pytest.approx(row.gigabytes_per_second / row.memory_gigabytes_per_second)
        assert row.resident_bytes > row.file_bytes > row.weight_bytes > 0
        assert row.peak_bytes is None or row.peak_bytes >= row.resident_bytes
        assert "matri" in row.kernels
    assert rows[0].file_bytes == packed.stat().st_size
    assert rows[0].decode_ratio is None
    assert rows[1].decode_ratio == Spread.of([rows[1].decode_tokens_per_second / rows[0].decode_tokens_per_second])
    assert rows[1].prefill_ratio == Spread.of([rows[1].prefill_tokens_per_second / rows[0].prefill_tokens_per_second])


def test_the_table_has_speeds_and_ratios(measured: Measured, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_speeds(measured.rows)
    out = capsys.readouterr().out
    for words in ("decode, tokens/s", "GB/s", "resident MB", f"times {packed}", "40 tokens of prompt, 6 new ones", "engine"):
        assert words in out


def test_the_command_prints_a_list(stories_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--threads", "1", "--prompt-tokens", "9", "--new-tokens", "2", "--repetitions", "1", "--json")
    cli.main(["bench", str(stories_folder), *options], standalone_mode=False)
    (row,) = json.loads(capsys.readouterr().out)
    promised = "threads decode_tokens_per_second prefill_tokens_per_second resident_bytes file_bytes load_seconds engine path"
    assert set(promised.split()) <= row.keys()


@pytest.mark.parametrize("threads", ["", "1,", "two", "1;2", "99999999999"])
def test_threads_are_numbers(threads: str, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="list of numbers"):
        cli.main(["bench", str(packed), "--threads", threads], standalone_mode=False)


def test_a_model_that_fails_its_self_test_is_not_timed(packed: Path, tmp_path: Path) -> None:
    model = open_packed(packed)
    assert model.self_test is not None
    record = json.loads(json.dumps(model.self_test))
    record["sequences"][0]["top_logits"][0][0] += 1
    wrong = tmp_path / "wrong.clus"
    write_packed(replace(model, self_test=record), wrong)
    with pytest.raises(SelfTestError, match="does not compute the logits") as caught:
        bench(packed, against=[wrong], threads=[1], repetitions=1)
    assert caught.value.problems[0].file == str(wrong)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"threads": [0]}, "threads"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prompt_tokens": 513}, "prompt_tokens"),
        ({"new_tokens": 512}, "new_tokens"),
        ({"repetitions": 0}, "repetitions"),
    ],
)
def test_options_out_of_range(options: dict[str, int], field: str, packed: Path) -> None:
    with pytest.raises(InvalidRequestError, match=f"`{field}` is out of range"):
        bench(packed, **options)  # type: ignore[arg-type]


def test_a_process_that_dies_is_an_error(packed: Path) -> None:
    request = Request(str(packed), 1, 1, 1, 1)
    with pytest.raises(WorkersLostError, match="died") as caught:
        run_process(request, ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert caught.value.problems[0].found == "exit code -9"
    with pytest.raises(WorkersLostError, match="exit code 3, some reason"):
        run_process(request, ("-c", "import sys; print('some reason', file=sys.stderr); sys.exit(3)"))


def test_the_process_imports_little_before_it_measures() -> None:
    code = "import sys, cluscomp_export.benchmarking.process; sys.exit(bool({'torch', 'tokenizers', 'click'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_read_per_token() -> None:
    """By hand: a tied model reads everything; an untied embedding gives a row; of six experts a token goes through two."""
    tied = oracle("llama-tied")[1]
    assert weight_bytes(tied, describe(tied.config)) == 4 * sum(tensor.num_weights for tensor in tied.tensors.values())
    untied = oracle("llama-gqa")[1]
    all_but_embedding = sum(t.num_weights for name, t in untied.tensors.items() if name != "model.embed_tokens.weight")
    assert weight_bytes(untied, describe(untied.config)) == 4 * (all_but_embedding + untied.config["hidden_size"])
    experts = oracle("qwen3-moe")[1]
    sizes = {name: 4 * tensor.num_weights for name, tensor in experts.tensors.items()}
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(size for name, size in sizes.items() if ".experts." not in name and name != "model.embed_tokens.weight")
    row = 4 * experts.config["hidden_size"]
    assert weight_bytes(experts, describe(experts.config)) == pytest.approx(others + row + in_experts / 3, abs=1)


def test_a_shared_codebook_is_read_once() -> None:
    dense = oracle("llama-tied")[1]
    codebook = Codebook("shared", Array.of(np.zeros((16, 4), np.float16)))
    tensors = dict(dense.tensors)
    saved = 0
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        codes = Array.of(np.zeros((32, 8), np.uint16))
        tensors[name] = ClusteredWeight(name, (32, 32), (Stage(codebook, codes),))
        saved += 4 * 32 * 32 - 32 * 8 * 4 // 8
    clustered = replace(dense, tensors=tensors)
    before = weight_bytes(dense, describe(dense.config))
    assert weight_bytes(clustered, describe(dense.config)) == before - saved + 16 * 4 * 2


def test_reading_memory_takes_time() -> None:
    assert 0.1 < read_gigabytes_per_second(1 << 20, 2) < 10_000
    assert default_threads()[0] == 1
