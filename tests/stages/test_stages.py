"""What happens to a row: groups, seeds, rejections carried on, both scorings of the same ids, nothing measured twice."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_engine import PLACE, POLICY, Odd

from actors.fakes import most_likely, token_evidence
from pipeline import stages
from pipeline.config import Model
from pipeline.contract import Failure, Place, Policy, Reject, Score, ShardInputs
from pipeline.errors import EngineError
from pipeline.grader.verifier import Grader
from pipeline.method.rewards import RunningBaseline
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.problem import Problem
from pipeline.problems.tiny import ANSWER_PATTERN
from pipeline.recipes import demo
from pipeline.stages import STAGES
from pipeline.store.shards import check_table, count_rejected

PROBLEMS = [
    Problem(0, "7+4-3+9", "7+4=11;11-3=8;8+9=17#17", "17", None, ""),
    Problem(1, "1+1+1+1", "1+1=2;2+1=3;3+1=4#4", "4", None, ""),
    Problem(2, None, "x", "1", Reject.MISSING_PROBLEM, "column 'problem' is empty"),
    Problem(3, "9" * 200, "x", "1", None, ""),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(Model(path=str(asset_path())))


def test_only_the_students_prompt_counts_for_the_window_of_an_evaluation(tokenizer):
    """No teacher reads it. Its prompt left out held-out problems with long solutions, which are the hard ones."""
    run = resolve(demo(), ["model.max_model_len=120", "rollout.max_new_tokens=72"])
    long = [Problem(0, "1+1", "1+1=2;" * 20, "2", None, "")]
    reasons = [stages.prompts.prompts(long, run, tokenizer, taught)["reject_reason"].to_pylist() for taught in (True, False)]
    assert reasons == [["prompt_too_long"], [None]]
    places = [Place("rounds/0000"), Place("evals/0000")]
    made = [STAGES["prompts"].compute(ShardInputs(run, "0000", place, {}, {}, problems=long)).table for place in places]
    assert [table["reject_reason"].to_pylist() for table in made] == reasons


def test_a_teacher_with_the_students_prompt_needs_no_solution(tokenizer):
    """The control `no_reference` on a source without solutions lost every row, as an engine error, after a paid rollout."""
    run = demo()
    same = run.prompts.model_copy(update={"teacher": run.prompts.student, "teacher_thinking": run.prompts.student_thinking})
    table = stages.prompts.prompts([Problem(0, "1+1", None, "2")], run.model_copy(update={"prompts": same}), tokenizer)
    assert table["teacher_prompt_tokens"].to_pylist() == table["prompt_tokens"].to_pylist()
    assert table["teacher_prompt_tokens"].to_pylist()[0]


@pytest.fixture(scope="module")
def run():
    return resolve(demo(), ["rollout.group_size=4", "score.rescore_share=0"])


@pytest.fixture
def prompts(run, tokenizer):
    return stages.prompts.prompts(PROBLEMS, run, tokenizer)


def rolled_out(prompts, run, tokenizer, engine=None, policy=POLICY):
    engine = engine or Odd(run.model)
    return stages.rollout.decode(stages.rollout.rollout(prompts, run, engine, policy, PLACE), tokenizer)


def test_prompts_reject_what_cannot_be_asked_and_keep_the_row(prompts, tokenizer):
    check_table(STAGES["prompts"], prompts)
    assert count_rejected(prompts) == {"missing_problem": 1, "prompt_too_long": 1}
    assert "max_model_len 128" in prompts["reject_detail"][3].as_py()
    assert tokenizer.decode(prompts["prompt_tokens"][0].as_py(), skip_special_tokens=True).strip() == "7+4-3+9"
    assert "8+9=17#17" in tokenizer.decode(prompts["teacher_prompt_tokens"][0].as_py())


def test_rollout_has_g_rows_per_prompt_also_for_rejected_prompts(prompts, run, tokenizer):
    table = rolled_out(prompts, run, tokenizer)
    check_table(STAGES["rollout"], table)
    assert table["prompt_index"].to_pylist() == [i for i in range(4) for _ in range(4)]
    assert count_rejected(table) == {"missing_problem": 4, "prompt_too_long": 4}
    assert set(pc.drop_null(table["policy_version"]).to_pylist()) == {3}


def test_seeds_and_ids_depend_on_seed_round_prompt_and_sample_only(prompts, run, tokenizer):
    whole = rolled_out(prompts, run, tokenizer)
    alone = rolled_out(prompts.slice(0, 1), run, tokenizer)
    assert whole.slice(0, 4).equals(alone)
    other = stages.rollout.rollout(prompts, run.model_copy(update={"seed": 1}), Odd(run.model), POLICY, PLACE)
    assert not set(other["trace_id"].to_pylist()) & set(whole["trace_id"].to_pylist())
    assert len(set(whole["trace_id"].to_pylist())) == whole.num_rows


def test_a_mixture_asks_the_base_with_the_privileged_prompt_for_teacher_traces(prompts, run, tokenizer):
    run = resolve(run, ["rollout.teacher_share=0.5"])
    engine = Odd(run.model)
    table = rolled_out(prompts, run, tokenizer, engine)
    assert engine.calls == [("generate", POLICY, 4), ("generate", Policy(0), 4)]
    assert table["trace_source"].to_pylist()[:4] == ["student", "student", "teacher", "teacher"]
    scored = stages.score.score(prompts, table, run, engine, POLICY)
    check_table(STAGES["score"], scored)
    assert engine.calls[2:] == [("score", Policy(0), 4), ("score", POLICY, 4)]
    assert scored["teacher_logprobs"][2].equals(table["rollout_logprobs"][2])
    assert scored["student_logprobs"][0].equals(table["rollout_logprobs"][0])
    assert scored["student_logprob_source"].to_pylist()[:4] == ["rollout", "rollout", "score", "score"]


def test_scores_are_the_engines_under_the_privileged_prompt(prompts, run, tokenizer):
    rollout = rolled_out(prompts, run, tokenizer)
    scored = stages.score.score(prompts, rollout, run, Odd(run.model), POLICY)
    tokens = np.array(rollout["response_tokens"][5].as_py())
    logprobs, entropy = token_evidence(tokens, 0, len(prompts["teacher_prompt_tokens"][1].as_py()), 57)
    np.testing.assert_array_equal(scored["teacher_logprobs"][5].as_py(), logprobs)
    np.testing.assert_array_equal(np.float32(scored["teacher_entropy"][5].as_py()), entropy)


@pytest.mark.parametrize(("policy", "asked"), [(Policy(0), 4), (POLICY, 8)])
def test_the_base_is_asked_for_its_logprobs_unless_it_wrote_the_trace(prompts, run, tokenizer, policy, asked):
    run = resolve(run, ["rollout.teacher_share=0.5", "score.base_logprobs=true"])
    engine = Odd(run.model)
    rollout = rolled_out(prompts, run, tokenizer, engine, policy)
    scored = stages.score.score(prompts, rollout, run, engine, policy)
    check_table(STAGES["score"], scored)
    assert engine.calls[-1] == ("score", Policy(0), asked)
    for row in range(8):
        tokens = np.array(rollout["response_tokens"][row].as_py())
        prompt = prompts["prompt_tokens"][rollout["prompt_index"][row].as_py()].as_py()
        expected = token_evidence(tokens, 0, len(prompt), 57)[0]
        np.testing.assert_array_equal(np.float32(scored["base_logprobs"][row].as_py()), expected)


def test_kept_tokens_come_with_every_teacher_score_also_of_traces_that_the_teacher_wrote(prompts, run, tokenizer):
    run = resolve(run, ["rollout.teacher_share=0.5", "score.keep_topk=3"])
    engine = Odd(run.model, score=run.score)
    rollout = rolled_out(prompts, run, tokenizer, engine)
    scored = stages.score.score(prompts, rollout, run, engine, POLICY)
    check_table(STAGES["score"], scored)
    assert engine.calls[2:] == [("score", Policy(0), 8), ("score", POLICY, 4)]
    assert {c.name for c in STAGES["score"].writes} - {"base_logprobs", *stages.teachers.COLUMNS} == set(scored.column_names[3:])
    for row in range(8):
        tokens = np.array(rollout["response_tokens"][row].as_py())
        logprobs = np.array(scored["teacher_logprobs"][row].as_py(), np.float32)
        ids, values = most_likely(tokens, logprobs, 3, 57)
        assert scored["teacher_topk_tokens"][row].as_py() == ids.tolist()
        assert scored["teacher_topk_logprobs"][row].as_py() == values.tolist()
    assert scored["teacher_topk_tokens"][8].as_py() is None  # a rejected row
    with pytest.raises(EngineError, match=r"score\.keep_topk: the engine gave none of the 3 most likely tokens"):
        stages.score.score(prompts, rollout, run, Odd(run.model), POLICY)


def test_without_the_setting_a_shard_has_no_such_columns(prompts, run, tokenizer):
    scored = stages.score.score(prompts, rolled_out(prompts, run, tokenizer), run, Odd(run.model), POLICY)
    assert not {"teacher_topk_tokens", "teacher_topk_logprobs"} & set(scored.column_names)


def test_a_rescored_sample_measures_the_gap(prompts, run, tokenizer):
    run = resolve(run, ["score.rescore_share=1"])

    def shifted(answer):
        return Score(answer.tokens, answer.logprobs - np.float32(0.25), answer.entropy, 0.0)

    rollout = rolled_out(prompts, run, tokenizer)
    clean = stages.score.score(prompts, rollout, run, Odd(run.model), POLICY)
    assert set(clean["student_logprob_gap"].to_pylist()[:8]) == {0.0}
    odd = stages.score.score(prompts, rollout, run, Odd(run.model, spoil_score={2: shifted}), POLICY)
    assert odd["student_logprob_gap"][2].as_py() == pytest.approx(0.25, abs=1e-5)
    assert odd["student_logprobs"].equals(clean["student_logprobs"])


def spoiled(**changes):
    def spoil(answer):
        values = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
        return type(answer)(**values | {name: change(values[name]) for name, change in changes.items()})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: Failure("the engine died 3 times"), "engine_error"),
        (spoiled(logprobs=lambda v: np.where(np.arange(len(v)) == 0, np.nan, v).astype(np.float32)), "non_finite"),
        (spoiled(entropy=lambda v: np.full_like(v, np.inf)), "non_finite"),
        (spoiled(logprobs=lambda v: np.where(np.arange(len(v)) == 0, 0.1, v).astype(np.float32)), "impossible"),
        (spoiled(logprobs=lambda v: v + 50), "impossible"),
        (spoiled(entropy=lambda v: np.full_like(v, -5)), "impossible"),
        (spoiled(entropy=lambda v: np.full_like(v, 100)), "impossible"),
        (spoiled(tokens=lambda v: v + 1000), "impossible"),
        (spoiled(logprobs=lambda v: v[:-1]), "impossible"),
        (spoiled(tokens=lambda v: v[:0], logprobs=lambda v: v[:0], entropy=lambda v: v[:0]), "empty_response"),
    ],
)
def test_a_spoiled_generation_is_a_typed_row_and_its_neighbours_go_on(prompts, run, tokenizer, spoil, reason):
    table = rolled_out(prompts, run, tokenizer, Odd(run.model, spoil_generate={5: spoil}))
    check_table(STAGES["rollout"], table)
    assert count_rejected(table)[reason] == 1
    assert table["reject_reason"][5].as_py() == reason
    scored = stages.score.score(prompts, table, run, Odd(run.model), POLICY)
    assert scored["reject_reason"].equals(table["reject_reason"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: Failure("gone"), "engine_error"),
        (spoiled(logprobs=lambda v: np.full_like(v, -np.inf)), "non_finite"),
        (spoiled(logprobs=lambda v: v + 50), "impossible"),
        (spoiled(entropy=lambda v: np.full_like(v, 100)), "impossible"),
        (spoiled(tokens=lambda v: v + 1), "response_mismatch"),
        (spoiled(tokens=lambda v: v[:-1]), "response_mismatch"),
    ],
)
def test_a_spoiled_score_is_a_typed_row(prompts, run, tokenizer, spoil, reason):
    rollout = rolled_out(prompts, run, tokenizer)
    scored = stages.score.score(prompts, rollout, run, Odd(run.model, spoil_score={1: spoil}), POLICY)
    check_table(STAGES["score"], scored)
    assert scored["reject_reason"][1].as_py() == reason
    assert scored["reject_reason"][0].as_py() is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoiled(topk_logprobs=lambda v: v[:, ::-1]), "top-k: log-probs do not descend"),
        (spoiled(topk_logprobs=lambda v: v * 0), "top-k: probabilities of one position add up to 3"),
        (spoiled(topk_logprobs=lambda v: v - np.inf), "score: top-k log-prob"),
        (spoiled(topk_tokens=lambda v: v * 0), "top-k: names a token twice at one position"),
        (spoiled(topk_tokens=lambda v: v + 57), "top-k: ids "),
        (spoiled(topk_tokens=lambda v: v[:-1]), "of 2 tokens"),
        (spoiled(topk_logprobs=lambda v: v - 1), "top-k: a token's log-prob is 1 nat off that of the kept tokens"),
        (spoiled(topk_tokens=lambda v: (v + 9) % 57), "top-k: a token's log-prob is "),
    ],
)
def test_kept_tokens_that_cannot_be_are_a_typed_row(prompts, run, tokenizer, spoil, said):
    run = resolve(run, ["score.keep_topk=3"])
    rollout = rolled_out(prompts, run, tokenizer)
    row = next(row for row in range(8) if len(rollout["response_tokens"][row].as_py()) == 2 or "of 2" not in said)
    scored = stages.score.score(prompts, rollout, run, Odd(run.model, spoil_score={row: spoil}, score=run.score), POLICY)
    check_table(STAGES["score"], scored)
    assert count_rejected(scored) == count_rejected(rollout) | {"non_finite" if said[-8:] == "log-prob" else "impossible": 1}
    assert said in scored["reject_detail"][row].as_py()


def test_an_engine_whose_numbers_are_mostly_impossible_ends_the_stage(prompts, run, tokenizer):
    broken = spoiled(entropy=lambda v: np.full_like(v, 100))
    few = rolled_out(prompts, run, tokenizer, Odd(run.model, spoil_generate=dict.fromkeys(range(4), broken)))
    assert count_rejected(few)["impossible"] == 4
    with pytest.raises(EngineError, match=r"broke the contract on its numbers in 5 of 8 answers, such as rollout: entropy 100"):
        rolled_out(prompts, run, tokenizer, Odd(run.model, spoil_generate=dict.fromkeys(range(5), broken)))
    rollout = rolled_out(prompts, run, tokenizer)
    with pytest.raises(EngineError, match=r"in 8 of 8 answers, such as score: entropy 100"):
        stages.score.score(prompts, rollout, run, Odd(run.model, spoil_score=dict.fromkeys(range(8), broken)), POLICY)


def test_another_policy_that_answers_ends_the_stage(prompts, run):
    engine = Odd(run.model, spoil_generate={0: spoiled(policy_version=lambda v: v - 1)})
    with pytest.raises(EngineError, match="policy 2 answered a request for policy 3"):
        stages.rollout.rollout(prompts, run, engine, POLICY, PLACE)


@pytest.fixture
def graded(prompts, run, tokenizer):
    rollout = rolled_out(prompts, run, tokenizer)
    texts = ["7+4=11#17", "#16", "no answer", "7#17"] * 2 + [None] * 8
    finish = ["stop", "stop", "stop", "length"] * 2 + [None] * 8
    for name, column in (("response_text", texts), ("finish_reason", finish)):
        rollout = rollout.set_column(rollout.schema.get_field_index(name), name, pa.array(column, pa.string()))
    return rollout, stages.grade.grade(prompts, rollout, run, Grader("exact", ANSWER_PATTERN), None)


def test_grades_are_verdicts_with_length_shaped_rewards_and_group_advantages(graded, run):
    rollout, grade = graded
    check_table(STAGES["grade"], grade)
    assert grade["verdict"].to_pylist()[:5] == ["correct", "wrong", "unparsable", "truncated", "wrong"]
    length = len(rollout["response_tokens"][0].as_py())
    reward = 1 + 0.5 * (1 - length / run.rollout.max_new_tokens)
    assert grade["reward"].to_pylist()[:4] == pytest.approx([reward, 0, 0, 0])
    spread = np.std([reward, 0, 0, 0]) + 1e-4
    assert grade["advantage"].to_pylist()[:4] == pytest.approx(
        [(reward - reward / 4) / spread] + [-reward / 4 / spread] * 3, rel=1e-5
    )
    assert grade["advantage"].to_pylist()[4:8] == [0.0] * 4
    assert grade["advantage"].null_count == 8


def test_the_running_baseline_is_that_of_earlier_rounds(graded, prompts, run):
    rollout, _ = graded
    state = RunningBaseline(count=100, mean=0.5, m2=25.0, steps=20)
    grade = stages.grade.grade(prompts, rollout, run, Grader("exact", ANSWER_PATTERN), state)
    assert grade["advantage"].to_pylist()[1] == pytest.approx((0 - 0.5) / 0.5)


def labelled(graded, prompts, run, **label):
    rollout, grade = graded
    run = resolve(run, [f"label.{k}={v}" for k, v in label.items()])
    score = stages.score.score(prompts, rollout, run, Odd(run.model), POLICY)
    peak = stages.score.entropy_max(score)
    profile = stages.profile.profile(score, run, peak, 57)
    check_table(STAGES["profile"], profile)
    table = stages.label.label(grade, score, profile, run, peak, 57)
    check_table(STAGES["label"], table)
    return score, profile, table


def test_labels_have_a_regime_a_gate_and_a_weight_per_token(graded, prompts, run):
    score, profile, table = labelled(graded, prompts, run)
    assert count_rejected(table) == {"missing_problem": 4, "prompt_too_long": 4}
    entropy, lookahead = (np.array(t[c][1].as_py()) for t, c in ((score, "teacher_entropy"), (profile, "lookahead_entropy")))
    expected = [entropy[t : t + run.profile.window + 1].min() for t in range(len(entropy))]
    np.testing.assert_array_equal(lookahead, expected)
    peak = max(stages.score.entropy_max(score), 1.0)
    np.testing.assert_allclose(table["gate"][1].as_py(), np.clip(1 - 0.3 * lookahead / peak, 0.1, 1), rtol=1e-6)
    spans = table["spans"][1].as_py()
    assert [s["start"] for s in spans[1:]] == [s["end"] for s in spans[:-1]]
    assert (spans[0]["start"], spans[-1]["end"]) == (0, len(entropy))
    for span in spans:
        assert set(table["regime"][1].as_py()[span["start"] : span["end"]]) == {span["regime"]}
        assert span["peak_entropy"] == pytest.approx(entropy[span["start"] : span["end"]].max())


def test_gamma_zero_gates_nothing(graded, prompts, run):
    _, _, table = labelled(graded, prompts, run, gamma=0)
    assert set(table["gate"].combine_chunks().flatten().to_pylist()) == {1.0}


def test_a_row_that_only_the_grader_rejected_has_no_label(graded, prompts, run):
    rollout, grade = graded
    reasons = ["verifier_timeout", *grade["reject_reason"].to_pylist()[1:]]
    grade = grade.set_column(grade.schema.get_field_index("reject_reason"), "reject_reason", pa.array(reasons, pa.string()))
    _, _, table = labelled((rollout, grade), prompts, run)
    assert table["reject_reason"][0].as_py() == "verifier_timeout"
    assert table["gate"][0].as_py() is None
    assert table["gate"][1].as_py() is not None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.lists(st.floats(-10, 0, width=32), max_size=6), max_size=8))
def test_ragged_columns_survive_the_way_through_numpy(values):
    array = stages.tables._column([None if v is None else np.array(v, np.float32) for v in values], pa.list_(pa.float32()))
    assert array.to_pylist() == values
    flat, offsets = stages.tables.ragged(pa.chunked_array([array]))
    assert [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [v or [] for v in values]


def test_optional_columns_are_absent_where_no_row_has_a_value(prompts, run, tokenizer):
    assert not {"messages", "extra", "imported"} & set(prompts.column_names)
    one = stages.prompts.prompts([Problem(0, "1+1", "s", "2", extra='{"a": 1}'), PROBLEMS[1]], run, tokenizer)
    check_table(STAGES["prompts"], one)
    assert one["extra"].to_pylist() == ['{"a": 1}', None]
    assert {"messages", "imported"}.isdisjoint(one.column_names)
