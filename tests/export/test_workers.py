"""Workers: threads, processes and a Ray cluster make the bytes that one process makes, whoever of them dies."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from dying_job import DyingJob
from safetensors.numpy import load_file, save_file

from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.workers.base import WorkerChoice, parse_workers
from cluscomp_export.compression.workers.opening import open_workers
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.work_folder import work_path
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, WorkersLostError

# A short text and few windows: what a process of its own does, too, which knows nothing of the tests' defaults.
TEXT = Path(__file__).parents[1] / "data" / "README.md"
OPTIONS: dict[str, Any] = {
    "bits": 4,
    "share": "none",
    "calibration": str(TEXT),
    "calibration_windows": 2,
    "blockwise_epochs": 0,
}
"""A codebook for each of the 35 matrices, codes with error feedback. No training: its last bits may depend on the threads."""


@pytest.fixture(scope="module")
def alone(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The conversion that one process makes."""
    output = tmp_path_factory.mktemp("alone") / "out.clus"
    convert(stories_folder, output, ConversionOptions(**OPTIONS))
    return output.read_bytes()


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("4", WorkerChoice("processes", 4)),
        ("threads:2", WorkerChoice("threads", 2)),
        ("ray", WorkerChoice("ray")),
        ("ray://head:10001", WorkerChoice("ray", address="ray://head:10001")),
    ],
)
def test_what_can_be_asked_for(text: str, choice: WorkerChoice) -> None:
    assert parse_workers(text) == choice


@pytest.mark.parametrize("text", ["", "0", "-1", "2.5", "threads", "threads:", "ray://", "ray://head", "tcp://head:1", "4 "])
def test_anything_else_is_refused_before_any_work(text: str, stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="`workers` is not understood"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(workers=text))
    assert list(tmp_path.iterdir()) == []


def test_threads_make_the_same_bytes(alone: bytes, stories_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.clus"
    report = convert(stories_folder, output, ConversionOptions(**OPTIONS, workers="threads:3"))
    assert output.read_bytes() == alone
    assert report.reused == 0


def test_without_feedback_too_and_with_a_shared_codebook(stories_folder: Path, tmp_path: Path) -> None:
    made = []
    for workers in (None, "threads:3"):
        options = ConversionOptions(bits=3, share="kind", embedding_bits=6, effort="fast", workers=workers)
        convert(stories_folder, tmp_path / "out.clus", options, force=True)
        made.append((tmp_path / "out.clus").read_bytes())
    assert made[0] == made[1]


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one of joblib's. Another may end while it is looked at, or have ended and not been waited for."""
    try:
        return "joblib.externals.loky.backend.popen_loky_posix" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs processes that have ended and are not yet waited for")
def test_a_process_that_has_ended_is_no_worker() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert not is_worker(psutil.Process(ended.pid))


def killer(stages: list[str], at: int) -> Callable[[str, int, int], None]:
    """Kills a process that works for this one, when so many codebooks are there."""

    def on_progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if (stage, done) == ("fitting codebooks", at):
            [*_, worker] = filter(is_worker, psutil.Process().children())
            worker.kill()

    return on_progress


def test_a_process_that_is_killed_costs_nothing_but_time(alone: bytes, stories_folder: Path, tmp_path: Path) -> None:
    output, stages = tmp_path / "out.clus", list[str]()
    convert(stories_folder, output, ConversionOptions(**OPTIONS, workers="2"), on_progress=killer(stages, at=3))
    assert "a worker died: repeating what it did" in stages
    assert output.read_bytes() == alone


def test_what_workers_finished_is_taken_up_by_whoever_goes_on(alone: bytes, stories_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.clus"

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("fitting codebooks", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(stories_folder, output, ConversionOptions(**OPTIONS, workers="threads:2"), on_progress=interrupt)
    kept = len(list(work_path(output).glob("*.safetensors")))
    assert kept == 7, "the energies, the importance of rows and five codebooks"
    assert convert(stories_folder, output, ConversionOptions(**OPTIONS)).reused == kept
    assert output.read_bytes() == alone


def test_workers_that_always_die_are_given_up() -> None:
    with (
        open_workers(parse_workers("2"), Computing()) as workers,
        pytest.raises(WorkersLostError, match="died 3 times in a row") as caught,
    ):
        list(workers.run(["one", "two"], lambda unit, computing: DyingJob()))
    assert caught.value.exit_code == 8


def test_an_error_of_a_job_is_the_error_of_the_conversion(stories_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((stories_folder / "config.json").read_bytes())
    tensors = load_file(stories_folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e6)
    save_file(tensors, source / "model.safetensors")
    options = ConversionOptions(dim=2, clusters=8, workers="threads:2")
    with pytest.raises(InvalidFileError, match="centroids do not fit float16") as caught:
        convert(source, tmp_path / "out.clus", options)
    assert caught.value.problems[0].tensor == name.removesuffix(".weight")
    # From another process they come pickled.
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems  # noqa: S301


def test_without_ray_it_says_what_to_install(stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "cluscomp_export.compression.workers.ray", raising=False)
    with pytest.raises(InvalidRequestError, match=r"cluscomp-export\[ray\]"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(workers="ray"))


def test_a_cluster_that_never_answers_is_an_error(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluscomp_export.compression.workers import ray as ray_workers

    released = threading.Event()
    monkeypatch.setattr(ray_workers, "CONNECTION_SECONDS", 0.1)
    monkeypatch.setattr(ray_workers.ray, "init", lambda *_, **__: released.wait())
    with pytest.raises(InvalidRequestError, match=r"ray://192\.0\.2\.1:10001: no answer within"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(workers="ray://192.0.2.1:10001"))
    released.set()


def test_a_ray_cluster_of_which_a_worker_is_killed_makes_the_same_bytes(
    alone: bytes, stories_folder: Path, tmp_path: Path
) -> None:
    output, script = tmp_path / "out.clus", Path(__file__).parents[1] / "support" / "ray_conversion.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(stories_folder), str(output), json.dumps(OPTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["workers"] == 2
    stages = report["stages"]
    assert stages.index("fitting codebooks") < stages.index("a worker died: repeating what it did")
    assert stages.index("a worker died: repeating what it did") < stages.index("block by block")
    assert output.read_bytes() == alone
