"""The command `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluscomp_export.cli.options import DEVICE, JSON, PATH, command, option
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, say, show

__all__ = ["generate"]


@command()
@click.argument("model", type=PATH)
@click.argument("prompt")
@option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to generate.")
@option("--chat", is_flag=True, help="Treat PROMPT as a user's message, with the model's chat template.")
@option("--raw", is_flag=True, help="Print what the model writes unchanged, control characters included.")
@option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@option("--top-k", type=click.IntRange(min=1), help="Sample among the k most likely tokens.")
@option("--top-p", type=click.FloatRange(min=0, max=1), help="Sample among the most likely tokens of this total probability.")
@option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@option("--delta", type=PATH, help="Apply this delta (see tune) first.")
@DEVICE
@option(
    "--kernel",
    default="auto",
    show_default=True,
    help="Compute in torch with this kernel: native, embedding_bag, triton, dense, reference.",
)
@option("--selftest", is_flag=True, help="Run the self-test first, and fail if the model computes something else.")
@JSON
def generate(
    model: Path,
    prompt: str,
    *,
    delta: Path | None,
    device: str,
    kernel: str,
    selftest: bool,
    chat: bool,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL.

    Control characters in the generated text are shown escaped (\\x1b), as are characters that reverse the order of text.
    """
    from dataclasses import asdict

    from cluscomp_runtime import load

    with ProgressDisplay() as progress:
        progress("loading", 0, 1)
        loaded = load(model, device=device, kernel=kernel, selftest=selftest, delta=delta)
    say(f"engine: {loaded.engine}; kernels: {loaded.kernel_summary}")
    text = loaded.chat([{"role": "user", "content": prompt}]) if chat else prompt
    stream = loaded.stream(text, add_special_tokens=not chat, **options)
    if not as_json and not chat:
        show(prompt, end="", raw=raw)
    for piece in stream:
        if not as_json:
            show(piece, end="", raw=raw)
    result = stream.finish()
    if as_json:
        rates = {"new_tokens": result.new_tokens, "tokens_per_second": result.tokens_per_second}
        print_json({**asdict(result), **rates, "engine": loaded.engine, "kernel": loaded.kernel_summary})
        return
    show()
    say(f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s, stopped by {result.stop_reason}")
