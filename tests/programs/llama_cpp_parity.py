"""Hold a dense GGUF file against stock llama.cpp: the same token ids, perplexity and greedy continuation as our own runtime.

    python tests/programs/llama_cpp_parity.py MODEL --text TEXT [--types f16 q8_0] [--windows 4] [--context 512]

MODEL is anything the tool converts from. Exits with 1 if a file disagrees. The tests run the same comparison on a small model.

llama.cpp computes with less precision than we do: it rounds the input of every matrix product, to half precision for weights of
half precision, to eight bits in blocks of 32 for quantised ones, and keeps keys and values in half precision. How much that
costs is measured, not guessed: our runtime scores the same tokens once more with the same roundings. Those err otherwise but
by as much, so llama.cpp agrees if its scores differ from our exact ones by no more than twice what the roundings change.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import node_programs
import torch
from torch.nn import functional as F

from cluscomp_export.evaluation.protocols import choose_protocol
from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import DENSE_TYPES, write_dense_gguf
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.linear import DenseLinear

__all__ = ["Comparison", "compare"]

NEW_TOKENS = 32
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """What llama.cpp and our runtime make of one file.

    Differences are root mean squares over the scored tokens, in nats: `difference` between llama.cpp's log probabilities and
    ours, `rounding` what llama.cpp's roundings change in ours. The logarithm of the perplexity is a mean over the same
    tokens, so it differs by no more than `difference`. `greedy_deficit` is how far, in nats by our reckoning, the worst
    token of llama.cpp's continuation is from the best one.
    """

    release: str
    scored_tokens: int
    same_ids: bool
    perplexity: float
    their_perplexity: float
    difference: float
    rounding: float
    greedy_deficit: float

    @property
    def agrees(self) -> bool:
        """Whether ids are equal, scores within twice the rounding, and greedy tokens ours but for rounding.

        A choice between two tokens goes wrong by the difference of two errors, which spreads by sqrt(2) times `rounding`; in
        a few dozen choices it stays within four deviations, 4 * sqrt(2) < 6.
        """
        return self.same_ids and self.difference <= 2 * self.rounding and self.greedy_deficit <= 6 * self.rounding


def compare(path: Path, gguf_type: str, text: str, *, windows: int, context: int) -> Comparison:
    """Score the first `windows` windows of `context` tokens of `text` and continue the first 16 of its tokens."""
    ours = LanguageModel.from_model(open_source(path), kernel="dense")
    if ours.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    ids = ours.tokenizer.encode(text)
    bos_id = ours.tokenizer.bos_id if ids[:1] == [ours.tokenizer.bos_id] else None
    cut = choose_protocol(context=context).windows(ids, count=windows, bos_id=bos_id)
    prompt = cut[0][:16]
    request = {"path": str(path), "text": text, "prompt_ids": prompt, "new_tokens": NEW_TOKENS, "windows": cut}
    answer = node_programs.run("llama_cpp.mjs", request)
    theirs = torch.tensor([score for window in answer["windows"] for score in window], dtype=torch.float64)
    exact = scores(ours, cut)
    with llama_cpp_rounding(gguf_type):
        rounded = scores(ours, cut)
    return Comparison(
        release=answer["release"],
        scored_tokens=len(exact),
        same_ids=answer["text_ids"] == ids[0 if bos_id is None else 1 :],
        perplexity=math.exp(-float(exact.mean())),
        their_perplexity=math.exp(-float(theirs.mean())),
        difference=float((theirs - exact).pow(2).mean().sqrt()),
        rounding=float((rounded - exact).pow(2).mean().sqrt()),
        greedy_deficit=greedy_deficit(ours, prompt, answer["greedy_ids"]),
    )


def scores(model: LanguageModel, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log probabilities float64 of the tokens in the second half of each window."""
    found = []
    for window in windows:
        first = len(window) // 2
        predicted = torch.log_softmax(model.forward(torch.tensor([window]))[0, first:-1].double(), dim=-1)
        found.append(predicted.gather(1, torch.tensor(window[first + 1 :])[:, None])[:, 0])
    return torch.cat(found)


def greedy_deficit(model: LanguageModel, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """By how much the continuation's worst token trails the likeliest one at its place, in nats."""
    logits = model.forward(torch.tensor([[*prompt, *continuation[:-1]]]))[0, len(prompt) - 1 :].double()
    chosen = logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return float((logits.max(dim=-1).values - chosen).max())


def llama_cpp_rounding(gguf_type: str) -> ExitStack:
    """Within it, our runtime rounds what llama.cpp does for weights of that type."""
    attention = F.scaled_dot_product_attention
    rounding = input_rounding(gguf_type)

    def linear(matrix: DenseLinear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(rounding(x), matrix.weight, matrix.bias)

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        return attention(half(queries), half(keys), half(values), **options)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(DenseLinear, "__call__", linear))
    stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
    return stack


def input_rounding(gguf_type: str) -> Rounding:
    """What llama.cpp does to the input of a product with weights of that type."""
    if gguf_type == "f32":
        return lambda x: x
    if gguf_type == "f16":
        return half
    if gguf_type == "bf16":
        return lambda x: x.bfloat16().float()
    # Rows that are no whole blocks are kept in half precision.
    return lambda x: eight_bits(x) if x.shape[-1] % 32 == 0 else half(x)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.contiguous().numpy(), kind), kind))


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold our dense GGUF files against stock llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["f16"], choices=list(DENSE_TYPES))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    reason = node_programs.missing()
    if reason is not None:
        raise SystemExit(reason)
    model = open_source(options.model)
    text = options.text.read_text(encoding="utf-8")
    agree = True
    with tempfile.TemporaryDirectory() as folder:
        for gguf_type in options.types:
            path = Path(folder) / f"{gguf_type}.gguf"
            write_dense_gguf(model, path, gguf_type=gguf_type)
            found = compare(path, gguf_type, text, windows=options.windows, context=options.context)
            path.unlink()
            agree &= found.agrees
            print(f"{gguf_type}: {'agrees' if found.agrees else 'DIFFERS'} {found}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
