"""The stages as functions from shards to a shard: what happens to a row. No Ray, no engine of their own.

Every function takes the input shards it declares in contract.PLAN and returns one table with a row for every input row, in
the same order. A row that cannot go on carries its first `reject_reason`; later stages pass it by and null stands in its
columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import contract
from pipeline.config import Prompts, Run
from pipeline.contract import Engines, Failure, Generate, Generation, Policy, Reject, Sampling, Score, Sequence
from pipeline.errors import EngineError
from pipeline.grading import Grader
from pipeline.prompts import fits, student_prompt, teacher_prompt
from pipeline.regimes import label as label_arrays
from pipeline.regimes import profile as profile_arrays
from pipeline.rewards import RunningBaseline, group_advantage, length_shaped_reward
from pipeline.sources import Problem


def prompts(problems: Rows[Problem], run: Run, tokenizer: Any) -> pa.Table:
    """Problems as student and privileged prompts of ids; a prompt that leaves no room for the response is rejected."""
    rows = []
    for item in problems:
        row: dict[str, Any] = {"prompt_id": _digest(f"{item.index}\n{item.problem}\n{item.solution}\n{item.answer}")}
        if item.reject is not None:
            rows.append(row | {"reject_reason": str(item.reject), "reject_detail": item.detail})
            continue
        assert item.problem is not None
        student = student_prompt(tokenizer, item.problem, run.prompts.student, run.prompts.system, run.prompts.student_thinking)
        teacher = _privileged(item.problem, item.solution, run.prompts, tokenizer)
        longest = max(len(student), len(teacher or ()))
        if not fits(longest, run.rollout.max_new_tokens, run.model.max_model_len):
            detail = f"{longest} prompt + {run.rollout.max_new_tokens} new tokens > max_model_len {run.model.max_model_len}"
            rows.append(row | {"reject_reason": str(Reject.PROMPT_TOO_LONG), "reject_detail": detail})
            continue
        row |= {"problem": item.problem, "solution": item.solution, "answer": item.answer}
        rows.append(row | {"prompt_tokens": student, "teacher_prompt_tokens": teacher})
    return pa.Table.from_pylist(rows, schema=contract.schema(contract.STAGES["prompts"]))


def _privileged(problem: str, solution: str | None, settings: Prompts, tokenizer: Any) -> list[int] | None:
    """The teacher's prompt; None in an evaluation, whose problems come without a solution."""
    if solution is None:
        return None
    if settings.teacher == settings.student:  # a control: the teacher without the reference
        return student_prompt(tokenizer, problem, settings.teacher, settings.system, settings.teacher_thinking)
    return teacher_prompt(tokenizer, problem, solution, settings.teacher, settings.system, settings.teacher_thinking)


def rollout(prompts: pa.Table, run: Run, engines: Engines, policy: Policy, where: str, first: int = 0, lag: int = 0) -> pa.Table:
    """G traces per prompt, next to each other; a trace depends on its seed, prompt and policy only.

    `where` (the round or evaluation) and the prompt's place in it go into trace ids and seeds, not the cut into shards; `first`
    is the place of this shard's first prompt; `lag` the rounds by which `policy` is behind the round. Raises EngineError when
    an answer names another policy.
    """
    size = run.rollout.group_size
    num_teacher = round(size * run.rollout.teacher_share)
    source_of = ["student"] * (size - num_teacher) + ["teacher"] * num_teacher
    draft = _Draft("rollout", [""] * (prompts.num_rows * size))
    asked: dict[str, list[int]] = {"student": [], "teacher": []}
    requests: dict[str, list[Generate]] = {"student": [], "teacher": []}
    ids = {"student": prompts["prompt_tokens"].to_pylist(), "teacher": prompts["teacher_prompt_tokens"].to_pylist()}
    carried = prompts.select(["prompt_id", "reject_reason", "reject_detail"]).to_pylist()
    for i, prompt in enumerate(carried):
        for sample, source in enumerate(source_of):
            row = i * size + sample
            name = f"{run.seed}/{where}/{prompt['prompt_id']}/{first + i}/{sample}"
            seed = int(_digest(f"seed/{name}"), 16) & 0x7FFFFFFF
            draft.keys[row] = _digest(name)
            if prompt["reject_reason"]:
                draft.reject(row, prompt["reject_reason"], prompt["reject_detail"])
                draft.values[row] = {"prompt_index": i}
                continue
            draft.values[row] = {"prompt_index": i, "sample_index": sample, "trace_source": source, "seed": seed}
            asked[source].append(row)
            requests[source].append(Generate(ids[source][i], seed))
    sampling = Sampling(run.rollout.temperature, run.rollout.top_p, run.rollout.top_k, run.rollout.max_new_tokens)
    for source, who in (("student", policy), ("teacher", Policy(0))):
        if requests[source]:
            for row, answer in zip(asked[source], engines.generate(requests[source], who, sampling), strict=True):
                _take_generation(draft, row, answer, who, lag)
    return draft.table()


