"""The stages as Ray Data executions over shards: what is missing or stale is computed and committed, the rest is left alone.

One execution streams every shard of a round through a chain of stages; each shard moves on as soon as it is committed, so one
shard is graded while another is still being written. Two chains make a round: MEASURE ends with what training reads; LABELS
needs the round's largest entropy, hence all of MEASURE, and runs while the trainer is already at work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import contract, errors, stages
from pipeline.config import Model, Run
from pipeline.contract import Engines, Stage
from pipeline.errors import EgrsdError, StoreError, UserError
from pipeline.grading import shared_grader
from pipeline.prompts import load_tokenizer
from pipeline.rewards import RunningBaseline
from pipeline.sources import Problem, ProblemSet, epoch_indices
from pipeline.store import Entry, Store, area
from pipeline.tiny import resolve_model

MEASURE = ("prompts", "rollout", "grade", "score")
LABELS = ("profile", "label")
TRAINED_ON = MEASURE


@dataclass(frozen=True)
class Round:
    """One round (or evaluation) of a run, as every stage of it sees it. Picklable; `engines` maps stage to its pool."""

    store: Store
    run: Run
    kind: str
    number: int
    policy_version: int
    shards: dict[str, list[int]]
    engines: dict[str, Engines]

    @property
    def area(self) -> str:
        """Folder of the round."""
        return area(self.kind, self.number)


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
    plan = {"policy": policy_version, "shards": shards, "source": source.fingerprint}
    path = f"{area(kind, number)}/plan.json"
    if store.read_json(path) != plan:
        store.write_json(path, plan)
    return Round(store, run, kind, number, policy_version, shards, {})


def open_round(store: Store, run: Run, kind: str, number: int) -> Round:
    """A round that was planned earlier. Raises UserError when there is none."""
    plan = store.read_json(f"{area(kind, number)}/plan.json")
    if plan is None:
        known = store.numbers(kind)
        here = f"Here: {known[0]} to {known[-1]}" if known else "Start the run with `egrsd distill`"
        raise UserError(f"no {kind.removesuffix('s')} {number}", store.uri, here)
    return Round(store, run, kind, number, plan["policy"], plan["shards"], {})


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
    if stage.name == "grade" and work.run.grade.advantage == "running":
        found["baseline"] = _digest(baseline(work).to_dict())
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
    changed = [name for name, value in expected.items() if entry.inputs.get(name) != value]
    return f"{changed[0]} changed" if changed else None


def entropy_peak(work: Round) -> float | None:
    """Largest teacher entropy of the round in nats, the scope of the label stage's gate; None while scores are missing."""
    entries = work.store.entries(work.area, "score")
    if not work.shards.keys() <= entries.keys():
        return None
    return max((entries[shard].facts["entropy_max"] for shard in work.shards), default=0.0)


def baseline(work: Round) -> RunningBaseline:
    """Running reward state at the start of a round: all rewards of earlier rounds, folded in order and kept per round."""
    state = RunningBaseline()
    if work.kind != "rounds":
        return state
    for number in range(work.number):
        earlier = open_round(work.store, work.run, "rounds", number)
        entries = work.store.entries(earlier.area, "grade")
        hashes = {shard: entries[shard].sha256 for shard in earlier.shards if shard in entries}
        before = _digest(state.to_dict())
        kept = work.store.read_json(f"{earlier.area}/baseline.json")
        if kept is None or kept["grade"] != hashes or kept["before"] != before:
            rewards = [work.store.read(entries[shard], ["reward"])["reward"] for shard in sorted(hashes)]
            merged = pc.drop_null(pa.chunked_array([c for r in rewards for c in r.chunks], pa.float32()))
            state = state.update(merged.to_numpy())
            kept = {"grade": hashes, "before": before, "after": state.to_dict()}
            work.store.write_json(f"{earlier.area}/baseline.json", kept)
        state = RunningBaseline.from_dict(kept["after"])
    return state


# ---- execution ---------------------------------------------------------------------------------------------------------


def execute(
    work: Round,
    chain: tuple[str, ...],
    source: ProblemSet | None = None,
    *,
    force: bool = False,
    only: set[str] | None = None,
    inflight: int = 4,
    on_entry: Callable[[Entry, bool], None] = lambda *_: None,
) -> list[Entry]:
    """Bring the stages of `chain` up to date for every shard; returns their entries, fresh and old.

    `on_entry(entry, computed)` is called as shards get done. `inflight` bounds the shards that wait on engines at one time.
    Raises the stage's own error, not Ray's wrapping of it.
    """
    todo, done = [], []
    for shard, indices in work.shards.items():
        problems = source.rows(indices) if source is not None and "prompts" in chain else None
        digest = problems_digest(problems) if problems is not None else None
        fresh = not (force and (only is None or shard in only)) and all(
            why_stale(work, contract.STAGES[name], shard, digest) is None for name in chain
        )
        if fresh or (only is not None and shard not in only):
            done += [entry for name in chain if (entry := work.store.entry(work.area, name, shard)) is not None]
        else:
            text = json.dumps([asdict(p) for p in problems]) if problems is not None else ""
            todo.append({"shard": shard, "problems": text, "entries": "[]", "error": ""})
    for entry in done:
        on_entry(entry, False)
    for row in _stream(work, chain, todo, force, inflight) if todo else ():
        for document in json.loads(row["entries"]):
            entry = Entry(**document["entry"])
            on_entry(entry, document["computed"])
            done.append(entry)
    return done


