"""A worker ends with the process that started it, even if that is killed outright."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import joblib
import pytest
from death_signal import death_signal
from joblib.externals.loky import get_reusable_executor

from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.workers.base import parse_workers
from cluscomp_export.compression.workers.opening import open_workers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs kill and fork")

FAMILY = """
import os, sys, time
from cluscomp_export.compression.workers import orphans
if sys.argv[1] == "watched":
    orphans._kernel_ends_us = lambda: False
    orphans._LOOK_SECONDS = 0.05
parent = os.getpid()
if os.fork() == 0:
    orphans.end_with(parent)
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def is_there(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


@pytest.mark.parametrize(
    "how", [pytest.param("by the kernel", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux")), "watched"]
)
def test_a_killed_parent_takes_its_worker_along(how: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", FAMILY, how]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_there(worker)
        parent.kill()
        # The worker holds the pipe's other end: it closes when both are gone.
        assert parent.stdout.read() == ""


def test_a_worker_whose_parent_has_ended_already_ends_at_once() -> None:
    code = "import os; from cluscomp_export.compression.workers.orphans import end_with; end_with(os.getppid() + 1)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_worker_processes_are_bound_to_this_one() -> None:
    with open_workers(parse_workers("2"), Computing()) as workers, workers.new_pool() as pool:
        assert list(pool(joblib.delayed(death_signal)() for _ in range(2))) == [signal.SIGKILL] * 2
    get_reusable_executor().shutdown(wait=True)
