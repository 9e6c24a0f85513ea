"""The contract: every column's name, type, shape, unit, writer and readers. The one place.

Arrow schemas, the tables of pipeline/README.md and the checks at every commit derive from COLUMNS. Shape legend: `T` response
tokens, `P` prompt tokens, `Q` privileged prompt tokens. Entropies and log-probabilities are in nats, at temperature 1, over
the full vocabulary.

The engines' side of the contract stands here too: what a stage asks an engine (`Generate`, `Sequence`) and what it gets
(`Generation`, `Score`, `Failure`), so that real engines and fakes share one signature and stages never import either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pipeline.config import Run
    from pipeline.method.rewards import RunningBaseline
    from pipeline.problems.sources import Problem


class Verdict(StrEnum):
    """What the grader found. A verifier that fails is never `wrong`: its row carries a reject_reason instead."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"


class Reject(StrEnum):
    """Why a row cannot go on. It stays in every later shard, null but counted."""

    MISSING_PROBLEM = "missing_problem"
    MISSING_SOLUTION = "missing_solution"
    MISSING_ANSWER = "missing_answer"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_ERROR = "engine_error"
    EMPTY_RESPONSE = "empty_response"
    NON_FINITE = "non_finite"
    RESPONSE_MISMATCH = "response_mismatch"
    VERIFIER_TIMEOUT = "verifier_timeout"
    VERIFIER_ERROR = "verifier_error"


class Regime:
    """Codes of the `regime` column (2605.13255, section 5.5)."""

    LOCK, MID, PIVOT, FORK = range(4)
    NAMES = ("lock", "mid", "pivot", "fork")


@dataclass(frozen=True)
class Column:
    """One column: `shape` is "" for a scalar; `nullable` allows null in a row that was not rejected."""

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

    where: engines or CPU; key: the column that names its rows; reads: columns of earlier stages; settings: settings, or whole
    sections, whose change makes its shards stale. `round_inputs` says, for a run, which values of the whole round do so too:
    problems, policy, baseline or peak. `after_round`: it needs every shard of the round to be scored first.
    """

    name: str
    where: str
    key: str
    reads: tuple[str, ...]
    settings: tuple[str, ...]
    compute: Callable[[Shard], Made]
    round_inputs: Callable[[Run], tuple[str, ...]] = lambda _: ()
    after_round: bool = False

    @property
    def writes(self) -> tuple[Column, ...]:
        """The columns this stage writes, in file order (key and reject_reason not counted)."""
        return tuple(c for c in COLUMNS.values() if c.writer == self.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose shards it reads, in the order of the plan."""
        return tuple(dict.fromkeys(column.writer for column in COLUMNS.values() if column.name in self.reads))

    def reads_of(self, writer: Stage) -> list[str]:
        """The columns of `writer` that this stage may read: key and rejections, and what it declares."""
        own = [name for name in self.reads if COLUMNS[name].writer == writer.name]
        return [writer.key, "reject_reason", "reject_detail", *own]

    def reads_setting(self, setting: str) -> bool:
        """Whether a change of `setting`, by its dotted name, makes its shards stale."""
        return any(setting == name or setting.startswith(f"{name}.") for name in self.settings)


class Scope(NamedTuple):
    """What labels need of a whole round: its largest teacher entropy in nats, and the size of the vocabulary."""

    peak: float
    vocab_size: int


