"""What a run asks of a cluster, against what the cluster has."""

import time

import pytest

from actors import cluster, resources
from actors.resources import Demand, Node, check
from pipeline import config, recipes
from pipeline.errors import ResourceError, SettingError
from pipeline.overrides import resolve


def test_resources_add_up_over_demands():
    nodes = [Node({"CPU": 4, "GPU": 2}, {"role": "train"}), Node({"CPU": 4})]
    train = Demand("train", 2, config.Placement(cpus=2, gpus=1, labels={"role": "train"}))
    check([train, Demand("engines.rollout", 4, config.Placement(cpus=1))], nodes)
    with pytest.raises(ResourceError, match=r"9 CPU are asked for .* the cluster has 8: 1 are missing"):
        check([train, Demand("engines.rollout", 5, config.Placement(cpus=1))], nodes)
    with pytest.raises(ResourceError, match=r"one asks for 5 CPU; the largest node has 4 CPU"):
        check([Demand("engines.rollout", 1, config.Placement(cpus=5))], nodes)
    check([Demand("engines.rollout", 0, config.Placement(cpus=5))], nodes)


def test_a_placement_is_asked_of_ray_with_all_its_parts():
    asked = config.Placement(cpus=2, gpus=1, resources={"rollout": 1}, labels={"role": "gpu"})
    whole = {"num_cpus": 2, "num_gpus": 1, "resources": {"rollout": 1}, "label_selector": {"role": "gpu"}}
    assert resources.options(asked) == whole
    assert "label_selector" not in resources.options(config.Placement())


def sized(engines: int, ranks: int) -> config.Run:
    """The recipe for one node with so many engines and ranks, one card each."""
    sets = [f"engines.rollout.min={engines}", f"engines.rollout.max={engines}", f"train.workers={ranks}"]
    return resolve(recipes.recipe("qwen3_4b_8gpu"), sets)


@pytest.mark.parametrize(
    ("gpus", "engines", "ranks", "missing"),
    [
        (8, 4, 4, ""),
        (8, 5, 4, "9 GPU are asked for (5 x 1 (engines.rollout) + 4 x 1 (train)), the cluster has 8: 1 are missing"),
        (4, 2, 2, ""),
        (4, 4, 4, "8 GPU are asked for"),
        (2, 1, 1, ""),
        (1, 1, 1, "2 GPU are asked for"),
        (0, 1, 1, "one asks for 2 CPU, 1 GPU; the largest node has 2 CPU, 0 GPU"),
    ],
)
def test_the_room_of_one_node_with_and_without_gpus(monkeypatch, gpus, engines, ranks, missing):
    monkeypatch.setattr(cluster, "processors", lambda: 32)
    node = cluster.local_node(gpus)
    assert node.resources == {"CPU": 32.0 if gpus else 8.0, "GPU": float(gpus)}
    demands = resources.demands_of(sized(engines, ranks))
    if not missing:
        check(demands, [node])
        return
    with pytest.raises(ResourceError) as refused:
        check(demands, [node])
    assert missing.replace("has 2 CPU", "has 8 CPU") in str(refused.value)


def test_the_paper_recipe_needs_two_nodes_of_eight():
    nodes = [Node({"CPU": 32, "GPU": 8, "rollout": 8}), Node({"CPU": 32, "GPU": 8, "train": 8}), Node({"CPU": 16})]
    check(resources.demands_of(recipes.recipe("qwen3_4b")), nodes)
    with pytest.raises(ResourceError, match="the largest node has"):
        check(resources.demands_of(recipes.recipe("qwen3_4b")), nodes[::2])


def test_a_small_gpu_machine_counts_as_many_logical_cpus_as_any(monkeypatch):
    monkeypatch.setattr(cluster, "processors", lambda: 4)
    assert cluster.local_node(1).resources == {"CPU": 8.0, "GPU": 1.0}


def test_an_engine_of_the_gpu_build_asks_for_a_card_where_the_settings_name_none(monkeypatch):
    demo = recipes.demo()
    assert resources.demands_of(demo)[0].resources == {"CPU": 1.0}
    monkeypatch.setattr(resources, "vllm_for_gpus", lambda: True)
    assert resources.demands_of(demo)[0].resources == {"CPU": 1.0, "GPU": 1.0}
    check(resources.demands_of(demo), [cluster.local_node(1)])  # its rank trains on the CPU


def test_ranks_never_share_a_card():
    with pytest.raises(SettingError, match=r"placement\.gpus 0\.5 would let ranks share a GPU, which NCCL refuses"):
        resolve(sized(4, 2), ["train.placement.gpus=0.5"])
    assert resolve(sized(1, 1), ["train.placement.gpus=0.5"]).train.placement.gpus == 0.5


def test_one_card_holds_engine_and_rank_of_its_recipe_and_no_second_engine():
    run = recipes.recipe("qwen3_1_7b_1gpu")
    node = cluster.local_node(1)
    check(resources.demands_of(run), [node])
    with pytest.raises(ResourceError, match=r"1\.5 GPU are asked for"):
        check([*resources.demands_of(run), Demand("engines.score", 1, run.engines.rollout.placement)], [node])


