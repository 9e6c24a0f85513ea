"""`egrsd sweep --choose`: the choice from made-up audits with known answers, and on a tiny world."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from audited_world import answered_world
from scipy import stats
from typer.testing import CliRunner

from jobs import sweep as job
from jobs.cli import app
from pipeline.audit import choose, measure
from pipeline.config import Run
from pipeline.errors import SettingError, UserError
from pipeline.fit import footprint
from pipeline.overrides import resolve
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round

AXES = {"label.gamma": [0.0, 0.3, 1.0], "profile.window": [3]}
GATE = "--set objective.name=cl_egrsd --set objective.gate=own --set objective.control=none --set objective.entropy=teacher"
RUN = Run(name="made up")
ASKED = choose.gates(RUN, AXES)


def audit(*gaps, sample=800):
    """An audit of 16 blocks and 800 traces, with the difference of each gate as (value, half of its own 95 % interval).

    sample: traces whose gradients were taken.
    """
    one = {"value": 0.9, "low": 0.8, "high": 1.0}
    points = [{"name": name, choose.FIGURE: one, "difference": {}} for name in ("reinforce", choose.UNGATED)]
    for name, gap in zip(list(ASKED)[1:], gaps, strict=True):
        told = gap and {"value": gap[0], "low": gap[0] - gap[1], "high": gap[0] + gap[1]}
        points.append({"name": name, choose.FIGURE: one, "difference": {choose.FIGURE: told}})
    made = {"run": "r", "round": 0, "policy": 0, "traces": 800, "sample": sample, "blocks": 16, "measured": "0" * 16}
    return made | {"sampling": {}, "points": points}


def test_the_gates_are_the_grid_and_gamma_0_once():
    assert list(ASKED) == ["gamma 0", "gamma 0.3, window 3", "gamma 1, window 3"]
    settings = [(run.objective.name, run.objective.gamma, run.objective.window) for run in ASKED.values()]
    assert settings == [("cl_egrsd", 0.0, 0), ("cl_egrsd", 0.3, 3), ("cl_egrsd", 1.0, 3)]


def test_a_gate_is_whole_whatever_the_run_has():
    """A run of the inverted gate had this gate audited under the name of another."""
    base = resolve(RUN, ["objective.control=inverted", "objective.entropy=student", "objective.name=egrsd"])
    for run in choose.gates(base, AXES).values():
        assert (run.objective.control, run.objective.gate, run.objective.entropy) == ("none", "own", "teacher")


def test_what_is_open_is_what_may_be_better():
    """A gate that is told to be worse is no open question, and one without a figure is no bad one."""
    found = choose.choose(audit((0.01, 0.012), (-0.05, 0.01)), ASKED, None)
    assert found["wanted"]["gate"] == "gamma 0.3, window 3"
    assert not found["worse"]
    half = choose.choose(audit(None, (-0.05, 0.01)), ASKED, None)
    assert choose.sentences(half)[0].startswith("choice: none. These traces tell no gate")
    same = choose.choose(audit((0.0, 0.0), (0.0, 0.0)), ASKED, None)
    assert choose.sentences(same)[0].startswith("choice: none. These traces tell no gate")


def test_the_gate_above_0_with_the_largest_difference_is_chosen_and_a_half_interval_costs_four_times():
    found = choose.choose(audit((0.02, 0.005), (0.03, 0.01)), ASKED, 60.0)
    wider = stats.t.ppf(1 - 0.025 / 2, 15) / stats.t.ppf(0.975, 15)  # two gates, fifteen degrees of freedom: 2.49 / 2.13
    assert wider == pytest.approx(1.168, abs=1e-3)
    assert found["chosen"]["gate"] == "gamma 1, window 3"
    assert found["chosen"]["gap"]["low"] == pytest.approx(0.03 - wider * 0.01)
    assert found["wanted"] == {"gate": "gamma 1, window 3", "times": 4.0, "sample": 3200, "traces": 2400, "seconds": 180.0}
    assert choose.sentences(found) == [
        "choice: gamma 1, window 3, whose averaged cosine is +0.0300 [+0.0183, +0.0417] above that of gamma 0",
        f"train with {GATE} --set objective.gamma=1 --set objective.window=3",
        "to halve this interval: 4.0 times these traces, 2400 more, some 180 s of engines as in this round, with `--sample 3200`",
    ]


@pytest.mark.parametrize(
    ("sample", "price"),
    [
        (128, "gradients of 512 traces, 4.0 times as many. This round has them: add `--sample 512`"),
        (
            512,
            "gradients of 2048 traces, 4.0 times as many. `--sample 800` takes all of this round first. "
            "The rest is 1248 more, some 94 s of engines as in this round, with `--sample 2048`",
        ),
    ],
)
def test_traces_that_the_round_has_are_no_price_of_engines(sample, price):
    """Blocks of 8 or 32 of 50 traces told the cosines, and four times all 800 traces were asked for, with their engines."""
    found = choose.choose(audit((0.02, 0.005), (0.03, 0.01), sample=sample), ASKED, 60.0)
    assert choose.sentences(found)[2] == f"to halve this interval: {price}"


def test_an_interval_that_is_wider_above_asks_for_no_fewer_traces_than_there_are():
    """+.03 [-.002, .045]: half of the width is less than the value, and the audit asked for -309 more traces."""
    found = audit((0.03, 0.0), (-0.05, 0.01))
    wider = stats.t.ppf(1 - 0.025 / 2, 15) / stats.t.ppf(0.975, 15)
    gap = {"value": 0.03, "low": 0.03 - 0.032 / wider, "high": 0.03 + 0.015 / wider}
    found["points"][2]["difference"][choose.FIGURE] = gap
    chosen = choose.choose(found, ASKED, None)
    assert chosen["chosen"] is None
    times = ((0.032 + 0.032 / 2.4899 * 0.8662) / 0.03) ** 2  # t of fifteen degrees at 1 - .025 / 2 and at .8
    assert chosen["wanted"]["times"] == pytest.approx(times, rel=1e-4)
    assert chosen["wanted"]["traces"] == pytest.approx(800 * (times - 1), abs=1)


def test_the_traces_that_are_asked_for_tell_the_difference_in_four_of_five_audits():
    """Once the expected end of the interval stood at 0: half of all audits with so many traces told nothing."""
    found = choose.choose(audit((0.0105, 0.01), (-0.001, 0.01)), ASKED, None)
    quantiles = [stats.t.ppf(share, 15) for share in (0.975, 1 - 0.025 / 2)]
    error = 0.01 / quantiles[0] / np.sqrt(found["wanted"]["times"])
    drawn = np.random.default_rng(0).standard_normal((20000, 16)) * error * 4 + 0.0105  # sixteen blocks
    low = drawn.mean(1) - quantiles[1] * drawn.std(1, ddof=1) / 4
    assert np.mean(low > 0) == pytest.approx(0.8, abs=0.02)


def test_an_interval_of_one_gate_alone_is_not_enough():
    """.0105 +- .01 is above 0 alone, and .0105 +- .0117 with two gates is not. Noise falls with the root of the traces."""
    found = choose.choose(audit((0.0105, 0.01), (-0.001, 0.01)), ASKED, None)
    assert found["chosen"] is None
    times = (0.01168 * (1 + 0.8662 / 2.4899) / 0.0105) ** 2
    assert found["wanted"]["times"] == pytest.approx(times, rel=1e-2)
    assert choose.sentences(found) == [
        "choice: none. These traces tell no gate of the grid apart from gamma 0 in the good direction",
        "to tell gamma 0.3, window 3 from gamma 0 in four of five audits: 2.2 times these traces, 1000 more, "
        "with `--sample 1800`",
    ]


def test_gates_that_all_lose_and_traces_that_tell_nothing():
    lost = choose.choose(audit((-0.05, 0.01), (-0.06, 0.02)), ASKED, None)
    assert choose.sentences(lost) == ["choice: gamma 0, because every gate of the grid lowers the averaged cosine"]
    silent = choose.choose(audit(None, None), ASKED, None)
    assert choose.sentences(silent) == ["choice: none. These traces are too few, or too noisy, to tell a direction"]


@pytest.mark.parametrize(
    ("sets", "rounds", "message"),
    [
        (["label.gamma=0"], None, "gamma is 0.*above 0"),
        (["label.floor=.1,.2"], None, "no axis of --choose"),
        (["objective.gamma=.1"], None, "label"),
        ([], [0, 1], "reads one round"),
    ],
)
def test_what_cannot_be_chosen_is_refused(world, sets, rounds, message):
    with pytest.raises(SettingError, match=message):
        job.choose_gate(world.uri, sets, rounds, 0, True)


def test_a_stored_round_gets_a_proposal(world, capfd, monkeypatch):
    filtered = resolve(world.load_run(), ["rollout.top_p=.9"])
    monkeypatch.setattr(job, "open_run", lambda _: (world, filtered))
    job.choose_gate(world.uri, ["label.gamma=.5,1", "label.window=0,1"], [0], 0, True)
    document = world.read_json(choose.EVIDENCE)
    asked = choose.gates(RUN, {"label.gamma": [0.5, 1.0], "profile.window": [0, 1]})
    assert [point["gate"] for point in document["points"]] == list(asked)
    assert document["measured"] == Inventory(open_round(world, world.load_run(), "rounds", 0)).measured
    shown = capfd.readouterr().out
    assert "choice: " in shown
    assert (document["traces"], document["sample"]) == (96, 64)  # 16 blocks, a minibatch of 4 traces of each
    assert "gradients of 64 of 96 traces of round 0" in " ".join(shown.split())
    assert "traces were sampled at temperature 1, top-p 0.9, top-k off, so the reference is" in " ".join(shown.split())
    assert "rank correlation .84 in round 0" in " ".join(shown.split())


def test_a_large_model_is_audited_by_its_adapter(world, monkeypatch):
    """In a tiny world ten gates have 10 + 3 weightings, and 3 further gradients. A whole model has no adapter."""
    run, size = world.load_run(), footprint.measure(world.load_run().model)
    work, plan = open_round(world, run, "rounds", 0), measure.Plan(space=None)
    need = 6 * 4 * 16 * size.parameters
    monkeypatch.setattr(measure, "MOST_BYTES", need)
    assert measure._space(work, 10, plan) == "weights"
    monkeypatch.setattr(measure, "MOST_BYTES", need - 1)
    assert measure._space(work, 10, plan) == "adapter"
    with pytest.raises(UserError, match=r"for 10 gates with gamma 0 do not fit into .*Use 9 gates with gamma 0 at most"):
        measure._space(replace(work, run=resolve(run, ["model.tuning=full"])), 10, plan)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return answered_world(tmp_path_factory.mktemp("choose") / "run")


def test_a_choice_is_made_of_gradients(world):
    done = CliRunner().invoke(app, ["sweep", "--run", world.uri, "--choose", "--sample", "0"])
    assert done.exit_code == 2
    assert "--sample 0 leaves gradients out" in " ".join(done.output.split())


def test_more_gradients_of_a_stored_round_are_taken_where_they_are_asked_for(world):
    """The command that was named took as many as before where memory ends the blocks, and audited other objectives."""
    done = CliRunner().invoke(app, ["sweep", "--run", world.uri, "--choose", "--set", "label.gamma=1", "--sample", "96"])
    assert done.exit_code == 0, done.output
    document = world.read_json(choose.EVIDENCE)
    assert (document["traces"], document["sample"], document["blocks"]) == (96, 96, 16)


def test_a_sample_is_shared_out_over_the_blocks_by_their_size():
    groups = [np.arange(40), np.arange(40, 60), np.arange(60, 100)]
    run = resolve(RUN, ["train.batch_traces=8"])
    assert [len(part) for part in measure._parts(groups, run, 0)] == [8, 8, 8]
    assert [len(part) for part in measure._parts(groups, run, 50)] == [20, 10, 20]
    assert [part.tolist() for part in measure._parts(groups, run, 100)] == [rows.tolist() for rows in groups]
