"""Proves everything that lies in a run's folder: what `egrsd verify` says. Each finding names the file and the way out.

The invariants are listed in pipeline/README.md. The readers of the run check most of them on what they read. Only here all files
are read, ids of traces are computed again, and what nobody names is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import TOPK
from pipeline.digest import digest
from pipeline.errors import ContractError, EgrsdError, StoreError
from pipeline.rounds.baseline import baselines, read_kept
from pipeline.rounds.contents import read_models
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import has_figures
from pipeline.rounds.origin import read_sources
from pipeline.rounds.plan import Plan, read_plan
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import joined_round, left_out, read_shard
from pipeline.rounds.seats import MEAN_REMEDY, folder_of
from pipeline.stages import MEASURE, PLAN, STAGES
from pipeline.stages.prompts import prompt_id
from pipeline.stages.score import entropy_max
from pipeline.stages.tables import matrices, ragged
from pipeline.store.directory import Entry, Store, area
from pipeline.store.documents import RESTORE
from pipeline.store.folders import POLICY_REMEDY, STATE_REMEDY, check_folder, is_dropped, is_whole
from pipeline.store.names import EVALUATION_FOLDER
from pipeline.store.possible import SLACK, unlike_topk
from pipeline.store.shards import check_columns

_FIGURES = {
    "train": ("round", *("step", "loss", "grad_norm", "lr", "traces", "tokens", "rejected", "advantage", "weight", "delta")),
    "round": ("round", "policy_lag", "num_rows", "num_rejected", "accuracy", "mean_reward", "mean_length"),
}
LEFT = "Nothing reads it: delete it"
STORED_AGAIN = "Compute the stage again with `egrsd stage ... --force`"


@dataclass
class Proof:
    """What was found in a run so far: one line each. `read` counts shards, folders and files that were read whole."""

    store: Store
    run: Run
    findings: list[str] = field(default_factory=list)
    read: int = 0

    def say(self, error: EgrsdError) -> None:
        """Add a finding, once."""
        if str(error) not in self.findings:
            self.findings.append(str(error))

    @contextmanager
    def found(self) -> Iterator[None]:
        """An error of the block is a finding, and the proof goes on."""
        try:
            yield
            self.read += 1
        except EgrsdError as error:
            self.say(error)


def prove(store: Store, run: Run) -> Proof:
    """Read every file of a run and check every invariant."""
    proof = Proof(store, run)
    for number in store.numbers("rounds"):
        with proof.found():
            _prove_area(proof, area("rounds", number), "rounds", number)
    kinds = ["evals", *(f"evals/{name[0]}" for name in store.named("evals", EVALUATION_FOLDER))]
    for kind in kinds:
        for number in store.numbers(kind):
            with proof.found():
                _prove_area(proof, area(kind, number), kind, number)
    with proof.found():
        for work in open_rounds(store, run):
            with proof.found():
                _prove_round(proof, work)
    for kind, remedy in (("policy", POLICY_REMEDY), ("train", STATE_REMEDY)):
        for number in store.numbers(kind):
            if is_whole(store, area(kind, number)):
                with proof.found():
                    if not is_dropped(store, area(kind, number)):
                        check_folder(store, area(kind, number), remedy)
    for name in run.teachers:
        for number in store.numbers(f"teachers/{name}"):
            with proof.found():
                check_folder(store, folder_of(name, number), MEAN_REMEDY)
    with proof.found():
        _prove_metrics(store)
    with proof.found():
        _prove_baselines(store, run)
    with proof.found():
        read_sources(store)
    with proof.found():
        read_models(store)
    return proof


def _prove_area(proof: Proof, where: str, kind: str, number: int) -> None:
    """Everything in one round or evaluation that needs no settings: its plan, and each shard with its columns and its inputs."""
    store, plan = proof.store, read_plan(proof.store, kind, number)
    stages = {stage.name: store.entries(where, stage.name) for stage in PLAN}
    for name, entries in stages.items():
        for shard in entries.keys() - (plan.shards.keys() if plan is not None else set()):
            proof.say(StoreError("is a shard that the plan does not name", store.locate(f"{where}/{name}/{shard}.json"), LEFT))
    for shard in plan.shards if plan is not None else ():
        made = {name: entries[shard] for name, entries in stages.items() if shard in entries}
        with proof.found():
            _prove_shard(store, made, plan, where)


def _prove_shard(store: Store, entries: dict[str, Entry], plan: Plan | None, where: str) -> None:
    """The stages of one shard: every file, the rows of all stages, the counts of the plan, and the facts in the entries."""
    for entry in entries.values():
        store.read(entry)
    fresh = {name: entry for name, entry in entries.items() if _follows(entry, entries)}
    tables = read_shard(store, fresh)
    if "prompts" in tables and plan is not None:
        _prove_problems(store, entries["prompts"], tables["prompts"], plan)
    if "score" in tables and abs(entry_peak(fresh["score"]) - entropy_max(tables["score"])) > SLACK:
        _refuse(store, fresh["score"], "facts.entropy_max is not the largest teacher entropy of the rows", STORED_AGAIN)
    if "grade" in tables and "reward" not in fresh["grade"].inputs and (pc.min(tables["grade"]["reward"]).as_py() or 0) < 0:
        _refuse(store, fresh["grade"], "column reward: is negative, and no reward of grade.rewards made it so", STORED_AGAIN)
    sizes = {name: entry.facts["vocab_size"] for name, entry in fresh.items() if "vocab_size" in entry.facts}
    if len(set(sizes.values())) > 1:
        _refuse(store, fresh["score"], f"facts.vocab_size differs between stages: {sizes}", STORED_AGAIN)
    for name in ("prompts", "profile") if sizes else ():  # their entries do not say the size of the vocabulary
        if name in tables:
            try:
                check_columns(name, tables[name], min(sizes.values()))
            except ContractError as error:
                _refuse(store, fresh[name], f"{error.where}: {error.what}", STORED_AGAIN)
    if "score" in tables and "teacher_sibling" in tables["score"].column_names:
        _prove_siblings(store, fresh["score"], tables["score"])
    if {"rollout", "score"} <= tables.keys() and set(TOPK) <= set(tables["score"].column_names):
        _prove_topk(store, fresh["score"], tables["rollout"], tables["score"])
    if "rollout" in tables and where.startswith("rounds/"):
        _prove_policy(store, fresh["rollout"], tables["rollout"], plan, int(where.rpartition("/")[2]))


def _prove_topk(store: Store, entry: Entry, rollout: pa.Table, score: pa.Table) -> None:
    """A kept response token has the same log-prob in both places. One that was not kept is at most as likely as the last kept."""
    live = pc.is_null(score["reject_reason"])
    tokens = ragged(rollout.filter(live)["response_tokens"])[0]
    logprobs = ragged(score.filter(live)["teacher_logprobs"])[0]
    ids, kept = (matrices(score.filter(live)[name]) for name in TOPK)
    if ids and (wrong := unlike_topk(tokens, logprobs, np.concatenate(ids), np.concatenate(kept))):
        _refuse(store, entry, f"columns teacher_logprobs, {', '.join(TOPK)}: {wrong}", STORED_AGAIN)


def _prove_problems(store: Store, entry: Entry, prompts: pa.Table, plan: Plan) -> None:
    """prompt_id is the hash of a problem's place in the source and its texts. So the problems are those of the plan."""
    if entry.rows != len(plan.shards[entry.shard]):
        _refuse(store, entry, f"{entry.rows} rows, and the plan has {len(plan.shards[entry.shard])} problems", RESTORE)
    names = ("prompt_id", "reject_reason", "problem", "solution", "answer", "messages")
    nulls = [None] * prompts.num_rows
    texts = zip(*(prompts[name].to_pylist() if name in prompts.column_names else nulls for name in names), strict=True)
    for index, (key, reason, *parts) in zip(plan.shards[entry.shard], texts, strict=True):
        if reason is None and key != prompt_id(index, *parts):
            _refuse(store, entry, f"column prompt_id: a row is not problem {index}, which the plan names", STORED_AGAIN)


