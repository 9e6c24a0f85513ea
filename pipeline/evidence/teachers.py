"""Whether a teacher answers, and whether it is better than the student that it will teach, before the run pays for more.

A teacher on engines of its own, or at a server, first scores a few prompts. Then teacher and base answer a few problems. These
answers are graded like any trace and stored in `evidence/teachers.json`. They train nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import JsonValue

from pipeline.config import Run, Teacher
from pipeline.contract import Engines, Failure, Generate, Policy, Sampling, Score, Verdict
from pipeline.contract import Sequence as Asked
from pipeline.digest import digest
from pipeline.errors import EngineError
from pipeline.grader.verifier import grader_of
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems.sources import ProblemSet, epoch_indices
from pipeline.rounds.round import Round
from pipeline.rounds.seats import seats_of
from pipeline.stages.prompts import prompts
from pipeline.stages.rollout import WRITERS
from pipeline.stages.teachers import PROBLEM, prompts_before, refuse_degenerate
from pipeline.store.directory import Store
from pipeline.store.documents import Document

FILE = "evidence/teachers.json"
_LOOKED_AT = 8  # problems per sampled one, among which those of a teacher are looked for
_PROBED = 8  # problems whose prompts a teacher scores first
_PROBED_IDS = 65  # most ids of such a prompt


class Sampled(Document):
    """evidence/teachers.json: what decided the answers as a hash, and per teacher the answers with their verdicts."""

    made_of: str
    teachers: dict[str, list[dict[str, JsonValue]]]


def probe_teachers(run: Run, source: ProblemSet, engines: Mapping[str, Engines]) -> None:
    """Have each teacher with engines or a server of its own score a few prompts of the source.

    Raises EngineError for a teacher that scores none of them, or that gives the same number to every token. A pool that cannot
    start raises its own error here too. Without this a broken teacher would be found after an evaluation and a whole rollout.
    """
    own = {name: engines[f"teachers.{name}"] for name in run.teachers if f"teachers.{name}" in engines}
    indices = epoch_indices(len(source), run.seed, 0, min(len(source), _PROBED)).tolist()
    made = prompts(source.rows(indices), run, tokenizer_of(run.model))["prompt_tokens"].to_pylist() if own else []
    asked = [Asked(ids[:1], ids[1:_PROBED_IDS]) for ids in made if ids is not None and len(ids) > 1]
    for name, pool in own.items():
        answers = pool.score(asked, Policy(0)) if asked else []
        failed = [answer.cause for answer in answers if isinstance(answer, Failure)]
        if failed and len(failed) == len(answers):
            what = f"it scores none of {len(failed)} prompts: {failed[0]}"
            raise EngineError(what, f"teachers.{name}", "Check its model, its window (max_model_len), its server and its log")
        refuse_degenerate(name, [answer for answer in answers if isinstance(answer, Score)], pool.facts())


def sample_teachers(store: Store, run: Run, source: ProblemSet, engines: Mapping[str, Engines]) -> list[str]:
    """A sentence for each teacher that can answer: how many problems it and the base solve. Stored answers are not made again.

    A teacher that sees a sibling or a verdict has nothing to see before the first trace, so it is left out. A run whose verdicts
    are decided by a reward has no sample, because the verifier does not know them.
    """
    asked = {name: teacher for name, teacher in run.teachers.items() if teacher.sample and teacher.before_grading}
    if not asked or run.grade.verdict_reward is not None:
        return []
    decides = ("seed", "model", "prompts", "rollout", "grade", "source", *WRITERS)
    made_of = digest([run.digest(decides), source.fingerprint, {name: teacher.sample for name, teacher in asked.items()}])
    found = store.read_document(FILE, Sampled)
    if found is None or found.made_of != made_of or any(map(_failed, itertools.chain(*found.teachers.values()))):
        found = Sampled(made_of=made_of, teachers=_answered(store, run, source, engines, asked))
        store.write_json(FILE, found.model_dump())
    return [sentence(name, rows) for name, rows in found.teachers.items()]


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether an engine gave no answer, so that it is asked again. Before 2026-11-30 this stood as an empty truncated one."""
    empty = [row[f"{who}_text"] == "" and row[f"{who}_verdict"] == Verdict.TRUNCATED for who in ("teacher", "base")]
    return any(empty) or "teacher_cause" in row or "base_cause" in row


