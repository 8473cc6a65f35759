"""What is written for people: nothing a terminal would obey, whatever a model says and whatever its files are named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from runtime_models import clustered_model, side_file, small_config

from cluscomp_export.cli.main import cli
from cluscomp_export.cli.terminal import ProgressDisplay, say, show
from cluscomp_formats.packed import write_packed

HOSTILE = "\x1b]52;c;cm0=\x07\x1b[31m\u202e\x9b\r\x00"
ESCAPED = r"\x1b]52;c;cm0=\x07\x1b[31m\u202e\x9b\r\x00"


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can say nothing but control sequences."""
    vocabulary = {f"{HOSTILE}{token}": token for token in range(97)}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": f"{HOSTILE}0"}, "decoder": {"type": "Fuse"}}
    path = tmp_path_factory.mktemp("hostile") / "hostile.clus"
    model = clustered_model(small_config(num_hidden_layers=1), {"tokenizer.json": side_file(json.dumps(content))})
    write_packed(model, path)
    return path


def generate(model: Path, *options: str) -> str:
    result = CliRunner().invoke(
        cli, ["generate", str(model), "Once", "--max-new-tokens", "4", *options], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.stdout


def test_what_a_model_says_is_shown_without_control_sequences(hostile_model: Path) -> None:
    written = generate(hostile_model)
    assert ESCAPED in written
    assert all(character == "\n" or character.isprintable() for character in written)


def test_what_a_model_says_is_raw_on_request(hostile_model: Path) -> None:
    assert HOSTILE in generate(hostile_model, "--raw")


def test_json_is_escaped_by_its_own_rules(hostile_model: Path) -> None:
    written = generate(hostile_model, "--json")
    assert "\x1b" not in written
    assert HOSTILE in json.loads(written)["text"]


@pytest.mark.parametrize("text", ["日本語 é\n\tx", "नमस्ते 👩‍👩‍👧 \u00a0\u3000", "سلام\u200fx"])
def test_other_text_stays_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(text)
    assert capsys.readouterr().out == text + "\n"


def test_messages_are_shown_without_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"warning: {HOSTILE}\nnext")
    assert capsys.readouterr().err == f"warning: {ESCAPED}\nnext\n"


@pytest.mark.parametrize("raw", [False, True])
def test_what_the_stream_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    show("é 世 \udc80", raw=raw)
    assert stream.buffer.getvalue() == rb"\xe9 \u4e16 \udc80" + b"\n"  # type: ignore[attr-defined]


def test_progress_names_no_control_sequence() -> None:
    with ProgressDisplay() as progress:
        progress(f"clustering {HOSTILE}", 0, 2)
        progress(f"clustering {HOSTILE}", 1, 2)
        assert {task.description for task in progress._progress.tasks} == {f"clustering {ESCAPED}"}
