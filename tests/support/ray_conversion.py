"""Converts a model on a Ray cluster of two nodes; a worker is killed in the middle: `ray_conversion.py SOURCE OUTPUT`.

The nodes are on this machine, each with the processes it would have on its own; the conversion, a process that is on none, is
their client. Prints the stages of the conversion and the workers there were at the time as JSON; `test_workers.py` judges it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import psutil

# gRPC's fork handlers kill, now and then, the server that Ray forks for a client. A busy machine is no failure.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
os.environ["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "600"

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}

CONVERSION = """
import json
import os
import sys
from pathlib import Path
from cluscomp_export.conversion.convert import ConversionOptions, convert
source, output, options, workers = sys.argv[1:]
options = ConversionOptions(**json.loads(options), workers=workers)
# One write for a line: threads of Ray's client write to the same place.
convert(Path(source), Path(output), options, on_progress=lambda stage, done, total: os.write(1, f"{stage}|{done}\\n".encode()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workers(cluster: Cluster) -> list[psutil.Process]:
    """The processes of this cluster that run jobs."""
    raylets = [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
    children = [child for raylet in raylets for child in psutil.Process(raylet).children()]
    return [child for child in children if runs_jobs(child)]


def runs_jobs(process: psutil.Process) -> bool:
    """Others may end while they are looked at, or have ended and not been waited for."""
    try:
        return "".join(process.cmdline()[:1]).startswith("ray::PoolActor")
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def main(source: str, output: str, options: str) -> int:
    port = free_port()
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "ray_client_server_port": port})
    stages: dict[str, None] = {}
    found: list[psutil.Process] = []
    try:
        cluster.add_node(**NODE)
        command = [sys.executable, "-c", CONVERSION, source, output, options, f"ray://127.0.0.1:{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as conversion:
            for line in conversion.stdout or ():
                stage, done = line.strip().split("|")
                stages[stage] = None
                if not found and stage == "fitting codebooks" and int(done) >= 3:
                    found = workers(cluster)
                    found[0].kill()
    finally:
        cluster.shutdown()
    print(json.dumps({"workers": len(found), "stages": list(stages)}))
    return conversion.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
