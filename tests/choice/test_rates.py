"""Pass rates from stored verdicts: of a run's own rounds, of other runs and of evaluations; what other runs say is checked."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from filled_runs import measured, planner_of, run_at
from in_process import brought

from actors.fakes import FakeEngine
from pipeline.choice import rates
from pipeline.choice.plans import prepare
from pipeline.config import Evaluation, Source
from pipeline.errors import SettingError, StoreError
from pipeline.evidence.asked import ask
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.rounds.origin import keep as keep_sources
from pipeline.rounds.origin import read_sources
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import plan_round, with_engines
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin

COLUMNS = [f"source.{name}={name}" for name in ("problem", "solution", "answer")]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of one measured round, whose base has also answered 12 training problems 8 times each, as `egrsd evaluate` does."""
    store, run = run_at(tmp_path_factory.mktemp("runs") / "other")
    planner = planner_of(store, run)
    measured(planner, planner.plan(0, 0))
    sets = ["evaluation.source.split=train", "evaluation.source.size=200", "evaluation.problems=12"]
    one = ask(run, "tiny-arithmetic", 8, sets)
    work, pool = plan_round(store, one.run, one.kind, 0, 0, one.source), FakeEngine(run.model, run.engines.rollout, run.score)
    brought(with_engines(work, {"rollout": pool}), "prompts", "rollout", "grade")
    return store, one.kind


def by_hand(store, where, plan):
    """(correct, graded) of each index, counted row by row."""
    found = {}
    for shard, indices in plan.shards.items():
        rows = store.read(store.entry(where, "grade", shard), ["verdict"])["verdict"].to_pylist()
        for place, index in enumerate(indices):
            mine = rows[8 * place : 8 * place + 8]
            found[index] = (mine.count("correct"), len(mine))
    return found


def kept(folder, *sets):
    """(what a new run with these settings keeps of other runs, what it says)."""
    store, run = run_at(folder, *sets)
    source = open_source(run.source)
    said = rates.keep(store, run, source)
    return rates.of_others(store, run, source), said, store


def counts(found):
    return {int(i): (int(found.correct[i]), int(found.graded[i])) for i in np.flatnonzero(found.known)}


def test_the_verdicts_of_a_round_are_those_of_its_rows(other):
    store, _ = other
    run = store.load_run()
    found = rates.of_round(store, 0, open_source(run.source))
    assert counts(found) == by_hand(store, "rounds/0000", read_plan(store, "rounds", 0))
    assert not rates.of_round(store, 7, open_source(run.source)).known.any()
    foreign = open_source(run.source.model_copy(update={"seed": 5}))
    assert not rates.of_round(store, 0, foreign).known.any()


def test_a_verdict_whose_row_was_rejected_tells_nothing(other, tmp_path):
    store = Store(str(shutil.copytree(other[0].uri, tmp_path / "run")))
    entry = store.entry("rounds/0000", "grade", "0000")
    before = rates._verdicts(store, entry, 2)
    table = store.read(entry)
    rows = table.to_pylist()
    rows[0] |= {"reject_reason": "reward_error", "verdict": "correct"}
    store.commit("rounds/0000", STAGES["grade"], "0000", pa.Table.from_pylist(rows, schema=table.schema), Origin())
    right, graded = rates._verdicts(store, store.entry("rounds/0000", "grade", "0000"), 2)
    assert graded.tolist() == [before[1][0] - 1, before[1][1]]
    assert right[0] == before[0][0] - (table["verdict"][0].as_py() == "correct")


def test_an_evaluation_of_the_base_tells_the_pass_rates_of_its_problems(other, tmp_path):
    store, kind = other
    sets = ["source.pass_rate=0.1,0.9", f"source.pass_rates={store.uri}/{kind}/0000"]
    found, said, own = kept(tmp_path / "own", *sets)
    assert counts(found) == by_hand(store, f"{kind}/0000", read_plan(store, kind, 0))
    assert said == [f"note: {store.uri}/{kind}/0000: pass rates of 12 problems of the source, 96 verdicts (source.pass_rates)."]
    run = own.load_run()
    again = rates.keep(own, run, open_source(run.source))  # the other run is not read again
    assert again == [said[0].replace(" (source", ", as they were read when the run began (source")]
    planner = planner_of(own, run)
    planner.plan(0, 0)
    low, high = ({i for i, (c, n) in counts(found).items() if bad(c / n)} for bad in (lambda p: p < 0.1, lambda p: p > 0.9))
    chosen = read_plan(own, "rounds", 0).chosen
    assert (chosen.below, chosen.above, chosen.unmeasured) == (len(low), len(high), 200 - 12)


