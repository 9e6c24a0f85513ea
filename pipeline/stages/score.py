"""Stage `score`: the frozen teacher, with the reference in view, scores the same ids that the student wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import (
    ENGINE_SETTINGS,
    TOPK,
    EngineFacts,
    Engines,
    Failure,
    Policy,
    Reject,
    Score,
    Sequence,
    ShardInputs,
    ShardResult,
    Stage,
)
from pipeline.errors import EngineError
from pipeline.stages.signals import broken, refuse_many
from pipeline.stages.tables import Draft, ragged, views


def score(prompts: pa.Table, rollout: pa.Table, run: Run, engines: Engines, policy: Policy) -> pa.Table:
    """Student and teacher log-probs and the teacher's entropy of every response token, all from the same kind of engine.

    Generation already measured the writer's log-probs, so they are not measured again. Only a sample of the student's traces
    (`score.rescore_share`) is scored again, and the gap is stored. Imported traces are scored by both. With `score.keep_topk` the
    teacher scores its own traces too: generation does not know the setting. All that a row says of the teacher then comes from
    that one forward pass.
    """
    kept = TOPK if run.score.keep_topk else ()
    base = ("base_logprobs",) if run.score.base_logprobs else ()
    draft = Draft.after(STAGE, rollout)
    facts = engines.facts()
    indices, sources = rollout["prompt_index"].to_pylist(), rollout["trace_source"].to_pylist()
    ids = {name: views(prompts[name]) for name in ("prompt_tokens", "teacher_prompt_tokens")}
    responses, logprobs, entropies = (views(rollout[n]) for n in ("response_tokens", "rollout_logprobs", "rollout_entropy"))
    by_student = [row for row in draft.live() if sources[row] == "student"]
    by_teacher = [row for row in draft.live() if sources[row] == "teacher"]
    imports = [row for row in draft.live() if sources[row] == "import"]  # nobody measured them yet
    again = [row for row in by_student if int(draft.keys[row], 16) % 10_000 < run.score.rescore_share * 10_000]
    for row in draft.live():
        draft.values[row] = {"entropy_method": facts.entropy_method, "entropy_error": 0.0}
    for row in by_student:
        draft.values[row] |= {"student_logprobs": logprobs[row], "student_logprob_source": "rollout"}
    for row in by_teacher:
        draft.values[row] |= {"teacher_logprobs": logprobs[row], "teacher_entropy": entropies[row]}
        draft.values[row]["entropy_error"] = rollout["rollout_entropy_error"][row].as_py()

    def ask(rows: list[int], prompt: str, who: Policy) -> list[tuple[int, Score]]:
        """The usable scores of these rows, as (row, score), under one prompt column and policy. Other rows are rejected."""
        sequences = [Sequence(ids[prompt][indices[row]].tolist(), responses[row].tolist()) for row in rows]
        answers = engines.score(sequences, who) if rows else []
        pairs = zip(rows, answers, strict=True)
        scored = [(row, _usable(draft, row, answer, responses[row], facts.vocab_size)) for row, answer in pairs]
        refuse_many(draft, rows, "stage score")
        return [(row, answer) for row, answer in scored if answer is not None]

    by_others = sorted(by_student + imports + (by_teacher if kept else []))
    for row, scored in ask(by_others, "teacher_prompt_tokens", Policy(0)):
        draft.values[row] |= {"teacher_logprobs": scored.logprobs, "teacher_entropy": scored.entropy}
        draft.values[row]["entropy_error"] = scored.entropy_error
        if kept:
            draft.values[row] |= dict(zip(kept, _topk(scored, run.score.keep_topk), strict=True))
    for row, scored in ask([*by_teacher, *(row for row in imports if draft.reasons[row] is None)], "prompt_tokens", policy):
        draft.values[row] |= {"student_logprobs": scored.logprobs, "student_logprob_source": "score"}
    for row, scored in ask(again, "prompt_tokens", policy):
        draft.values[row]["student_logprob_gap"] = float(np.abs(scored.logprobs - logprobs[row]).max())
    if base:
        known = set(by_student if policy.version == 0 else ())  # the base itself wrote these
        for row in known:
            draft.values[row]["base_logprobs"] = logprobs[row]
        for row, scored in ask([row for row in draft.live() if row not in known], "prompt_tokens", Policy(0)):
            draft.values[row]["base_logprobs"] = scored.logprobs
    return draft.table((*kept, *base))


def _usable(draft: Draft, row: int, answer: Score | Failure, response: np.ndarray, vocab_size: int) -> Score | None:
    """The score, or None after its row was rejected. The engine must have scored exactly the ids of the response."""
    if isinstance(answer, Failure):
        draft.reject(row, Reject.ENGINE_ERROR, answer.cause)
    elif not np.array_equal(answer.tokens, response):
        draft.reject(row, Reject.RESPONSE_MISMATCH, f"scored {len(answer.tokens)} ids that are not the {len(response)} sampled")
    elif (found := broken(answer, vocab_size)) is not None:
        draft.reject(row, found[0], f"score: {found[1]}")
    else:
        return answer
    return None


def _topk(scored: Score, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens of a score and their log-probs, [T, keep]. Raises EngineError when the engine gave others."""
    ids, logprobs = scored.topk_tokens, scored.topk_logprobs
    if ids is None or logprobs is None or ids.shape[1] != keep:
        given = "none" if ids is None else f"{ids.shape[1]}"
        what = f"the engine gave {given} of the {keep} most likely tokens of a position"
        raise EngineError(what, "score.keep_topk", "Lower it, or let another engine score")
    return ids, logprobs


