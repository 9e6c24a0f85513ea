"""Where Ray puts an engine of two GPUs. The GPUs are numbers that Ray counts; no machine has them.

    python tests/inference/gpu_nodes.py [eight] FILE

The process writes to FILE, as JSON, what it saw on a machine with one GPU, which an engine and a rank share. Then come two nodes
with one GPU each, and a third with two. With `eight` there is one machine with eight GPUs instead.
"""

import json
import os
import sys

import ray
from ray.cluster_utils import Cluster
from waiting import until

from actors.cluster import check_room
from actors.fakes import FakeEngine
from actors.pool.pool import EnginePool
from actors.resources import demands_of, options, placement_of
from pipeline import config, recipes
from pipeline.errors import ResourceError
from pipeline.store.directory import Store
from pipeline.training import worker

# no node starts workers that nobody asked for, or gathers figures
QUICK = {"prestart_worker_first_driver": False, "enable_metrics_collection": False}


class Seeing(FakeEngine):
    """A fake engine whose facts name the GPUs that its process may use, and its node's label."""

    def facts(self):
        label = ray.get_runtime_context().get_node_labels().get("egrsd-role", "")
        return type(super().facts())(**{**vars(super().facts()), "engine": f"{label} {os.environ['CUDA_VISIBLE_DEVICES']}"})


def start():
    """A pool of one engine on two GPUs."""
    pool = config.Pool(tensor_parallel=2, placement=config.Placement(cpus=0.1, gpus=2))
    return EnginePool.start("rollout", config.Model(), pool, config.ScoreSettings(), Seeing)


@ray.remote
class Rank:
    """An actor with the resources of a rank."""

    def cards(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]


def on_one_card():
    """The cards that engine and rank of the recipe for one card get on the head, and what is left of its single card."""
    run = recipes.recipe("qwen3_1_7b_1gpu")
    check_room(demands_of(run))
    pool = EnginePool.start("rollout", config.Model(), run.engines.rollout, config.ScoreSettings(), Seeing)
    asked = worker._trainer(Store("unused"), run).scaling_config
    rank = Rank.options(num_cpus=asked.resources_per_worker["CPU"], num_gpus=asked.resources_per_worker["GPU"]).remote()
    told = [
        pool.facts().engine.strip(),
        ray.get(rank.cards.remote()),
        free_cards(),
        asked.num_workers,
    ]
    pool.close()
    ray.kill(rank)
    until(lambda: free_cards() == 1, what="the card is free")
    return told


def free_cards():
    """The GPUs of the cluster that nobody holds."""
    return ray.available_resources().get("GPU", 0.0)


def on_eight_cards():
    """The cards of the four engines and of the four ranks of the recipe for one machine with eight."""
    run = recipes.recipe("qwen3_4b_8gpu")
    ray.init(address="local", num_cpus=32, num_gpus=8, include_dashboard=False, log_to_driver=False)
    check_room(demands_of(run))
    settings = run.engines.rollout
    asked = worker._trainer(Store("unused"), run).scaling_config
    place = {"num_cpus": asked.resources_per_worker["CPU"], "num_gpus": asked.resources_per_worker["GPU"]}
    engines = [Rank.options(**options(placement_of(settings))).remote() for _ in range(settings.min)]
    ranks = [Rank.options(**place).remote() for _ in range(asked.num_workers)]
    told = [ray.get([actor.cards.remote() for actor in part]) for part in (engines, ranks)]
    ray.shutdown()
    return told


def only_eight(path):
    """Write the cards of the recipe for one machine with eight."""
    with open(path, "w") as file:
        json.dump(on_eight_cards(), file)


def main(path):
    """Ask for engines while the cluster grows: one card on the head, one on a node, two on another."""
    head = {"num_cpus": 8, "num_gpus": 1, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    told = {"shared": on_one_card()}
    cluster.add_node(num_cpus=1, num_gpus=1, labels={"egrsd-role": "single"})
    cluster.wait_for_nodes()
    try:
        start()
    except ResourceError as error:
        told["refused"] = str(error)
    cluster.add_node(num_cpus=1, num_gpus=2, labels={"egrsd-role": "double"})
    cluster.wait_for_nodes()
    pool = start()
    told["engine"] = pool.facts().engine
    told["free"] = free_cards()
    pool.close()
    ray.shutdown()
    cluster.shutdown()
    with open(path, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    only_eight(sys.argv[2]) if sys.argv[1] == "eight" else main(sys.argv[1])
