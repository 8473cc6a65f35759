"""Hold our dense GGUF files against stock llama.cpp: the same token ids, greedy continuation and perplexity as our own runtime.

    python tools/llama_cpp_parity.py MODEL --text TEXT --node FOLDER [--types f16 q8_0] [--windows 4] [--context 512]

MODEL is anything the tool converts from. FOLDER is where `npm install --ignore-scripts node-llama-cpp` was run; nothing is
downloaded here. Also checks that llama.cpp refuses the native flavour. Exits with 1 if anything differs: ids must be equal,
perplexities agree within 0.2 % (quantised types: 2 %), and continuations be equal but for quantised types.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluscomp_export.evaluate import evaluate, text_windows
from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import write_dense_gguf, write_gguf
from cluscomp_formats.ir import Model
from cluscomp_runtime import LanguageModel

NEW_TOKENS = 32
TOLERANCE = {"f32": 0.002, "f16": 0.002, "bf16": 0.002}
"""Relative difference of perplexities: llama.cpp rounds activations to half precision for half-precision weights."""

QUANTISED_TOLERANCE = 0.02
"""The same for quantised weights, which llama.cpp multiplies with activations rounded to eight bits."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold our dense GGUF files against stock llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["f16"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    model = open_source(options.model)
    text = options.text.read_text(encoding="utf-8")
    different = False
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "native.gguf"
        write_gguf(replace(model, tensors={}), native)
        for gguf_type in options.types:
            path = Path(folder) / f"{gguf_type}.gguf"
            write_dense_gguf(model, path, gguf_type=gguf_type)
            different |= not agrees(open_source(path), path, native, text, gguf_type, options)
            path.unlink()
    return int(different)


def agrees(dense: Model, path: Path, native: Path, text: str, gguf_type: str, options: argparse.Namespace) -> bool:
    """Compare one file and print what was found."""
    ours = LanguageModel.from_model(dense)
    if ours.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    ids = ours.tokenizer.encode(text)
    bos_id = ours.tokenizer.bos_id if ids[:1] == [ours.tokenizer.bos_id] else None
    windows = text_windows(ids, context=options.context, windows=options.windows, bos_id=bos_id)
    prompt = windows[0][:16]
    request = {
        "model": str(path),
        "refused": str(native),
        "text": text,
        "prompt_ids": prompt,
        "new_tokens": NEW_TOKENS,
        "windows": windows,
    }
    theirs = scores(request, options.node)
    continuation = list(prompt)
    for _ in range(NEW_TOKENS):
        continuation.append(int(ours.forward([continuation])[0, -1].argmax()))
    perplexity = evaluate(ours, windows).perplexity
    losses = [-score for window in theirs["windows"] for score in window]
    their_perplexity = math.exp(sum(losses) / len(losses))
    difference = their_perplexity / perplexity - 1
    same_ids = theirs["text_ids"] == ids[0 if bos_id is None else 1 :]
    same_text = theirs["greedy_ids"] == continuation[len(prompt) :]
    refused = "unknown model architecture: 'cluscomp'" in (theirs["refusal"] or "")
    print(f"{gguf_type}: llama.cpp {theirs['release']}, {len(losses)} tokens scored")
    print(f"  perplexity: ours {perplexity:.4f}, llama.cpp {their_perplexity:.4f} ({difference:+.3%})")
    print(f"  same ids of the text ({len(ids)}): {same_ids}; same greedy continuation ({NEW_TOKENS}): {same_text}")
    print(f"  native flavour: {theirs['refusal'] or 'loaded, which is wrong'}")
    exact = gguf_type in TOLERANCE
    close = abs(difference) <= TOLERANCE.get(gguf_type, QUANTISED_TOLERANCE)
    return close and same_ids and refused and (same_text or not exact)


def scores(request: dict[str, Any], node_folder: Path) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(request, file)
        file.flush()
        script = Path(__file__).with_name("llama_cpp_scores.mjs")
        command = ["node", str(script), str(node_folder.resolve()), file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"node failed:\n{result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return answer


if __name__ == "__main__":
    sys.exit(main())
