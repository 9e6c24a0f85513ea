"""Teachers that a run names: what they see, who scores which trace, what makes their scores stale, and what is refused."""

import contextlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from committed import round_table
from hypothesis import given
from hypothesis import strategies as st
from in_process import Refusing, bring_up_to_date, brought, planned, stale

from actors.fakes import Behaviour, FakeEngine, token_evidence
from pipeline.config import Teacher
from pipeline.contract import COLUMNS, EngineFacts, Score
from pipeline.errors import EngineError, SourceError
from pipeline.grader.code import codes_of
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.refused import refuse_unknown_teachers
from pipeline.rounds.round import with_engines
from pipeline.rounds.rows import joined_round
from pipeline.stages import MEASURE, STAGES, chain_of
from pipeline.stages.prompts import prompts
from pipeline.stages.score import AGREE, check_facts
from pipeline.stages.teachers import contexts, feedback, refuse_degenerate, siblings

FACTS = EngineFacts("exact", "raw_logprobs", "float32", "fake", 128, 57)
BIG = ("teachers.big.model=tiny-reasoner", "teachers.big.dtype=bfloat16", "teachers.big.prompt=plain", "teachers.big.gap_share=1")


class Own(FakeEngine):
    """The engine of a teacher of its own: its log-probs are those of policy version 5."""

    def facts(self):
        return EngineFacts("bounds", "raw_logprobs", "bfloat16", "another engine", 128, 60)

    def score(self, sequences, policy):
        found = super().score(sequences, policy)
        versions = [token_evidence(s.tokens, 5, 1, 57) for s in found]
        return [Score(s.tokens, logprobs, entropy, 0.25) for s, (logprobs, entropy) in zip(found, versions, strict=True)]


def taught(tmp_path, *sets, own=Own):
    """A planned round with the fake engines of a student and of a teacher `big`."""
    work = planned(tmp_path, *sets)
    return with_engines(work, work.engines | {"teachers.big": own(work.run.model, work.run.engines.rollout, work.run.score)})


def test_another_model_scores_every_trace_with_its_own_prompt_and_its_numbers_are_told_apart(tmp_path):
    work = taught(tmp_path, *BIG)
    brought(work)
    rows = joined_round(work)
    assert set(rows["teacher_name"].to_pylist()) == {"big"}
    assert set(rows["entropy_method"].to_pylist()) == {"bounds"}
    assert set(rows["entropy_error"].to_pylist()) == {0.25}
    assert rows["teacher_context_tokens"].to_pylist() == rows["prompt_tokens"].to_pylist()  # the same model, and no reference
    for row in rows.to_pylist():
        expected = token_evidence(np.array(row["response_tokens"]), 5, 1, 57)[0]
        assert np.allclose(row["teacher_logprobs"], expected)
        here = token_evidence(np.array(row["response_tokens"]), 0, len(row["prompt_tokens"]), 57)[0]
        assert row["teacher_logprob_gap"] == pytest.approx(np.abs(here - expected).max(), abs=1e-6)
    entry = work.store.entry(work.area, "score", "0000")
    assert entry.facts["vocab_size"] == 57  # the student's, so that all stages agree
    assert entry.facts["teachers"]["big"]["vocab_size"] == 60


class Padded(FakeEngine):
    """A teacher whose head has 60 rows for the 57 tokens of the student. It keeps the last three of them now and then."""

    def __init__(self, *args):
        super().__init__(*args, behaviour=Behaviour(vocab_size=60))

    def score(self, sequences, policy):
        found = super().score(sequences, policy)
        return [Score(s.tokens, s.logprobs, s.entropy * 0, 0.0, s.topk_tokens, s.topk_logprobs) for s in found]


def test_kept_tokens_that_the_student_does_not_have_reject_their_row(tmp_path):
    work = taught(tmp_path, *BIG, "score.keep_topk=3", own=Padded)
    brought(work, "prompts", "rollout", "grade", "score")
    rows = joined_round(work).to_pylist()
    beyond = {row["trace_id"] for row in rows if max(row["response_tokens"]) + 2 > 56}
    assert {row["trace_id"] for row in rows if row["reject_reason"] == "impossible"} == beyond
    assert 0 < len(beyond) < len(rows)
    assert any("and 0 to 56 are possible" in (row["reject_detail"] or "") for row in rows)


