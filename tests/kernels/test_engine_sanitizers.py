"""The engine under the compilers' sanitizers: memory, undefined behaviour, races."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "cluscomp_kernels"
CHECK = Path(__file__).with_name("engine_check.c")
FLAGS = ["-std=gnu11", "-g", "-O1", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    """Every instruction set, and prompts in pieces against prompts at once, with one thread and with four."""
    sources = [str(CHECK), *map(str, sorted((KERNELS / "engine").glob("*.c")))]
    program = tmp_path / "engine_check"
    command = ["gcc", *FLAGS, f"-fsanitize={sanitizers}", f"-I{KERNELS}", *sources, "-o", str(program), "-lm", "-pthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"no library for -fsanitize={sanitizers}")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 results differ\n", "")
