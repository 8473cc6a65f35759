"""The command as people and scripts use it: outputs, JSON, exit codes, messages."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_export.cli.main import main
from cluscomp_export.cli.terminal import ProgressDisplay
from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_formats.packed import write_packed

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cluscomp-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cluscomp_export.conversion.convert import ConversionOptions, convert

    output = tmp_path_factory.mktemp("packed") / "stories.clus"
    convert(stories_folder, output, ConversionOptions(bits=4, share="kind"))
    return output


def test_convert_reports_and_writes(run: Run, stories_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.clus"
    code, out, _ = run("convert", stories_folder, output, "--bits", 4, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["file_bytes"] == output.stat().st_size
    assert report["bits_per_weight"]["linears"] <= 4
    assert report["digest"].startswith("sha256:")


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Run, stories_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", stories_folder, tmp_path / "out.clus", "--bits", 3, "--dry-run")
    assert code == 0
    assert "predicted size" in out
    assert "model.layers.*.self_attn.q_proj.weight" in out
    code, out, _ = run("convert", stories_folder, tmp_path / "out.clus", "--bits", 3, "--dry-run", "--json")
    assert json.loads(out)["bits_per_weight"]["linears"] <= 3
    assert list(tmp_path.iterdir()) == []


def test_plan_explains_itself(run: Run, stories_folder: Path) -> None:
    code, out, _ = run("plan", stories_folder, "--bits", 2.2)
    assert code == 0
    for words in (
        "its bits",
        "error",
        "All weights count alike",
        "phase",
        "bits per weight: 2.",
        "predicted size",
        "at most",
    ):
        assert words in out
    code, out, _ = run("plan", stories_folder, "--match-loss", 0.5)
    assert code == 0
    for words in ("sensitivity", "loss %", "sensitivities", "predicted loss: 0.", "nats per token"):
        assert words in out


def test_plan_in_json_is_complete(run: Run, stories_folder: Path) -> None:
    code, out, _ = run("plan", stories_folder, "--budget", "0.2 MB", "--sensitivity", "measured", "--json")
    assert code == 0
    report = json.loads(out)
    assert 0.95 * 200_000 < report["file_bytes"] <= 200_000
    clustered = [row for row in report["tensors"] if row["kind"] == "clustered"]
    assert sum(row["loss"] for row in clustered) == pytest.approx(report["predicted_loss"])
    assert sum(row["loss_share"] for row in clustered) == pytest.approx(1)
    assert {row["codebook"] for row in clustered} == {book["name"] for book in report["codebooks"]}
    assert all(row["codebook_bits"] in (8, 16) and row["sensitivity"] > 0 for row in clustered)
    assert "sensitivities" in {peak["phase"] for peak in report["memory"]}


def test_a_plan_is_saved_and_followed(run: Run, stories_folder: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out.clus"
    code, out, _ = run("plan", stories_folder, "--budget", "200kB", "--save", file, "--json")
    assert code == 0
    predicted = json.loads(out)["file_bytes"]
    code, _, err = run("plan", stories_folder, "--save", file)
    assert code == 5, err
    code, out, _ = run("convert", stories_folder, output, "--plan", file, "--effort", "fast", "--json")
    assert code == 0
    # What the self-test record may be shorter than its longest text, in 80 positions of 8 logits and ids, and what the hash of
    # the plan in the provenance is longer than a budget.
    assert predicted - 80 * 8 * 12 < output.stat().st_size < predicted + 100
    code, out, _ = run("convert", stories_folder, tmp_path / "direct.clus", "--budget", "200kB", "--effort", "fast", "--json")
    assert output.stat().st_size - 100 < json.loads(out)["file_bytes"] <= 200_000


@pytest.mark.parametrize("size", ["much", "-5MB", "16XB"])
def test_a_budget_that_is_no_size_is_a_usage_error(run: Run, stories_folder: Path, size: str) -> None:
    code, _, err = run("plan", stories_folder, f"--budget={size}")
    assert code == 2
    assert "is not a size" in err


def test_a_plan_takes_no_more_than_a_configuration(run: Run, stories_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((stories_folder / name).read_bytes())
    code, out, _ = run("plan", tmp_path, "--budget", "200kB", "--json")
    assert code == 0
    assert json.loads(out)["file_bytes"] <= 200_000
    code, _, err = run("plan", tmp_path, "--budget", "200kB", "--sensitivity", "measured")
    assert code == 3
    assert "only the configuration is here" in err


def test_inspect(run: Run, packed: Path, stories_folder: Path) -> None:
    code, out, _ = run("inspect", packed, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["format"] == "packed"
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["file_bytes"] == packed.stat().st_size
    assert 0 < report["bits_per_weight"]["linears"] <= 4 < report["bits_per_weight"]["all"]
    row = next(row for row in report["tensors"] if row["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert row["shape"] == [64, 64]
    assert row["dim"] * row["clusters"] > 0
    code, out, _ = run("inspect", packed)
    assert report["digest"] in out
    assert "kernel here" in out
    code, out, _ = run("inspect", packed, "--quick", "--json")
    assert json.loads(out)["digest"] is None
    code, out, _ = run("inspect", packed, "--reference", stories_folder)
    assert code == 0
    assert "relative error" in out
    assert run("inspect", packed, "--reference", stories_folder, "--quick")[0] == 2


def test_tune_try_inspect_and_merge(run: Run, packed: Path, stories_text: Path, tmp_path: Path) -> None:
    delta, merged = tmp_path / "some.delta", tmp_path / "merged.gguf"
    tune = ("tune", packed, delta, "--text", stories_text, "--context", 32, "--steps", 2, "--batch", 2, "--lr", 3e-2)
    code, out, _ = run(*tune, "--dry-run")
    assert code == 0
    assert "2 steps of 2" in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(*tune, "--train", "codebooks,norms", "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report["changed"]) == {"codebook", "norm"}
    assert report["file_bytes"] == delta.stat().st_size
    code, out, _ = run("inspect", delta, "--reference", packed)
    assert code == 0
    assert report["base"] in out
    assert json.loads(run("inspect", delta, "--json")[1])["result"] == report["result"]
    code, out, _ = run("generate", packed, "Once upon", "--delta", delta, "--max-new-tokens", 3, "--selftest")
    assert (code, out.startswith("Once upon")) == (0, True)
    code, out, _ = run("merge", packed, delta, merged, "--to", "gguf", "--json")
    assert (code, json.loads(out)["digest"]) == (0, report["result"])
    assert run("verify", merged, packed, "--delta", delta)[0] == 0
    assert run("verify", merged, packed)[0] == 1
    perplexities = [
        json.loads(run("eval", *model, "--text", stories_text, "--windows", 2, "--context", 64, "--json")[1])["perplexity"]
        for model in ((packed,), (packed, "--delta", delta), (merged,))
    ]
    assert perplexities[0] != perplexities[1] == perplexities[2]
    assert run(*tune)[0] == 5
    assert run("merge", packed, delta, merged, "--to", "gguf")[0] == 5
    assert run("merge", merged, delta, tmp_path / "twice.clus")[0] == 3
    assert run("generate", delta, "Once")[0] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        ("--text", "a", "--chat", "b"),
        ("--text", "a", "--steps", 1, "--epochs", 2),
        ("--text", "a", "--train", "codes"),
        ("--text", "a", "--kl", 1),
    ],
)
def test_tune_refuses_options_that_do_not_fit(run: Run, packed: Path, tmp_path: Path, wrong: tuple[object, ...]) -> None:
    assert run("tune", packed, tmp_path / "x.delta", *wrong)[0] == 2
    assert run("merge", packed, tmp_path / "x.delta", tmp_path / "y", "--weights", "a,b")[0] == 2


def test_inspect_reports_on_a_faulty_file_to_the_end(run: Run, packed: Path, tmp_path: Path) -> None:
    flipped = corrupt(packed, tmp_path / "flipped.clus", lambda data: data.__setitem__(1000, data[1000] ^ 1))
    code, out, err = run("inspect", flipped)
    assert code == 3
    assert "kernel here" in out
    assert "checksum" in err
    code, out, _ = run("inspect", flipped, "--json")
    report = json.loads(out)
    assert (code, report["exit_code"], len(report["problems"])) == (3, 3, 1)
    assert report["architecture"] == "LlamaForCausalLM"


def test_a_source_is_not_loaded_but_told_to_be_converted(run: Run, stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense.gguf"
    assert run("convert", packed, dense, "--to", "gguf", "--gguf-type", "f16")[0] == 0
    for source in (stories_folder, dense):
        code, _, err = run("generate", source, "hello")
        assert code == 3
        assert f"cluscomp-export convert {source} model.clus" in err


def test_inspect_shows_names_of_any_kind_as_text(run: Run, tmp_path: Path) -> None:
    config: dict[str, Any] = {"architectures": 5, "model_type": "\x1b[2J"}
    names = ["[/]", "[red]x", "a\u202eb"]
    tensors: dict[str, Tensor] = {name: DenseTensor(name, Array.of(np.zeros((2, 2), np.float32))) for name in names}
    write_packed(Model(config, tensors, provenance={"tool": 1, "version": ["\x1b[2J"]}), tmp_path / "m.clus")
    code, out, _ = run("inspect", tmp_path / "m.clus")
    assert code == 0
    assert all(shown in out for shown in ("[/]", "[red]x", "a\\u202eb", "\\x1b[2J"))
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_progress_shows_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressDisplay() as progress:
        progress("clustering [/]", 1, 2)


def test_progress_is_told_line_by_line_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ProgressDisplay() as progress:
        progress("writing", 0, 100)
        now += 100.0
        progress("reading", 0, 1)
        progress("writing", 1, 100)
        for done in range(11):
            progress("training \x1b[2J", done, 10)
            now += 40.0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "writing: 1/100",
        "training \\x1b[2J: 2/10, about 5 min left",
        "training \\x1b[2J: 4/10, about 4 min left",
        "training \\x1b[2J: 6/10, about 3 min left",
        "training \\x1b[2J: 8/10, about 1 min left",
        "training \\x1b[2J: 10/10",
    ]


def test_verify_speaks_in_exit_codes(run: Run, stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    code, out, _ = run("verify", stories_folder, packed)
    assert code == 0
    assert out.strip().endswith("DERIVED")
    code, out, _ = run("verify", packed, packed, "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "equal")
    other = tmp_path / "other.clus"
    assert run("convert", stories_folder, other, "--bits", 5)[0] == 0
    assert run("verify", packed, other)[0] == 1
    other.write_bytes(other.read_bytes()[:-1])
    assert run("verify", packed, other)[0] == 2
    assert run("verify", packed, tmp_path / "missing.clus")[0] == 2


def test_eval(run: Run, stories_folder: Path, stories_text: Path, packed: Path) -> None:
    arguments = ("--text", stories_text, "--reference", stories_folder, "--windows", 2, "--context", 128, "--json")
    code, out, _ = run("eval", packed, *arguments)
    result = json.loads(out)
    assert code == 0
    assert result["windows"] == 2
    assert 1 < result["reference_perplexity"] < 6
    assert result["perplexity"] < 2 * result["reference_perplexity"]
    assert 0 < result["kl_median"] < result["kl"] < result["kl_p99"] <= result["kl_max"]
    assert result["kl"] < 1
    assert 0.5 < result["top1"] <= 1
    assert result["record"]["command"] == ["cluscomp-export", "eval", *map(str, (packed, *arguments))]
    code, out, _ = run("eval", packed, *arguments[:-1])
    assert code == 0
    assert f"{result['perplexity']:.4f} +/- {result['perplexity_error']:.4f}" in out
    assert f"{result['perplexity_ratio']:.4f}" in out
    assert f"{result['kl_p99']:.4f}" in out


def test_eval_in_the_papers_protocol_to_a_file(run: Run, stories_text: Path, packed: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    arguments = ("eval", packed, "--text", stories_text, "--protocol", "gptq", "--context", 64, "--windows", 2)
    code, out, _ = run(*arguments, "--threads", 1, "--output", output)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert code == 0
    assert "protocol gptq: 2 windows of 64 tokens" in out
    assert f"{result['perplexity']:.4f}" in out
    assert result["record"]["protocol"]["join"] == "rows"
    assert result["record"]["threads"] == 1
    content = output.read_bytes()
    assert run(*arguments, "--output", output)[0] == 5
    assert output.read_bytes() == content
    assert run(*arguments, "--output", output, "--force")[0] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["eval.json"]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--text", "a.txt", "--tasks", "arc_easy"),
        ("--tasks", "arc_easy", "--windows", 3, "--reference", "original"),
        ("--text", "a.txt", "--limit", 3),
        ("--text", "a.txt", "--protocol", "wikitext"),
    ],
)
def test_eval_refuses_options_that_do_not_go_together(run: Run, packed: Path, options: tuple[object, ...]) -> None:
    assert run("eval", packed, *options)[0] == 2


def test_eval_of_tasks_without_the_harness_says_what_to_install(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "cluscomp_export.evaluation.harness", raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    code, _, err = run("eval", packed, "--tasks", "arc_easy")
    assert code == 4
    assert "pip install cluscomp-export[lm-eval]" in err


def test_generate_streams_what_json_reports(run: Run, packed: Path) -> None:
    code, out, err = run("generate", packed, "Once upon a time", "--max-new-tokens", 12, "--selftest")
    assert code == 0
    assert "engine: native; kernels: native" in err
    assert out.startswith("Once upon a time")
    code, document, _ = run("generate", packed, "Once upon a time", "--max-new-tokens", 12, "--json")
    result = json.loads(document)
    assert out.strip() == ("Once upon a time" + result["text"]).strip()
    assert len(result["token_ids"]) == result["new_tokens"] == 12


def corrupt(packed: Path, output: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(packed.read_bytes())
    change(data)
    output.write_bytes(data)
    return output


def test_bad_input_is_told_apart_by_exit_code(run: Run, stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.clus"
    assert run("convert", tmp_path / "missing", out)[0] == 3
    assert run("convert", stories_folder, packed)[0] == 5
    assert run("convert", stories_folder, tmp_path / "no" / "folder.clus")[0] == 6
    assert run("convert", stories_folder, out, "--bits", 0.001)[0] == 2
    assert run("convert", stories_folder, out, "--dim", 4)[0] == 2
    assert run("convert", stories_folder, out, "--share", "everything")[0] == 2
    assert run("convert", stories_folder, out, "--device", "abacus")[0] == 2
    assert run("generate", packed, "x", "--device", "abacus")[0] == 2
    assert run("generate", packed, "x", "--kernel", "steam")[0] == 2
    truncated = corrupt(packed, tmp_path / "truncated.clus", lambda data: data.__delitem__(slice(-100, None)))
    assert run("inspect", truncated)[0] == 3
    flipped = corrupt(packed, tmp_path / "flipped.clus", lambda data: data.__setitem__(1000, data[1000] ^ 1))
    assert run("inspect", flipped)[0] == 3
    assert not out.exists()


def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(run: Run, stories_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((stories_folder / "config.json").read_bytes())

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    code, _, err = run("convert", source, tmp_path / "out.clus")
    assert code == 3
    assert "pytorch_model.bin" in err
    assert "safe" in err
    assert not (tmp_path / "pwned").exists()


def test_errors_are_json_for_machines(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("inspect", tmp_path / "missing.clus", "--json")
    document = json.loads(out)
    assert document["exit_code"] == code == 3
    assert document["problems"][0]["file"].endswith("missing.clus")


def test_an_unknown_architecture_is_clustered_but_not_run(run: Run, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"architectures": ["StrangeModel"], "model_type": "strange"}))
    generator = np.random.default_rng(0)
    weights = {f"blocks.{layer}.mixer.weight": generator.normal(size=(64, 64)).astype(np.float32) for layer in range(2)}
    save_file(weights, source / "model.safetensors")
    output = tmp_path / "out.clus"
    code, _, err = run("convert", source, output, "--dim", 4, "--clusters", 64)
    assert code == 0
    assert "no self-test record" in err
    assert run("inspect", output)[0] == 0
    code, _, err = run("generate", output, "hello")
    assert code == 4
    assert "StrangeModel" in err or "strange" in err
    assert run("verify", source, output)[0] == 2


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards, also where the test fails: what is left of it would fail another."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def test_ctrl_c_before_anything_is_finished_leaves_nothing_behind(stories_folder: Path, tmp_path: Path) -> None:
    # A clustering that lasts until it is interrupted. In the background SIGINT is ignored, and
    # what is ignored is inherited.
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cluscomp_export.compression import fit_encode; "
        "fit_encode.kmeans = lambda *_, **__: (print('clustering', flush=True), time.sleep(60)); "
        "from cluscomp_export.cli.main import main; main()"
    )
    arguments = ["convert", str(stories_folder), str(tmp_path / "out.clus"), "--dim", "2", "--clusters", "16"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with started([sys.executable, "-c", code, *arguments], environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "clustering\n"
        assert [path.name for path in tmp_path.iterdir()] == [".out.clus.work"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_is_kept_and_the_command_says_so(
    run: Run, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = ("convert", stories_folder, tmp_path / "out.clus", "--dim", 2, "--clusters", 16)
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.compression.fit_encode.assign", interrupt)
        code, _, err = run(*arguments)
    assert code == 130
    assert f"{tmp_path / '.out.clus.work'}: run the same command again to resume" in err
    assert [path.name for path in tmp_path.iterdir()] == [".out.clus.work"]
    code, _, err = run(*arguments)
    assert code == 0
    assert "resumed an interrupted conversion (reused 35 finished units)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.clus"]


def test_a_closed_pipe_is_not_complained_about(packed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    code = (
        f"import sys; sys.argv[1:] = ['inspect', {str(packed)!r}, '--json']; from cluscomp_export.cli.main import main; main()"
    )
    with started([sys.executable, "-c", code], environment) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_help_teaches_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("convert", "inspect", "verify", "eval", "generate"):
        assert command in out
        assert "Examples" in run("convert", "--help")[1]
        assert run(command, "--help")[0] == 0


def test_a_version_is_reported(run: Run) -> None:
    assert run("--version")[1].startswith("cluscomp-export, version")
