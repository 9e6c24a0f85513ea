"""The map's statistics: planted coefficients, an orthogonal array of worlds, ranks, and settings that the project takes."""

import numpy as np
import pytest

from pipeline.evidence.comparison import chosen_objectives, variant
from pipeline.overrides import resolve
from pipeline.recipes import demo
from tests.benchmarks import bench_map, bench_objectives


def test_the_worlds_are_an_orthogonal_array():
    """Each pair of levels of two dials comes exactly once among the nine worlds."""
    for one, other in (("forks", "pivots"), ("forks", "style"), ("pivots", "style")):
        assert len({(getattr(world, one), getattr(world, other)) for world in bench_map.WORLDS}) == 9


def test_planted_coefficients_are_found():
    """A difference of .1 + .02 forks x style - .03 pivots, without noise."""
    worlds = bench_map.WORLDS
    planted = np.array([0.1 + 0.02 * world.forks * world.style - 0.03 * world.pivots for world in worlds])
    differences = np.broadcast_to(planted[:, None, None], (9, 5, 7))
    found = [bench_map.coefficient(differences, weights).value for weights in bench_map.design(worlds)]
    assert found == pytest.approx([0.1, 0.02, -0.03])


def test_ranks_that_agree_have_correlation_one():
    values = np.arange(18.0).reshape(9, 2)
    here, p = bench_map.rank_correlation(values, values**3)
    assert here == pytest.approx(1)
    assert p < 0.001
    assert bench_map.rank_correlation(values, -values)[0] == pytest.approx(-1)


def test_the_power_grows_with_the_effect():
    assert bench_map.power(0.0, bench_map.WORLDS, times=60) < 0.15
    assert bench_map.power(3.0, bench_map.WORLDS, times=20) > 0.9


def test_the_project_takes_every_setting_and_objective_of_the_benchmarks():
    for world in bench_map.WORLDS:
        base = resolve(demo(), bench_map.settings(world, "x"))
        assert [variant(base, name, 1).seed for name in chosen_objectives(bench_map.OBJECTIVES)] == [1] * 9
    base = resolve(demo(), bench_objectives.NEEDS)
    assert len([variant(base, name, 0) for name in chosen_objectives(bench_objectives.OBJECTIVES)]) == 9
    compare, sweep = bench_objectives.commands("out", "0..4", ["rounds=2"])
    assert compare[:2] == ["jobs", "compare"]
    assert sweep[3] == "out/grpo-s0"