def _take_generation(draft: _Draft, row: int, answer: Generation | Failure, policy: Policy, lag: int) -> None:
    if isinstance(answer, Failure):
        draft.reject(row, Reject.ENGINE_ERROR, answer.cause)
        return
    if answer.policy_version != policy.version:
        raise EngineError(f"policy {answer.policy_version} answered a request for policy {policy.version}", "rollout")
    if len(answer.tokens) == 0:
        draft.reject(row, Reject.EMPTY_RESPONSE, "no token was generated")
        return
    if not (np.isfinite(answer.logprobs).all() and np.isfinite(answer.entropy).all()):
        draft.reject(row, Reject.NON_FINITE, "rollout log-prob or entropy")
        return
    draft.values[row] |= {
        "response_tokens": answer.tokens,
        "rollout_logprobs": answer.logprobs,
        "rollout_entropy": answer.entropy,
        "rollout_entropy_error": answer.entropy_error,
        "finish_reason": answer.finish_reason,
        "policy_version": answer.policy_version,
        "policy_lag": lag,
    }


def decode(table: pa.Table, tokenizer: Any) -> pa.Table:
    """Fill `response_text` of a rollout shard from its ids."""
    live = pc.is_null(table["reject_reason"])
    texts = iter(tokenizer.batch_decode(table.filter(live)["response_tokens"].to_pylist(), skip_special_tokens=True))
    column = pa.array([_clean(next(texts)) if ok else None for ok in live.to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index("response_text"), "response_text", column)


def grade(prompts: pa.Table, rollout: pa.Table, run: Run, grader: Grader, baseline: RunningBaseline | None) -> pa.Table:
    """Verdict, reward and advantage of every trace. A verifier that failed rejects its row: never a zero reward.

    `baseline` is the running state at the start of the round; None uses the group estimator.
    """
    draft = _Draft.after("grade", rollout)
    live = np.array(draft.live(), np.int64)
    answers = prompts["answer"].take(rollout["prompt_index"]).take(live).to_pylist()
    lengths = pc.list_value_length(rollout["response_tokens"]).to_numpy(zero_copy_only=False)
    rewards = np.full(rollout.num_rows, np.nan)
    chosen = rollout.take(live)
    verdicts = grader.grade(chosen["response_text"].to_pylist(), answers, chosen["finish_reason"].to_pylist())
    for row, verdict in zip(live.tolist(), verdicts, strict=True):
        draft.values[row] = {"verdict": verdict.verdict, "extracted_answer": verdict.answer and _clean(verdict.answer)}
        if verdict.reject is not None:
            draft.reject(row, verdict.reject, verdict.detail)
            continue
        correct = np.array([verdict.verdict == contract.Verdict.CORRECT])
        rewards[row] = length_shaped_reward(correct, np.array([lengths[row]]), run.rollout.max_new_tokens, run.grade.beta_length)[
            0
        ]
    advantages = (
        group_advantage(rewards, run.rollout.group_size)
        if baseline is None
        else baseline.advantage(rewards, run.grade.running_warmup_steps)
    )
    for row in draft.live():
        draft.values[row] |= {"reward": float(rewards[row]), "advantage": float(advantages[row])}
    return draft.table()


def score(prompts: pa.Table, rollout: pa.Table, run: Run, engines: Engines, policy: Policy) -> pa.Table:
    """Student and teacher log-probs and the teacher's entropy of every response token, from one engine and numerics.

    What generation already measured is not measured again: the student's log-probs of its own traces, the teacher's of the
    teacher's. A sample (`score.rescore_share`) of student traces is scored again and its gap kept.
    """
    draft = _Draft.after("score", rollout)
    facts = engines.facts()
    indices, sources = rollout["prompt_index"].to_pylist(), rollout["trace_source"].to_pylist()
    ids = {name: views(prompts[name]) for name in ("prompt_tokens", "teacher_prompt_tokens")}
    responses, logprobs, entropies = (views(rollout[n]) for n in ("response_tokens", "rollout_logprobs", "rollout_entropy"))
    by_student = [row for row in draft.live() if sources[row] == "student"]
    by_teacher = [row for row in draft.live() if sources[row] == "teacher"]
    again = [row for row in by_student if int(draft.keys[row], 16) % 10_000 < run.score.rescore_share * 10_000]
    for row in draft.live():
        draft.values[row] = {"entropy_method": facts.entropy_method, "entropy_error": 0.0}
    for row in by_student:
        draft.values[row] |= {"student_logprobs": logprobs[row], "student_logprob_source": "rollout"}
    for row in by_teacher:
        draft.values[row] |= {"teacher_logprobs": logprobs[row], "teacher_entropy": entropies[row]}
        draft.values[row]["entropy_error"] = rollout["rollout_entropy_error"][row].as_py()

    def ask(rows: list[int], prompt: str, who: Policy) -> list[tuple[int, Score]]:
        """The usable scores of these rows under one prompt column and policy; the others are rejected."""
        sequences = [Sequence(ids[prompt][indices[row]].tolist(), responses[row].tolist()) for row in rows]
        answers = engines.score(sequences, who) if rows else []
        scored = ((row, _usable(draft, row, answer, responses[row])) for row, answer in zip(rows, answers, strict=True))
        return [(row, answer) for row, answer in scored if answer is not None]

    for row, scored in ask(by_student, "teacher_prompt_tokens", Policy(0)):
        draft.values[row] |= {"teacher_logprobs": scored.logprobs, "teacher_entropy": scored.entropy}
        draft.values[row]["entropy_error"] = scored.entropy_error
    for row, scored in ask(by_teacher, "prompt_tokens", policy):
        draft.values[row] |= {"student_logprobs": scored.logprobs, "student_logprob_source": "score"}
    for row, scored in ask(again, "prompt_tokens", policy):
        draft.values[row]["student_logprob_gap"] = float(np.abs(scored.logprobs - logprobs[row]).max())
    return draft.table()


def profile(score: pa.Table, run: Run, peak: float, vocab_size: int) -> pa.Table:
    """Lookahead entropy, row statistics and regime shares of every scored trace; peak in nats is the round's maximum."""
    shard = _Ragged("profile", score, score)
    entropy, offsets = shard.take(score["teacher_entropy"])
    result = profile_arrays(entropy, offsets, **_regime_settings(run, peak, vocab_size), window=run.profile.window)
    stats = result.statistics
    columns = {"lookahead_entropy": shard.lists(result.lookahead, offsets)}
    for name, values in zip(("mean", "p50", "p90", "max"), stats, strict=True):
        columns[f"entropy_{name}"] = shard.scalars(values)
    for code, name in enumerate(contract.Regime.NAMES):
        columns[f"share_{name}"] = shard.scalars(np.ascontiguousarray(result.shares[:, code]))
    return shard.table(columns)


def label(grade: pa.Table, score: pa.Table, profile: pa.Table, run: Run, peak: float, vocab_size: int) -> pa.Table:
    """Regime, spans, gate and token weight of every trace that was graded and scored.

    The gate's maximum M is the round's here (`peak`, nats), at least label.min_normaliser; the trainer takes its minibatch's.
    """
    shard = _Ragged("label", grade, score)
    entropy, offsets = shard.take(score["teacher_entropy"])
    settings = run.label
    result = label_arrays(
        entropy,
        shard.take(profile["lookahead_entropy"])[0],
        offsets,
        shard.rows(grade["advantage"]),
        shard.take(score["teacher_logprobs"])[0],
        shard.take(score["student_logprobs"])[0],
        **_regime_settings(run, peak, vocab_size),
        peak=max(peak, settings.min_normaliser),
        gamma=settings.gamma,
        floor=settings.floor,
        epsilon=settings.epsilon,
        gate_on_lookahead=settings.lookahead,
    )
    spans = result.spans
    fields = contract.COLUMNS["spans"].type.value_type
    runs = pa.StructArray.from_arrays([pa.array(v) for v in spans[:-1]], fields=list(fields))
    return shard.table(
        {
            "regime": shard.lists(result.regime, offsets),
            "spans": shard.lists(runs, spans.offsets),
            "gate": shard.lists(result.gate, offsets),
            "token_weight": shard.lists(result.weight, offsets),
        }
    )


def entropy_max(score: pa.Table) -> float:
    """Largest teacher entropy of a shard in nats over the rows that go on; 0 when there is none."""
    flat, _ = ragged(score.filter(pc.is_null(score["reject_reason"]))["teacher_entropy"])
    return float(flat.max()) if flat.size else 0.0


def _regime_settings(run: Run, peak: float, vocab_size: int) -> dict[str, float]:
    settings = run.profile
    scale = math.log(vocab_size) if settings.normaliser == "log_vocab" else max(peak, run.label.min_normaliser)
    return {"scale": scale, "tau_low": settings.tau_low, "tau_high": settings.tau_high}


class _Ragged:
    """A shard computed as whole ragged arrays over its live rows, and put back among the rejected ones."""

    def __init__(self, stage: str, *inputs: pa.Table) -> None:
        self.stage, self.keys = contract.STAGES[stage], inputs[0]["trace_id"]
        self.reasons = pc.coalesce(*(t["reject_reason"] for t in inputs))
        self.details = pc.coalesce(*(t["reject_detail"] for t in inputs))
        self.live = np.asarray(pc.is_null(self.reasons))

    def rows(self, column: pa.ChunkedArray) -> np.ndarray:
        """A scalar column of the live rows."""
        return (column if self.live.all() else column.filter(pa.array(self.live))).to_numpy()

    def take(self, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """A list column of the live rows as flat values and offsets."""
        return ragged(column if self.live.all() else column.filter(pa.array(self.live)))

    def scalars(self, values: np.ndarray) -> pa.Array:
        """A value per live row, null among the others."""
        out = np.zeros(len(self.live), values.dtype)
        out[self.live] = values
        return pa.array(out, mask=~self.live)

    def lists(self, values: np.ndarray | pa.Array, offsets: np.ndarray) -> pa.Array:
        """A list per live row, null among the others."""
        lengths = np.zeros(len(self.live), np.int32)
        lengths[self.live] = np.diff(offsets)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)])
        flat = values if isinstance(values, pa.Array) else pa.array(values)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, mask=pa.array(~self.live))

    def table(self, columns: dict[str, pa.Array]) -> pa.Table:
        """The shard, in the order of the contract."""
        fixed = {self.stage.key: self.keys, "reject_reason": self.reasons, "reject_detail": self.details}
        schema = contract.schema(self.stage)
        return pa.Table.from_arrays([{**fixed, **columns}[name] for name in schema.names], schema=schema)


