"""Figures of evaluations: known values, what pairs, what leaves, and what is read of a run."""

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import recipes
from pipeline.contract import schema
from pipeline.evidence import evaluation
from pipeline.rounds.plan import Plan, write_plan
from pipeline.rounds.round import evaluation_run, open_round
from pipeline.rounds.tally import tally_of
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED
from pipeline.store.manifest import Origin


def shards(verdicts, lengths, answers, rejected=()):
    """A (rollout, grade) pair."""
    reasons = ["verifier_timeout" if i in rejected else None for i in range(len(verdicts))]
    rollout = pa.table({"response_tokens": pa.array([[1] * n for n in lengths], pa.list_(pa.int32()))})
    columns = {"reject_reason": reasons, "verdict": verdicts, "extracted_answer": answers}
    return rollout, pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def answered(correct, length=None):
    """Samples [N, K] with the verdicts that `correct` says."""
    correct = np.asarray(correct, float)
    length = np.ones_like(correct) if length is None else np.asarray(length, float)
    texts = [[None if c != 0 else "x" for c in row] for row in correct]
    votes = np.array([evaluation.majority(c, np.array(t, object)) for c, t in zip(correct, texts, strict=True)])
    return evaluation.Samples(correct, np.zeros_like(correct), length, votes, {}, {})


def test_samples_are_problems_by_samples_and_a_rejected_row_is_nan():
    first = shards(["correct", "wrong", "truncated", "unparsable"], [2, 4, 6, 8], ["7", "8", None, None])
    second = shards(["timeout", "correct"], [3, 5], ["9", "1"], rejected={0})
    found = evaluation.samples([first, second], 2)
    np.testing.assert_array_equal(found.correct, [[1, 0], [0, 0], [np.nan, 1]])
    np.testing.assert_array_equal(found.truncated, [[0, 0], [1, 0], [np.nan, 0]])
    np.testing.assert_array_equal(found.length, [[2, 4], [6, 8], [np.nan, 5]])
    assert found.majority.tolist() == [0.5, 0.0, 1.0]
    assert found.verdicts == {"correct": 2, "wrong": 1, "truncated": 1, "unparsable": 1, "timeout": 1}
    assert found.rejected == {"verifier_timeout": 1}


def test_a_timeout_is_counted_and_leaves_the_mean():
    found = evaluation.samples([shards(["correct", "timeout", "timeout", "timeout"], [2, 4, 6, 8], [None] * 4, {1, 2, 3})], 2)
    assert evaluation.per_problem(found, "correct")[0] == 1.0
    assert math.isnan(evaluation.per_problem(found, "correct")[1])
    assert evaluation.per_problem(found, "length")[0] == 2.0
    assert (found.verdicts, found.rejected) == ({"correct": 1, "timeout": 3}, {"verifier_timeout": 3})


def test_rows_on_which_the_verifier_gave_up_are_counted_in_new_and_in_old_shards():
    def entry(facts, rejected):
        return SimpleNamespace(facts=facts, rejected=rejected)

    assert evaluation._gave_up(entry({"gave_up": 3}, {"verifier_timeout": 1})) == 3
    assert evaluation._gave_up(entry({}, {"verifier_timeout": 1, "verifier_error": 2, "missing_answer": 4})) == 3


def test_policies_pair_by_problem_also_where_one_failed():
    before = evaluation.samples([shards(["correct", "wrong", "wrong"], [1, 1, 1], [None] * 3, {0})], 1)
    after = evaluation.samples([shards(["correct", "correct", "wrong"], [1, 1, 1], [None] * 3)], 1)
    assert evaluation.differences(after, before, 1, names=evaluation.MEANS)["avg"].value == 0.5


