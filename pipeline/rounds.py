"""Rounds and evaluations of a run: their plans, what makes a shard stale, the state carried from round to round. No Ray.

A shard is fresh when it was made with the settings its stage reads and from the inputs that are there now, by hash. Recomputing
an input to the same bytes therefore makes nothing stale.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import contract
from pipeline.config import Run
from pipeline.contract import Engines, Stage
from pipeline.errors import StoreError, UserError
from pipeline.rewards import RunningBaseline
from pipeline.sources import Problem, ProblemSet, epoch_indices
from pipeline.store import Entry, Store, area

MEASURE = ("prompts", "rollout", "grade", "score")
LABELS = ("profile", "label")
TRAINED_ON = MEASURE
EVALUATION = ("prompts", "rollout", "grade")


@dataclass(frozen=True)
class Round:
    """One round (or evaluation) of a run, as every stage of it sees it. Picklable.

    `shards` maps shard to source indices; `baseline` is the running reward state at the start of the round, None where the
    group estimator is used; `engines` maps stage to its pool; `scope` is Inventory.scope for tasks, so that none reads it again.
    """

    store: Store
    run: Run
    kind: str
    number: int
    policy_version: int
    shards: dict[str, list[int]]
    baseline: RunningBaseline | None
    engines: dict[str, Engines]
    scope: tuple[float, int] | None = None

    @property
    def area(self) -> str:
        """Folder of the round."""
        return area(self.kind, self.number)

    @property
    def lag(self) -> int:
        """Rounds between the policy that answers and the one an on-policy round would ask for; 0 for an evaluation."""
        return self.number - self.policy_version if self.kind == "rounds" else 0


def plan_round(store: Store, run: Run, kind: str, number: int, policy_version: int, source: ProblemSet) -> Round:
    """The shards of a round as source indices, persisted in plan.json so that a rerun meets the same ones.

    Rounds walk through shuffled epochs of the source without a gap; an evaluation takes the first problems in order.
    """
    count = run.rollout.prompts_per_round
    if kind == "rounds":
        indices = epoch_indices(len(source), run.seed, number * count, count).tolist()
    else:
        indices = list(range(min(count, len(source))))
    size = run.rollout.prompts_per_shard
    width = max(4, len(str(len(indices) // size)))  # names sort like numbers
    shards = {f"{i // size:0{width}d}": indices[i : i + size] for i in range(0, len(indices), size)}
    plan = {"policy": policy_version, "shards": shards, "source": source.fingerprint, "asked": count}
    path = f"{area(kind, number)}/plan.json"
    if store.read_json(path) != plan:
        store.write_json(path, plan)
    return Round(store, run, kind, number, policy_version, shards, _baseline(store, run, kind, number, keep=True), {})


def open_round(store: Store, run: Run, kind: str, number: int, baseline: RunningBaseline | None = None) -> Round:
    """A round that was planned earlier; `baseline` saves folding it again. Raises UserError when there is none."""
    plan = store.read_json(f"{area(kind, number)}/plan.json", "policy", "shards")
    if plan is None:
        known = store.numbers(kind)
        here = f"Here: {known[0]} to {known[-1]}" if known else "Start the run with `egrsd distill`"
        raise UserError(f"no {kind.removesuffix('s')} {number}", store.uri, here)
    state = baseline or _baseline(store, run, kind, number)
    return Round(store, run, kind, number, plan["policy"], plan["shards"], state, {})


def open_rounds(store: Store, run: Run) -> Iterator[Round]:
    """All planned rounds in order; the running reward state is folded once."""
    states = baselines(store, run)
    for number in store.numbers("rounds"):
        if store.read_json(f"{area('rounds', number)}/plan.json") is not None:
            yield open_round(store, run, "rounds", number, next(states, None))


# ---- staleness ---------------------------------------------------------------------------------------------------------


class Inventory:
    """What is there of a round, for one question: every entry, setting and policy is read at most once.

    `whole` reads all entries of a stage at the first one asked for, as a driver wants them; without it a shard's are read one
    by one, as a task does that works on a few. Ask a new one what is there later.
    """

    def __init__(self, work: Round, whole: bool = True) -> None:
        self.work, self._whole = work, whole
        self._stages: dict[str, dict[str, Entry]] = {}
        self._single: dict[tuple[str, str], Entry | None] = {}
        self._settings: dict[str, str] = {}

    def entries(self, name: str) -> dict[str, Entry]:
        """Entries of a stage for the shards that the round's plan names; others are left over from an earlier plan."""
        if name not in self._stages:
            found = self.work.store.entries(self.work.area, name)
            self._stages[name] = {shard: entry for shard, entry in found.items() if shard in self.work.shards}
        return self._stages[name]

    def entry(self, name: str, shard: str) -> Entry | None:
        """Entry of one shard, None where it does not exist."""
        if self._whole:
            return self.entries(name).get(shard)
        if (name, shard) not in self._single:
            self._single[name, shard] = self.work.store.entry(self.work.area, name, shard)
        return self._single[name, shard]

    def expected_inputs(self, stage: Stage, shard: str, problems: str | None = None) -> dict[str, str] | None:
        """What a fresh shard of `stage` would be made from; None while an input shard does not exist.

        `problems` is the digest of the shard's source rows where the source is open; without it the last one is trusted.
        """
        found: dict[str, str] = {}
        for name in contract.inputs(stage):
            entry = self.entry(name, shard)
            if entry is None:
                return None
            found[name] = entry.sha256
        if stage.name == "prompts" and problems is not None:
            found["problems"] = problems
        if stage.name in {"rollout", "score"} and self.work.policy_version:
            found["policy"] = self._policy
        if stage.name == "grade" and self._baseline is not None:
            found["baseline"] = self._baseline
        if stage.name in LABELS:
            if self.scope is None:
                return None
            if stage.name == "label" or self.work.run.profile.normaliser == "batch_max":
                found["peak"] = repr(self.scope[0])
        return found

    def why_stale(self, stage: Stage, shard: str, problems: str | None = None) -> str | None:
        """Why a shard must be computed: missing, settings, or the input that changed; None when it is fresh."""
        entry = self.entry(stage.name, shard)
        if entry is None:
            return "missing"
        if entry.settings != self.settings(stage):
            return "settings"
        expected = self.expected_inputs(stage, shard, problems)
        if expected is None:
            return "input missing"
        named = expected.keys() | (entry.inputs.keys() & {"policy"})  # made by a policy, where the base must answer now
        changed = [name for name in sorted(named) if entry.inputs.get(name) != expected.get(name)]
        return f"{changed[0]} changed" if changed else None

    def reasons(self, name: str) -> Counter[str]:
        """Shards of a stage by why they must be computed."""
        found = (self.why_stale(contract.STAGES[name], shard) for shard in self.work.shards)
        return Counter(reason for reason in found if reason is not None)

    def stale_input(self, stage: Stage, shard: str) -> str | None:
        """The input stage of a shard that would itself be computed again, and why; None when all are fresh.

        What only reads stored traces (grade, profile, label) may also read those whose policy has been trained again since.
        """
        for name in contract.inputs(stage):
            reason = self.why_stale(contract.STAGES[name], shard)
            if reason and not (reason == "policy changed" and stage.where == "CPU"):
                return f"{name} ({reason})"
        return None

    def settings(self, stage: Stage) -> str:
        """Hash of the settings that a stage reads."""
        if stage.name not in self._settings:
            self._settings[stage.name] = self.work.run.digest(stage.settings)
        return self._settings[stage.name]

    @cached_property
    def scope(self) -> tuple[float, int] | None:
        """Largest teacher entropy of the round in nats, which the label stage's gate divides by, and the size of the vocabulary
        that its distributions run over; None while scores are missing."""
        if self.work.scope is not None:
            return self.work.scope
        entries = self.entries("score")
        if not entries or self.work.shards.keys() - entries.keys():
            return None
        facts = [entry.facts for entry in entries.values()]
        return max(fact["entropy_max"] for fact in facts), facts[0]["vocab_size"]

    @cached_property
    def _policy(self) -> str:
        manifest = self.work.store.read_bytes(f"{area('policy', self.work.policy_version)}/manifest.json") or b""
        return hashlib.sha256(manifest).hexdigest()[:16]

    @cached_property
    def _baseline(self) -> str | None:
        return None if self.work.baseline is None else _digest(self.work.baseline.to_dict())


