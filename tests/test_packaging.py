"""What is installed is complete, and what the project says of itself agrees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluscomp_kernels import native

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIRED = os.environ.get("CLUSCOMP_REQUIRE_NATIVE") == "1"


def test_the_c_kernels_were_built() -> None:
    """Without them many tests are skipped. With CLUSCOMP_REQUIRE_NATIVE=1 in the environment, as in CI, this one fails."""
    if native.library() is None:
        (pytest.fail if REQUIRED else pytest.skip)(native.missing_reason())


@pytest.mark.skipif(os.name != "posix", reason="chooses the compiler by CC")
@pytest.mark.parametrize("required", [False, True])
def test_a_compile_that_fails_ends_the_build_only_where_the_kernels_are_required(required: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "CC": "false", "CLUSCOMP_REQUIRE_NATIVE": str(int(required))}
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == required, done.stderr
    assert not list(tmp_path.rglob("_native*"))


def test_every_folder_that_is_installed_is_a_package() -> None:
    """Files of any other are left out, or put in with a warning that they will be."""
    for where in PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]:
        for package in (ROOT / where).glob("cluscomp_*/"):
            folders = {path.parent for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
            assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_one_oldest_python_is_claimed_everywhere() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"Python (\d+\.\d+)", readme)) == {oldest}