def test_a_look_before_a_run_chooses_by_the_same_pass_rates_and_keeps_none(other, tmp_path):
    """`distill --dry-run` did not look, and spoke of traces of a run that was then refused."""
    store, kind = other
    sets = ["source.pass_rate=0.1,0.9", f"source.pass_rates={store.uri}/{kind}"]
    own, run = run_at(tmp_path / "own", *sets)
    source = open_source(run.source)
    said = prepare(own, run, source, [0], write=False)
    looked = rates.of_others(own, run, source)
    assert rates.read_kept(own) is None
    assert prepare(own, run, source, [0]) == said
    assert counts(rates.of_others(own, run, source)) == counts(looked)
    with pytest.raises(SettingError, match="none of 200 problems is in"):
        prepare(own, resolve(run, ["source.pass_rate=0.501,0.502", "source.unmeasured=left_out"]), source, [0], write=False)


def test_a_whole_run_tells_what_its_rounds_and_evaluations_found_together(other, tmp_path):
    store, kind = other
    found, _, _ = kept(tmp_path, "source.sampling=variance", f"source.pass_rates={store.uri}")
    whole = by_hand(store, "rounds/0000", read_plan(store, "rounds", 0))
    for index, (correct, graded) in by_hand(store, f"{kind}/0000", read_plan(store, kind, 0)).items():
        before = whole.get(index, (0, 0))
        whole[index] = (before[0] + correct, before[1] + graded)
    assert counts(found) == whole
    rounds, _, _ = kept(tmp_path / "rounds", "source.sampling=variance", f"source.pass_rates={store.uri}/rounds/")
    assert counts(rounds) == by_hand(store, "rounds/0000", read_plan(store, "rounds", 0))


def test_problems_are_found_by_their_texts_in_any_order_and_others_are_counted(other, tmp_path):
    store, kind = other
    source = open_source(store.load_run().source)
    rows = [vars(row) for row in source.rows([5, 3, 11])] + [{"problem": "1+1", "solution": "x", "answer": "2"}]
    rows[1] = rows[1] | {"answer": "9999"}  # another answer is another problem
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({name: row[name] for name in ("problem", "solution", "answer")}) + "\n" for row in rows))
    sets = [f"source.uri={file}", *COLUMNS, "source.unmeasured=left_out", "model.path=tiny-reasoner"]
    found, said, _ = kept(tmp_path / "own", *sets, f"source.pass_rates={store.uri}/{kind}", "rollout.temperature=0.5")
    of_base = by_hand(store, f"{kind}/0000", read_plan(store, kind, 0))
    assert counts(found) == {0: of_base[5], 2: of_base[11]}
    assert said[0].endswith("2 problems of the source, 16 verdicts; 10 of their problems are not in it (source.pass_rates).")
    assert said[1:] == [f"note: {store.uri}/{kind} was made with other settings: rollout.temperature was 1.0, here 0.5."]


def test_problems_without_a_solution_have_pass_rates_too(other, tmp_path):
    """No row of a file without solutions was a problem of the other run, although a run on it works."""
    store, kind = other
    rows = open_source(store.load_run().source).rows([5, 11])
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"problem": row.problem, "answer": row.answer}) + "\n" for row in rows))
    sets = [f"source.uri={file}", "prompts.teacher={problem}|{answer}", "source.unmeasured=left_out"]
    found, _, _ = kept(tmp_path / "own", *sets, f"source.pass_rates={store.uri}/{kind}")
    of_base = by_hand(store, f"{kind}/0000", read_plan(store, kind, 0))
    assert counts(found) == {0: of_base[5], 1: of_base[11]}


