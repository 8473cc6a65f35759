"""Workers on a Ray cluster, by Ray's backend for joblib. Needs the package ray, which only this module imports."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import joblib
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.joblib.ray_backend import RayBackend

from cluscomp_export.workers import STREAMING, Workers
from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["RayWorkers", "connect"]


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Be connected to the cluster at `address`, `ray://HOST:PORT`.

    Without one: to the cluster that RAY_ADDRESS names or this machine is part of, else to a new one of this machine alone. A
    connection that this process has already is taken. Raises InvalidRequestError if there is no connection to be had.
    """
    if ray.is_initialized():
        yield
        return
    # Nobody is told what is run here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        found = f"{address or os.environ.get('RAY_ADDRESS') or 'ray'}: {str(error).strip().splitlines()[0]}"
        remedy = "check that the cluster runs (`ray status` on its head) with the same versions of ray and Python"
        raise InvalidRequestError(Problem("no_cluster", "cannot connect to Ray", None, None, found, remedy=remedy)) from error
    try:
        yield
    finally:
        ray.shutdown()


class RayWorkers(Workers):
    """As many workers as the cluster has GPUs, with `device` "cuda", else as `computing.threads` (1) goes into its CPUs."""

    lost = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)

    def threads(self, jobs: int) -> int:
        return self.computing.threads or 1

    def new_pool(self) -> joblib.Parallel:
        threads = self.threads(0)
        needs = {"GPU": 1} if self.computing.device.startswith("cuda") else {"CPU": threads}
        resources = ray.cluster_resources()
        count = min(int(resources.get(kind, 0) // amount) for kind, amount in needs.items())
        if count == 0:
            found = ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in needs)
            expected = ", ".join(f"at least {amount} {kind}s" for kind, amount in needs.items())
            problem = Problem("no_workers", "the cluster has no room for a worker", found=found, expected=expected)
            raise InvalidRequestError(problem)
        # joblib runs one worker's jobs in its own process, which is not on the cluster: there, two share the place.
        share = count / max(2, count)
        arguments = {"num_cpus": threads * share, "num_gpus": needs.get("GPU", 0) * share}
        return joblib.Parallel(max(2, count), backend=_StreamingBackend(ray_remote_args=arguments), **STREAMING)


class _StreamingBackend(RayBackend):  # type: ignore[misc]
    """Ray's backend, with results as they come, which it can do but does not claim."""

    supports_return_generator = True

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the pool. A new one is made by need: the cluster may have become smaller."""
        super().abort_everything(ensure_ready=False)
