"""Workers: threads or processes of this machine, or of a Ray cluster, that run the jobs of a compression.

joblib runs the jobs; on a cluster it uses Ray's backend for joblib. A job carries its arrays: a worker needs this package, but
neither the source nor the work folder, so it can run on any machine.

When a worker dies, only its running jobs are lost; new workers repeat them. One process receives and stores all results, so the
results do not depend on which worker computed them, in which order, or how often.
"""

from __future__ import annotations

import abc
import contextlib
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import joblib

from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.threads import check_threads
from cluscomp_formats.errors import InvalidRequestError, Problem, WorkersLostError
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.version import __version__
from cluscomp_kernels.kmeans.clustering import compute_path

__all__ = ["STREAMING", "Job", "WorkerChoice", "Workers", "parse_workers"]

FRUITLESS_ATTEMPTS = 3
"""Workers may die this many times in a row without a single job finished."""

STREAMING: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "2*n_jobs"}
"""Options of `joblib.Parallel`: results one by one, and no more than two jobs per worker in memory."""

_LOCAL = re.compile(r"(threads:)?([1-9][0-9]{0,3})")
_CLIENT = re.compile(r"ray://[^\s/]+:[0-9]+")


class Job(Protocol):
    """What a worker runs."""

    @property
    def computing(self) -> Computing:
        """Method, seed, threads and device."""

    def run(self, on_progress: Progress = ...) -> dict[str, AnyArray]:
        """Compute the arrays of one unit of work."""


Prepare = Callable[[str, Computing], Job]
"""Makes the job of a unit of work. It is called again if the job must be repeated."""


@dataclass(frozen=True)
class WorkerChoice:
    """What `workers` asks for: `count` threads or processes of this machine, or Ray, at an `address` if one is given."""

    kind: Literal["threads", "processes", "ray"]
    count: int = 0
    address: str | None = None


def parse_workers(text: str) -> WorkerChoice:
    """`N`, `threads:N`, `ray` or `ray://HOST:PORT`. Raises InvalidRequestError."""
    local = _LOCAL.fullmatch(text)
    if local is not None:
        check_threads(int(local[2]), "workers")
        return WorkerChoice("threads" if local[1] else "processes", int(local[2]))
    if text == "ray":
        return WorkerChoice("ray")
    if _CLIENT.fullmatch(text):
        return WorkerChoice("ray", address=text)
    expected = "a number of processes, threads:NUMBER, ray or ray://HOST:PORT"
    raise InvalidRequestError(Problem("bad_option", "`workers` is not understood", found=text, expected=expected))


class Workers(abc.ABC):
    """Runs jobs. Get it from `open_workers` of `workers.opening`."""

    lost: tuple[type[Exception], ...]
    """What is raised when a worker dies."""

    def __init__(self, computing: Computing, on_progress: Progress = silent) -> None:
        self.computing = computing
        self._engine = _engine(computing.device)
        self._on_progress = on_progress
        self._pool = contextlib.ExitStack()
        self._parallel: joblib.Parallel | None = None
        self._arriving: Generator[Any, None, None] | None = None

    @abc.abstractmethod
    def threads(self, jobs: int) -> int:
        """Number of threads for each of `jobs` jobs."""

    @abc.abstractmethod
    def new_pool(self) -> contextlib.AbstractContextManager[joblib.Parallel]:
        """Start workers that yield results in the order in which they finish."""

    def run(self, units: Sequence[str], prepare: Prepare) -> Iterator[tuple[str, dict[str, AnyArray]]]:
        """The units' arrays, each as soon as it is there.

        Raises what a job raises; WorkersLostError if workers die again and again, InvalidRequestError if they cannot run our
        jobs.
        """
        missing = dict.fromkeys(units)
        deaths = 0
        while missing:
            how = replace(self.computing, threads=self.threads(len(missing)))
            calls = (joblib.delayed(_run)(unit, prepare(unit, how), self._engine) for unit in list(missing))
            try:
                for unit, arrays in self._results(calls):
                    del missing[unit]
                    deaths = 0
                    yield unit, arrays
            except self.lost as error:
                self.close()
                deaths += 1
                if deaths == FRUITLESS_ATTEMPTS:
                    raise _lost(error, next(iter(missing))) from error
                self._on_progress("a worker died: repeating what it did", len(units) - len(missing), len(units))

    def _results(self, calls: Iterator[Any]) -> Iterator[tuple[str, dict[str, AnyArray]]]:
        if self._parallel is None:
            # Kept between runs: starting a worker takes seconds.
            self._parallel = self._pool.enter_context(self.new_pool())
        self._arriving = self._parallel(calls)
        try:
            for result in self._arriving:  # noqa: UP028 - what is delegated to is closed before we are
                yield result
        finally:
            self._stop()

    def _stop(self) -> None:
        with warnings.catch_warnings():
            # joblib tells those who do not wait for all results that they could; here an error is the reason.
            warnings.simplefilter("ignore", UserWarning)
            if self._arriving is not None:
                self._arriving.close()

    def close(self) -> None:
        """End the workers, also if they are running jobs."""
        self._stop()
        self._parallel = None
        self._pool.close()


def _run(unit: str, job: Job, engine: str) -> tuple[str, dict[str, AnyArray]]:
    """What a worker does. `engine` is that of the process that asks: another one may give other results."""
    found = _engine(job.computing.device)
    if found != engine:
        remedy = "install the same version of cluscomp-export, with its compiled kernels, for all workers"
        raise InvalidRequestError(Problem("other_version", "a worker is not like the rest", None, None, found, engine, remedy))
    return unit, job.run()


def _engine(device: str) -> str:
    return f"cluscomp-export {__version__}, k-means: {compute_path(device)}"


def _lost(error: Exception, unit: str) -> WorkersLostError:
    message = f"workers died {FRUITLESS_ATTEMPTS} times in a row without finishing anything"
    remedy = "the system may have killed them for want of memory: try fewer workers; what is finished is kept"
    found = (str(error).strip() or type(error).__name__).splitlines()[0]
    return WorkersLostError(Problem("workers_lost", message, None, unit, found, remedy=remedy))