def _prove_siblings(store: Store, entry: Entry, score: pa.Table) -> None:
    """A sibling is another trace of the same shard."""
    pairs = zip(score["trace_id"].to_pylist(), score["teacher_sibling"].to_pylist(), strict=True)
    known = set(score["trace_id"].to_pylist())
    if any(sibling is not None and (sibling == key or sibling not in known) for key, sibling in pairs):
        _refuse(store, entry, "column teacher_sibling: a trace has itself, or a trace of another shard", STORED_AGAIN)


def entry_peak(entry: Entry) -> float:
    """The largest teacher entropy that a scored shard's entry says, nats."""
    return float(entry.fact("entropy_max"))


def _prove_policy(store: Store, entry: Entry, rollout: pa.Table, plan: Plan | None, number: int) -> None:
    """The policy that wrote the traces of the student is the plan's, as far behind as the rows say."""
    mine = rollout.filter(pc.and_(pc.is_null(rollout["reject_reason"]), pc.equal(rollout["trace_source"], "student")))
    policy = plan.policy if plan is not None else 0
    if set(mine["policy_version"].to_pylist()) - {policy} or set(mine["policy_lag"].to_pylist()) - {number - policy}:
        what = f"columns policy_version, policy_lag: the plan says policy {policy}, {number - policy} behind"
        _refuse(store, entry, what, "The plan or the shard is of another round: restore both from a copy")