@pytest.mark.parametrize(
    ("correct", "answers", "expected"),
    [
        ([1, 1, 0], ["7", "7.0", "8"], 1.0),
        ([1, 0, 0], ["7", "8", "8.0"], 0.0),  # wrong answers meet in their normal form
        ([1, 0, 0], ["7", "8", "9"], 1 / 3),  # a tie of three
        ([1, 1, 0, 0], ["1/2", "0.5", "3", "3"], 0.5),  # right answers are one, however they are written
        ([1, 0, 0, 0], ["7", None, None, None], 1.0),  # no answer, no vote
        ([0, 0], [None, None], 0.0),
        ([math.nan, 1], ["8", "7"], 1.0),
        ([math.nan, math.nan], [None, None], math.nan),
    ],
)
def test_the_majority_counts_a_tie_as_its_chance(correct, answers, expected):
    assert evaluation.majority(np.array(correct, float), np.array(answers, object)) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(right, k):
    [found] = evaluation.pass_at(np.array([right], float), k)
    if k > len(right):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.mean([any(chosen) for chosen in combinations(right, k)]))


def test_pass_at_k_counts_a_rejected_row_as_no_sample():
    found = evaluation.pass_at(np.array([[1, 0, np.nan], [np.nan, np.nan, 0]]), 2)
    assert found[0] == 1.0
    assert math.isnan(found[1])


def test_figures_are_the_known_ones():
    found = evaluation.figures(answered([[1, 0], [1, 1], [0, 0], [1, 0]], [[2, 4], [6, 8], [10, 12], [2, 4]]), 2)
    assert found["avg"].value == 0.5
    assert found["pass"].value == 0.75
    assert found["maj"].value == 0.5
    assert found["length"].value == 6.0
    assert found["median_length"].value == 5.0
    assert found["tokens_per_correct"].value == 12.0
    assert all(value.low <= value.value <= value.high for value in found.values())


def test_no_correct_answer_has_no_price():
    found = evaluation.figures(answered([[0], [0]]), 1)
    assert found["tokens_per_correct"].value == math.inf
    assert found["avg"].value == 0.0
    changed = evaluation.differences(answered([[0], [1], [0]]), answered([[1], [0], [0]]), 1)
    assert "tokens_per_correct" in changed
    assert "avg" in changed
    assert "tokens_per_correct" not in evaluation.differences(answered([[0], [0]]), answered([[1], [0]]), 1)


def test_differences_pair_by_problem_and_leave_what_one_side_lacks():
    hard_and_easy = [[0], [0], [1], [1]]
    before, after = answered([*hard_and_easy, [1]]), answered([*hard_and_easy, [math.nan]])
    found = evaluation.differences(after, before, 1)["avg"]
    assert found.value == 0 == found.low + found.high
    with pytest.raises(ValueError, match="5 and 4 problems do not pair"):
        evaluation.differences(after, answered(hard_and_easy), 1)


def test_only_equal_problems_pair_and_in_any_order():
    before, after = (
        replace(answered([[0], [1], [1]]), problems=("a", "b", "b")),
        replace(answered([[1], [1], [0]]), problems=("b", "b", "a")),
    )
    assert evaluation.comparable(after, before)
    found = evaluation.differences(after, before, 1)["avg"]
    assert found.value == 0
    other = replace(before, problems=("a", "b", "c"))
    assert not evaluation.comparable(after, other)
    with pytest.raises(ValueError, match=r"asked different problems \(1 of 3\)"):
        evaluation.differences(after, other, 1)


def test_one_problem_has_no_interval():
    for names in (evaluation.FIGURES, evaluation.MEANS):  # the report asks for means alone
        with pytest.raises(ValueError, match="1 problems are too few"):
            evaluation.figures(answered([[1]]), 1, names)
        with pytest.raises(ValueError, match="1 problems are too few"):
            evaluation.differences(answered([[1]]), answered([[0]]), 1, names)


