"""Load a model in one program and let it speak, in a process of its own: what `formats.py` starts for each row of its table.

`python benchmarks/run_program.py PROGRAM` reads a JSON request {path, prompt_ids, new_tokens, threads} from its input and
prints {load_seconds, tokens_per_second, ids, logits: [of the prompt's last token], peak_bytes, base_bytes}. The speed leaves
out the first token; `base_bytes` is what the process had taken, libraries included, before it touched the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import peak_resident_bytes

Step = Callable[[list[int], Any], tuple[Any, Any]]
"""Token ids and the state after those before to the logits of the last one and the new state; the state is None at first."""


def ours(path: Path, threads: int) -> Step:
    import torch

    from cluscomp_runtime import load

    torch.set_num_threads(threads)
    model = load(path)

    def step(ids: list[int], cache: Any) -> tuple[Any, Any]:
        cache = cache or model.decoder.cache(512)
        with torch.inference_mode():
            return model.decoder(torch.tensor([ids]), cache, last_only=True)[0, -1].numpy(), cache

    return step


def transformers(path: Path, threads: int) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    import cluscomp_runtime.hf  # noqa: F401 - registers the quantizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def step(ids: list[int], cache: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].numpy(), out.past_key_values

    return step


def onnxruntime(path: Path, threads: int, *, compact: bool = False) -> Step:
    import numpy as np

    from cluscomp_export.inspection.onnxruntime import OnnxSession

    session = OnnxSession(path, compact=compact, threads=threads)

    def step(ids: list[int], cache: Any) -> tuple[Any, Any]:
        logits, present = session.step(np.array([ids], np.int64), cache)
        return logits[0, -1], present

    return step


PROGRAMS: dict[str, Callable[[Path, int], Step]] = {
    "ours": ours,
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "onnxruntime, compact": lambda path, threads: onnxruntime(path, threads, compact=True),
}


def measure(program: str, request: dict[str, Any]) -> dict[str, Any]:
    start_program = PROGRAMS[program]
    for module in {"ours": ("cluscomp_runtime",), "transformers": ("transformers", "cluscomp_runtime.hf")}.get(
        program, ("onnxruntime", "cluscomp_export.inspection.onnxruntime")
    ):
        __import__(module)
    base = peak_resident_bytes()
    start = time.perf_counter()
    step = start_program(Path(request["path"]), request["threads"])
    load_seconds = time.perf_counter() - start
    logits, state = step(request["prompt_ids"], None)
    last, ids = logits.tolist(), [int(logits.argmax())]
    start = time.perf_counter()
    while len(ids) < request["new_tokens"]:
        logits, state = step(ids[-1:], state)
        ids.append(int(logits.argmax()))
    return {
        "load_seconds": load_seconds,
        "tokens_per_second": (len(ids) - 1) / (time.perf_counter() - start),
        "ids": ids,
        "logits": last,
        "peak_bytes": peak_resident_bytes(),
        "base_bytes": base,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], json.load(sys.stdin))))
