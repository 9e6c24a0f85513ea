"""Rounds whose problems are chosen by pass rate, and rounds that are filled: the same plan after a kill, and nothing lost."""

import json

import numpy as np
import pytest
from committed import round_table
from filled_runs import Killed, bytes_of, measured, planner_of, run_at
from in_process import brought, planned

from pipeline.choice.plans import prepare, told
from pipeline.errors import SettingError, StoreError, UserError
from pipeline.inspection.remaining import trainable_rounds
from pipeline.overrides import resolve
from pipeline.problems.sources import epoch_indices, open_source
from pipeline.rounds.inventory import commit_round
from pipeline.rounds.metrics import summarise_round, warning
from pipeline.rounds.plan import Filling, Further, Plan, read_plan, write_plan
from pipeline.rounds.round import open_round
from pipeline.rounds.rows import left_out, signals
from pipeline.stages import LABELS


def filled(folder, *sets, rounds=1):
    """(store, run, its last round) of a run whose rounds are measured and filled."""
    store, run = run_at(folder, *sets)
    planner = planner_of(store, run)
    for number in range(rounds):
        work = measured(planner, planner.plan(number, 0))
    return store, run, work


def test_with_the_default_settings_plans_are_what_they_were(tmp_path):
    store, run = run_at(tmp_path / "new")
    made = [planner_of(store, run).plan(number, 0).shards for number in range(2)]
    old = [planned(tmp_path / "old", *run_sets(run), number=number).shards for number in range(2)]
    assert made == old
    assert json.loads(store.read_bytes("rounds/0001/plan.json")).keys() == {"policy", "shards", "source", "asked"}


@pytest.mark.parametrize("later", [2, 8])
def test_a_changed_number_of_prompts_repeats_no_problem_and_leaves_none_out(tmp_path, later):
    """Round 2 started at 2 x 2 = 4 of an epoch, where 8 problems had been asked: four came twice."""
    store, run = run_at(tmp_path, "source.size=40")
    asked = [planner_of(store, run).plan(number, 0) for number in range(2)]
    changed = resolve(run, [f"rollout.prompts_per_round={later}"])
    asked += [planner_of(store, changed).plan(number, 0) for number in range(2, 4)]
    problems = [index for work in asked for indices in work.shards.values() for index in indices]
    order = epoch_indices(40, run.seed, 0, 8 + 2 * later).tolist()
    assert problems == order
    assert [read_plan(store, "rounds", number).end for number in range(4)] == [None, None, 8 + later, 8 + 2 * later]
    again = [planner_of(store, changed).plan(number, 0).shards for number in range(2, 4)]
    assert again == [work.shards for work in asked[2:]]


def run_sets(run):
    sizes = {name: getattr(run.rollout, name) for name in ("prompts_per_round", "prompts_per_shard", "group_size")}
    return [*(f"rollout.{name}={value}" for name, value in sizes.items()), f"source.size={run.source.size}"]


def test_a_round_is_filled_until_it_has_its_groups_and_every_row_is_kept_and_counted(tmp_path):
    store, run, work = filled(tmp_path, "rollout.fill_groups=60", "rounds=1")
    plan, found = read_plan(store, "rounds", 0), signals(work)
    assert plan.filling.full
    assert plan.further
    assert plan.shards == work.shards
    assert len(plan.problems) == len(set(plan.problems)) == 4 + sum(part.prompts for part in plan.further)
    with_signal = sum(int(signal.sum()) for signal in found.values())
    assert with_signal >= 4
    left = left_out(work)
    commit_round(work, left)
    table = round_table(store, 0)
    assert table.num_rows == 4 * 8  # the first four groups with a signal, whole
    assert (np.abs(table["advantage"].to_numpy().reshape(4, 8)).max(axis=1) > 0).all()
    assert sum(map(len, left.values())) == len(plan.problems) - 4
    stored = sum(entry.rows for entry in store.entries("rounds/0000", "score").values())
    assert stored == 8 * len(plan.problems)
    assert [w.number for w in trainable_rounds(store, run, 0)] == [0]
    assert told(store, run) == [
        f"1 rounds are filled: {len(plan.problems) - 4} further prompts were asked. {len(plan.problems) - 4} groups are not "
        "trained on, since they have no signal or their round had enough (rollout.fill_groups)."
    ]


