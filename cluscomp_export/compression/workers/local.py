"""Workers on this machine: threads or processes."""

from __future__ import annotations

import os
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.workers.base import STREAMING, WorkerChoice, Workers
from cluscomp_export.compression.workers.orphans import end_with
from cluscomp_formats.progress import Progress

__all__ = ["LocalWorkers"]


class LocalWorkers(Workers):
    """Threads or processes of this machine, which share its cores unless `computing.threads` says otherwise."""

    lost = (BrokenProcessPool,)

    def __init__(self, choice: WorkerChoice, computing: Computing, on_progress: Progress) -> None:
        super().__init__(computing, on_progress)
        self._choice = choice

    def threads(self, jobs: int) -> int:
        return self.computing.threads or max(1, joblib.cpu_count() // min(self._choice.count, jobs))

    def new_pool(self) -> joblib.Parallel:
        if self._choice.kind == "threads":
            return joblib.Parallel(self._choice.count, backend="threading", **STREAMING)
        # Arrays go through pipes: joblib would else put large ones into files that last as long as the pool.
        options: dict[str, Any] = {"inner_max_num_threads": self.threads(self._choice.count), "max_nbytes": None}
        options |= {"initializer": end_with, "initargs": (os.getpid(),)}
        with joblib.parallel_config("loky", n_jobs=self._choice.count, **options):
            return joblib.Parallel(**STREAMING)

    def close(self) -> None:
        used = self._parallel is not None
        super().close()
        if used and self._choice.kind == "processes":
            get_reusable_executor().shutdown(wait=True)