def why_stale(work: Round, stage: Stage, shard: str) -> str | None:
    """Inventory.why_stale for a single shard."""
    return Inventory(work, whole=False).why_stale(stage, shard)


def baselines(store: Store, run: Run, keep: bool = False) -> Iterator[RunningBaseline]:
    """Running reward state at the start of round 0, 1, ...: all rewards of earlier rounds, folded in order.

    Each round's part is on file (written with `keep`, by whoever drives the run) and is folded again when its grades, or what
    came before them, changed. Nothing where the group estimator is used.
    """
    if run.grade.advantage != "running":
        return
    state = RunningBaseline()
    for number in itertools.count():
        yield state
        where = area("rounds", number)
        plan = store.read_json(f"{where}/plan.json", "shards") or {"shards": {}}
        entries = {shard: entry for shard, entry in store.entries(where, "grade").items() if shard in plan["shards"]}
        hashes, before = {shard: entry.sha256 for shard, entry in entries.items()}, _digest(state.to_dict())
        kept = store.read_json(f"{where}/baseline.json", "grade", "before", "after")
        if kept is None or kept["grade"] != hashes or kept["before"] != before:
            rewards = [store.read(entries[shard], ["reward"])["reward"] for shard in sorted(entries)]
            merged = pc.drop_null(pa.chunked_array([c for r in rewards for c in r.chunks], pa.float32()))
            kept = {"grade": hashes, "before": before, "after": state.update(merged.to_numpy()).to_dict()}
            if entries and keep:
                store.write_json(f"{where}/baseline.json", kept)
        state = RunningBaseline.from_dict(kept["after"])


