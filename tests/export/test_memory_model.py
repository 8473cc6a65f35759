"""The model of a conversion's memory: against a real conversion, and what follows from its formulas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from known_configs import KNOWN

from cluscomp_export.conversion.convert import ConversionOptions, Prepared, convert, prepare
from cluscomp_export.conversion.memory import LIBRARY_BYTES, PROCESS_BYTES, Peak, memory_warnings
from cluscomp_export.conversion.memory.conversion import CONTEXT_BYTES
from cluscomp_formats.errors import StorageError

CHILD = """
import json, sys
from pathlib import Path
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_runtime.memory import return_freed_arrays

return_freed_arrays()
source, output, text, small = map(Path, sys.argv[1:5])
measured = sys.argv[5] == "measured"
# Libraries make their buffers when they are first used; that is the process, not the conversion.
convert(small, output, ConversionOptions(bits=4, calibration=str(text), threads=1), force=True)
chosen = {"bits": 2, "effort": "fast", "sensitivity": "measured"} if measured else {"dim": 8, "clusters": 64}
options = ConversionOptions(calibration=str(text), threads=1, **{"effort": "balanced", **chosen})
prepared = prepare(source, options, measure=False)

def resident(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS:")
convert(source, output, options, force=True)
largest = max(prepared.memory, key=lambda peak: peak.host)
print(json.dumps({"measured": resident("VmHWM:") - before, "predicted": largest.host, "phase": largest.phase}))
"""


@pytest.fixture
def synthetic(tmp_path: Path, stories_folder: Path, sensitivity: str) -> Path:
    """A block whose feed-forward is wide beside its stream: its moments are what takes memory, 24 x 3072² bytes = 226 MB. For
    sensitivities, which have none, a larger one."""
    from synthetic_model import llama_config, write_model

    folder = tmp_path / "source"
    folder.mkdir()
    write_model(folder, llama_config(256 if sensitivity == "equal" else 512, 3072, 1, 4, 4, 512))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((stories_folder / name).read_bytes())
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("sensitivity", ["equal", "measured"])
def test_a_conversion_needs_what_was_predicted(sensitivity: str, synthetic: Path, stories_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if sensitivity == "equal":
        text.write_text("Once upon a time there was a little girl who loved to run and play in the park with her dog. " * 4)
    else:
        # One full window, and not more than one by the model, which counts bytes: these are tokens of about a byte.
        text.write_text("QZ#7XJ" * 160)
    command = [sys.executable, "-c", CHILD, synthetic, tmp_path / "out.clus", text, stories_folder, sensitivity]
    child = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(child.stdout)
    assert found["phase"] == ("error feedback" if sensitivity == "equal" else "sensitivities"), found
    # An upper bound; and a tight one: what it leaves is the slack for the heap (50 MB), half of which not every run
    # uses, and rounding up of what overlaps.
    assert found["measured"] <= found["predicted"], found
    assert found["measured"] >= 0.6 * found["predicted"], found


WHOLE = """
import sys
from pathlib import Path
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_runtime.memory import return_freed_arrays

return_freed_arrays()
convert(Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]))
status = Path("/proc/self/status").read_text()
peak, mapped = (int(status.split(name)[1].split()[0]) * 1024 for name in ("VmHWM:", "RssFile:"))
print(peak - mapped)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        ConversionOptions(bits=3, effort="fast", threads=1),
        ConversionOptions(
            bits=3,
            share="none",
            effort="best",
            calibration_windows=4,
            calibration_context=64,
            recovery_steps=1,
            recovery_batch=1,
            recovery_context=64,
            threads=1,
        ),
    ],
    ids=["fast", "best"],
)
def test_the_fixed_part_holds_for_a_small_model(options: ConversionOptions, stories_folder: Path, tmp_path: Path) -> None:
    """A model of 1 MB takes little else: the whole process, from its start, needs no more than is said."""
    planned = prepare(stories_folder, options, measure=False)
    predicted = planned.process_bytes + max(peak.host for peak in planned.memory)
    command = [sys.executable, "-c", WHOLE, stories_folder, tmp_path / "out.clus", repr(options)]
    child = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    # What is mapped of libraries depends on the system's cache, so that part is taken as stated.
    measured = int(child.stdout) + LIBRARY_BYTES
    assert 0.6 * predicted <= measured <= predicted


def prepared(name: str, folder: Path, **options: Any) -> Prepared:
    (folder / "config.json").write_text(json.dumps(KNOWN[name][0]), encoding="utf-8")
    return prepare(folder, ConversionOptions(**options), to_plan=True)


def peaks(name: str, folder: Path, **options: Any) -> dict[str, Peak]:
    return {peak.phase: peak for peak in prepared(name, folder, **options).memory}