def test_problems_without_an_answer_leave_and_the_rest_keep_every_figure():
    lost = [[math.nan, math.nan]]
    whole, holey = answered([[1, 0], [1, 1]] * 5), answered([[1, 0], [1, 1]] * 5 + lost * 10)
    assert evaluation.figures(holey, 2) == evaluation.figures(whole, 2)
    assert not evaluation.comparable(answered([[1], [1], *[[math.nan]] * 2]), answered([*[[math.nan]] * 2, [1], [1]]))
    assert not evaluation.comparable(whole, holey)
    assert evaluation.comparable(holey, holey)
    assert evaluation.macro([(holey, None)], 2) == evaluation.macro([(whole, None)], 2)
    with pytest.raises(ValueError, match="1 problems are too few"):
        evaluation.figures(answered([[1, 0], *lost, *lost]), 1)


def test_pass_at_k_is_that_of_the_problems_with_k_samples_if_there_are_two():
    found = evaluation.figures(answered([[1, math.nan]] * 6 + [[1, 0], [0, 0], [1, 1], [0, 0]]), 2)
    assert found["pass"].value == 0.5
    assert found.keys() == set(evaluation.FIGURES)
    assert "pass" not in evaluation.figures(answered([[1, math.nan]] * 9 + [[1, 0]]), 2)


def test_intervals_over_problems_cover_as_often_as_they_say():
    """Of 100 evaluations of 60 problems x 2 samples about 95 % hold the truth; so do differences of two policies."""
    rng, held = np.random.default_rng(5), {"figures": 0, "differences": 0}
    for _ in range(100):
        chance = rng.beta(2, 2, 60)
        draw = lambda chance=chance: answered((rng.random((60, 2)) < chance[:, None]).astype(float))  # noqa: E731
        found = evaluation.figures(draw(), 1)["avg"]
        held["figures"] += found.low <= 0.5 <= found.high
        found = evaluation.differences(draw(), draw(), 1)["avg"]
        held["differences"] += found.low <= 0 <= found.high
    assert all(0.90 <= count / 100 <= 0.99 for count in held.values()), held


def test_differences_of_medians_and_prices_hold_the_truth():
    """Of 1 000 pairs of evaluations, whose problems are easy or hard for both policies, about 95 % hold the truth, which is 0."""
    rng, held = np.random.default_rng(6), {"median_length": 0, "tokens_per_correct": 0}
    for _ in range(1000):
        easy = rng.standard_normal((60, 1))

        def draw(easy=easy):
            right = rng.random((60, 2)) < 1 / (1 + np.exp(-easy))
            return answered(right.astype(float), np.exp(4 - 0.3 * easy + 0.3 * rng.standard_normal((60, 2))))

        found = evaluation.differences(draw(), draw(), 1, tuple(held))
        for name in held:
            held[name] += found[name].low <= 0 <= found[name].high
    assert all(0.93 <= count / 1000 <= 0.985 for count in held.values()), held


def test_the_macro_mean_counts_sources_not_problems():
    small, large = answered([[1], [1]]), answered([[0]] * 50)
    assert evaluation.macro([(small, None), (large, None)], 1)["avg"].value == 0.5
    assert evaluation.macro([(small, small), (large, answered([[1]] * 50))], 1)["avg"].value == -0.5


# ---- what is stored


def commit(store, shard, verdicts, lengths, where="evals/0000", inputs=None, settings=""):
    """One shard of an evaluation, its rollouts and its grades; columns that evaluations do not read hold fillers."""
    facts = {"engine": f"engine {shard}", "dtype": "float32", "logprobs_mode": "raw", "entropy_method": "exact"}
    for name, known in zip(("rollout", "grade"), shards(verdicts, lengths, ["7"] * len(verdicts)), strict=True):
        columns = {field.name: filler(field.type, lengths) for field in schema(STAGES[name])}
        columns |= {"trace_source": ["student"] * len(verdicts)} if name == "rollout" else {}
        columns |= {"trace_id": [str(i) for i in range(len(verdicts))], "reject_reason": [None] * len(verdicts)}
        columns |= {column: known[column].to_pylist() for column in known.column_names}
        table = pa.table(columns, schema(STAGES[name]))
        origin = Origin(facts=facts, settings=settings, inputs=(inputs or {}) if name == "rollout" else {})
        store.commit(where, STAGES[name], shard, table, origin)


