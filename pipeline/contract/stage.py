"""What a stage is: the columns and settings that it reads, and what it is given to compute one shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipeline.contract.columns import COLUMNS, Column, reward_columns
from pipeline.contract.engines import Engines, Policy

if TYPE_CHECKING:
    from pipeline.config import Run
    from pipeline.grader.code import Code
    from pipeline.method.rewards import RunningBaseline
    from pipeline.problems.sources import Problem

# these settings change an engine's numbers
# what named teachers see, where their own settings do not say it: the shard of prompts does not have it
TEACHER_PROMPTS = ("prompts.teacher", "prompts.teacher_thinking")
ENGINE_SETTINGS = ("model.path", "model.revision", "model.dtype", "model.max_model_len")


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
    more_reads: columns that it reads only in some runs.
    asks: whether a stage on engines asks them anything in a run.
    in_run: whether a run has this stage.
    by_round: settings that reach it through its `round_inputs`. A change makes it stale where one of these inputs changes.
    """

    name: str
    where: str
    key: str
    reads: tuple[str, ...]
    settings: tuple[str, ...]
    compute: Callable[[ShardInputs], ShardResult]
    round_inputs: Callable[[Run], tuple[str, ...]] = lambda _: ()
    after_round: bool = False
    more_reads: Callable[[Run], tuple[str, ...]] = lambda _: ()
    asks: Callable[[Run], bool] = lambda _: True
    in_run: Callable[[Run], bool] = lambda _: True
    by_round: tuple[str, ...] = ()

    def read_by(self, run: Run) -> Stage:
        """This stage with every column that it reads in a run among its `reads`."""
        return replace(self, reads=(*self.reads, *more)) if (more := self.more_reads(run)) else self

    @property
    def writes(self) -> tuple[Column, ...]:
        """The columns that this stage writes, in file order. The key and reject_reason are not among them."""
        return tuple(c for c in COLUMNS.values() if c.writer == self.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose shards this stage may read, in the order of PLAN. A run may lack one of them."""
        return tuple(dict.fromkeys(column.writer for column in COLUMNS.values() if column.name in self.reads))

    def reads_of(self, writer: Stage) -> list[str]:
        """The columns of `writer` that this stage may read: the key, the rejections and the columns that it declares."""
        declared = [name for name in self.reads if COLUMNS[name].writer == writer.name]
        return [writer.key, "reject_reason", "reject_detail", *declared]

    def reads_setting(self, setting: str) -> bool:
        """Whether a change of `setting`, a dotted name, can make the shards of this stage stale."""
        parts = setting.split(".")
        read = (*self.settings, *self.by_round)
        return any(setting == name or setting.startswith(f"{name}.") or _matches(name, parts) for name in read)


def _matches(name: str, parts: list[str]) -> bool:
    """Whether a name such as `teachers.*.model` stands for a setting, or for a section around it, in parts."""
    wanted = name.split(".")
    return "*" in wanted and all(a in ("*", b) for a, b in zip(wanted, parts, strict=False))


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


class Seat(NamedTuple):
    """Where a teacher answers: its engines, and the policy that they must answer with."""

    engines: Engines
    policy: Policy


@dataclass(frozen=True)
class ShardInputs:
    """What a stage is given to compute one shard.

    tables, facts: the shard as the earlier stages made it, by stage name.
    problems: source rows, for the first stage only.
    engines, policy: for a stage that runs on engines.
    teachers: the seat of every teacher that the run names.
    baseline: running reward state at the start of the round. None with the group estimator.
    scope: for a stage that needs the whole round.
    codes: the code of each reward, by its name.
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
    teachers: Mapping[str, Seat] = field(default_factory=dict)
    codes: Mapping[str, Code] = field(default_factory=dict)

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


def schema(stage: Stage, optional: Collection[str] = ()) -> pa.Schema:
    """Arrow schema of a stage's shard: key, reject_reason, reject_detail, then the columns it writes.

    reject_reason is null in a row that goes on. Of the optional columns only those that `optional` names are there; so it is with
    the columns of single rewards.
    """
    columns = [c for c in stage.writes if c.name != stage.key and (not c.optional or c.name in optional)]
    columns += reward_columns(optional) if stage.name == "reward" else []
    fields = [
        pa.field(stage.key, pa.string(), nullable=False),
        pa.field("reject_reason", pa.string()),
        pa.field("reject_detail", pa.string()),
    ]
    return pa.schema(fields + [pa.field(c.name, c.type) for c in columns])