def entropy_max(score: pa.Table) -> float:
    """Largest teacher entropy, in nats, over the rows of a shard that go on. 0 when there are none."""
    flat, _ = ragged(score.filter(pc.is_null(score["reject_reason"]))["teacher_entropy"])
    return float(flat.max()) if flat.size else 0.0


def bounds_instead(cause: str) -> str:
    """The sentences that tell of bounds where exact entropies were asked for, because of `cause`."""
    return (
        f"entropies are bounds and not exact ({cause}). Gates and weights are computed from the middle of the bounds. "
        "score.fallback=false ends such a run before it pays."
    )


def check_facts(wrote: Mapping[str, Any], facts: EngineFacts, where: str) -> None:
    """Raise EngineError, with the facts that differ, when the scoring engine is not like the one that wrote the traces.

    The loss compares student and teacher log-probs, so both need the same numerics. `wrote` has the facts of the rollout shard;
    those of imported traces, which no engine wrote, name no engine.
    """
    if wrote.get("trace_source") == "import":
        return
    scores = asdict(facts)
    names = ("engine", "dtype", "logprobs_mode", "entropy_method", "vocab_size")
    if changed := [name for name in names if wrote[name] != scores[name]]:
        named = ", ".join(f"{name} was {wrote[name]}, now {scores[name]}" for name in changed)
        raise EngineError(f"the engine that scores is not like the one that wrote the traces: {named}", where, "Roll out again")


def _compute(shard: ShardInputs) -> ShardResult:
    engines, policy = shard.on_engines()
    check_facts(shard.facts["rollout"], engines.facts(), f"{shard.place.where}, shard {shard.name}")
    table = score(shard.tables["prompts"], shard.tables["rollout"], shard.run, engines, policy)
    return ShardResult(table, {"entropy_max": entropy_max(table), **asdict(engines.facts())})


STAGE = Stage(
    "score",
    "engines",
    "trace_id",
    reads=(
        "prompt_tokens",
        "teacher_prompt_tokens",
        "prompt_index",
        "response_tokens",
        "rollout_logprobs",
        "rollout_entropy",
        "rollout_entropy_error",
        "trace_source",
    ),
    settings=(*ENGINE_SETTINGS, "score"),
    compute=_compute,
    round_inputs=lambda _: ("policy",),
)
