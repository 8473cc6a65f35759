"""`eval` beside llama.cpp's own `llama-perplexity`: the same model and the same bytes of text, to four decimals.

    .venv/bin/python benchmarks/llama_perplexity.py /path/to/llama-perplexity MODEL --text TEXT [--context 128]

Both evaluate MODEL, uncompressed in float32: llama.cpp as the GGUF file that we write, keys and values in float32. The text
comes as it is, with Windows line ends, with a byte order mark, with the tokenizer's special tokens in it, and with emoji,
control characters and scripts that a small vocabulary spells in bytes. Exits with 1 if a perplexity differs by more than
`TOLERANCE`, or a number of windows differs.

llama-perplexity is built from the source of the package llama-cpp-python, of which this needs no more:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF
    cmake --build build --target llama-perplexity
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.cli.terminal import print_table
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import write_dense_gguf
from cluscomp_runtime.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Relative. Sums of float32 in another order change a perplexity in the sixth digit or so."""

TRIES = 5
"""llama-perplexity sometimes ends before its log has its last line."""

EXACT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]

_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+)")
_WINDOWS = re.compile(r"calculating perplexity over (\d+) chunks")


def texts(text: str, special: list[str]) -> dict[str, bytes]:
    """The text by itself and with what makes texts differ, a little of it in every paragraph."""

    def sprinkled(words: list[str]) -> bytes:
        paragraphs = text.split("\n")
        return "\n".join(f"{part} {words[index % len(words)]}" for index, part in enumerate(paragraphs)).encode()

    unusual = ["👩‍👩‍👧 🦄", "한국어 텍스트", "a\tb\x07\x1b[1mc\x00d", "中文", "\u200f\u2028e\u0301", "\r"]
    return {
        "as it is": text.encode(),
        "Windows line ends": text.replace("\n", "\r\n").encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "special tokens": sprinkled(special),
        "emoji and control characters": sprinkled(unusual),
        "line ends at the end": text.encode() + b"\n\n",
    }


def theirs(program: Path, model: Path, text: Path, context: int) -> tuple[float, int]:
    """llama.cpp's perplexity and its number of windows."""
    command = [program, "-m", model, "-f", text, "-c", str(context), "-b", str(context), "-t", "1", "-ngl", "0"]
    for _ in range(TRIES):
        ran = subprocess.run([*command, *EXACT], capture_output=True, text=True, check=False, errors="replace")
        output = ran.stdout + ran.stderr
        estimate, windows = _ESTIMATE.search(output), _WINDOWS.search(output)
        if estimate is not None and windows is not None:
            return float(estimate[1]), int(windows[1])
    raise SystemExit(f"{program} gives no estimate:\n{output[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="llama-perplexity")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=12000, help="of the text; two windows at least")
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    tokenizer = Tokenizer.from_files(source.files)
    if tokenizer is None:
        raise SystemExit("this model has no tokenizer")
    text = read_text(arguments.text)[: arguments.characters].replace("\r", "")
    rows, agree = [], True
    with tempfile.TemporaryDirectory() as name:
        model, file = Path(name) / "model.gguf", Path(name) / "text.txt"
        write_dense_gguf(source, model, gguf_type="f32")
        for kind, content in texts(text, sorted(set(tokenizer.special_tokens.values()))).items():
            file.write_bytes(content)
            ours = evaluate_files(arguments.model, text=file, context=arguments.context)
            perplexity, windows = theirs(arguments.program, model, file, arguments.context)
            agree &= abs(ours.perplexity / perplexity - 1) <= TOLERANCE and ours.windows == windows
            rows.append((kind, ours.windows, windows, f"{ours.perplexity:.4f}", f"{perplexity:.4f}"))
    print_table(("text", "windows", "llama.cpp's", "perplexity", "llama.cpp's"), rows)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
