"""Every column: its name, type, shape, unit and writer. And the codes that columns hold.

Arrow schemas, the tables of pipeline/README.md and the checks at every commit derive from COLUMNS. Shape legend: `T` response
tokens, `P` prompt tokens, `Q` privileged prompt tokens, `K` kept tokens of a distribution, `S` spans. `R` is the number of traces
that the source brings for a problem. Entropies and log-probs are in nats, at temperature 1, over the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Verdict(StrEnum):
    """The grader's result. A row whose verifier dies or stands still is never `wrong`: it carries a reject_reason instead."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"


class Reject(StrEnum):
    """Why a row cannot go on. The row stays in every later shard: its columns are null, and it is counted."""

    MISSING_PROBLEM = "missing_problem"
    MISSING_SOLUTION = "missing_solution"
    MISSING_ANSWER = "missing_answer"
    NO_CONTEXT = "no_context"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_ERROR = "engine_error"
    EMPTY_RESPONSE = "empty_response"
    NON_FINITE = "non_finite"
    IMPOSSIBLE = "impossible"
    RESPONSE_MISMATCH = "response_mismatch"
    UNREADABLE_ANSWER = "unreadable_answer"
    VERIFIER_TIMEOUT = "verifier_timeout"
    VERIFIER_ERROR = "verifier_error"
    BAD_MESSAGES = "bad_messages"
    EXTRA_TOO_LARGE = "extra_too_large"
    RESPONSE_TOO_LONG = "response_too_long"
    UNKNOWN_TOKENS = "unknown_tokens"
    REWARD_ERROR = "reward_error"
    REWARD_TIMEOUT = "reward_timeout"
    REWARD_MISSING = "reward_missing"


class Regime:
    """Codes of the `regime` column (2605.13255, section 5.5)."""

    LOCK, MID, PIVOT, FORK = range(4)
    NAMES = ("lock", "mid", "pivot", "fork")


@dataclass(frozen=True)
class Column:
    """One column. `shape` is "" for a scalar. `nullable` allows null in a row that was not rejected.

    A shard may lack an `optional` column: its setting is off, no row has a value, or the shard is older than the column. Rows
    whose `trace_source` is `unknown_for` have null in it, since nobody knows their value.
    """

    name: str
    type: pa.DataType
    writer: str
    shape: str = ""
    unit: str = ""
    doc: str = ""
    nullable: bool = False
    optional: bool = False
    unknown_for: str = ""


_IDS, _FLOATS, _TEXT = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.string()
_SPANS = pa.list_(
    pa.struct(
        [
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("regime", pa.int8()),
            ("mean_entropy", pa.float32()),
            ("peak_entropy", pa.float32()),
        ]
    )
)