def sentence(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a sample says of a teacher, with a warning when it is no better than the base. What has no verdict is counted."""
    if not rows:
        return f"warning: teacher {name}: none of the first problems could be asked, so nothing is known of it."
    answered = [row for row in rows if None not in (row["teacher_verdict"], row["base_verdict"])]
    right = [sum(row[f"{who}_verdict"] == Verdict.CORRECT for row in answered) for who in ("teacher", "base")]
    said = f"teacher {name}: solves {right[0]} of {len(answered)} sampled problems, the base {right[1]}"
    if left := len(rows) - len(answered):
        why = next((cause for row in rows for who in ("teacher", "base") if (cause := row.get(f"{who}_cause"))), "no verdict")
        said = f"{said}; {left} got no answer or no verdict ({why})"
        if not answered:
            return f"warning: {said}: nothing is known of it."
    if right[0] > right[1]:
        return f"{said}."
    return f"warning: {said}: it is no better than its student, which may learn nothing from it. {FILE} has the answers."


def _answered(
    store: Store, run: Run, source: ProblemSet, engines: Mapping[str, Engines], asked: Mapping[str, Teacher]
) -> dict[str, list[dict[str, JsonValue]]]:
    """The answers of every teacher and of the base to its first problems."""
    most = max(teacher.sample for teacher in asked.values())
    indices = epoch_indices(len(source), run.seed, 0, min(len(source), _LOOKED_AT * most)).tolist()
    table = prompts(source.rows(indices), run, tokenizer_of(run.model))
    taught = prompts_before(run, table)
    work = Round(store, run, "rounds", 0, 0, {}, None, dict(engines))
    answers: dict[str, list[dict[str, JsonValue]]] = {}
    for name, teacher in asked.items():
        places = [place for place, own in enumerate(taught) if own is not None and own[0] == name][: teacher.sample]
        seat = seats_of(work)[name].engines  # before the first round every policy of the student is the base
        rows = table.take(pa.array(places, pa.int64())).to_pylist()
        own_prompts = [own[1] for place in places if (own := taught[place]) is not None]
        by_teacher = _written(run, rows, own_prompts, seat)
        by_base = _written(run, rows, [row["prompt_tokens"] for row in rows], engines["rollout"])
        kept = [{key: row[key] for key in ("prompt_id", *PROBLEM[:3])} for row in rows]
        answers[name] = [
            row | {f"teacher_{key}": value for key, value in mine.items()} | {f"base_{key}": value for key, value in base.items()}
            for row, mine, base in zip(kept, by_teacher, by_base, strict=True)
        ]
    return answers


def _written(run: Run, rows: Sequence[Mapping[str, Any]], asked: list[list[int]], engines: Engines) -> list[dict[str, JsonValue]]:
    """Text and verdict of one answer of the base policy for each prompt of `asked`; where it failed no verdict, and why."""
    chosen = run.rollout
    sampling = Sampling(chosen.temperature, chosen.top_p, chosen.top_k, chosen.max_new_tokens)
    seeds = [int(digest(f"sample/{run.seed}/{row['prompt_id']}"), 16) & 0x7FFFFFFF for row in rows]
    traces = engines.generate([Generate(ids, seed) for ids, seed in zip(asked, seeds, strict=True)], Policy(0), sampling)
    whole = [None if isinstance(trace, Failure) else trace for trace in traces]
    tokenizer, grader = tokenizer_of(run.model), grader_of(run)
    texts = ["" if t is None else str(tokenizer.decode(t.tokens.tolist(), skip_special_tokens=True)) for t in whole]
    ends = ["length" if t is None else t.finish_reason for t in whole]
    verdicts = grader.grade(texts, [row["answer"] for row in rows], ends)
    grader.close()
    told: list[dict[str, JsonValue]] = []
    for trace, text, graded in zip(traces, texts, verdicts, strict=True):
        if isinstance(trace, Failure):
            told.append({"text": text, "verdict": None, "cause": trace.cause})
        else:
            told.append({"text": text, "verdict": graded.verdict})
    return told
