"""The small graded sample that says whether a teacher is better than its student, and gates that refuse wide bounds."""

import contextlib
import json

import numpy as np
import pytest
from in_process import Refusing, brought, planned

from actors.fakes import FakeEngine
from pipeline.contract import Failure, Generation, Score
from pipeline.errors import EngineError, UserError
from pipeline.evidence.teachers import FILE, probe_teachers, sample_teachers, sentence
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.refused import refuse_wide_bounds
from pipeline.rounds.round import with_engines


class Solver(FakeEngine):
    """An engine that answers `#6` to every problem."""

    def generate(self, requests, policy, sampling):
        ids = [*tokenizer_of(self._model)("#6")["input_ids"], 2]
        numbers = np.full(len(ids), 0.1, np.float32)
        return [Generation(np.array(ids, np.int32), -numbers, numbers, 0.0, "stop", policy.version) for _ in requests]


def test_a_teacher_is_compared_with_the_base_once_and_the_answers_are_stored(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(json.dumps({"problem": f"{i}+1", "solution": "x", "answer": "6" if i % 2 else "7"}) for i in range(8))
    )
    work = planned(tmp_path / "run", f"source.uri={path}", "teachers.big.prompt=plain", "teachers.big.dtype=bfloat16")
    run, source = resolve(work.run, ["teachers.big.sample=4"]), open_source(work.run.source)
    fakes = [kind(run.model, run.engines.rollout, run.score) for kind in (FakeEngine, Solver)]
    pools = {"rollout": fakes[0], "score": fakes[0], "teachers.big": fakes[1]}
    said = sample_teachers(work.store, run, source, pools)
    stored = json.loads(work.store.read_bytes(FILE))["teachers"]["big"]
    right = sum(row["answer"] == "6" for row in stored)
    assert [row["teacher_verdict"] for row in stored] == ["correct" if row["answer"] == "6" else "wrong" for row in stored]
    assert len(stored) == 4
    assert said == [sentence("big", stored)]
    assert right
    assert said[0].startswith(f"teacher big: solves {right} of 4 sampled problems, the base 0")
    assert sample_teachers(work.store, run, source, {}) == said  # no engine is asked again
    alike = sample_teachers(work.store, resolve(run, ["seed=1"]), source, pools | {"teachers.big": fakes[0]})
    assert alike[0].startswith("warning: teacher big: solves 0 of 4 sampled problems, the base 0: it is no better")


class Silent(FakeEngine):
    """An engine whose server answers every second request."""

    def generate(self, requests, policy, sampling):
        answers = super().generate(requests, policy, sampling)
        return [answer if place % 2 else Failure("the server is busy") for place, answer in enumerate(answers)]


def test_a_teacher_whose_engine_failed_has_not_answered_wrongly(tmp_path):
    """Its failures were graded as truncated answers, and kept: a teacher that timed out was called no better than its student."""
    work = planned(tmp_path / "run", "teachers.big.prompt=plain", "teachers.big.dtype=bfloat16")
    run, source = resolve(work.run, ["teachers.big.sample=4"]), open_source(work.run.source)
    fakes = [kind(run.model, run.engines.rollout, run.score) for kind in (FakeEngine, Silent)]
    [said] = sample_teachers(work.store, run, source, {"rollout": fakes[0], "score": fakes[0], "teachers.big": fakes[1]})
    stored = json.loads(work.store.read_bytes(FILE))["teachers"]["big"]
    assert [row["teacher_verdict"] is None for row in stored] == [True, False, True, False]
    assert stored[0]["teacher_cause"] == "the server is busy"
    assert "of 2 sampled problems" in said
    assert "; 2 got no answer or no verdict (the server is busy)" in said
    [again] = sample_teachers(work.store, run, source, {"rollout": fakes[0], "score": fakes[0], "teachers.big": fakes[0]})
    assert "of 4 sampled problems" in again  # the server is back
    none = sentence("big", [{"teacher_verdict": None, "base_verdict": "wrong", "teacher_cause": "it is down"}])
    assert none == (
        "warning: teacher big: solves 0 of 0 sampled problems, the base 0; 1 got no answer or no verdict (it is down): "
        "nothing is known of it."
    )


class Flat(FakeEngine):
    """An engine that gives every token the same log-prob."""

    def score(self, sequences, policy):
        return [Score(s.tokens, np.full_like(s.logprobs, -2.5), s.entropy, 0.0) for s in super().score(sequences, policy)]


class Deaf(FakeEngine):
    """An engine that can score nothing."""

    def score(self, sequences, policy):
        return [Failure("no room") for _ in sequences]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Flat, r"teachers\.big: its log-prob is constant: -2\.5 nat on each of \d+ tokens"),
        (Deaf, r"teachers\.big: it scores none of 8 prompts: no room\. Check its model"),
        (FakeEngine, None),
    ],
)
def test_a_teacher_scores_a_few_prompts_before_anything_is_asked_of_it(kind, said):
    run = resolve(demo(), ["teachers.big.prompt=sibling", "teachers.big.dtype=bfloat16"])
    student, own = (engine(run.model, run.engines.rollout, run.score) for engine in (Refusing, kind))
    with contextlib.nullcontext() if said is None else pytest.raises(EngineError, match=said):
        probe_teachers(run, open_source(run.source), {"rollout": student, "score": student, "teachers.big": own})
    alone = resolve(demo(), ["teachers.big.prompt=plain"])  # on the student's engines, which need no probe
    probe_teachers(alone, open_source(alone.source), {"rollout": student, "score": student})


class Wide(FakeEngine):
    def score(self, sequences, policy):
        return [Score(s.tokens, s.logprobs, s.entropy, 0.8) for s in super().score(sequences, policy)]


def test_a_gate_refuses_bounds_that_are_too_wide_and_another_objective_does_not(tmp_path):
    served = ["teachers.big={model: tiny-reasoner, server: 'http://127.0.0.1:9', prompt: plain}", "teachers.big.gap_share=0"]
    work = planned(tmp_path, *served)
    brought(with_engines(work, work.engines | {"teachers.big": Wide(work.run.model, work.run.engines.rollout, work.run.score)}))
    with pytest.raises(UserError, match=r"8 of 8 traces have a token .* \+-0\.8 nat, and the gate may read \+-0\.5"):
        refuse_wide_bounds(work)
    for sets in (["objective.name=grpo"], ["teachers.big.max_half_width=1"]):
        refuse_wide_bounds(type(work)(**{**vars(work), "run": resolve(work.run, sets)}))