def _stream(
    work: Round, chain: tuple[str, ...], rows: list[dict[str, str]], force: bool, inflight: int
) -> Iterator[dict[str, Any]]:
    import ray.data

    quiet_ray_data()
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for name in chain:
        on_engines = contract.STAGES[name].where == "engines"
        data = data.map(
            partial(_bring_up_to_date, work, name, force),
            num_cpus=0.05 if on_engines else 1,
            compute=ray.data.TaskPoolStrategy(size=min(inflight, len(rows))) if on_engines else None,
        )
    for row in data.iter_rows():
        if row["error"]:
            kind, *said = json.loads(row["error"])
            raise getattr(errors, kind)(*said)
        yield row


def _bring_up_to_date(work: Round, name: str, force: bool, row: dict[str, Any]) -> dict[str, Any]:
    """One shard through one stage, inside a Ray task. An error we understand travels as data: Ray keeps only its text."""
    if row["error"]:
        return row
    problems = [Problem(**item) for item in json.loads(row["problems"])] if row["problems"] else None
    try:
        entry, computed = bring_up_to_date(work, contract.STAGES[name], row["shard"], problems, force)
    except EgrsdError as error:
        return row | {"error": json.dumps([type(error).__name__, *error.args])}
    return row | {"entries": json.dumps([*json.loads(row["entries"]), {"entry": asdict(entry), "computed": computed}])}


def bring_up_to_date(
    work: Round, stage: Stage, shard: str, problems: list[Problem] | None = None, force: bool = False
) -> tuple[Entry, bool]:
    """Compute and commit one shard of one stage unless it is fresh. Returns its entry and whether it was computed.

    Raises StoreError when an input is missing, and whatever the stage raises.
    """
    digest = problems_digest(problems) if problems is not None else None
    old = work.store.entry(work.area, stage.name, shard)
    if old is not None and not force and why_stale(work, stage, shard, digest) is None:
        return old, False
    inputs = expected_inputs(work, stage, shard, digest)
    if inputs is None:
        needs = ", ".join(contract.inputs(stage))
        raise StoreError(f"an input of stage {stage.name} is missing", f"{work.area}, shard {shard}", f"Run these first: {needs}")
    entries = {name: work.store.entry(work.area, name, shard) for name in contract.inputs(stage)}
    start = time.perf_counter()
    tables = {name: work.store.read(entry, _declared(stage, name)) for name, entry in entries.items() if entry is not None}
    table, facts = _compute(work, stage.name, tables, problems)
    entry = work.store.commit(
        work.area,
        stage,
        shard,
        table,
        settings=work.run.digest(stage.settings),
        inputs=inputs,
        seconds=time.perf_counter() - start,
        facts=facts,
    )
    return entry, True


def _declared(stage: Stage, writer: str) -> list[str]:
    """The columns of `writer` that `stage` may read: its key, its rejections, and what the contract declares."""
    own = [name for name in stage.reads if contract.COLUMNS[name].writer == writer]
    return [contract.STAGES[writer].key, "reject_reason", "reject_detail", *own]


def _compute(
    work: Round, stage: str, tables: dict[str, pa.Table], problems: list[Problem] | None
) -> tuple[pa.Table, dict[str, Any]]:
    run = work.run
    match stage:
        case "prompts":
            if problems is None:
                raise StoreError("the source is not open", "stage prompts", "Run it through `egrsd stage prompts`")
            return stages.prompts(problems, run, _tokenizer(run.model)), {}
        case "rollout":
            engines = work.engines["rollout"]
            table = stages.rollout(tables["prompts"], run, engines, work.store.policy(work.policy_version), work.area)
            return stages.decode(table, _tokenizer(run.model)), asdict(engines.facts())
        case "grade":
            state = baseline(work) if run.grade.advantage == "running" else None
            grader = shared_grader(run.grade.verifier, run.grade.answer_pattern, run.grade.deadline_s, run.grade.processes)
            return stages.grade(tables["prompts"], tables["rollout"], run, grader, state), {}
        case "score":
            engines = work.engines["score"]
            policy = work.store.policy(work.policy_version)
            table = stages.score(tables["prompts"], tables["rollout"], run, engines, policy)
            return table, {"entropy_max": stages.entropy_max(table), **asdict(engines.facts())}
        case "profile":
            return stages.profile(tables["score"], run, *_scope(work)), {}
        case "label":
            peak = _scope(work)[0]
            return stages.label(tables["grade"], tables["score"], tables["profile"], run, *_scope(work)), {"peak": peak}
    raise AssertionError(stage)


def _scope(work: Round) -> tuple[float, int]:
    """The round's largest entropy in nats, and the vocabulary its distributions run over."""
    peak = entropy_peak(work)
    assert peak is not None
    return peak, next(iter(work.store.entries(work.area, "score").values())).facts["vocab_size"]


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


def problems_digest(problems: list[Problem]) -> str:
    """Hash of source rows."""
    return _digest([asdict(p) for p in problems])


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


def quiet_ray_data() -> None:
    """Ray Data without its progress bars and plan logs: the command line draws its own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@lru_cache(maxsize=4)
def _tokenizer_of(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    return load_tokenizer(resolve_model(path), revision, trust_remote_code)


def _tokenizer(model: Model) -> Any:
    return _tokenizer_of(model.path, model.revision, model.trust_remote_code)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
