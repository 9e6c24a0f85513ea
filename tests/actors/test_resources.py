"""What a run asks of a cluster, against what the cluster has."""

import pytest

from actors.resources import Demand, Node, check
from pipeline import config
from pipeline.errors import ResourceError


def test_resources_add_up_over_demands():
    nodes = [Node({"CPU": 4, "GPU": 2}, {"role": "train"}), Node({"CPU": 4})]
    train = Demand("train", 2, config.Placement(cpus=2, gpus=1, labels={"role": "train"}))
    check([train, Demand("engines.rollout", 4, config.Placement(cpus=1))], nodes)
    with pytest.raises(ResourceError, match=r"9 CPU are asked for .* the cluster has 8: 1 are missing"):
        check([train, Demand("engines.rollout", 5, config.Placement(cpus=1))], nodes)
    with pytest.raises(ResourceError, match=r"one asks for 5 CPU; the largest node has 4 CPU"):
        check([Demand("engines.rollout", 1, config.Placement(cpus=5))], nodes)
    check([Demand("engines.rollout", 0, config.Placement(cpus=5))], nodes)