@dataclass(frozen=True)
class Place:
    """Where a shard stands.

    where: folder of its round or evaluation; first: place of its first prompt in there; lag: rounds by which the policy that
    answers is behind, 0 is on-policy.
    """

    where: str
    first: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Shard:
    """What a stage is given to compute one shard.

    tables and facts: of the stages it reads, by stage name; problems: source rows, for the first stage alone.
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
        """The engines that answer, and the policy they must answer with."""
        assert self.engines is not None
        assert self.policy is not None
        return self.engines, self.policy

    def whole_round(self) -> Scope:
        """The scope of the round, which is there once every shard is scored."""
        assert self.scope is not None
        return self.scope


class Made(NamedTuple):
    """A computed shard: its table, and small results that later stages need without opening it."""

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
        Column("prompt_id", _TEXT, "prompts", doc="key of a prompt: hash of source, index and text"),
        Column("problem", _TEXT, "prompts", doc="what the student is asked"),
        Column(
            "solution", _TEXT, "prompts", doc="reference solution, the privileged context; evaluations have none", nullable=True
        ),
        Column("answer", _TEXT, "prompts", doc="what the grader compares with"),
        Column("prompt_tokens", _IDS, "prompts", "P", "id", "student prompt"),
        Column(
            "teacher_prompt_tokens",
            _IDS,
            "prompts",
            "Q",
            "id",
            "privileged prompt: problem and reference solution",
            nullable=True,
        ),
        Column("trace_id", _TEXT, "rollout", doc="key of a trace: hash of run seed, round, prompt and sample"),
        Column("prompt_index", pa.int32(), "rollout", doc="row of this trace's prompt in the prompts shard"),
        Column("sample_index", pa.int32(), "rollout", doc="0 .. G-1 within the prompt's group"),
        Column("trace_source", _TEXT, "rollout", doc="student or teacher: whose prompt and weights wrote the trace"),
        Column("response_tokens", _IDS, "rollout", "T", "id", "sampled ids, end-of-sequence included"),
        Column("response_text", _TEXT, "rollout", doc="decoded response, special tokens left out"),
        Column("rollout_logprobs", _FLOATS, "rollout", "T", "nats", "of the writer, raw, temperature 1"),
        Column("rollout_entropy", _FLOATS, "rollout", "T", "nats", "of the writer's full distribution"),
        Column(
            "rollout_entropy_error", pa.float32(), "rollout", unit="nats", doc="largest half-width of the bounds; 0 when exact"
        ),
        Column("finish_reason", _TEXT, "rollout", doc="stop or length"),
        Column("policy_version", pa.int32(), "rollout", doc="version of the adapter that answered; 0 is the base"),
        Column("policy_lag", pa.int32(), "rollout", doc="rounds by which the round's policy is behind it; 0 is on-policy"),
        Column("seed", pa.int64(), "rollout", doc="sampling seed of this trace"),
        Column("verdict", _TEXT, "grade", doc="correct, wrong, unparsable, truncated, timeout"),
        Column("extracted_answer", _TEXT, "grade", doc="what the response answers, as the grader read it", nullable=True),
        Column("reward", pa.float32(), "grade", doc="length-shaped, 0 or in [1, 1 + beta_length]"),
        Column("advantage", pa.float32(), "grade", doc="running or group estimator"),
        Column("student_logprobs", _FLOATS, "score", "T", "nats", "under the student prompt, adapter on"),
        Column("teacher_logprobs", _FLOATS, "score", "T", "nats", "under the privileged prompt, adapter off"),
        Column("teacher_entropy", _FLOATS, "score", "T", "nats", "of the teacher's full distribution"),
        Column("entropy_method", _TEXT, "score", doc="exact, or bounds (midpoint of the top-k bounds)"),
        Column("entropy_error", pa.float32(), "score", unit="nats", doc="largest half-width of the bounds; 0 when exact"),
        Column("student_logprob_source", _TEXT, "score", doc="rollout: taken from generation; score: scored again"),
        Column(
            "student_logprob_gap",
            pa.float32(),
            "score",
            unit="nats",
            doc="largest |rollout - scored| of a re-scored sample, else null",
            nullable=True,
        ),
        Column("lookahead_entropy", _FLOATS, "profile", "T", "nats", "least entropy of a token and the next W"),
        Column("entropy_mean", pa.float32(), "profile", unit="nats"),
        Column("entropy_p50", pa.float32(), "profile", unit="nats"),
        Column("entropy_p90", pa.float32(), "profile", unit="nats"),
        Column("entropy_max", pa.float32(), "profile", unit="nats"),
        Column("share_lock", pa.float32(), "profile", doc="share of tokens in this regime"),
        Column("share_mid", pa.float32(), "profile", doc="share of tokens in this regime"),
        Column("share_pivot", pa.float32(), "profile", doc="share of tokens in this regime"),
        Column("share_fork", pa.float32(), "profile", doc="share of tokens in this regime"),
        Column("regime", pa.list_(pa.int8()), "label", "T", doc="0 lock, 1 mid, 2 pivot, 3 fork"),
        Column("spans", _SPANS, "label", "S", doc="maximal runs of one regime: [start, end), mean and peak entropy"),
        Column("gate", _FLOATS, "label", "T", doc="confidence omega in [floor, 1]; its M is the largest entropy of the round"),
        Column("token_weight", _FLOATS, "label", "T", doc="advantage x magnitude x gate"),
    )
}

WEIGHTS = ("model.path", "model.revision", "model.dtype", "model.max_model_len")  # settings that decide an engine's numbers


def schema(stage: Stage) -> pa.Schema:
    """Arrow schema of a stage's shard: key, reject_reason (null = goes on), reject_detail, then the columns it writes."""
    columns = [c for c in stage.writes if c.name != stage.key]
    fields = [pa.field(stage.key, _TEXT, nullable=False), pa.field("reject_reason", _TEXT), pa.field("reject_detail", _TEXT)]
    return pa.schema(fields + [pa.field(c.name, c.type) for c in columns])


# ---- what stages and engines say to each other ------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """Who must answer: base weights plus the adapter at `adapter` (a URI), or the base alone when adapter is None."""

    version: int
    adapter: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How traces are sampled; log-probs and entropies that come back are raw (temperature 1) whatever stands here."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Generate:
    """One trace to write: prompt ids and the seed that, with the policy, decides the trace."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Sequence:
    """One response to score under one prompt."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, eq=False)
class Generation:
    """tokens int32 [T], logprobs float32 [T] nats, entropy float32 [T] nats, of the distribution that wrote them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float
    finish_reason: str
    policy_version: int


@dataclass(frozen=True, eq=False)
class Score:
    """tokens int32 [T] as the engine saw them, logprobs float32 [T] nats, entropy float32 [T] nats."""

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float


@dataclass(frozen=True)
class Failure:
    """One request that an engine could not answer; its neighbours were answered."""

    cause: str


@dataclass(frozen=True)
class EngineFacts:
    """What the numbers of an engine mean; stored with the data, and a mismatch is refused."""

    entropy_method: str  # exact | bounds
    logprobs_mode: str  # raw_logprobs
    dtype: str
    engine: str  # "vllm 0.32.0"
    max_model_len: int
    vocab_size: int


class Engines(Protocol):
    """Inference as the stages see it: one engine, or a pool of them. Answers keep the order of the requests."""

    def facts(self) -> EngineFacts:
        """What the numbers mean: entropy method, log-prob mode, dtype, engine version."""
        ...

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """Write one trace per request with `policy`."""
        ...

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Log-prob and entropy of every response token under `policy`, at temperature 1."""
        ...


@dataclass(frozen=True)
class Usage:
    """What a pool of engines has done in its life.

    busiest_s: seconds of work of its busiest engine; idle_s: seconds without work, added up over engines that could answer; most:
    engines that it may have now.
    """

    busiest_s: float
    idle_s: float
    most: int


class PooledEngines(Engines, Protocol):
    """Inference as the driver sees it: a pool that also tells what its engines have done."""

    def usage(self) -> Usage:
        """What its engines have done so far."""
        ...