def test_student_and_teacher_each_use_their_own_chat_template(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(asset_path(), folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}?{{ m['content'] }}{% endfor %}=")
    work = taught(tmp_path / "run", f"teachers.big.model={folder}", "teachers.big.template={problem}|{answer}")
    brought(work)
    tokenizer = tokenizer_of(work.run.model)
    for row in joined_round(work).to_pylist():
        assert tokenizer.decode(row["prompt_tokens"]) == f"<bos>{row['problem']}\n"
        assert tokenizer.decode(row["teacher_context_tokens"]) == f"<bos>?{row['problem']}|{row['answer']}="
        assert row["teacher_logprob_gap"] is None  # nobody else has these weights


def test_another_teacher_makes_scores_stale_and_no_trace(tmp_path):
    work = taught(tmp_path, *BIG)
    brought(work, "prompts", "rollout", "grade", "score")
    other = resolve(work.run, ["teachers.big.template=Solve {problem}"])
    assert {name for name, _ in stale(with_engines(type(work)(**{**vars(work), "run": other}), {}))} == {"prompts", "score"} | {
        "profile",
        "label",
    }
    refusing = {**work.engines, "rollout": Refusing(None, None, work.run.score)}
    again = with_engines(type(work)(**{**vars(work), "run": other}), refusing)
    assert {name for name, _ in brought(again, "prompts", "rollout", "score")} == {"prompts", "score"}  # no trace was written


@pytest.mark.parametrize("setting", ["prompts.teacher=Known: {solution}. {problem}", "prompts.teacher_thinking=false"])
def test_what_the_prompts_of_all_teachers_say_makes_their_scores_stale(tmp_path, setting):
    """The shard of prompts has no prompt of a named teacher, so it stays as it was. Old scores then counted as fresh."""
    work = taught(tmp_path, "teachers.big.dtype=bfloat16")
    brought(work, "prompts", "rollout", "grade", "score")
    again = with_engines(type(work)(**{**vars(work), "run": resolve(work.run, [setting])}), work.engines)
    brought(again, "prompts")
    assert ("score", "0000") in stale(again)
    assert ("rollout", "0000") not in stale(again)
    assert {name for name, _ in brought(again, "prompts", "rollout", "score")} == {"score"}
    assert [stage.name for stage in STAGES.values() if stage.reads_setting("prompts.teacher")] == ["prompts", "rollout", "score"]


def test_scores_from_before_that_do_not_tell_their_prompts_stay_fresh(tmp_path):
    work = taught(tmp_path, "teachers.big.dtype=bfloat16")
    brought(work, "prompts", "rollout", "grade")
    before = replace(STAGES["score"], round_inputs=lambda _: ("policy", "teacher_policy"))
    for shard in work.shards:
        bring_up_to_date(work, before, shard)
    assert "teacher_prompts" not in work.store.entry(work.area, "score", "0000").inputs
    assert not {key for key in stale(work) if key[0] == "score"}


def test_a_run_without_named_teachers_has_none_of_their_columns(tmp_path):
    work = planned(tmp_path)
    brought(work)
    assert not {name for name in joined_round(work).column_names if COLUMNS.get(name) and COLUMNS[name].optional}


def test_rows_choose_their_teacher_and_a_row_that_names_nobody_is_refused_with_its_name(tmp_path):
    rows = [{"problem": f"{i}+1", "answer": str(i + 1), "who": "ab"[i % 2]} for i in range(4)]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    sets = [f"source.uri={path}", 'source.solution=""', "source.teacher=who", "teachers.a.prompt=plain", "teachers.b.policy=base"]
    work = planned(tmp_path / "run", *sets, "teachers.b.template={problem} gives {answer}")
    brought(work)
    found = joined_round(work).to_pylist()
    assert [row["teacher_name"] for row in found] == [row["problem_teacher"] for row in found]
    assert {row["teacher_name"]: row["teacher_context"] for row in found} == {"a": "plain", "b": "privileged"}
    tokenizer = tokenizer_of(work.run.model)
    told = {tokenizer.decode(row["teacher_context_tokens"], skip_special_tokens=True).strip() for row in found}
    assert told == {"0+1", "2+1", "1+1 gives 2", "3+1 gives 4"}
    assert round_table(work.store, 0) is None
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"who": "bb"}])))
    with pytest.raises(SourceError, match=r"p\.jsonl, row 4: column 'who' names 'bb', which is no teacher\. Did you mean 'b'"):
        refuse_unknown_teachers(open_source(work.run.source), work.run)
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"who": None}])))
    with pytest.raises(SourceError, match=r"row 4: column 'who' is empty\. Teachers of this run: a, b"):
        refuse_unknown_teachers(open_source(work.run.source), work.run)


def test_a_missing_solution_counts_only_where_a_template_reads_it(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(row)
            for row in [
                {"problem": "1+1", "solution": "", "answer": "2"},
                {"problem": "2+2", "solution": "2+2=4#4", "answer": ""},
            ]
        )
    )
    run = resolve(demo(), [f"source.uri={path}"])
    rows = open_source(run.source).rows([0, 1])
    reasons = lambda *sets: prompts(rows, resolve(run, [*sets]), tokenizer_of(run.model))["reject_reason"].to_pylist()  # noqa: E731
    assert reasons() == ["missing_solution", "missing_answer"]
    assert reasons("prompts.teacher={problem}|{answer}") == [None, "missing_answer"]
    assert reasons("teachers.a.prompt=sibling") == [None, "missing_answer"]


