"""Rounds and evaluations of a run: their plans, what makes a shard stale, the state carried from round to round. No Ray.

A shard is fresh when it was made with the settings its stage reads and from the inputs that are there now, by hash. Recomputing
an input to the same bytes therefore makes nothing stale.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import contract
from pipeline.config import Run
from pipeline.contract import Engines, Stage
from pipeline.errors import StoreError, UserError
from pipeline.rewards import RunningBaseline
from pipeline.sources import Problem, ProblemSet, epoch_indices
from pipeline.store import Store, area

MEASURE = ("prompts", "rollout", "grade", "score")
LABELS = ("profile", "label")
TRAINED_ON = MEASURE


@dataclass(frozen=True)
class Round:
    """One round (or evaluation) of a run, as every stage of it sees it. Picklable.

    `shards` maps shard to source indices; `baseline` is the running reward state at the start of the round, None where the
    group estimator is used; `engines` maps stage to its pool.
    """

    store: Store
    run: Run
    kind: str
    number: int
    policy_version: int
    shards: dict[str, list[int]]
    baseline: RunningBaseline | None
    engines: dict[str, Engines]

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
    shards = {f"{i // size:04d}": indices[i : i + size] for i in range(0, len(indices), size)}
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


def expected_inputs(work: Round, stage: Stage, shard: str, problems: str | None = None) -> dict[str, str] | None:
    """What a fresh shard of `stage` would be made from; None while an input shard does not exist.

    `problems` is the digest of the shard's source rows where the source is open; without it the last one is trusted.
    """
    found: dict[str, str] = {}
    for name in contract.inputs(stage):
        entry = work.store.entry(work.area, name, shard)
        if entry is None:
            return None
        found[name] = entry.sha256
    if stage.name == "prompts" and problems is not None:
        found["problems"] = problems
    if stage.name in {"rollout", "score"} and work.policy_version:
        manifest = work.store.read_bytes(f"{area('policy', work.policy_version)}/manifest.json") or b""
        found["policy"] = hashlib.sha256(manifest).hexdigest()[:16]
    if stage.name == "grade" and work.baseline is not None:
        found["baseline"] = _digest(work.baseline.to_dict())
    if stage.name in LABELS:
        peak = entropy_peak(work)
        if peak is None:
            return None
        if stage.name == "label" or work.run.profile.normaliser == "batch_max":
            found["peak"] = repr(peak)
    return found


def why_stale(work: Round, stage: Stage, shard: str, problems: str | None = None) -> str | None:
    """Why a shard must be computed: missing, settings, or the input that changed; None when it is fresh."""
    entry = work.store.entry(work.area, stage.name, shard)
    if entry is None:
        return "missing"
    if entry.settings != work.run.digest(stage.settings):
        return "settings"
    expected = expected_inputs(work, stage, shard, problems)
    if expected is None:
        return "input missing"
    named = expected.keys() | (entry.inputs.keys() & {"policy"})  # a shard that a policy made, where the base must answer now
    changed = [name for name in sorted(named) if entry.inputs.get(name) != expected.get(name)]
    return f"{changed[0]} changed" if changed else None


def stale_input(work: Round, stage: Stage, shard: str) -> str | None:
    """The input stage of a shard that would itself be computed again, and why; None when all are fresh.

    What only reads stored traces (grade, profile, label) may also read those whose policy has been trained again since.
    """
    for name in contract.inputs(stage):
        reason = why_stale(work, contract.STAGES[name], shard)
        if reason and not (reason == "policy changed" and stage.where == "CPU"):
            return f"{name} ({reason})"
    return None


def entropy_peak(work: Round) -> float | None:
    """Largest teacher entropy of the round in nats, the scope of the label stage's gate; None while scores are missing."""
    entries = work.store.entries(work.area, "score")
    if not work.shards.keys() <= entries.keys():
        return None
    return max((entries[shard].facts["entropy_max"] for shard in work.shards), default=0.0)


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
    shards = {}
    for shard in work.shards:
        entries = {name: work.store.entry(work.area, name, shard) for name in TRAINED_ON}
        shards[shard] = {name: entry.sha256 for name, entry in entries.items() if entry is not None}
        if len(shards[shard]) < len(TRAINED_ON):
            raise StoreError("a round is committed with a shard missing", f"{work.area}, shard {shard}")
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


def scope(work: Round) -> tuple[float, int]:
    """The round's largest entropy in nats, and the vocabulary its distributions run over."""
    peak = entropy_peak(work)
    assert peak is not None
    return peak, next(iter(work.store.entries(work.area, "score").values())).facts["vocab_size"]


def problems_digest(problems: list[Problem]) -> str:
    """Hash of source rows."""
    return _digest([asdict(p) for p in problems])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
