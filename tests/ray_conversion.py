"""Converts a model on a Ray cluster of two nodes; a worker is killed in the middle: `ray_conversion.py SOURCE OUTPUT`.

The nodes are on this machine, each with the processes it would have on its own. Prints the stages of the conversion and the
workers there were at the time as JSON; `test_workers.py` judges it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import psutil

from cluscomp_export.convert import ConversionOptions, convert

# A busy machine is no failure.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "600"}

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workers(cluster: Cluster) -> list[psutil.Process]:
    """The processes of this cluster that run jobs."""
    raylets = [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
    children = [child for raylet in raylets for child in psutil.Process(raylet).children()]
    return [child for child in children if child.cmdline()[0].startswith("ray::PoolActor")]


def main(source: Path, output: Path) -> None:
    port = free_port()
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "ray_client_server_port": port})
    report: dict[str, list[str] | int] = {"workers": 0}
    stages: list[str] = []

    def kill_one(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if (stage, done) == ("fitting codebooks", 3):
            found = workers(cluster)
            report["workers"] = len(found)
            found[0].kill()

    try:
        cluster.add_node(**NODE)
        options = ConversionOptions(bits=4, share="none", workers=f"ray://127.0.0.1:{port}")
        convert(source, output, options, on_progress=kill_one)
    finally:
        cluster.shutdown()
    print(json.dumps({**report, "stages": list(dict.fromkeys(stages))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