def filler(kind, lengths):
    """A column that no one reads; its lists are as long as the response."""
    if pa.types.is_list(kind):
        return [[0] * length for length in lengths]
    return ["x" if pa.types.is_string(kind) else 0] * len(lengths)


@pytest.fixture
def evaluated(tmp_path):
    """A run of which the evaluation of policy 0 is planned: two shards of two problems."""
    store = Store(str(tmp_path / "run"))
    store.save_run(recipes.demo(), {})
    write_plan(store, "evals", 0, Plan(0, {"0000": [0, 1], "0001": [2, 3]}))
    return store


def test_held_out_answers_are_read_in_order_once_they_are_whole(evaluated):
    run = evaluated.load_run()
    commit(evaluated, "0001", ["wrong", "correct"], [3, 4])
    assert evaluation.held_out(evaluated, run, 0) is None  # a shard is missing
    assert evaluation.held_out(evaluated, run, 1) is None  # never planned
    commit(evaluated, "0000", ["correct", "correct"], [1, 2])
    found = evaluation.held_out(evaluated, run, 0)
    assert found.correct.tolist() == [[1], [1], [0], [1]]
    assert found.length.tolist() == [[1], [2], [3], [4]]
    work = open_round(evaluated, evaluation_run(run), "evals", 0)
    assert evaluation.engine_facts(work)["engine"] == "engine 0000, engine 0001"


def test_answers_of_a_policy_that_was_trained_again_are_not_those_of_the_new_one(evaluated, tmp_path):
    """After `train --replace` the page and the model card gave the old policy's accuracy to the new one."""
    run = evaluated.load_run()
    write_plan(evaluated, "evals", 1, Plan(1, {"0000": [0, 1]}))

    def publish(weights):
        (tmp_path / "new").mkdir(exist_ok=True)
        for name in NEEDED["policy"]:
            (tmp_path / "new" / name).write_bytes(weights)
        evaluated.delete("policy/0001")
        evaluated.publish_policy(1, tmp_path / "new")
        return evaluated.content(1)

    commit(evaluated, "0000", ["correct", "wrong"], [1, 2], "evals/0001", {"policy": publish(b"old")})
    assert evaluation.held_out(evaluated, run, 1).correct.tolist() == [[1], [0]]
    publish(b"new")
    assert evaluation.held_out(evaluated, run, 1) is None
    evaluated.delete("policy/0001")
    assert evaluation.held_out(evaluated, run, 1) is None  # it waits to be trained again
    assert tally_of(evaluated, run, 1) is None
    evaluated.publish_policy(2, tmp_path / "new")
    assert evaluation.held_out(evaluated, run, 1) is not None  # nothing says that they are another's


def test_an_evaluation_half_done_anew_with_other_settings_is_not_read(evaluated):
    commit(evaluated, "0000", ["correct"] * 2, [1] * 2, settings="0" * 16)
    commit(evaluated, "0001", ["wrong"] * 2, [1] * 2, settings="1" * 16)
    assert evaluation.held_out(evaluated, evaluated.load_run(), 0) is None
    commit(evaluated, "0001", ["wrong"] * 2, [1] * 2, settings="0" * 16)
    assert evaluation.held_out(evaluated, evaluated.load_run(), 0).earlier


def test_an_evaluation_half_done_anew_with_more_samples_is_not_read(evaluated):
    commit(evaluated, "0000", ["correct"] * 4, [1] * 4)
    commit(evaluated, "0001", ["wrong"] * 2, [1] * 2)
    assert evaluation.held_out(evaluated, evaluated.load_run(), 0) is None
