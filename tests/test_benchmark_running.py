"""`benchmarks/running.py`: ratios are taken within a repetition; memory of a process is seen from outside; the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import running

from cluscomp_export.benchmarking.traffic import weight_bytes
from cluscomp_export.sources import open_source
from cluscomp_formats.architectures import describe

MIB = 1 << 20


def figures(speed: float) -> running.Figures:
    return {
        "decode": speed,
        "prefill": 10 * speed,
        "resident_bytes": 100 * MIB,
        "peak_bytes": 200 * MIB,
        "load_seconds": None,
        "engine": "some",
    }


def test_ratios_are_taken_within_a_repetition(stories_folder: Path) -> None:
    speeds = {"ours": iter([2.0, 30.0, 4.0]), "llama.cpp": iter([1.0, 10.0, 4.0])}

    def entry(program: str) -> running.Entry:
        return running.Entry("file", program, stories_folder, lambda threads, shape: figures(next(speeds[program])))

    found = [entry("ours"), entry("llama.cpp")]
    runs = running.measure_all(found, [1], running.Shape(4, 4), 3)
    ours, peer = running.results(found, runs, {})
    assert ours["decode"] == {"median": 4.0, "min": 2.0, "max": 30.0}
    assert ours["ratios"]["llama.cpp file"]["decode"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    model = open_source(stories_folder)
    assert ours["gigabytes_per_second"] == pytest.approx(4.0 * weight_bytes(model, describe(model.config)) / 1e9)
    assert peer["ratios"]["ours file"]["prefill"]["median"] == 0.5
    text = running.report({"rows": [ours, peer], "disturbed": []})
    assert "| file | llama.cpp file | 1 | 2.00 (1.00 to 3.00) | 2.00 (1.00 to 3.00) |" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process_is_seen_from_outside() -> None:
    code = f"import time; kept = b'1' * {64 * MIB}; time.sleep(0.3)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    resident, peak = running.watch_memory(process)
    process.communicate()
    assert 64 * MIB < resident <= peak < 128 * MIB


def test_spinning_processes_end() -> None:
    with pytest.raises(ZeroDivisionError), running.spinning(2):
        raise ZeroDivisionError