def test_what_tells_nothing_is_refused_before_anything_is_paid(other, tmp_path):
    store, _ = other

    def refused(place, *sets):
        own, run = run_at(tmp_path / "own", "source.unmeasured=left_out", f"source.pass_rates={place}", *sets)
        with pytest.raises(SettingError) as caught:
            prepare(own, run, open_source(run.source), [0])
        return str(caught.value)

    assert "source.pass_rates: no run at " in refused(tmp_path / "nowhere")
    assert "no graded traces at " in refused(f"{store.uri}/evals/none-00000000")
    assert "is a problem of tiny-arithmetic" in refused(store.uri, "source.split=test")


def test_damaged_verdicts_of_another_run_are_refused_in_one_line(other, tmp_path):
    store, kind = other
    entry = next(iter(store.entries(f"{kind}/0000", "grade").values()))
    whole = store.read_bytes(entry.path)
    try:
        store.write(entry.path, whole[:-1])
        with pytest.raises(StoreError, match="the bytes are not those that were committed"):
            kept(tmp_path, "source.unmeasured=left_out", f"source.pass_rates={store.uri}/{kind}")
    finally:
        store.write(entry.path, whole)
    path = f"{kind}/0000/plan.json"
    plan, whole = store.read_json(path), store.read_bytes(path)
    try:
        store.write_json(path, plan | {"shards": {shard: [*rows, 9] for shard, rows in plan["shards"].items()}})
        with pytest.raises(StoreError, match=r"rows, and the plan has \d+ problems"):
            kept(tmp_path, "source.unmeasured=left_out", f"source.pass_rates={store.uri}/{kind}")
    finally:
        store.write(path, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": [9]}, "correct is above graded"),
        ({"graded": [8, 8]}, "have different lengths"),
        ({"indices": [200]}, "indices: 200 is beyond the 200 problems of the source"),
        ({"indices": [-1]}, r"indices\.0: "),
        ({"indices": [3, 3], "correct": [1, 1], "graded": [8, 8]}, "indices do not rise"),
        ({"graded": [0], "correct": [0]}, r"graded\.0: "),
        ({"correct": [float("nan")]}, r"correct\.0: |not JSON"),
    ],
)
def test_a_damaged_file_of_pass_rates_is_refused_with_its_field(tmp_path, change, message):
    store, run = run_at(tmp_path, "source.unmeasured=left_out", "source.pass_rates=somewhere")
    source = open_source(run.source)
    whole = {
        "settings": rates.settings_of(run, source),
        "places": ["a"],
        "indices": [3],
        "correct": [1],
        "graded": [8],
        "others": 0,
    }
    store.write_json("pass_rates.json", whole | change)
    with pytest.raises(StoreError, match=f"pass_rates\\.json: .*({message})"):
        rates.of_others(store, run, source)


# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["source.pass_rate=0.9,0.1"], "the lower bound comes first"),
        (["source.pass_rate=0.1,1.1"], r"source\.pass_rate\.1"),
        (["source.pass_rate=0.1"], r"source\.pass_rate"),
        (["source.pass_rates=runs/a"], "names runs that nothing reads"),
        (["evaluation.source.pass_rate=0.1,0.9"], "choose problems of training, not of an evaluation"),
        (["rollout.fill_groups=4", "grade.advantage=running"], "needs grade.advantage 'group'"),
        (["rollout.fill_groups=4", "source.response=trace"], "needs traces that the student writes"),
        (["rollout.fill_groups=-1"], r"rollout\.fill_groups"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, sets, message):
    with pytest.raises(SettingError, match=message):
        run_at(tmp_path, *sets)


def test_a_choice_makes_no_shard_and_no_source_stale(tmp_path):
    _, plain = run_at(tmp_path / "plain")
    store, chosen = run_at(tmp_path / "chosen", "source.pass_rate=0.1,0.9", "source.sampling=variance", "source.pass_rates=a,b")
    assert chosen.digest(("source",)) == plain.digest(("source",))
    assert Source(**chosen.source.reading()) == plain.source
    keep_sources(store, {"source": open_source(chosen.source)})
    assert read_sources(store)["source"].settings == plain.source.reading()
    assert resolve(chosen, ["source.pass_rates="]).source.pass_rates == ()
    assert Evaluation().source.reading() == Source(split="test").reading()
