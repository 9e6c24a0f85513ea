"""Stage `score`: the frozen teacher, with the reference in view, scores the same ids that the student wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import (
    ENGINE_SETTINGS,
    TEACHER_PROMPTS,
    TOPK,
    EngineFacts,
    Engines,
    Failure,
    Policy,
    Reject,
    Score,
    Seat,
    Sequence,
    ShardInputs,
    ShardResult,
    Stage,
)
from pipeline.errors import EngineError
from pipeline.stages.signals import broken, refuse_many
from pipeline.stages.tables import Draft, ragged, views
from pipeline.stages.teachers import COLUMNS as TEACHER_COLUMNS
from pipeline.stages.teachers import GRADED, PROBLEM, Context, Taught, compared, contexts, refuse_degenerate

# Facts of engines, and of whom each must agree with those of the engines that wrote the traces: of the student's engines, which
# also score the default teacher, or of every teacher's. A teacher of its own may be another engine with another dtype. Its
# vocabulary may be padded to another size: what is beyond the tokenizer's ids has no part in its numbers.
AGREE = {
    "engine": ("student",),
    "dtype": ("student",),
    "logprobs_mode": ("student", "teacher"),
    "entropy_method": ("student",),
    "vocab_size": ("student",),
    "max_model_len": (),
    "scoring": (),
    "fallback": (),
}


def score(
    prompts: pa.Table, rollout: pa.Table, run: Run, engines: Engines, policy: Policy, taught: Taught | None = None
) -> pa.Table:
    """Student and teacher log-probs and the teacher's entropy of every response token.

    Generation already measured the writer's log-probs, so they are not measured again. Only a sample of the student's traces
    (`score.rescore_share`) is scored again, and the gap is stored. Imported traces are scored by both. With `score.keep_topk` the
    teacher scores its own traces too: generation does not know the setting. All that a row says of the teacher then comes from
    that one forward pass.

    `engines` are the student's, and also those of the default teacher. `taught` has the teachers that the run names: they score
    every trace.
    """
    kept = TOPK if run.score.keep_topk else ()
    base = ("base_logprobs",) if run.score.base_logprobs else ()
    draft = Draft.after(STAGE, rollout)
    if taught is not None:
        taught.begin(draft)
    shard = _Shard.of(draft, prompts, rollout, engines.facts())
    shard.note_generation(rollout)
    again = [row for row in shard.wrote["student"] if _in_sample(draft.keys[row], run.score.rescore_share)]
    if taught is None:
        others = sorted(shard.wrote["student"] + shard.wrote["import"] + (shard.wrote["teacher"] if kept else []))
        shard.teach("", others, shard.prompt("teacher_prompt_tokens"), Seat(engines, Policy(0)), run.score.keep_topk)
    else:
        for name, seat in taught.seats.items():
            found = shard.teach(name, taught.rows_of(name, draft.live()), taught.prompt, seat, run.score.keep_topk)
            if name in taught.compared:
                sample = [row for row in found if _in_sample(draft.keys[row], run.teachers[name].gap_share)]
                shard.compare(sample, taught.prompt, Seat(engines, seat.policy), "teacher")
    student = Seat(engines, policy)
    for row, scored in shard.ask(shard.unmeasured(), shard.prompt("prompt_tokens"), student):
        draft.values[row] |= {"student_logprobs": scored.logprobs, "student_logprob_source": "score"}
    shard.compare(again, shard.prompt("prompt_tokens"), student, "student")
    if base:
        known = set(shard.wrote["student"] if policy.version == 0 else ())  # the base itself wrote these
        for row in known:
            draft.values[row]["base_logprobs"] = draft.values[row]["student_logprobs"]
        others = [row for row in draft.live() if row not in known]
        for row, scored in shard.ask(others, shard.prompt("prompt_tokens"), Seat(engines, Policy(0))):
            draft.values[row]["base_logprobs"] = scored.logprobs
    return draft.table((*kept, *base, *(() if taught is None else TEACHER_COLUMNS)))


@dataclass(frozen=True)
class _Shard:
    """The traces of a shard, and the one way in which engines score them into `draft`.

    wrote: the live rows before anything was scored, by who wrote them: student, teacher, or import for others.
    """

    draft: Draft
    facts: EngineFacts
    ids: dict[str, list[np.ndarray]]
    indices: list[int]
    responses: list[np.ndarray]
    wrote: dict[str, list[int]]

    @classmethod
    def of(cls, draft: Draft, prompts: pa.Table, rollout: pa.Table, facts: EngineFacts) -> _Shard:
        """From the tables of the stages before. facts: those of the student's engines."""
        wrote: dict[str, list[int]] = {"student": [], "teacher": [], "import": []}
        sources = rollout["trace_source"].to_pylist()
        for row in draft.live():
            wrote[sources[row]].append(row)
        ids = {name: views(prompts[name]) for name in ("prompt_tokens", "teacher_prompt_tokens")}
        return cls(draft, facts, ids, rollout["prompt_index"].to_pylist(), views(rollout["response_tokens"]), wrote)

    def prompt(self, name: str) -> Callable[[int], list[int]]:
        """The prompt of a row in a prompt column."""
        return lambda row: self.ids[name][self.indices[row]].tolist()

    def note_generation(self, rollout: pa.Table) -> None:
        """Note what generation measured: the writer's log-probs, and the entropies where the teacher wrote."""
        logprobs, entropies = views(rollout["rollout_logprobs"]), views(rollout["rollout_entropy"])
        for row in self.draft.live():
            self.draft.values[row] |= {"entropy_method": self.facts.entropy_method, "entropy_error": 0.0}
        for row in self.wrote["student"]:
            self.draft.values[row] |= {"student_logprobs": logprobs[row], "student_logprob_source": "rollout"}
        for row in self.wrote["teacher"]:
            self.draft.values[row] |= {"teacher_logprobs": logprobs[row], "teacher_entropy": entropies[row]}
            self.draft.values[row]["entropy_error"] = rollout["rollout_entropy_error"][row].as_py()

    def unmeasured(self) -> list[int]:
        """The live rows without log-probs of the student."""
        return [row for row in (*self.wrote["teacher"], *self.wrote["import"]) if self.draft.reasons[row] is None]

    def ask(self, rows: list[int], prompt: Callable[[int], list[int]], seat: Seat) -> list[tuple[int, Score]]:
        """The usable scores of these rows, as (row, score), each under its prompt. Other rows are rejected."""
        sequences = [Sequence(prompt(row), self.responses[row].tolist()) for row in rows]
        answers = seat.engines.score(sequences, seat.policy) if rows else []
        pairs = zip(rows, answers, strict=True)
        # a teacher's head may have rows that no token has
        vocab_size = min(seat.engines.facts().vocab_size, self.facts.vocab_size)
        scored = [(row, _usable(self.draft, row, answer, self.responses[row], vocab_size)) for row, answer in pairs]
        refuse_many(self.draft, rows, "stage score")
        return [(row, answer) for row, answer in scored if answer is not None]

    def teach(self, name: str, rows: list[int], prompt: Callable[[int], list[int]], seat: Seat, keep: int) -> list[int]:
        """Have a teacher score these rows, with its `keep` most likely tokens a position. The rows that it could score."""
        means, found = seat.engines.facts(), self.ask(rows, prompt, seat)
        refuse_degenerate(name, [scored for _, scored in found], means)
        for row, scored in found:
            self.draft.values[row] |= {"teacher_logprobs": scored.logprobs, "teacher_entropy": scored.entropy}
            self.draft.values[row] |= {"entropy_error": scored.entropy_error, "entropy_method": means.entropy_method}
            if keep:
                self.draft.values[row] |= dict(zip(TOPK, _topk(scored, keep), strict=True))
        return [row for row, _ in found]

    def compare(self, rows: list[int], prompt: Callable[[int], list[int]], seat: Seat, whose: str) -> None:
        """Store the largest gap between these rows' log-probs of `whose` (student, teacher) and those that `seat` has."""
        for row, scored in self.ask(rows, prompt, seat):
            gap = np.abs(scored.logprobs - self.draft.values[row][f"{whose}_logprobs"]).max()
            self.draft.values[row][f"{whose}_logprob_gap"] = float(gap)