def test_imported_traces_need_no_engine_that_writes_unless_an_evaluation_asks():
    apart = ["engines.score.max=2", "source.uri=x.jsonl", "source.response=t"]

    def asked(*sets):
        return [demand.setting for demand in resources.demands_of(resolve(recipes.demo(), [*apart, *sets]), train=False)]

    assert asked() == ["engines.rollout", "engines.score", "data stages"]
    assert asked("evaluation.problems=0") == ["engines.score", "data stages"]
    alone = resolve(recipes.demo(), ["source.uri=x.jsonl", "source.response=t", "evaluation.problems=0"])
    assert [name for name, _ in resources.pools_of(alone)] == ["rollout"]


def eights(count: int, **resources: float) -> list[Node]:
    """Nodes of eight cards each."""
    return [Node({"CPU": 64, "GPU": 8, **resources}) for _ in range(count)]


def cards(setting: str, count: int, gpus: float, **more: float) -> Demand:
    return Demand(setting, count, config.Placement(gpus=gpus, resources=more))


def test_what_fits_by_its_sums_and_finds_no_places_is_refused_before_anything_is_loaded():
    check([cards("engines.rollout", 6, 1), cards("teachers.big.engines", 1, 8), cards("train", 2, 1)], eights(2))
    with pytest.raises(ResourceError) as refused:
        check([cards("engines.rollout", 5, 3), cards("train", 1, 1)], eights(2))  # 16 of 16 cards
    assert str(refused.value) == (
        "engines.rollout, train: 5 x 1 CPU, 3 GPU (engines.rollout) + 1 x 1 CPU, 1 GPU (train): each fits on a node and the sums "
        "suffice, but no way to place all at one time exists. Add a node, or lower the numbers of engines and workers or their "
        "placement"
    )


def test_the_first_place_that_fits_is_not_the_last_word():
    mixed = [Node({"CPU": 64, "GPU": 8, "rollout": 8}), *eights(1)]
    check([cards("train", 1, 8), cards("engines.rollout", 8, 1, rollout=1)], mixed)  # the ranks leave the labelled node
    check([cards("a", 2, 4), cards("b", 3, 3), cards("c", 2, 2), cards("d", 1, 3)], eights(3))
    check([cards("a", 2, 5), cards("b", 2, 3), cards("c", 4, 2)], eights(3))
    check([cards("a", 1, 6), cards("b", 2, 5), cards("c", 4, 4), cards("d", 1, 2), cards("e", 2, 3)], eights(5))


def test_many_actors_on_many_nodes_are_placed_in_a_moment():
    nodes = [Node({"CPU": 64, "GPU": 8, "memory": float(number)}) for number in range(100)]
    begun = time.monotonic()
    check([cards("engines.rollout", 400, 1), cards("engines.score", 100, 4)], nodes)
    check([cards("engines.rollout", 199, 3), cards("train", 100, 1)], nodes)
    assert time.monotonic() - begun < 30


def test_a_part_of_a_run_asks_only_for_the_pools_that_answer_it():
    run = resolve(recipes.demo(), ["engines.score.max=2", "teachers.big.model=x", "teachers.big.engines.max=1"])

    def asked(run, *parts):
        return [name for name, _ in resources.pools_of(run, parts)]

    assert asked(run, *resources.ASKING) == ["rollout", "score", "big"]
    assert asked(run, "evaluation") == ["rollout"]
    assert asked(run, "score") == ["score", "big"]
    assert asked(run, "rollout") == ["rollout"]
    assert asked(resolve(run, ["rollout.teacher_share=0.5"]), "rollout") == ["rollout", "big"]
    assert asked(resolve(recipes.demo(), []), "score") == ["rollout"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["engines.rollout.placement.gpus=0.5"],
            r"engines\.rollout\.placement\.gpus: an engine takes memory_share 0\.9 of a card of which it asks for 0\.5",
        ),
        (["engines.rollout.placement.gpus=4"], r"tensor_parallel 1 uses 1 of 4 cards\. Set engines\.rollout\.tensor_parallel 4"),
        (["train.placement.gpus=2"], r"train\.placement\.gpus: a rank uses one card, and 2 are asked for"),
    ],
)
def test_cards_that_would_hold_too_much_or_idle_are_refused_before_a_run(sets, message):
    run = resolve(recipes.demo(), sets)  # a run from before can be read
    with pytest.raises(SettingError, match=message):
        resources.demands_of(run)


def test_a_part_of_a_card_suffices_where_the_engine_takes_no_more_or_takes_turns():
    for sets in (
        ["engines.rollout.placement.gpus=0.5", "engines.rollout.memory_share=0.5"],
        ["engines.rollout.placement.gpus=0.5", "engines.rollout.colocate=true", "train.placement.gpus=0.5"],
        ["engines.rollout.placement.gpus=2", "engines.rollout.tensor_parallel=2"],
    ):
        resources.demands_of(resolve(recipes.demo(), sets))
