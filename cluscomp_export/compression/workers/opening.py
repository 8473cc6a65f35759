"""Opens the workers that were asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.workers.base import WorkerChoice, Workers
from cluscomp_export.compression.workers.local import LocalWorkers
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.progress import Progress, silent

__all__ = ["open_workers"]


@contextlib.contextmanager
def open_workers(choice: WorkerChoice, computing: Computing, on_progress: Progress = silent) -> Iterator[Workers]:
    """Workers to run jobs on, until the block ends; `computing.threads` is for each of them.

    Without it, local workers share the cores of this machine, and workers on Ray have one each. Raises InvalidRequestError if
    Ray is not installed or cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        if choice.kind == "ray":
            try:
                from cluscomp_export.compression.workers.ray import RayWorkers, connect
            except ImportError as error:
                remedy = "pip install 'cluscomp-export[ray]'"
                problem = Problem("not_installed", "`workers='ray'` needs the package ray", found=str(error), remedy=remedy)
                raise InvalidRequestError(problem) from error
            stack.enter_context(connect(choice.address))
            workers: Workers = RayWorkers(computing, on_progress)
        else:
            workers = LocalWorkers(choice, computing, on_progress)
        stack.callback(workers.close)
        yield workers