def _baseline(store: Store, run: Run, kind: str, number: int, keep: bool = False) -> RunningBaseline | None:
    if run.grade.advantage != "running":
        return None
    return next(itertools.islice(baselines(store, run, keep), number, None)) if kind == "rounds" else RunningBaseline()


# ---- hand over ----------------------------------------------------------------------------------------------------------


def commit_round(work: Round) -> None:
    """Hand a round to the trainer: ready.json names exactly the shards it may train on."""
    seen = Inventory(work)
    shards = {
        shard: {name: entry.sha256 for name in TRAINED_ON if (entry := seen.entry(name, shard)) is not None}
        for shard in work.shards
    }
    if short := [shard for shard, hashes in shards.items() if len(hashes) < len(TRAINED_ON)]:
        raise StoreError("a round is committed with a shard missing", f"{work.area}, shard {short[0]}")
    document = {"policy": work.policy_version, "shards": shards}
    if work.store.ready(work.number) != document:
        work.store.write_json(f"{work.area}/ready.json", document)


def evaluation_run(run: Run) -> Run:
    """The run whose rounds are the evaluations of `run`: its held-out source and sampling, graded the same way."""
    ev = run.evaluation
    rollout = run.rollout.model_copy(
        update={
            "prompts_per_round": ev.problems,
            "prompts_per_shard": max(1, min(128, ev.problems)),
            "group_size": ev.samples,
            "temperature": ev.temperature,
            "top_p": ev.top_p,
            "top_k": ev.top_k,
            "max_new_tokens": ev.max_new_tokens,
            "teacher_share": 0.0,
        }
    )
    grade = run.grade.model_copy(update={"advantage": "running"})  # G may be 1; nothing trains on these advantages
    return run.model_copy(update={"source": ev.source, "rollout": rollout, "grade": grade})


def with_engines(work: Round, engines: Mapping[str, Engines]) -> Round:
    """The same round with engines at hand."""
    return replace(work, engines=dict(engines))


def problems_digest(problems: list[Problem]) -> str:
    """Hash of source rows."""
    return _digest([asdict(p) for p in problems])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
