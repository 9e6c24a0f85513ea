"""Where Ray puts an engine of two GPUs. The GPUs are numbers that Ray counts; no machine has them.

    python tests/actors/gpu_nodes.py FILE

The process writes to FILE, as JSON, what it saw on nodes with one GPU each, and then beside a node with two.
"""

import json
import os
import sys

import ray
from ray.cluster_utils import Cluster

from actors.fakes import FakeEngine
from actors.pool import EnginePool
from pipeline import config
from pipeline.errors import ResourceError


class Seeing(FakeEngine):
    """A fake engine whose facts name the GPUs that its process may use, and its node's label."""

    def facts(self):
        label = ray.get_runtime_context().get_node_labels().get("egrsd-role", "")
        return type(super().facts())(**{**vars(super().facts()), "engine": f"{label} {os.environ['CUDA_VISIBLE_DEVICES']}"})


def start():
    """A pool of one engine on two GPUs."""
    pool = config.Pool(tensor_parallel=2, placement=config.Placement(cpus=0.1, gpus=2))
    return EnginePool.start("rollout", config.Model(), pool, config.ScoreSettings(), Seeing)


def main(path):
    """Ask for the engine twice."""
    told = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1, labels={"egrsd-role": "single"})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        start()
    except ResourceError as error:
        told["refused"] = str(error)
    cluster.add_node(num_cpus=1, num_gpus=2, labels={"egrsd-role": "double"})
    cluster.wait_for_nodes()
    pool = start()
    told["engine"] = pool.facts().engine
    told["free"] = ray.available_resources().get("GPU")
    pool.close()
    ray.shutdown()
    cluster.shutdown()
    with open(path, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