def _usable(draft: _Draft, row: int, answer: Score | Failure, response: np.ndarray) -> Score | None:
    """The score, or None after rejecting its row: both scorings must have seen the same response ids (trap 5)."""
    if isinstance(answer, Failure):
        draft.reject(row, Reject.ENGINE_ERROR, answer.cause)
    elif not np.array_equal(answer.tokens, response):
        draft.reject(row, Reject.RESPONSE_MISMATCH, f"scored {len(answer.tokens)} ids that are not the {len(response)} sampled")
    elif not (np.isfinite(answer.logprobs).all() and np.isfinite(answer.entropy).all()):
        draft.reject(row, Reject.NON_FINITE, "scored log-prob or entropy")
    else:
        return answer
    return None


def views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column as numpy views of one flat array; an empty view where null stands."""
    flat, offsets = ragged(column)
    return [flat[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as flat values [N] and offsets int64 [R+1]; null rows are empty."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    return array.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class _Draft:
    """A shard in the making: one dict of values per row, and the rows that were rejected."""

    def __init__(self, stage: str, keys: list[str]) -> None:
        self.stage, self.keys = contract.STAGES[stage], keys
        self.values: list[dict[str, Any]] = [{} for _ in keys]
        self.reasons: list[str | None] = [None] * len(keys)
        self.details: list[str | None] = [None] * len(keys)

    @classmethod
    def after(cls, stage: str, previous: pa.Table) -> _Draft:
        """A draft for the same rows as `previous`, with its rejections carried on."""
        draft = cls(stage, previous["trace_id"].to_pylist())
        draft.reasons, draft.details = previous["reject_reason"].to_pylist(), previous["reject_detail"].to_pylist()
        return draft

    def live(self) -> list[int]:
        """Rows that go on."""
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def reject(self, row: int, reason: str, detail: str | None) -> None:
        """Take a row out, unless an earlier reason already did."""
        if self.reasons[row] is None:
            self.reasons[row], self.details[row] = str(reason), detail and _clean(detail)[:500]

    def table(self) -> pa.Table:
        """The shard, in the order of the contract."""
        schema = contract.schema(self.stage)
        fixed = {self.stage.key: self.keys, "reject_reason": self.reasons, "reject_detail": self.details}
        arrays = [
            pa.array(fixed[f.name], f.type) if f.name in fixed else _column([v.get(f.name) for v in self.values], f.type)
            for f in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column from Python values; lists of numbers go through one concatenation instead of one object per token."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    lengths = np.array([0 if v is None else len(v) for v in values], np.int64)
    parts = [np.asarray(v, kind.value_type.to_pandas_dtype()) for v in values if v is not None and len(v)]
    flat = np.concatenate(parts) if parts else np.empty(0, kind.value_type.to_pandas_dtype())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(flat), type=kind, mask=pa.array([v is None for v in values], pa.bool_()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
