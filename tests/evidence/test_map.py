"""The map's statistics: planted coefficients, an orthogonal array of worlds, ranks, and settings that the project takes."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from jobs import audit as job
from pipeline.audit import choose
from pipeline.evidence.comparison import chosen_objectives, variant
from pipeline.evidence.intervals import over_seeds
from pipeline.overrides import resolve
from pipeline.recipes import demo
from tests.benchmarks import bench_longer, bench_map, bench_objectives, map_figure


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
    for name in ("H1", "H2"):
        assert bench_map.power(name, 0.0, bench_map.WORLDS, times=60) < 0.15
        assert bench_map.power(name, 3.0, bench_map.WORLDS, times=20) > 0.9
    shares = [bench_map.power("H3", constant, bench_map.WORLDS, times=100) for constant in (0.0, 2.0)]
    assert shares[0] > 0.15 > 0.1 > shares[1]


def test_the_project_takes_every_setting_and_objective_of_the_benchmarks():
    for world in bench_map.WORLDS:
        base = resolve(demo(), bench_map.settings(world, "x"))
        assert [variant(base, name, 1).seed for name in chosen_objectives(bench_map.OBJECTIVES)] == [1] * 9
    for world in bench_longer.WORLDS:
        assert world in bench_map.WORLDS
        longer, mapped = (resolve(demo(), made.settings(world, "x")) for made in (bench_longer, bench_map))
        assert longer.model_copy(update={"rounds": mapped.rounds}) == mapped
        assert mapped.rounds < longer.train.warmup_steps < longer.rounds == 16
    base = resolve(demo(), bench_objectives.NEEDS)
    assert len([variant(base, name, 0) for name in chosen_objectives(bench_objectives.OBJECTIVES)]) == 9
    compare, sweep = bench_objectives.commands("out", "0..4", ["rounds=2"])
    assert compare[:2] == ["jobs", "compare"]
    assert sweep[3] == "out/grpo-s0"


def planted(folder, right):
    """Files of nine worlds, with the answers `right(world, name, seed)` and audits that see a hundredth of the gaps."""
    rng, names = np.random.default_rng(0), chosen_objectives(bench_map.OBJECTIVES)
    for place, world in enumerate(bench_map.WORLDS):
        draws = rng.random((bench_map.SEEDS, bench_map.PROBLEMS))
        answers = {name: [bench_map.packed(row < right(world, name)) for row in draws] for name in names}
        seen = {name: dict.fromkeys(bench_map.FIGURES, right(world, name) / 100) for name in bench_map.AUDITED}
        audits = {str(number): [seen] * bench_map.AUDITED_SEEDS for number in (0, bench_map.ROUNDS // 2)}
        document = {"world": vars(world), "answers": answers, "audits": audits}
        (folder / f"world-{place}.json").write_text(json.dumps(document))


def test_a_gate_that_helps_with_forks_and_style_is_found_in_the_files_of_worlds_and_predicted(tmp_path):
    """Both gates gain 2 points for each unit of forks x style. `grpo` and `position` lose with pivots. Three equal `rlsd`."""
    gain = {"egrsd": lambda w: 0.02 * w.forks * w.style, "cl_egrsd": lambda w: 0.02 * w.forks * w.style}
    lose = {"grpo": lambda w: -0.03 * w.pivots, "position": lambda w: -0.02 * w.pivots}
    planted(tmp_path, lambda world, name: 0.6 + (gain | lose).get(name, lambda w: 0.0)(world))
    found = bench_map.conclude(tmp_path, bench_map.WORLDS)
    assert found["H1"]["value"] == pytest.approx(0.02, abs=0.004)
    assert found["H1"]["p_holm"] < 0.001
    assert found["H2"]["value"] == 0
    assert found["H2"]["p_holm"] > 0.05
    assert abs(found["H3"]["value"]) < 0.01
    for correlation, p in found["audit"].values():
        assert 0.4 < correlation <= 4 / 7  # of seven objectives, three never differ and count as 0
        assert p < 0.01
    picture = ElementTree.fromstring(map_figure.draw(tmp_path, bench_map.WORLDS))
    circles = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 9 + 9 + 7 * (9 + 1)  # two panels of worlds, one of worlds and objectives with its legend
    assert all(0 <= float(mark.get(side)) <= map_figure.WIDTH for mark in circles for side in ("cx", "cy"))


# ---- what is written about the map is what its files say ---------------------------------------------------------------

TEXTS = {name: (Path(bench_map.__file__).parent / name).read_text() for name in ("MAP.md", "RESULTS.md", "map/map.svg")}


def cell(found):
    """Points with their interval, as the table has them. Equal answers in all seeds have no width."""
    parts = [f"{100 * value:+.1f}".replace("+0.", "+.").replace("-0.", "-.") for value in (found.value, found.low, found.high)]
    value, low, high = parts if found.low != found.high else [".0"] * 3
    return f"{value} [{low}, {high}]"


@pytest.fixture(scope="module")
def of_files():
    """(answers of each objective, audits, conclusion) of the committed files."""
    answers, audits = bench_map.read(bench_map.RESULTS, bench_map.WORLDS)
    return answers, audits, bench_map.conclude(bench_map.RESULTS, bench_map.WORLDS)


def test_the_table_of_the_map_is_that_of_its_files(of_files):
    answers = of_files[0]
    shown = ("grpo", "egrsd", "cl_egrsd", "position", "grpo+top_entropy:0.2", "inverted")
    rows = [line.replace("*", "") for line in TEXTS["RESULTS.md"].splitlines() if line.startswith("|")]
    for place, world in enumerate(bench_map.WORLDS):
        style = f"{world.style:g}".replace("0.", ".")
        first = f"{100 * answers['rlsd'][place].mean():.1f}"
        cells = [cell(over_seeds((answers[name] - answers["rlsd"])[place])) for name in shown]
        assert f"| {world.forks}, {world.pivots}, {style} | {first} | {' | '.join(cells)} |" in rows
    pooled = [cell(over_seeds((answers[name] - answers["rlsd"]).mean(0))) for name in shown]
    assert f"| all nine | | {' | '.join(pooled)} |" in rows


def test_the_hypotheses_and_what_the_audit_predicts_are_those_of_the_files(of_files):
    found, text = of_files[2], TEXTS["RESULTS.md"].replace("*", "")
    for name, unit in (("H1", " points a unit"), ("H2", " points a pivot")):
        value, low, high = (f"{100 * found[name][end]:+.2f}".replace("0.", ".") for end in ("value", "low", "high"))
        p, holm = (f"{found[name][key]:.2f}".replace("0.", ".") for key in ("p", "p_holm"))
        assert f"| {value}{unit} [{low}, {high}], p {p} (Holm {holm}) | lost |" in text
    figures = {"cosine": "cosine", "batch_cosine": "batch cosine", "batch_share": "signal"}
    figures |= {"averaged_cosine": "averaged cosine (AdamW's first moment)"}
    for key, name in figures.items():
        told = [found["audit"][f"round {number}, {key}"] for number in (0, 3)]
        digits = [2 if key == "batch_share" else 4] * 2
        cells = [f"{r:.2f}, p {p:.{d}f}".replace("0.", ".") for (r, p), d in zip(told, digits, strict=True)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert [name for name in found["validated"] if "share" in name] == []
    assert len(found["validated"]) == 6


def test_the_figure_of_the_map_is_drawn_from_its_files():
    assert map_figure.draw(bench_map.RESULTS, bench_map.WORLDS).strip() == TEXTS["map/map.svg"].strip()


def test_the_audits_predict_seeds_whose_traces_they_did_not_read(of_files):
    """Four seeds of a world were audited, and the other four trained on traces of their own. Five of six stay below .05 / 8."""
    answers, audits, _ = of_files
    names = list(bench_map.AUDITED)[1:]
    others = np.stack([(answers[name] - answers["rlsd"])[:, bench_map.AUDITED_SEEDS :].mean((1, 2)) for name in names], axis=1)
    rows = []
    for figure, name in (("cosine", "cosine"), ("batch_cosine", "batch cosine"), ("averaged_cosine", "averaged cosine")):
        told = [bench_map.rank_correlation(bench_map.gaps(audits, names, number, figure), others) for number in (0, 3)]
        cells = [f"{r:.2f}, p {p:.4f}".replace("0.", ".") for r, p in told]
        rows.append(f"| {name}, seeds 4 to 7 | {' | '.join(cells)} |")
    assert [row for row in rows if row not in TEXTS["RESULTS.md"]] == []


def test_what_a_verdict_says_of_the_worlds_is_what_the_files_say(of_files):
    """MEANING: worlds in which all four audits of round 0 put the gate on one side, and what training gained there."""
    answers, audits, _ = of_files
    gains, sides = (answers["egrsd"] - answers["rlsd"]), []
    for one in audits:
        told = [[row[name]["averaged_cosine"] for name in ("egrsd", "rlsd")] for row in one["0"]]
        sides.append([a - b for a, b in told])
    above = [place for place, side in enumerate(sides) if min(side) > 0]
    below = [place for place, side in enumerate(sides) if max(side) < 0]
    beyond = [place for place in above if over_seeds(gains[place]).low > 0]
    assert (len(above), len(below), len(beyond)) == (5, 1, 1)
    mean, lost = 100 * gains[above].mean(), 100 * gains[below].mean()
    text = f"{mean:.1f} points on average, beyond noise in one; where they put it below, in one, it lost {-lost:.1f}"
    assert text.replace("0.", ".") in job.MEANING
    averages = [100 * values.mean() for values in gains]
    assert f".0 points on average there, {max(averages):.1f}".replace("0.", ".") in choose.GAINS
    assert abs(np.mean(averages)) < 0.05
    assert f"and {min(averages):.1f} at least" in choose.GAINS


def test_a_file_of_another_world_is_refused(tmp_path):
    planted(tmp_path, lambda world, name: 0.5)
    (tmp_path / "world-0.json").write_bytes((tmp_path / "world-1.json").read_bytes())
    with pytest.raises(ValueError, match="of another world"):
        bench_map.conclude(tmp_path, bench_map.WORLDS)


def test_answers_are_kept_as_they_were():
    right = np.random.default_rng(0).random(256) < 0.7
    np.testing.assert_array_equal(bench_map.unpacked(bench_map.packed(right)), right)
    assert bench_map.packed(np.array([1, 0, 1, 0, 0, 0, 0, 1])) == "a1"
    with pytest.raises(ValueError, match="right or wrong"):
        bench_map.packed(np.array([0.5] * 8))


def test_an_audit_that_tells_nothing_is_left_out():
    """Of world 0 one audit tells a gap of .2, of world 1 none tells one, of world 2 two tell .4 and .6."""

    def told(value):
        return {"egrsd": {"cosine": value}, "rlsd": {"cosine": 0.1}}

    audits = [{"0": [told(0.3), told(None)]}, {"0": [told(None), told(None)]}, {"0": [told(0.5), told(0.7)]}]
    np.testing.assert_allclose(bench_map.gaps(audits, ["egrsd"], 0, "cosine")[:, 0], [0.2, 0.35, 0.5])


def test_the_figures_of_an_audit_are_read_as_they_were_written(tmp_path):
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    points = [{"name": name, **dict.fromkeys(bench_map.FIGURES, value)} for name in bench_map.AUDITED.values()]
    points[0]["cosine"] = None
    (tmp_path / "audit-0000.json").write_text(json.dumps({"points": points}))
    read = bench_map.figures_of(tmp_path / "audit-0000.json")
    assert read["rlsd"] == {"cosine": None, "batch_cosine": 0.5, "batch_share": 0.5, "averaged_cosine": 0.5}
    assert read["inverted"]["cosine"] == 0.5


def test_worlds_as_the_sample_have_least_squares_and_its_t():
    """A slope of .02 with a spread of .01 among worlds, against scipy's line on the part that forks x style alone explains."""
    worlds = bench_map.WORLDS
    x = np.array([world.forks * world.style for world in worlds])
    y = 0.02 * x + 0.01 * np.random.default_rng(3).standard_normal(9)
    found = bench_map.over_worlds(np.broadcast_to(y[:, None, None], (9, 2, 3)), worlds, 1)
    others = np.array([[1.0, world.pivots] for world in worlds])  # x and y without what 1 and pivots explain of them
    left_x, left_y = (part - others @ np.linalg.lstsq(others, part, rcond=None)[0] for part in (x, y))
    slope = left_x @ left_y / (left_x @ left_x)
    rest = left_y - slope * left_x
    t = slope / np.sqrt(rest @ rest / 6 / (left_x @ left_x))
    assert found["value"] == pytest.approx(slope)
    assert found["p"] == pytest.approx(2 * stats.t.sf(t, 6))


