"""The stages as Ray Data executions over shards: what is missing or stale is computed and committed, the rest is left alone.

One execution streams every shard of a round through a chain of stages; each shard moves on as soon as it is committed, so one
shard is graded while another is still being written. Two chains make a round: MEASURE ends with what training reads; LABELS
needs the round's largest entropy, hence all of MEASURE, and runs while the trainer is already at work.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from pipeline import contract, stages
from pipeline.config import Model
from pipeline.contract import Stage
from pipeline.errors import EgrsdError, EngineError, StoreError, from_data, to_data
from pipeline.grading import shared_grader
from pipeline.prompts import load_tokenizer
from pipeline.rounds import Round, expected_inputs, problems_digest, scope, stale_input, why_stale
from pipeline.sources import Problem, ProblemSet
from pipeline.store import Entry
from pipeline.tiny import resolve_model


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
    missing, done, now = [], [], replace(work, store=work.store.snapshot())
    for shard, indices in work.shards.items():
        problems = source.rows(indices) if source is not None and "prompts" in chain else None
        digest = problems_digest(problems) if problems is not None else None
        fresh = not (force and (only is None or shard in only)) and all(
            why_stale(now, contract.STAGES[name], shard, digest) is None for name in chain
        )
        if fresh or (only is not None and shard not in only):
            done += [entry for name in chain if (entry := now.store.entry(work.area, name, shard)) is not None]
        else:
            text = json.dumps([asdict(p) for p in problems]) if problems is not None else ""
            missing.append({"shard": shard, "problems": text, "entries": "[]", "error": ""})
    for entry in done:
        on_entry(entry, False)
    for row in _stream(work, chain, missing, force, inflight) if missing else ():
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
            raise from_data(json.loads(row["error"]))
        yield row


def _bring_up_to_date(work: Round, name: str, force: bool, row: dict[str, Any]) -> dict[str, Any]:
    """One shard through one stage, inside a Ray task. An error we understand travels as data: Ray keeps only its text."""
    if row["error"]:
        return row
    problems = [Problem(**item) for item in json.loads(row["problems"])] if row["problems"] else None
    try:
        entry, computed = bring_up_to_date(work, contract.STAGES[name], row["shard"], problems, force)
    except EgrsdError as error:
        return row | {"error": json.dumps(to_data(error))}
    return row | {"entries": json.dumps([*json.loads(row["entries"]), {"entry": asdict(entry), "computed": computed}])}


def bring_up_to_date(
    work: Round, stage: Stage, shard: str, problems: list[Problem] | None = None, force: bool = False
) -> tuple[Entry, bool]:
    """Compute and commit one shard of one stage unless it is fresh. Returns its entry and whether it was computed.

    Raises StoreError when an input is missing, and whatever the stage raises.
    """
    work = replace(work, store=work.store.snapshot())
    digest = problems_digest(problems) if problems is not None else None
    old = work.store.entry(work.area, stage.name, shard)
    if old is not None and not force and why_stale(work, stage, shard, digest) is None:
        return old, False
    inputs = expected_inputs(work, stage, shard, digest)
    if inputs is None:
        needs = ", ".join(contract.inputs(stage))
        raise StoreError(f"an input of stage {stage.name} is missing", f"{work.area}, shard {shard}", f"Run these first: {needs}")
    if reason := stale_input(work, stage, shard):
        raise StoreError(
            f"an input of stage {stage.name} is stale: {reason}", f"{work.area}, shard {shard}", "Run that stage first"
        )
    entries = {name: work.store.entry(work.area, name, shard) for name in contract.inputs(stage)}
    _check_facts(work, stage, entries)
    start = time.perf_counter()
    tables = {name: work.store.read(entry, declared(stage, name)) for name, entry in entries.items() if entry is not None}
    table, facts = _compute(work, stage.name, shard, tables, problems)
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


def _check_facts(work: Round, stage: Stage, entries: Mapping[str, Entry | None]) -> None:
    """Refuse to score with other numerics than those that wrote the traces (traps 3 and 4)."""
    if stage.name != "score" or (rollout := entries["rollout"]) is None:
        return
    wrote, scores = rollout.facts, asdict(work.engines["score"].facts())
    if changed := [
        name for name in ("engine", "dtype", "logprobs_mode", "entropy_method", "vocab_size") if wrote[name] != scores[name]
    ]:
        named = ", ".join(f"{name} was {wrote[name]}, now {scores[name]}" for name in changed)
        where = f"{work.area}, shard {rollout.shard}"
        raise EngineError(f"the engine that scores is not like the one that wrote the traces: {named}", where, "Roll out again")


def declared(stage: Stage, writer: str) -> list[str]:
    """The columns of `writer` that `stage` may read: its key, its rejections, and what the contract declares."""
    own = [name for name in stage.reads if contract.COLUMNS[name].writer == writer]
    return [contract.STAGES[writer].key, "reject_reason", "reject_detail", *own]


def _compute(
    work: Round, stage: str, shard: str, tables: dict[str, pa.Table], problems: list[Problem] | None
) -> tuple[pa.Table, dict[str, Any]]:
    run = work.run
    match stage:
        case "prompts":
            if problems is None:
                raise StoreError("the source is not open", "stage prompts", "Run it through `egrsd stage prompts`")
            return stages.prompts(problems, run, _tokenizer(run.model)), {}
        case "rollout":
            engines = work.engines["rollout"]
            first = sum(len(rows) for name, rows in work.shards.items() if name < shard)
            policy = work.store.policy(work.policy_version)
            table = stages.rollout(tables["prompts"], run, engines, policy, work.area, first, work.lag)
            return stages.decode(table, _tokenizer(run.model)), asdict(engines.facts())
        case "grade":
            grader = shared_grader(run.grade.verifier, run.grade.answer_pattern, run.grade.deadline_s, run.grade.processes)
            return stages.grade(tables["prompts"], tables["rollout"], run, grader, work.baseline), {}
        case "score":
            engines = work.engines["score"]
            policy = work.store.policy(work.policy_version)
            table = stages.score(tables["prompts"], tables["rollout"], run, engines, policy)
            return table, {"entropy_max": stages.entropy_max(table), **asdict(engines.facts())}
        case "profile":
            return stages.profile(tables["score"], run, *scope(work)), {}
        case "label":
            peak = scope(work)[0]
            return stages.label(tables["grade"], tables["score"], tables["profile"], run, *scope(work)), {"peak": peak}
    raise AssertionError(stage)


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
