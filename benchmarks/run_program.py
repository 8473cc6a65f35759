"""Load a model in one program and let it speak, in a process of its own: what `formats.py` starts for each row of its table.

`running.py` starts it for onnxruntime and transformers.

`python benchmarks/run_program.py PROGRAM` reads a JSON request {path, prompt_ids, new_tokens, threads} from its input and
prints {load_seconds, tokens_per_second, ids, logits: [of the prompt's last token], resident_bytes, peak_bytes, base_bytes}. The
speed leaves out the first token; memory is that after the last one, and `base_bytes` what the process had taken, libraries
included, before it touched the model. With `prefill_tokens` in the request, a prompt of so many random tokens is then read at
once, for `prefill_tokens_per_second`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import peak_resident_bytes, resident_bytes

WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 5

Step = Callable[[list[int], Any], tuple[Any, Any]]
"""Token ids and the state after those before to the logits of the last one and the new state; the state is None at first."""


def ours(path: Path, threads: int) -> Step:
    from cluscomp_runtime import load

    engine = load(path, threads=threads)._engine

    def step(ids: list[int], cache: Any) -> tuple[Any, Any]:
        cache = cache or engine.cache(1024)
        return engine.logits(np.array(ids), cache, last_only=True)[-1], cache

    return step


def transformers(path: Path, threads: int, dtype: str = "float32") -> Step:
    """`path` is a folder, or a GGUF file, which transformers decodes."""
    import torch
    from transformers import AutoModelForCausalLM

    import cluscomp_runtime.hf  # noqa: F401 - registers the quantizer

    torch.set_num_threads(threads)
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype))

    def step(ids: list[int], cache: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy(), out.past_key_values

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
    "transformers, bfloat16": lambda path, threads: transformers(path, threads, "bfloat16"),
    "onnxruntime": onnxruntime,
    "onnxruntime, compact": lambda path, threads: onnxruntime(path, threads, compact=True),
}


def measure(program: str, request: dict[str, Any]) -> dict[str, Any]:
    start_program = PROGRAMS[program]
    libraries = {"ours": ("cluscomp_runtime",), "transformers": ("transformers", "cluscomp_runtime.hf")}
    for module in libraries.get(program.partition(",")[0], ("onnxruntime", "cluscomp_export.inspection.onnxruntime")):
        __import__(module)
    base = peak_resident_bytes()
    start = time.perf_counter()
    step = start_program(Path(request["path"]), request["threads"])
    load_seconds = time.perf_counter() - start
    vocab_size = len(step(request["prompt_ids"], None)[0])
    random = np.random.default_rng(0).integers(0, vocab_size, request.get("prefill_tokens", WARM_UP_PROMPT)).tolist()
    warm_up(step, random[:WARM_UP_PROMPT])
    logits, state = step(request["prompt_ids"], None)
    last, ids = logits.tolist(), [int(logits.argmax())]
    start = time.perf_counter()
    while len(ids) < request["new_tokens"]:
        logits, state = step(ids[-1:], state)
        ids.append(int(logits.argmax()))
    seconds = time.perf_counter() - start
    answer = {
        "load_seconds": load_seconds,
        "tokens_per_second": (len(ids) - 1) / seconds,
        "ids": ids,
        "logits": last,
        "resident_bytes": resident_bytes(),
        "peak_bytes": peak_resident_bytes(),
        "base_bytes": base,
    }
    if "prefill_tokens" in request:
        start = time.perf_counter()
        step(random, None)
        answer["prefill_tokens_per_second"] = len(random) / (time.perf_counter() - start)
    return answer


def warm_up(step: Step, prompt: list[int]) -> None:
    """A short prompt and a few tokens: what a program does only once is done then."""
    logits, state = step(prompt, None)
    for _ in range(WARM_UP_TOKENS):
        logits, state = step([int(logits.argmax())], state)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], json.load(sys.stdin))))