def test_the_phases_are_those_of_the_effort(tmp_path: Path) -> None:
    before, after = ["checking the source", "calibration"], ["writing", "self-test"]
    to_feed_back = [*before, "row importance", "fitting codebooks"]
    assert [*peaks("Mistral-7B", tmp_path, bits=3)] == [*to_feed_back, "error feedback", "block-wise tuning", *after]
    assert [*peaks("Mistral-7B", tmp_path, bits=3, effort="fast")] == [*before, "fitting codebooks", "choosing codes", *after]
    assert [*peaks("Mistral-7B", tmp_path, bits=3, effort="best")] == [
        *to_feed_back,
        "error feedback",
        "block-wise tuning",
        "recovery",
        *after,
    ]
    paper = peaks("Mistral-7B", tmp_path, dim=8, clusters=65500)
    assert [*paper] == ["checking the source", "fitting codebooks", "choosing codes", *after]


def test_no_phase_grows_with_the_number_of_blocks_but_those_that_say_so(tmp_path: Path) -> None:
    """Twice the blocks change the disk, and of the host's peaks only those of what runs through the whole model and back."""
    long = {**KNOWN["Llama-2-7B"][0], "num_hidden_layers": 64}
    short = peaks("Llama-2-7B", tmp_path, bits=3, effort="best", share="none")
    (tmp_path / "config.json").write_text(json.dumps(long), encoding="utf-8")
    options = ConversionOptions(bits=3, effort="best", share="none")
    twice = {peak.phase: peak for peak in prepare(tmp_path, options, to_plan=True).memory}
    for phase, peak in short.items():
        grown = twice[phase].host / peak.host
        assert grown > 1.4 if phase in ("recovery", "row importance") else grown < 1.01, (phase, grown)
    assert twice["writing"].disk > 1.8 * short["writing"].disk


def test_without_an_accelerator_none_is_used(tmp_path: Path) -> None:
    assert all(peak.device == 0 for peak in peaks("Llama-2-70B", tmp_path, bits=2).values())
    on_gpu = peaks("Llama-2-70B", tmp_path, bits=2, device="cuda")
    assert 0 < max(peak.device for peak in on_gpu.values()) < 48e9


@pytest.mark.parametrize(("name", "bits"), [("Llama-2-70B", 3.3), ("Llama-3-70B", 2), ("Qwen2.5-72B", 2)])
def test_everything_for_a_large_model_fits_a_gpu_of_48_gb(name: str, bits: float, tmp_path: Path) -> None:
    needed = peaks(name, tmp_path, bits=bits, effort="best", device="cuda")
    assert max(peak.device for peak in needed.values()) + CONTEXT_BYTES < 48e9
    assert needed["recovery"].device > 20e9
    # The original is read matrix by matrix; the clustered head is decoded.
    assert needed["recovery"].host < 17e9


def test_a_device_with_too_little_memory_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Peak("calibration", 0, 10**9, 0), Peak("recovery", 8 * 10**9, 10**9, 0)]
    gpu = {"bytes": 8 * 10**9 + CONTEXT_BYTES}
    monkeypatch.setattr("cluscomp_export.conversion.memory.conversion.physical_bytes", lambda: 10**11)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=gpu["bytes"]))
    assert memory_warnings(found, "cuda:1") == []
    gpu["bytes"] -= 1
    assert memory_warnings(found, "cuda:1") == ["recovery may need 8.5 GB of memory; cuda:1 has 8.5 GB"]
    assert memory_warnings(found, "cpu") == []
    assert memory_warnings(found, "cuda:2") == memory_warnings(found, "nonsense") == []


def test_a_machine_with_too_little_memory_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Peak("calibration", 0, 5 * 10**9, 0), Peak("writing", 0, 10**9, 0)]
    monkeypatch.setattr("cluscomp_export.conversion.memory.conversion.physical_bytes", lambda: 5 * 10**9 + PROCESS_BYTES)
    assert memory_warnings(found, "cpu") == []
    monkeypatch.setattr("cluscomp_export.conversion.memory.conversion.physical_bytes", lambda: 5 * 10**9)
    assert memory_warnings(found, "cpu") == ["calibration may need 5.4 GB of memory; this machine has 5.0 GB"]
    monkeypatch.setattr("cluscomp_export.conversion.memory.conversion.physical_bytes", lambda: None)
    assert memory_warnings(found, "cpu") == []


def test_a_disk_with_too_little_space_is_refused_before_the_work(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConversionOptions(bits=4)
    needed = max(peak.disk for peak in prepare(stories_folder, options).memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, needed - 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="not enough space"):
        convert(stories_folder, tmp_path / "out.clus", options)
