"""The commands `inspect` and `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from cluscomp_export import api
from cluscomp_export.cli.messages import report_error
from cluscomp_export.cli.options import DEVICE, JSON, PATH, command, option
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, print_table, show
from cluscomp_formats.errors import ClusCompError, printable

__all__ = ["inspect", "verify"]

CANNOT_TELL = 2


@command()
@click.argument("model", type=PATH)
@option("--quick", is_flag=True, help="Read shapes only: no digest, no checksums, no use of codebooks.")
@option("--reference", type=PATH, help="The original: adds the error of each tensor compared with it.")
@JSON
def inspect(model: Path, *, quick: bool, reference: Path | None, as_json: bool) -> int:
    """Show what MODEL contains: architecture, settings per tensor, bits per weight, use of its codebooks, worst tensors.

    Reads every tensor, reports all problems, and exits with 3 if there are any. MODEL may be a delta (see tune). Then
    --reference is the model it belongs to, and adds how far the delta is from it.
    """
    from cluscomp_export.cli.tables import print_delta, print_inspection
    from cluscomp_formats.delta import is_delta

    if is_delta(model):
        of_delta = api.inspect_delta(model, reference=reference)
        print_json(vars(of_delta)) if as_json else print_delta(of_delta)
        return of_delta.exit_code
    with ProgressDisplay() as progress:
        report = api.inspect(model, reference=reference, quick=quick, on_progress=progress)
    print_json(vars(report)) if as_json else print_inspection(report)
    return report.exit_code


@command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@option("--delta", type=PATH, help="Apply this delta (see tune) to B first.")
@DEVICE
@JSON
def verify(a: Path, b: Path, *, delta: Path | None, device: str, as_json: bool) -> int:
    """Check that A and B are the same model, or that one was made from the other.

    Exit code 0: equal, or derived from that source and correct. 1: different, a self-test fails, or too little of the source
    is left. 2: could not tell. Prints what is proven and what is only claimed; docs/verify.md has the rules.
    """
    from dataclasses import asdict

    try:
        with ProgressDisplay() as progress:
            result = api.verify(a, b, delta=delta, device=device, on_progress=progress)
    except ClusCompError as error:
        report_error(error, as_json=as_json, exit_code=CANNOT_TELL)
        return CANNOT_TELL
    if as_json:
        print_json({**asdict(result), "exit_code": result.exit_code})
        return result.exit_code
    worst = sorted(result.tensors, key=lambda tensor: -tensor.relative)[:5]
    if worst and worst[0].max_absolute > 0:
        rows = [(tensor.name, f"{tensor.relative:.4f}", f"{tensor.max_absolute:.4g}") for tensor in worst]
        print_table(("worst tensors", "relative error", "largest difference"), rows)
    if result.logits:
        values = result.logits
        show(
            f"logits on {values['positions']} positions: KL {values['kl']:.4f} (by chance {values['chance']:.2f}), "
            f"top-1 agreement {100 * values['top1']:.1f} %, largest difference {values['max_difference']:.4g}"
        )
    for name, test in result.self_tests.items():
        verdict = {True: "passed", False: "FAILED", None: "not run"}[test["passed"]]
        detail = f" (difference {test['max_difference']:.3g}, allowed {test['tolerance']:.3g})" if "tolerance" in test else ""
        show(f"self-test of {name}: {verdict}{detail}")
    for reason in result.reasons:
        show(f"- {printable(reason)}")
    for label, texts in (("proven", result.proven), ("only claimed", result.claimed)):
        for text in texts:
            show(f"{label}: {printable(text)}")
    show(result.verdict.upper())
    return result.exit_code
