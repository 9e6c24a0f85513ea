"""The one place that says the name, type, shape, unit and writer of every column, and what stages and engines exchange.

Arrow schemas, the tables of pipeline/README.md and the checks at every commit derive from COLUMNS. Shape legend: `T` response
tokens, `P` prompt tokens, `Q` privileged prompt tokens, `S` spans. Entropies and log-probs are in nats, at temperature 1, over
the full vocabulary.

A stage asks an engine with `Generate` or `Sequence`. It gets back a `Generation`, a `Score` or a `Failure`. Real engines and
fakes share this signature, and stages import neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pipeline.config import Run
    from pipeline.method.rewards import RunningBaseline
    from pipeline.problems.sources import Problem


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
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_ERROR = "engine_error"
    EMPTY_RESPONSE = "empty_response"
    NON_FINITE = "non_finite"
    IMPOSSIBLE = "impossible"
    RESPONSE_MISMATCH = "response_mismatch"
    UNREADABLE_ANSWER = "unreadable_answer"
    VERIFIER_TIMEOUT = "verifier_timeout"
    VERIFIER_ERROR = "verifier_error"


class Regime:
    """Codes of the `regime` column (2605.13255, section 5.5)."""

    LOCK, MID, PIVOT, FORK = range(4)
    NAMES = ("lock", "mid", "pivot", "fork")


@dataclass(frozen=True)
class Column:
    """One column. `shape` is "" for a scalar. `nullable` allows null in a row that was not rejected."""

    name: str
    type: pa.DataType
    writer: str
    shape: str = ""
    unit: str = ""
    doc: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads, what makes its shards stale, and how a shard is computed.

    where: "engines" or "CPU".
    key: the column that names its rows.
    reads: columns of earlier stages.
    settings: the settings or whole sections whose change makes its shards stale.
    compute: makes one shard from its inputs.
    round_inputs: for a run, the values of the whole round that also make shards stale (problems, policy, baseline, peak).
    after_round: whether every shard of the round must be scored first.
    """

    name: str
    where: str
    key: str
    reads: tuple[str, ...]
    settings: tuple[str, ...]
    compute: Callable[[ShardInputs], ShardResult]
    round_inputs: Callable[[Run], tuple[str, ...]] = lambda _: ()
    after_round: bool = False

    @property
    def writes(self) -> tuple[Column, ...]:
        """The columns that this stage writes, in file order. The key and reject_reason are not among them."""
        return tuple(c for c in COLUMNS.values() if c.writer == self.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose shards this stage reads, in the order of PLAN."""
        return tuple(dict.fromkeys(column.writer for column in COLUMNS.values() if column.name in self.reads))

    def reads_of(self, writer: Stage) -> list[str]:
        """The columns of `writer` that this stage may read: the key, the rejections and the columns that it declares."""
        declared = [name for name in self.reads if COLUMNS[name].writer == writer.name]
        return [writer.key, "reject_reason", "reject_detail", *declared]

    def reads_setting(self, setting: str) -> bool:
        """Whether a change of `setting`, a dotted name, makes the shards of this stage stale."""
        return any(setting == name or setting.startswith(f"{name}.") for name in self.settings)


class Scope(NamedTuple):
    """What labels need from the whole round: its largest teacher entropy (`peak`, nats) and the size of the vocabulary."""

    peak: float
    vocab_size: int


@dataclass(frozen=True)
class Place:
    """Where a shard stands in its run.

    where: folder of its round or evaluation.
    first: place of its first prompt in that round.
    lag: rounds by which the policy that writes the traces is behind. 0 is on-policy.
    """

    where: str
    first: int = 0
    lag: int = 0


@dataclass(frozen=True)
class ShardInputs:
    """What a stage is given to compute one shard.

    tables, facts: the shard as the earlier stages made it, by stage name.
    problems: source rows, for the first stage only.
    engines, policy: for a stage that runs on engines.
    baseline: running reward state at the start of the round. None with the group estimator.
    scope: for a stage that needs the whole round.
    """

    run: Run
    name: str
    place: Place
    tables: Mapping[str, pa.Table]
    facts: Mapping[str, Mapping[str, Any]]
    problems: list[Problem] | None = None
    engines: Engines | None = None
    policy: Policy | None = None
    baseline: RunningBaseline | None = None
    scope: Scope | None = None

    def on_engines(self) -> tuple[Engines, Policy]:
        """The engines, and the policy that they must answer with. Only for a stage that runs on engines."""
        assert self.engines is not None
        assert self.policy is not None
        return self.engines, self.policy

    def whole_round(self) -> Scope:
        """The scope of the round. Only for a stage that runs after every shard was scored."""
        assert self.scope is not None
        return self.scope


class ShardResult(NamedTuple):
    """A computed shard: its table, and small results (`facts`) that later stages read without opening the shard."""

    table: pa.Table
    facts: dict[str, Any]


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
        Column("problem", _TEXT, "prompts", doc="text of the problem"),
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
        Column("trace_id", _TEXT, "rollout", doc="key of a trace: hash of run seed, round, prompt and sample"),
        Column("prompt_index", pa.int32(), "rollout", doc="row of this trace's prompt in the prompts shard"),
        Column("sample_index", pa.int32(), "rollout", doc="number of this trace in its prompt's group, 0 to G-1"),
        Column("trace_source", _TEXT, "rollout", doc="writer of the trace, student or teacher, with its own prompt and weights"),
        Column("response_tokens", _IDS, "rollout", "T", "id", "sampled ids, with the end-of-sequence id"),
        Column("response_text", _TEXT, "rollout", doc="decoded response without special tokens"),
        Column("rollout_logprobs", _FLOATS, "rollout", "T", "nats", "log-prob of each token under the writer, at temperature 1"),
        Column("rollout_entropy", _FLOATS, "rollout", "T", "nats", "entropy of the writer's full distribution at each token"),
        Column(
            "rollout_entropy_error", pa.float32(), "rollout", unit="nats", doc="largest half-width of its bounds; 0 when exact"
        ),
        Column("finish_reason", _TEXT, "rollout", doc="why the trace ended: stop (end of sequence) or length (cap)"),
        Column("policy_version", pa.int32(), "rollout", doc="policy that wrote the trace; 0 is the base model"),
        Column("policy_lag", pa.int32(), "rollout", doc="rounds by which the writing policy is behind; 0 is on-policy"),
        Column("seed", pa.int64(), "rollout", doc="sampling seed of this trace"),
        Column("verdict", _TEXT, "grade", doc="correct, wrong, unparsable, truncated, timeout"),
        Column("extracted_answer", _TEXT, "grade", doc="answer that the grader read from the response", nullable=True),
        Column("reward", pa.float32(), "grade", doc="length-shaped reward: 0, or between 1 and 1 + beta_length"),
        Column("advantage", pa.float32(), "grade", doc="advantage of the trace by the running or the group estimator"),
        Column("student_logprobs", _FLOATS, "score", "T", "nats", "log-prob of each token: student prompt, adapter on"),
        Column("teacher_logprobs", _FLOATS, "score", "T", "nats", "log-prob of each token: teacher prompt, adapter off"),
        Column("teacher_entropy", _FLOATS, "score", "T", "nats", "entropy of the teacher's full distribution at each token"),
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

# these settings change an engine's numbers
ENGINE_SETTINGS = ("model.path", "model.revision", "model.dtype", "model.max_model_len")


def schema(stage: Stage) -> pa.Schema:
    """Arrow schema of a stage's shard: key, reject_reason, reject_detail, then the columns it writes.

    reject_reason is null in a row that goes on.
    """
    columns = [c for c in stage.writes if c.name != stage.key]
    fields = [pa.field(stage.key, _TEXT, nullable=False), pa.field("reject_reason", _TEXT), pa.field("reject_detail", _TEXT)]
    return pa.schema(fields + [pa.field(c.name, c.type) for c in columns])


# ---- what stages and engines say to each other ------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """Which policy must answer: base weights plus the adapter at `adapter` (a URI), or the base alone when it is None."""

    version: int
    adapter: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How traces are sampled. Log-probs and entropies that come back are always raw, at temperature 1."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Generate:
    """One trace to write: the ids of its prompt, and its seed. Prompt, seed and policy decide the trace."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Sequence:
    """One response to score under one prompt."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, eq=False)
class Generation:
    """One written trace: tokens int32 [T], logprobs float32 [T] nats, entropy float32 [T] nats.

    Log-probs and entropies are those of the distribution that wrote the tokens. entropy_error: largest half-width in nats of the
    entropy bounds, 0 when exact.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float
    finish_reason: str
    policy_version: int


@dataclass(frozen=True, eq=False)
class Score:
    """One scored response: tokens int32 [T] as the engine saw them, logprobs float32 [T] nats, entropy float32 [T] nats.

    entropy_error: largest half-width in nats of the entropy bounds, 0 when exact.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float


@dataclass(frozen=True)
class Failure:
    """One request that an engine could not answer. The other requests of its batch were answered."""

    cause: str


@dataclass(frozen=True)
class EngineFacts:
    """What the numbers of an engine mean. They are stored with the data, and stage `score` refuses an engine with other facts.

    scoring: the positions of a scored sequence that go through the output head. `prompt`: all. `response`: those that predict
    its response. `shared`: the latter, and sequences with the same prompt also share its keys and values.
    fallback: why exact entropies were asked for and are not there. Empty when they are there, or when bounds were asked for.
    """

    entropy_method: str  # exact | bounds
    logprobs_mode: str  # raw_logprobs
    dtype: str
    engine: str  # "vllm 0.32.0"
    max_model_len: int
    vocab_size: int
    scoring: str = "prompt"
    fallback: str = field(default="", compare=False)


class Engines(Protocol):
    """Inference as the stages see it: one engine, or a pool of engines. Answers keep the order of the requests."""

    def facts(self) -> EngineFacts:
        """The facts of the engines, which are the same for all of them."""
        ...

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """Write one trace per request with `policy`."""
        ...

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Measure log-prob and entropy of every response token under `policy`, at temperature 1."""
        ...


@dataclass(frozen=True)
class Usage:
    """What a pool of engines has done in its life.

    busiest_s: seconds of work of its busiest engine.
    idle_s: seconds without work, added up over the engines that could answer.
    most: engines that the pool may have now.
    """

    busiest_s: float
    idle_s: float
    most: int


class PooledEngines(Engines, Protocol):
    """Inference as the driver sees it: a pool that also says what its engines have done."""

    def usage(self) -> Usage:
        """What the engines of this pool have done so far."""
        ...
