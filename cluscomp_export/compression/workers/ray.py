"""Workers on a Ray cluster, by Ray's backend for joblib. Needs the package ray, which only this module imports."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import joblib
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.joblib.ray_backend import RayBackend
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluscomp_export.compression.workers.base import STREAMING, Workers
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import AnyArray

__all__ = ["RayWorkers", "connect"]

CONNECTION_SECONDS = 120
"""How long an answer of the cluster is waited for. A start of Ray on this machine takes up to half a minute."""

RESERVATION_SECONDS = 10
RESERVATION_ATTEMPTS = 30


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
        _init(address)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        found = f"{address or os.environ.get('RAY_ADDRESS') or 'ray'}: {_last_line(error)}"
        remedy = "check that the cluster runs (`ray status` on its head) with the same versions of ray and Python"
        raise InvalidRequestError(Problem("no_cluster", "cannot connect to Ray", None, None, found, remedy=remedy)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str | None) -> None:
    """`ray.init`, which never ends if the server that a cluster starts for its client dies at once. Raises what it raises and
    TimeoutError."""
    raised: list[BaseException] = []

    def init() -> None:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except BaseException as error:  # noqa: BLE001 - for who waits
            raised.append(error)

    thread = threading.Thread(target=init, name="ray.init", daemon=True)
    thread.start()
    thread.join(CONNECTION_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {CONNECTION_SECONDS} s")
    if raised:
        raise raised[0]


class RayWorkers(Workers):
    """As many workers as the cluster has GPUs, with `device` "cuda", else as `computing.threads` (1) goes into its CPUs."""

    lost = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)

    def threads(self, jobs: int) -> int:
        return self.computing.threads or 1

    def _results(self, calls: Iterator[Any]) -> Iterator[tuple[str, dict[str, AnyArray]]]:
        try:
            yield from super()._results(calls)
        except RayTaskError as error:
            # What a job itself raises comes as it is.
            remedy = "install the same versions of cluscomp-export and its dependencies on every node"
            found = _last_line(error)
            problem = Problem("bad_workers", "the workers on Ray cannot run our jobs", found=found, remedy=remedy)
            raise InvalidRequestError(problem) from error

    @contextlib.contextmanager
    def new_pool(self) -> Iterator[joblib.Parallel]:
        with self._reserved() as (group, count):
            # joblib runs the jobs of a single worker in this process, which is not on the cluster: better two share its place.
            # (Ray wants a CPU for each: there may be one CPU in all.)
            workers = max(count, min(2, int(ray.cluster_resources()["CPU"])))
            share = count / workers
            arguments = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
            arguments |= {f"num_{kind.lower()}s": amount * share for kind, amount in self._place().items()}
            backend = _StreamingBackend(ray_remote_args=arguments)
            with joblib.Parallel(workers, backend=backend, **STREAMING) as parallel:
                yield parallel

    def _place(self) -> dict[str, float]:
        """What one worker takes of a node."""
        return {"CPU": self.threads(1), **({"GPU": 1} if self.computing.device.startswith("cuda") else {})}

    @contextlib.contextmanager
    def _reserved(self) -> Iterator[tuple[PlacementGroup, int]]:
        """Places for as many workers as there is room for, which is waited for: after the loss of a node it takes half a minute
        until Ray counts it no more, and what would have to be there waits forever."""
        place = self._place()
        kind = "GPU" if "GPU" in place else "CPU"
        for attempt in range(RESERVATION_ATTEMPTS):
            # What others use may become free, but is not waited for again and again.
            resources = ray.cluster_resources() if attempt == 0 else ray.available_resources()
            count = int(resources.get(kind, 0) // place[kind])
            group = placement_group([place] * max(1, count), strategy="SPREAD")
            try:
                if group.wait(RESERVATION_SECONDS):
                    yield group, max(1, count)
                    return
            finally:
                remove_placement_group(group)
            self._on_progress("waiting for room on the Ray cluster", attempt + 1, RESERVATION_ATTEMPTS)
        found = ", ".join(f"{amount:g} {kind}s" for kind, amount in ray.available_resources().items() if kind in place)
        expected = ", ".join(f"{amount:g} {kind}s" for kind, amount in place.items()) + " on one node for each worker"
        remedy = "add nodes, wait for other work on the cluster to end, or use fewer `threads`"
        raise InvalidRequestError(
            Problem("no_room", "the Ray cluster has no room for a worker", None, None, found, expected, remedy)
        )


class _StreamingBackend(RayBackend):  # type: ignore[misc]
    """Ray's backend, with results as they come, which it can do but does not claim."""

    supports_return_generator = True

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the pool. A new one is made by need: the cluster may have become smaller."""
        super().abort_everything(ensure_ready=False)


def _last_line(error: Exception) -> str:
    """Of a traceback from elsewhere, what it comes to."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