def _prove_round(proof: Proof, work: Round) -> None:
    """What a round's settings decide: the ids of its traces, the shards that it was committed with, and that its rows join."""
    store, seen = proof.store, Inventory(work)
    if seen.is_whole("prompts", "rollout") and seen.is_fresh("prompts", "rollout"):
        _prove_ids(store, work, seen)
        joined_round(work)
    scope = seen.scope
    for entry in seen.entries("label").values():
        peak = float(entry.fact("peak"))
        if scope is not None and seen.why_stale(STAGES["label"], entry.shard) is None and abs(peak - scope.peak) > SLACK:
            _refuse(store, entry, f"facts.peak is {peak:g}, and the largest entropy of the round {scope.peak:g}", STORED_AGAIN)
    ready = store.ready(work.number)
    if ready is not None and (ready.shards.keys() != work.shards.keys() or ready.policy != work.policy_version):
        where = store.locate(f"{work.area}/ready.json")
        proof.say(StoreError("names other shards, or another policy, than the plan", where, RESTORE))
    elif ready is not None and seen.as_committed and ready.left_out != left_out(work):
        where = store.locate(f"{work.area}/ready.json")
        proof.say(StoreError("left_out: are not the groups that the verdicts leave out", where, RESTORE))
    elif ready is not None and (short := [shard for shard, hashes in ready.shards.items() if set(MEASURE) - hashes.keys()]):
        proof.say(StoreError(f"shards.{short[0]}: a stage is missing", store.locate(f"{work.area}/ready.json"), RESTORE))


def _prove_ids(store: Store, work: Round, seen: Inventory) -> None:
    """trace_id is the hash of seed, round, prompt and sample. So rows of another round, or in another order, are found."""
    first = 0
    for shard, indices in work.shards.items():
        entries = {name: seen.entries(name)[shard] for name in ("prompts", "rollout")}
        tables = read_shard(store, entries)
        prompts = tables["prompts"]["prompt_id"].to_pylist()
        size = max(1, tables["rollout"].num_rows // max(1, len(prompts)))
        ids = [
            digest(f"{work.run.seed}/{work.area}/{prompt}/{first + i}/{sample}")
            for i, prompt in enumerate(prompts)
            for sample in range(size)
        ]
        if ids != tables["rollout"]["trace_id"].to_pylist():
            _refuse(store, entries["rollout"], "column trace_id: the rows are of another round, shard or order", STORED_AGAIN)
        first += len(indices)


def _prove_metrics(store: Store) -> None:
    """Every row of metrics has the figures that all versions wrote. A round that is made again may have its times alone."""
    for row in filter(has_figures, store.metrics()):
        missing = [name for name in _FIGURES.get(row["writer"], ()) if name not in row]
        if missing:
            where = store.locate(f"metrics/{int(row['round']):04d}-{row['writer']}.jsonl")
            raise StoreError(f"{missing[0]}: is missing", where, RESTORE)


def _prove_baselines(store: Store, run: Run) -> None:
    """The running reward state after every round is the one that its grades give."""
    states = baselines(store, run, trust=False)
    next(states, None)
    for number, state in zip(store.numbers("rounds"), states, strict=False):
        kept, plan = read_kept(store, number), read_plan(store, "rounds", number)
        if kept is None or plan is None:
            return
        grades = {s: e.sha256 for s, e in store.entries(area("rounds", number), "grade").items() if s in plan.shards}
        known = state.to_dict()
        if kept.grade == grades and any(abs(known[name] - value) > 1e-6 for name, value in kept.after.model_dump().items()):
            where = store.locate(f"{area('rounds', number)}/baseline.json")
            raise StoreError("after: is not the state that the grades give", where, RESTORE)


def _follows(entry: Entry, entries: dict[str, Entry]) -> bool:
    """Whether a shard was made from the inputs that are there now, directly and through them."""
    inputs = [name for name in entry.inputs if name in STAGES]
    return all(
        name in entries and entries[name].sha256 == entry.inputs[name] and _follows(entries[name], entries) for name in inputs
    )


def _refuse(store: Store, entry: Entry, what: str, remedy: str) -> None:
    raise StoreError(what, store.locate(f"{entry.area}/{entry.stage}/{entry.shard}.json"), remedy)
