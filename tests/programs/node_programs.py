"""Other people's programs, as npm carries them: are they here, and what do they say to a request?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "missing", "run"]

FOLDER = Path(__file__).parent
MINIMUM_NODE = 20


def missing() -> str | None:
    """What to install before `run` works, None if it is all there."""
    node = shutil.which("node")
    found = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip() if node else "none"
    version = re.match(r"v(\d+)\.", found)
    if version is None or int(version[1]) < MINIMUM_NODE:
        return f"needs node {MINIMUM_NODE} or newer with npm, found {found}; then: make programs"
    if not (FOLDER / "node_modules" / ".package-lock.json").is_file():
        return "the programs of tests/programs/package.json are not installed: make programs (Linux on x86-64)"
    return None


def run(script: str, request: Mapping[str, Any], *, timeout: float = 600) -> Any:
    """What a script of this folder answers: it reads a JSON request from its input and prints one line of JSON last.

    Raises RuntimeError with what it wrote if it fails, subprocess.TimeoutExpired after `timeout` seconds.
    """
    command = ["node", str(FOLDER / script)]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, encoding="utf-8", check=False, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