COLUMNS: dict[str, Column] = {
    c.name: c
    for c in (
        Column("prompt_id", _TEXT, "prompts", doc="key of a prompt: hash of its place in the source and its texts"),
        Column("problem", _TEXT, "prompts", doc="text of the problem; of a conversation its last user turn"),
        Column(
            "solution", _TEXT, "prompts", doc="reference solution, for the teacher only; evaluations have none", nullable=True
        ),
        Column("answer", _TEXT, "prompts", doc="reference answer, which the grader compares with"),
        Column("prompt_tokens", _IDS, "prompts", "P", "id", "prompt of the student"),
        Column(
            "teacher_prompt_tokens",
            _IDS,
            "prompts",
            "Q",
            "id",
            "prompt of the teacher: problem and reference solution",
            nullable=True,
        ),
        Column("problem_teacher", _TEXT, "prompts", doc="teacher that the row names; there with `source.teacher`", optional=True),
        Column(
            "messages",
            _TEXT,
            "prompts",
            doc="conversation that ends with the problem, as JSON; only where it has other turns",
            nullable=True,
            optional=True,
        ),
        Column("extra", _TEXT, "prompts", doc="other columns of the source, as one JSON object", nullable=True, optional=True),
        Column(
            "imported",
            pa.list_(_TEXT),
            "prompts",
            "R",
            doc="traces that the source brings (source.response), as text",
            nullable=True,
            optional=True,
        ),
        Column("trace_id", _TEXT, "rollout", doc="key of a trace: hash of run seed, round, prompt and sample"),
        Column("prompt_index", pa.int32(), "rollout", doc="row of this trace's prompt in the prompts shard"),
        Column("sample_index", pa.int32(), "rollout", doc="number of this trace in its prompt's group, 0 to G-1"),
        Column("trace_source", _TEXT, "rollout", doc="writer of the trace: student, teacher, or import (somebody else)"),
        Column("response_tokens", _IDS, "rollout", "T", "id", "sampled ids, with the end-of-sequence id"),
        Column("response_text", _TEXT, "rollout", doc="decoded response without special tokens"),
        Column(
            "rollout_logprobs",
            _FLOATS,
            "rollout",
            "T",
            "nats",
            "log-prob of each token under the writer, at temperature 1",
            unknown_for="import",
        ),
        Column(
            "rollout_entropy",
            _FLOATS,
            "rollout",
            "T",
            "nats",
            "entropy of the writer's full distribution at each token",
            unknown_for="import",
        ),
        Column(
            "rollout_entropy_error",
            pa.float32(),
            "rollout",
            unit="nats",
            doc="largest half-width of its bounds; 0 when exact",
            unknown_for="import",
        ),
        Column("finish_reason", _TEXT, "rollout", doc="why the trace ended: stop (end of sequence) or length (cap)"),
        Column(
            "policy_version", pa.int32(), "rollout", doc="policy that wrote the trace; 0 is the base model", unknown_for="import"
        ),
        Column(
            "policy_lag",
            pa.int32(),
            "rollout",
            doc="rounds by which the writing policy is behind; 0 is on-policy",
            unknown_for="import",
        ),
        Column("seed", pa.int64(), "rollout", doc="sampling seed of this trace", unknown_for="import"),
        Column("judged_verdict", _TEXT, "reward", doc="verdict of the verifier or of grade.verdict_reward; `grade` stores it"),
        Column("judged_answer", _TEXT, "reward", doc="answer that the verifier read from the response", nullable=True),
        Column(
            "judged_said",
            _TEXT,
            "reward",
            doc="what the tests of the problem said of the trace, where they decide the verdict",
            nullable=True,
            optional=True,
        ),
        Column("verdict", _TEXT, "grade", doc="correct, wrong, unparsable, truncated, timeout"),
        Column("extracted_answer", _TEXT, "grade", doc="answer that the grader read from the response", nullable=True),
        Column(
            "reward", pa.float32(), "grade", doc="length-shaped reward, 0 or 1 to 1 + beta_length; or the weighted sum of rewards"
        ),
        Column("advantage", pa.float32(), "grade", doc="advantage of the trace by the running or the group estimator"),
        Column("student_logprobs", _FLOATS, "score", "T", "nats", "log-prob of each token: student prompt, adapter on"),
        Column("teacher_logprobs", _FLOATS, "score", "T", "nats", "log-prob of each token: teacher prompt, adapter off"),
        Column("teacher_entropy", _FLOATS, "score", "T", "nats", "entropy of the teacher's full distribution at each token"),
        Column(
            "teacher_topk_tokens",
            pa.list_(_IDS),
            "score",
            "T K",
            "id",
            "the teacher's K most likely tokens at each position, the likeliest first",
            optional=True,
        ),
        Column(
            "teacher_topk_logprobs",
            pa.list_(_FLOATS),
            "score",
            "T K",
            "nats",
            "log-probs of these K tokens under the teacher",
            optional=True,
        ),
        Column(
            "base_logprobs",
            _FLOATS,
            "score",
            "T",
            "nats",
            "log-prob of each token: student prompt, adapter off; there with score.base_logprobs",
            optional=True,
        ),
        Column("entropy_method", _TEXT, "score", doc="exact, or bounds: the middle of the top-k bounds"),
        Column("entropy_error", pa.float32(), "score", unit="nats", doc="largest half-width of the entropy bounds; 0 when exact"),
        Column("student_logprob_source", _TEXT, "score", doc="rollout: measured with the trace; score: scored afterwards"),
        Column(
            "student_logprob_gap",
            pa.float32(),
            "score",
            unit="nats",
            doc="largest difference between rollout and score in a re-scored trace, else null",
            nullable=True,
        ),
        Column("teacher_name", _TEXT, "score", doc="teacher of this trace; there when the run names teachers", optional=True),
        Column(
            "teacher_context",
            _TEXT,
            "score",
            doc="what that teacher saw beside the problem: privileged, plain, sibling or feedback",
            optional=True,
        ),
        Column(
            "teacher_context_tokens",
            _IDS,
            "score",
            "Q",
            "id",
            "prompt of that teacher, with its own chat template",
            optional=True,
        ),
        Column("teacher_sibling", _TEXT, "score", doc="trace_id of the sibling that it saw", nullable=True, optional=True),
        Column(
            "teacher_logprob_gap",
            pa.float32(),
            "score",
            unit="nats",
            doc="largest difference between this teacher and the run's own engine with the same weights, in a sample, else null",
            nullable=True,
            optional=True,
        ),
        Column("lookahead_entropy", _FLOATS, "profile", "T", "nats", "least teacher entropy among a token and the next W"),
        Column("entropy_mean", pa.float32(), "profile", unit="nats", doc="mean teacher entropy of the trace"),
        Column("entropy_p50", pa.float32(), "profile", unit="nats", doc="median teacher entropy of the trace"),
        Column("entropy_p90", pa.float32(), "profile", unit="nats", doc="90th percentile of the trace's teacher entropy"),
        Column("entropy_max", pa.float32(), "profile", unit="nats", doc="largest teacher entropy of the trace"),
        Column("share_lock", pa.float32(), "profile", doc="share of the trace's tokens in regime lock"),
        Column("share_mid", pa.float32(), "profile", doc="share of the trace's tokens in regime mid"),
        Column("share_pivot", pa.float32(), "profile", doc="share of the trace's tokens in regime pivot"),
        Column("share_fork", pa.float32(), "profile", doc="share of the trace's tokens in regime fork"),
        Column("regime", pa.list_(pa.int8()), "label", "T", doc="regime of each token: 0 lock, 1 mid, 2 pivot, 3 fork"),
        Column("spans", _SPANS, "label", "S", doc="maximal runs of one regime: start, end (exclusive), mean and peak entropy"),
        Column("gate", _FLOATS, "label", "T", doc="confidence omega, from floor to 1; its M is the largest entropy of the round"),
        Column("token_weight", _FLOATS, "label", "T", doc="advantage x magnitude x gate"),
    )
}
TOPK = ("teacher_topk_tokens", "teacher_topk_logprobs")  # what score.keep_topk adds

REWARD_PREFIX = "reward_"  # begins the columns of stage `reward`: `reward_<name>` for each reward of `grade.rewards`


def reward_columns(names: Iterable[str]) -> list[Column]:
    """The columns of single rewards among column names, sorted. Null means that the reward is absent."""
    doc = "value of one reward of grade.rewards"
    return [
        Column(name, pa.float32(), "reward", doc=doc, nullable=True)
        for name in sorted(set(names) - COLUMNS.keys())
        if name.startswith(REWARD_PREFIX)
    ]
