"""Tables that describe models, plans and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluscomp_export.cli.terminal import print_table, say, show
from cluscomp_export.sources.linears import kind
from cluscomp_formats.errors import Problem, printable

if TYPE_CHECKING:
    from cluscomp_export.benchmarking.bench import Speed, Spread
    from cluscomp_export.conversion.plan_report import PlanReport
    from cluscomp_export.evaluation.evaluate import Evaluation
    from cluscomp_export.inspection.inspect import DeltaInspection, Inspection

__all__ = [
    "described_bits",
    "print_delta",
    "print_inspection",
    "print_memory",
    "print_plan",
    "print_predicted_speed",
    "print_scores",
    "print_speeds",
    "print_task_results",
    "print_tensors",
]

Rows = Sequence[Mapping[str, Any]]


def print_tensors(rows: Rows) -> None:
    """One line per kind of tensor."""
    merged: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        how = f"dim {row['dim']} x {row['clusters']}" if row["kind"] == "clustered" else row["dtype"]
        codebook = kind(row["codebook"]) if row["kind"] == "clustered" else ""
        merged.setdefault((kind(row["name"]), tuple(row["shape"]), how, codebook), []).append(row)
    print_table(
        ("tensors", "count", "shape", "stored as", "codebook", "bits"),
        [
            (name, len(group), " x ".join(map(str, shape)), how, codebook, f"{group[0]['bits_per_weight']:.2f}")
            for (name, shape, how, codebook), group in merged.items()
        ],
    )


def print_plan(report: PlanReport) -> None:
    """The report of a plan: tensors by kind and setting, the meaning of the columns, memory and totals."""
    merged: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in report.tensors:
        how = f"dim {row['dim']} x {row['clusters']}" if row["kind"] == "clustered" else row["dtype"]
        width = row.get("codebook_bits", "")
        merged.setdefault((kind(row["name"]), how, kind(row.get("codebook", "")), width), []).append(row)
    print_table(
        ("tensors", "count", "stored as", "codebook", "its bits", "bits", "sensitivity", "error", "loss %"),
        [
            (
                name,
                len(group),
                how,
                codebook,
                width,
                f"{group[0]['bits_per_weight']:.2f}",
                _range([row["sensitivity"] for row in group if "sensitivity" in row]),
                _range([row["expected_error"] for row in group if "expected_error" in row]),
                f"{100 * sum(row['loss_share'] for row in group):.1f}" if "loss_share" in group[0] else "",
            )
            for (name, how, codebook, width), group in sorted(merged.items(), key=str)
        ],
    )
    show(
        "its bits: per value of the codebook; bits: per weight, without the codebook; error: squared, relative to the weights'"
    )
    if report.predicted_loss is None:
        show("All weights count alike.")
    else:
        show("sensitivity: nats per token for an error of 1; loss: sensitivity times error, as a share of the total")
    show()
    print_memory(report.memory)
    show(f"MB at most; on the host in addition to the process itself (about {report.process_bytes / 1e6:.0f} MB)")
    show()
    show(f"bits per weight: {described_bits(report.bits_per_weight)}")
    size, bound = report.file_bytes, " at most"
    if size is None:
        size, bound = report.payload_bytes, " without headers"
    show(f"predicted size: {size / 1e6:.3f} MB ({size:,} bytes){bound}; source: {report.source_file_bytes / 1e6:.1f} MB")
    print_predicted_speed(report.speed)
    if report.predicted_loss is not None:
        show(
            f"predicted loss: {report.predicted_loss:.3g} nats per token on text like the calibration text, before error "
            "feedback and training"
        )


def described_bits(bits: Mapping[str, float]) -> str:
    """Bits per weight of the linear layers, of everything, and of the whole file with headers and side files."""
    file = f", {bits['file']:.2f} (the whole file)" if "file" in bits else ""
    return f"{bits['linears']:.2f} (linear layers), {bits['all']:.2f} (everything){file}"


def print_predicted_speed(speed: Mapping[str, Any]) -> None:
    """The predicted speed and memory of a model."""
    rates = ", ".join(
        f"{rate:.0f} tokens/s on {threads} thread{'s' * (threads > 1)}" for threads, rate in speed["tokens_per_second"].items()
    )
    basis = "measured profile" if speed["measured"] else "profile derived on paper"
    show(f"predicted decoding: {rates} of {speed['machine']} ({basis}), {speed['resident_bytes'] / 1e6:.0f} MB of memory")


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"


def print_memory(peaks: Rows) -> None:
    """One line per phase of a conversion, in MB = 10^6 bytes."""
    rows = [(peak["phase"], *(f"{peak[place] / 1e6:.0f}" for place in ("device", "host", "disk"))) for peak in peaks]
    print_table(("phase", "device", "host", "disk"), rows)


def print_inspection(report: Inspection) -> None:
    """The report of `inspect_model`: tables and facts on standard output, problems on standard error."""
    print_tensors(report.tensors)
    if report.codebooks:
        show()
        _print_codebooks(report.codebooks)
    if report.worst_tensors["names"]:
        show()
        _print_worst(report)
    show()
    bits = report.bits_per_weight
    unread = "not checked (--quick)"
    facts = {
        "format": report.format,
        "architecture": report.architecture,
        "weights": f"{report.weights / 1e6:.1f} million",
        "file": f"{report.file_bytes / 1e6:.1f} MB",
        "bits per weight": described_bits(bits),
        "digest": report.digest or (unread if report.quick else "none: some values could not be read"),
        "problems": unread if report.quick else len(report.problems) or "none",
        "self-test record": "yes" if report.self_test else "no",
        "made by": f"{report.provenance.get('tool', 'unknown')} {report.provenance.get('version', '')}",
        "kernel here": report.kernel,
    }
    for name, value in facts.items():
        show(f"{name:>17}: {printable(str(value))}")
    for difference in report.reference["differences"] if report.reference else ():
        say(f"warning: {difference}")
    for problem in report.problems:
        say(f"error: {Problem(**problem)}")


def print_delta(report: DeltaInspection) -> None:
    """The report of `inspect_delta`."""
    rows = [
        (
            row["kind"],
            row["count"],
            row["values"],
            f"{row['bytes'] / 1e6:.3f}",
            ", ".join(row["dtypes"]),
            "?" if row["relative_change"] is None else f"{row['relative_change']:.4f}",
        )
        for row in report.parameters
    ]
    print_table(("changed", "count", "values", "MB", "dtype", "relative change"), rows)
    show()
    record = report.record
    facts = {
        "file": f"{report.file_bytes / 1e6:.3f} MB",
        "of the model": report.base,
        "makes": report.result,
        "made by": f"{record.get('tool', 'unknown')} {record.get('version', '')}",
    }
    training = record.get("training")
    curve = training.get("curve") if isinstance(training, dict) else None
    if isinstance(curve, list) and curve and all(isinstance(entry, dict) for entry in curve):
        facts["held-out loss"] = ", ".join(f"{entry.get('held_out')} at {entry.get('step')}" for entry in (curve[0], curve[-1]))
    for name, value in facts.items():
        show(f"{name:>17}: {printable(str(value))}")


def _print_codebooks(rows: Rows) -> None:
    """One line per kind of codebook, with the sum of the counts and the worst entropy and share."""
    merged: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        merged.setdefault((kind(row["name"]), row["dim"], row["clusters"], row["dtype"], row["code_bits"]), []).append(row)
    print_table(
        ("codebooks", "count", "dim x clusters", "dtype", "dead", "duplicate", "entropy", "top cluster", "out of range"),
        [
            (
                name,
                len(group),
                f"{dim} x {clusters}",
                dtype,
                _merge(sum, group, "dead", "d"),
                _merge(sum, group, "duplicates", "d"),
                f"{_merge(min, group, 'entropy_bits', '.2f')} of {code_bits}",
                _merge(max, group, "largest_share", ".2%"),
                _merge(sum, group, "out_of_range", "d"),
            )
            for (name, dim, clusters, dtype, code_bits), group in merged.items()
        ],
    )


def _merge(merge: Callable[[Iterable[Any]], Any], rows: Rows, member: str, form: str) -> str:
    """One value for all rows; a question mark if one of them is unknown."""
    values = [row[member] for row in rows]
    return "?" if None in values else format(merge(values), form)


def _print_worst(report: Inspection) -> None:
    """The worst tensors by what was measured."""
    rows = {row["name"]: row for row in report.tensors}
    worst = [rows[name] for name in report.worst_tensors["names"]]
    if report.worst_tensors["by"] == "relative_error":
        cells = [(row["name"], f"{row['relative_error']:.4f}", f"{row['largest_difference']:.4g}") for row in worst]
        print_table(("worst tensors", "relative error", "largest difference"), cells)
        return
    cells = [(row["name"], f"{row['unused_bits_per_weight']:.2f}", f"{row['bits_per_weight']:.2f}") for row in worst]
    print_table(("worst tensors", "bits beyond entropy", "bits"), cells)


def print_scores(scores: Evaluation) -> None:
    """The statistics of an evaluation."""

    def shown(value: float | None, error: float | None, scale: float = 1, digits: int = 4) -> str:
        tail = "" if error is None else f" +/- {scale * error:.{digits}f}"
        return f"{scale * (value or 0):.{digits}f}{tail}"

    protocol = scores.record["protocol"]
    overlap = f", {protocol['stride']} apart" if protocol["stride"] < protocol["context"] else ""
    show(f"protocol {protocol['name']}: {scores.windows} windows of {scores.context} tokens{overlap}")
    show(f"perplexity {shown(scores.perplexity, scores.perplexity_error)} ({scores.scored_tokens} tokens scored)")
    if scores.kl is None:
        return
    show(f"reference perplexity {shown(scores.reference_perplexity, scores.reference_perplexity_error)}")
    show(f"perplexity ratio {shown(scores.perplexity_ratio, scores.perplexity_ratio_error)}")
    spread = f"median {scores.kl_median:.4f}, 90 % {scores.kl_p90:.4f}, 99 % {scores.kl_p99:.4f}, largest {scores.kl_max:.4f}"
    show(f"KL divergence {shown(scores.kl, scores.kl_error)} nats per token ({spread})")
    show(f"top-1 agreement {shown(scores.top1, scores.top1_error, 100, 2)} %")


def print_task_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each figure of each task, as the harness names them."""
    rows = []
    for task, figures in results.items():
        for name, value in figures.items():
            figure, _, how = name.partition(",")
            if isinstance(value, int | float) and how and not figure.endswith("_stderr"):
                error = figures.get(f"{figure}_stderr,{how}")
                rows.append((task, figure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    print_table(("task", "figure", "value", "+/-"), rows)


def print_speeds(speeds: Sequence[Speed]) -> None:
    """The results of `bench`: speeds and memory, then ratios to the first model, then what the columns mean."""

    def rate(spread: Spread) -> str:
        digits = 1 if spread.median < 100 else 0
        return f"{spread.median:.{digits}f} ({spread.min:.{digits}f} to {spread.max:.{digits}f})"

    def ratio(spread: Spread | None) -> str:
        return "" if spread is None else f"{spread.median:.2f} ({spread.min:.2f} to {spread.max:.2f})"

    print_table(
        (
            "model",
            "threads",
            "decode, tokens/s",
            "GB/s",
            "of memory's",
            "prefill, tokens/s",
            "load, s",
            "resident MB",
            "file MB",
        ),
        [
            (
                speed.path,
                speed.threads,
                rate(speed.decode_spread),
                f"{speed.gigabytes_per_second:.1f} of {speed.memory_gigabytes_per_second:.1f}",
                f"{100 * speed.bandwidth_share:.0f}",
                rate(speed.prefill_spread),
                f"{speed.load_seconds:.2f}",
                f"{speed.resident_bytes / 1e6:.0f}",
                f"{speed.file_bytes / 1e6:.1f}",
            )
            for speed in speeds
        ],
    )
    others = [speed for speed in speeds if speed.decode_ratio is not None]
    if others:
        show()
        print_table(
            (f"times {speeds[0].path}", "threads", "decode", "prefill"),
            [(speed.path, speed.threads, ratio(speed.decode_ratio), ratio(speed.prefill_ratio)) for speed in others],
        )
    show()
    for path, engine, kernels in dict.fromkeys((speed.path, speed.engine, speed.kernels) for speed in speeds):
        show(f"{printable(path)}: engine {engine}, kernels {printable(kernels)}")
    first = speeds[0]
    show(
        f"{first.prompt_tokens} tokens of prompt, {first.new_tokens} new ones; median (range) of {first.repetitions} processes"
    )
    show("GB/s: bytes of weights that a token reads times tokens/s, beside what reading memory alone reaches")
