"""Quality, size, time and memory of conversions: one line for each budget, effort and width of codebooks.

    .venv/bin/python benchmarks/compression.py MODEL --text wikitext2-raw-test.txt --bits 4 3 2.5 2 --effort fast balanced

Every conversion is a process of its own, whose time and peak memory are reported; each artefact passes its self-test before it
is scored. Perplexity, divergence and agreement are those of `cluscomp-export eval` on the first windows of the text, which must
not be the calibration text.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import quality_cells, quality_parser

from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_runtime import load


def convert(
    source: Path, output: Path, bits: float, effort: str, codebook_bits: int | None, calibration: Path | None, threads: int
) -> dict[str, Any]:
    """Convert in a process of its own: its report, wall-clock seconds and peak resident megabytes."""
    command = [sys.executable, "-m", "cluscomp_export.cli.main", "convert", str(source), str(output), "--json"]
    command += ["--bits", f"{bits:g}", "--effort", effort, "--threads", str(threads)]
    command += ["--codebook-bits", str(codebook_bits)] if codebook_bits else []
    command += ["--calibration", str(calibration)] if calibration else []
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert process.stdout is not None
    report = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {report.decode()}")
    measured = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_megabytes": usage.ru_maxrss / 1024,
    }
    return {**json.loads(report), **measured}


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--effort", nargs="+", default=["fast", "balanced", "best"])
    widths = {"planned": None, "8": 8, "16": 16}
    parser.add_argument("--codebook-bits", choices=widths, nargs="+", default=["planned"])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in arguments.bits:
            for effort, width in itertools.product(arguments.effort, arguments.codebook_bits):
                output = Path(folder) / f"{bits:g}-{effort}-{width}.clus"
                report = convert(arguments.model, output, bits, effort, widths[width], arguments.calibration, arguments.threads)
                load(output, selftest=True)
                quality = evaluate_files(output, text=arguments.text, reference=arguments.model, windows=arguments.windows)
                row = {
                    "bits": bits,
                    "effort": effort,
                    "codebook_bits": width,
                    "load": os.getloadavg()[1],
                    **report,
                    "quality": vars(quality),
                }
                say(json.dumps(row))
                rows.append(row)
                output.unlink()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    header = ("bits", "effort", "codebooks", "linears", "MB", "perplexity", "KL", "top-1 %", "seconds", "CPU s", "peak MB")
    print_table(
        header,
        [
            (
                f"{row['bits']:g}",
                row["effort"],
                row["codebook_bits"],
                f"{row['bits_per_weight']['linears']:.2f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                *quality_cells(row["quality"]),
                f"{row['seconds']:.0f}",
                f"{row['cpu_seconds']:.0f}",
                f"{row['peak_megabytes']:.0f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