def _in_sample(key: str, share: float) -> bool:
    """Whether a trace is in a sample of this share. Its key alone decides."""
    return int(key, 16) % 10_000 < share * 10_000


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


def check_facts(wrote: Mapping[str, Any], facts: EngineFacts, where: str, who: str = "student") -> None:
    """Raise EngineError, with the facts that differ, when the engine that scores may not score what another one wrote.

    The loss compares student and teacher log-probs, so they must mean the same. `wrote` has the facts of the rollout shard; those
    of imported traces, which no engine wrote, name no engine. AGREE has the facts that must be equal; `who` is student, or
    teacher for the engines of a teacher of its own.
    """
    if wrote.get("trace_source") == "import":
        return
    scores = asdict(facts)
    names = [name for name, whose in AGREE.items() if who in whose]
    if changed := [name for name in names if wrote[name] != scores[name]]:
        named = ", ".join(f"{name} was {wrote[name]}, now {scores[name]}" for name in changed)
        raise EngineError(f"the engine that scores is not like the one that wrote the traces: {named}", where, "Roll out again")


def _compute(shard: ShardInputs) -> ShardResult:
    engines, policy = shard.on_engines()
    where = f"{shard.place.where}, shard {shard.name}"
    check_facts(shard.facts["rollout"], engines.facts(), where)
    prompts, rollout, run = shard.tables["prompts"], shard.tables["rollout"], shard.run
    if not run.teachers:
        table = score(prompts, rollout, run, engines, policy)
        return ShardResult(table, {"entropy_max": entropy_max(table), **asdict(engines.facts())})
    facts = {name: seat.engines.facts() for name, seat in shard.teachers.items()}
    for name, found in facts.items():
        check_facts(shard.facts["rollout"], found, f"{where}, teacher {name}", "teacher")
    live = [row for row, reason in enumerate(rollout["reject_reason"].to_pylist()) if reason is None]
    taught = Taught(contexts(shard.tables, run, live), shard.teachers, compared(run))
    table = score(prompts, rollout, run, engines, policy, taught)
    seen = [(name, context) for name, context in taught.contexts.values() if isinstance(context, Context)]
    fell_back = sum(context.kind != run.teachers[name].prompt for name, context in seen)
    more = {"teachers": {name: asdict(found) for name, found in facts.items()}} | ({"fell_back": fell_back} if fell_back else {})
    return ShardResult(table, {"entropy_max": entropy_max(table), **asdict(engines.facts()), **more})


def _more_reads(run: Run) -> tuple[str, ...]:
    """The columns that the prompts of named teachers are made from."""
    if not run.teachers:
        return ()
    if all(teacher.before_grading for teacher in run.teachers.values()):
        return PROBLEM
    said = run.grade.tests_decide and any(teacher.prompt == "feedback" for teacher in run.teachers.values())
    return (*PROBLEM, *GRADED, *(("judged_said",) if said else ()))


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
    settings=(
        *(*ENGINE_SETTINGS, "score"),
        *(f"teachers.*.{name}" for name in ("model", "revision", "dtype", "max_model_len", "prompt", "template", "fallback")),
        *(f"teachers.*.{name}" for name in ("policy", "server", "served_model", "top_k", "gap_share")),
    ),
    compute=_compute,
    round_inputs=lambda run: ("policy", *(("teacher_policy", "teacher_prompts") if run.teachers else ())),
    by_round=TEACHER_PROMPTS,
    more_reads=_more_reads,
)