def test_no_direction_may_count_as_none():
    audits = [{"0": [{"egrsd": {"cosine": None}, "rlsd": {"cosine": 0.4}}]}]
    assert bench_map.gaps(audits, ["egrsd"], 0, "cosine", 0.0)[0, 0] == -0.4


def test_longer_runs_conclude_from_their_files(tmp_path):
    """The gate gains 3 of 256 problems in every seed of the first world, and nothing in the second."""
    right = np.zeros((len(bench_longer.SEEDS), bench_map.PROBLEMS))
    right[:, :128] = 1
    for place, world in enumerate(bench_longer.WORLDS):
        gated = right.copy()
        gated[:, 128 : 131 - 3 * place] = 1
        answers = {"rlsd": [bench_map.packed(row) for row in right], "egrsd": [bench_map.packed(row) for row in gated]}
        (tmp_path / f"longer-{place}.json").write_text(json.dumps({"world": vars(world), "answers": answers}))
    first, second = bench_longer.conclude(tmp_path)
    assert (first["rlsd"], first["points"][0]) == (50.0, pytest.approx(300 / 256))
    assert second["points"][0] == 0
    assert second["p_holm"] == 1
    (tmp_path / "longer-1.json").write_text((tmp_path / "longer-0.json").read_text())
    with pytest.raises(ValueError, match="of another world"):
        bench_longer.conclude(tmp_path)