def graded(verdicts, group=2, length=4):
    """Tables of a shard with these verdicts. Every group has `group` traces of `length` tokens."""
    keys = [f"trace{i}" for i in range(len(verdicts))]
    places = [i // group for i in range(len(verdicts))]
    problems = {
        "problem": [f"{i}+1" for i in range(places[-1] + 1)],
        "solution": [None] * (places[-1] + 1),
        "answer": ["1"] * (places[-1] + 1),
    }
    texts = [f"{key}" for key in keys]
    return {
        "prompts": pa.table(problems),
        "rollout": pa.table(
            {"trace_id": keys, "prompt_index": places, "response_text": texts, "response_tokens": [[1] * length] * len(keys)}
        ),
        "grade": pa.table(
            {
                "trace_id": keys,
                "reject_reason": pa.array([None if v else "verifier_error" for v in verdicts], pa.string()),
                "verdict": pa.array(verdicts, pa.string()),
                "extracted_answer": pa.array(["7" if v else None for v in verdicts], pa.string()),
            }
        ),
    }


@given(st.lists(st.sampled_from(["correct", "wrong", None]), min_size=4, max_size=4), st.integers(0, 5))
def test_a_sibling_is_another_correct_trace_of_the_group_chosen_by_seed(verdicts, seed):
    run = resolve(
        demo(), ["teachers.a.prompt=sibling", "teachers.a.template={problem}|{solution}", f"seed={seed}", 'source.solution=""']
    )
    tables = graded(verdicts)
    found = contexts(tables, run, range(4))
    assert found == contexts(tables, run, range(4))
    tokenizer = tokenizer_of(run.model)
    for row, (name, context) in found.items():
        other = row ^ 1  # groups of two
        has_one = verdicts[row] is not None and verdicts[other] == "correct"
        assert (name, context.kind, context.sibling) == ("a", *(("sibling", f"trace{other}") if has_one else ("plain", None)))
        assert (f"trace{other}" in tokenizer.decode(context.prompt)) == has_one
    rejecting = resolve(run, ["teachers.a.fallback=reject"])
    assert {row for row, (_, seen) in contexts(tables, rejecting, range(4)).items() if isinstance(seen, str)} == {
        row for row, (_, seen) in found.items() if seen.kind == "plain"
    }


@given(st.sets(st.text("abc", min_size=1), max_size=5), st.integers(0, 9))
def test_no_trace_is_its_own_sibling(keys, seed):
    for key in keys:
        assert sorted(siblings(seed, key, keys)) == sorted(keys - {key})


def test_a_sibling_without_room_gives_way_to_a_shorter_one_and_then_to_the_fallback():
    """Long traces with long siblings were rejected as errors of the engine. Training lost just these."""
    sets = ["teachers.a.prompt=sibling", "teachers.a.template={problem}|{solution}", "model.max_model_len=128"]
    tables = graded(["correct"] * 3, group=3, length=60)
    texts = ["9" * 80, "9" * 80, "trace2"]
    tables["rollout"] = tables["rollout"].set_column(2, "response_text", pa.array(texts))
    run = resolve(demo(), sets)
    found = contexts(tables, run, range(3))
    assert [found[row][1].sibling for row in range(3)] == ["trace2", "trace2", None]
    assert found[2][1].kind == "plain"
    assert all(len(context.prompt) + 60 <= 128 for _, context in found.values())
    _, why = contexts(tables, resolve(run, ["teachers.a.fallback=reject"]), [2])[2]
    assert re.fullmatch(r"\d+ tokens that teacher a sees \+ 60 of the response > its window 128", why)


def test_feedback_is_what_the_verifier_said_of_this_trace():
    run = resolve(demo(), ["teachers.a.prompt=feedback", "teachers.a.template={problem} {feedback}"])
    found = contexts(graded(["correct", "wrong"]), run, [0, 1])
    told = [tokenizer_of(run.model).decode(found[row][1].prompt) for row in (0, 1)]
    assert "he verifier read the answer 7 and found it correct." in told[0]
    assert "which is wrong." in told[1]
    assert "(none)" in feedback({"verdict": "wrong", "extracted_answer": None})


def test_feedback_is_what_the_tests_said_where_they_decide_the_verdict(tmp_path):
    path = tmp_path / "code.jsonl"
    row = {"problem": "1+1", "solution": "2", "answer": "2", "tests": ["assert True"]}
    path.write_text((json.dumps(row) + "\n") * 4)
    rewards = "grade.rewards=[{name: tests, function: python_tests, settings: {locks: available}}]"
    sets = [f"source.uri={path}", rewards, "grade.verdict_reward=tests", "teachers.a.prompt=feedback", "evaluation.problems=0"]
    sets += ["rollout.prompts_per_round=2", "rollout.max_new_tokens=12", "model.max_model_len=512"]
    work = planned(tmp_path / "run", *sets)
    work = replace(work, codes=codes_of(work.run))
    brought(work, *chain_of(work.run, MEASURE))
    rows = joined_round(work)
    for row in rows.to_pylist():
        told = tokenizer_of(work.run.model).decode(row["teacher_context_tokens"])
        assert row["teacher_context"] == "feedback"
        if row["verdict"] == "wrong":
            assert "t was found wrong." in told
            assert "t passed 0 of 1 tests." in told
            assert "verifier" not in told
        else:
            assert "t was cut off" in told or ("t was found correct." in told and "t passed 1 of 1 tests." in told)
    assert "wrong" in rows["verdict"].to_pylist()
    assert set(stale(work).values()) == {"missing"}  # labels, which were not asked for


def test_traces_without_a_context_are_counted_and_a_regrade_makes_the_scores_stale(tmp_path):
    work = planned(tmp_path, "teachers.a.prompt=sibling", "teachers.a.template={problem}|{solution}")
    brought(work)
    entries = work.store.entries(work.area, "score").values()
    rows = joined_round(work)["teacher_context"].to_pylist()
    assert sum(entry.facts.get("fell_back", 0) for entry in entries) == rows.count("plain") > 0
    assert all("grade" in entry.inputs for entry in entries)
    rejecting = planned(tmp_path / "b", "teachers.a={prompt: sibling, template: '{problem}|{solution}', fallback: reject}")
    brought(rejecting)
    assert "no_context" in joined_round(rejecting)["reject_reason"].to_pylist()


def test_a_teacher_that_writes_gets_its_own_prompt(tmp_path):
    work = taught(tmp_path, *BIG, "rollout.teacher_share=0.5", "teachers.big.template=Solve {problem}")
    brought(work)
    rows = joined_round(work).to_pylist()
    assert [row["trace_source"] for row in rows] == ["student", "teacher"] * 4
    for row in rows:
        prompt = row["teacher_context_tokens"] if row["trace_source"] == "teacher" else row["prompt_tokens"]
        assert np.allclose(row["rollout_logprobs"], token_evidence(np.array(row["response_tokens"]), 0, len(prompt), 57)[0])
    other = with_engines(type(work)(**{**vars(work), "run": resolve(work.run, ["teachers.big.template=Do {problem}"])}), {})
    assert stale(other)["rollout", "0000"] == "writers changed"


UNIFORM, CONSTANT = "is uniform: -log V = -4.043 nat on each of 12", "is constant: -0.5 nat"


@pytest.mark.parametrize(("logprob", "said"), [(-np.log(57), UNIFORM), (-0.5, CONSTANT), (-1e-4, None)])
def test_a_uniform_or_constant_teacher_is_found(logprob, said):
    tokens = np.arange(12, dtype=np.int32)
    scores = [Score(tokens, np.full(12, logprob, np.float32), np.zeros(12, np.float32), 0.0)]
    sure = contextlib.nullcontext()
    with sure if said is None else pytest.raises(EngineError, match=rf"teachers\.big: its log-prob {said}"):
        refuse_degenerate("big", scores, FACTS)


def test_a_constant_teacher_ends_the_round_before_it_is_trained_on(tmp_path):
    class Broken(Own):
        def score(self, sequences, policy):
            return [Score(s.tokens, np.full_like(s.logprobs, -3.0), s.entropy, 0.0) for s in super().score(sequences, policy)]

    work = taught(tmp_path, *BIG, own=Broken)
    with pytest.raises(EngineError, match=r"teachers\.big: its log-prob is constant"):
        brought(work)


def test_the_facts_that_must_agree_are_one_table():
    assert set(AGREE) == set(vars(FACTS))
    wrote = vars(FACTS) | {"engine": "vllm 1", "dtype": "bfloat16", "vocab_size": 99, "entropy_method": "bounds"}
    check_facts(wrote, FACTS, "here", "teacher")
    with pytest.raises(EngineError, match=r"engine was vllm 1, now fake, dtype was bfloat16, now float32"):
        check_facts(wrote, FACTS, "here")
    with pytest.raises(EngineError, match="logprobs_mode"):
        check_facts(wrote | {"logprobs_mode": "processed"}, FACTS, "here", "teacher")


def test_a_teacher_on_the_students_model_needs_no_pool():
    run = resolve(demo(), ["teachers.a.prompt=feedback", "source.solution=solution"])
    assert list(run.pools) == ["rollout"]
    assert not run.has_pool(Teacher())
    assert list(resolve(run, ["teachers.a.dtype=bfloat16"]).pools) == ["rollout", "a"]
    assert Behaviour().vocab_size == 57