def test_a_round_that_may_ask_no_more_lacks_groups_and_says_so(tmp_path):
    store, run, work = filled(tmp_path, "rollout.fill_groups=1")
    found = sum(int(signal.sum()) for signal in signals(work).values())
    assert len(read_plan(store, "rounds", 0).problems) == 5
    assert 0 < found < 4
    commit_round(work, left_out(work))
    assert round_table(store, 0).num_rows == 8 * found
    assert told(store, run)[-1] == f"rounds/0000 has {4 - found} groups with a signal fewer than the 4 that it asks for."


def test_a_round_without_any_signal_is_trained_on_as_it_is(tmp_path):
    store, _, work = filled(tmp_path, "rollout.fill_groups=4", "grade.answer_pattern=(nothing)")
    assert len(read_plan(store, "rounds", 0).problems) == 8
    assert left_out(work) == {}


def test_a_source_without_further_problems_ends_the_filling(tmp_path):
    store, _, _ = filled(tmp_path, "rollout.fill_groups=60", "source.size=8", "grade.answer_pattern=(nothing)")
    plan = read_plan(store, "rounds", 0)
    assert sorted(plan.problems) == list(range(8))
    assert plan.filling.full


def test_rounds_go_on_behind_the_further_prompts_of_the_round_before(tmp_path):
    store, run, _ = filled(tmp_path, "rollout.fill_groups=20", rounds=2)
    asked = [i for number in range(2) for i in read_plan(store, "rounds", number).problems]
    assert len(asked) == len(set(asked)) > 8
    default = resolve(run, ["rollout.fill_groups=0"])  # also when filling was switched off since
    assert not set(planner_of(store, default).plan(2, 0).shards["0000"]) & set(asked)


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("sampling", ["shuffled", "variance"])
def test_a_kill_at_any_moment_of_filling_leaves_the_same_shards_bit_for_bit(tmp_path, sampling, step):
    """`step`: of this many moments one is tried."""
    sets = ["rollout.fill_groups=12", f"source.sampling={sampling}"]
    whole, _, _ = filled(tmp_path / "whole", *sets, rounds=2)
    expected = bytes_of(whole)
    shards = sum(name.endswith("parquet") for name in expected)
    for moment in (5, shards // 3, shards // 2, shards - 3)[::step]:
        store, run = run_at(tmp_path / str(moment), *sets)
        left = [moment]
        with pytest.raises(Killed):
            both_rounds(store, run, left)
        if not read_plan(store, "rounds", 0).filling.full:
            with pytest.raises(UserError, match="round 0 is not measured"):
                trainable_rounds(store, run, 0)
        both_rounds(store, run)  # by the process that resumes
        assert bytes_of(store) == expected


def both_rounds(store, run, left=None):
    planner = planner_of(store, run)
    for number in range(2):
        measured(planner, planner.plan(number, 0), left)


def test_further_prompts_are_asked_anew_when_verdicts_have_changed(tmp_path):
    store, run, _ = filled(tmp_path, "rollout.fill_groups=30", "grade.answer_pattern=(nothing)")
    before = read_plan(store, "rounds", 0)
    planner = planner_of(store, resolve(run, [r"grade.answer_pattern=(\d)"]))
    work = measured(planner, planner.plan(0, 0))
    fresh, _, straight = filled(tmp_path / "fresh", "rollout.fill_groups=30")
    assert work.shards == straight.shards
    assert read_plan(store, "rounds", 0) == read_plan(fresh, "rounds", 0) != before


def test_filling_that_is_switched_off_keeps_what_was_asked(tmp_path):
    store, run, _ = filled(tmp_path, "rollout.fill_groups=12")
    plan = read_plan(store, "rounds", 0)
    write_plan(store, "rounds", 0, plan.before(1))  # as if it had been killed in the middle
    again = planner_of(store, resolve(run, ["rollout.fill_groups=0"])).plan(0, 0)
    assert again.shards == plan.before(1).shards
    assert read_plan(store, "rounds", 0).filling.full


def test_the_metrics_of_a_filled_round(tmp_path):
    _, _, work = filled(tmp_path, "rollout.fill_groups=1")
    brought(work, *LABELS)
    found = summarise_round(work)
    lacking = 4 - sum(int(signal.sum()) for signal in signals(work).values())
    assert (found["num_rows"], found["num_prompts_further"]) == (40, 1)
    assert (found["num_groups_lacking"], found["num_groups_left_out"]) == (lacking, 1 + lacking)
    assert "after 1 further prompts. Raise rollout.fill_groups" in warning(found)


# ---- choice by pass rate -----------------------------------------------------------------------------------------------


def test_later_rounds_leave_out_what_earlier_rounds_found_too_hard(tmp_path):
    sets = ["source.pass_rate=0.01,1", "source.size=12"]
    store, run, _ = filled(tmp_path, *sets, rounds=1)
    hard = [
        index
        for shard, indices in read_plan(store, "rounds", 0).shards.items()
        for index, rows in zip(indices, verdicts(store, shard), strict=True)
        if "correct" not in rows
    ]
    planner = planner_of(store, run)
    plans = [planner.plan(number, 0) for number in (1,)]
    chosen = read_plan(store, "rounds", 1).chosen
    assert (chosen.problems, chosen.below, chosen.above, chosen.unmeasured) == (12, len(hard), 0, 8)
    assert not {i for shard in plans[0].shards.values() for i in shard} & set(hard)
    assert told(store, run) == [
        f"rounds/0001 could take {12 - len(hard)} of 12 problems by pass rate [0.01, 1]. Left out: {len(hard)} below, 0 above; "
        "8 without a known pass rate are kept (source.pass_rate)."
    ]


def verdicts(store, shard):
    rows = store.read(store.entry("rounds/0000", "grade", shard), ["verdict"])["verdict"].to_pylist()
    return [rows[i : i + 8] for i in range(0, len(rows), 8)]


def test_a_stored_plan_stays_when_verdicts_change_and_goes_when_the_choice_does(tmp_path):
    store, run, _ = filled(tmp_path, "source.pass_rate=0.01,1", "source.size=40", rounds=1)
    first = planner_of(store, run).plan(1, 0)
    for entry in store.entries("rounds/0000", "grade"):
        store.delete(f"rounds/0000/grade/{entry}.json")
    assert planner_of(store, run).plan(1, 0).shards == first.shards
    other = resolve(run, ["source.sampling=variance"])
    assert planner_of(store, other).plan(1, 0).shards != first.shards


def test_bounds_that_let_nothing_in_are_refused_before_anything_is_paid(tmp_path):
    store, run = run_at(tmp_path, "source.unmeasured=left_out")
    source = open_source(run.source)
    message = r"none of 200 problems is in \[0, 1\]: 0 are below, 0 above, 200 have no known pass rate\. Widen the bounds"
    with pytest.raises(SettingError, match=message):
        prepare(store, run, source, [0])
    with pytest.raises(SettingError, match=message):
        planner_of(store, run).plan(0, 0)
    assert prepare(store, run, source, []) == []
    hard = resolve(run, ["source.unmeasured=kept", "source.sampling=variance", "model.max_model_len=80"])
    with pytest.raises(UserError, match="all 4 prompts of round 0 are rejected, 4 as prompt_too_long"):
        prepare(store, hard, source, [0])


# ---- the plan as a file ------------------------------------------------------------------------------------------------


def test_a_plan_is_cut_back_part_by_part_and_a_damaged_one_is_refused(tmp_path):
    shards = {"0000": [1, 2], "0001": [3], "0002": [4, 5], "0003": [6]}
    plan = Plan(0, shards, "a", 3, filling=Filling(9, [Further(2, 5), Further(1, 6)], full=True), end=3)
    assert [list(plan.before(n).shards) for n in range(3)] == [["0000", "0001"], ["0000", "0001", "0002"], list(shards)]
    assert not plan.before(2).filling.full
    assert plan.before(1).with_further({"0003": [6]}, 6) == plan.before(2)
    assert plan.asks_the_same(Plan(0, {"0000": [1, 2, 3]}, "a", 3))
    store, _ = run_at(tmp_path)
    write_plan(store, "rounds", 0, plan)
    assert read_plan(store, "rounds", 0) == plan
    text = store.read_bytes("rounds/0000/plan.json").replace(b'"prompts": 2', b'"prompts": 4')
    store.write("rounds/0000/plan.json", text)
    with pytest.raises(StoreError, match=r"plan\.json: .*filling\.further\.0: its prompts are no whole shards behind the others"):
        open_round(store, store.load_run(), "rounds", 0)
