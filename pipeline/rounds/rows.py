"""Rows of a round with the columns of several stages. Every reader gets them here, and the rows of all stages are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.objective import USES_ADVANTAGE
from pipeline.contract import COLUMNS, REWARD_PREFIX, reward_columns
from pipeline.errors import ContractError, StoreError, UserError, command
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round
from pipeline.stages import MEASURE, PLAN
from pipeline.store.directory import Entry, Ready, Store, area, round_of
from pipeline.store.documents import RESTORE
from pipeline.store.possible import key_of, types_of
from pipeline.store.shards import check_columns


def read_shard(store: Store, entries: Mapping[str, Entry], columns: Mapping[str, list[str]] | None = None) -> dict[str, pa.Table]:
    """The tables of one shard, by stage: all columns, or the `columns` of each stage. Optional ones may be missing.

    Raises StoreError when a file is damaged, or when the stages do not hold the same rows in the same order. The traces of a
    prompt stand next to each other, and `prompt_index` names its row.
    """
    tables, keys = {}, {}
    for name, entry in entries.items():
        wanted = None if columns is None else columns[name]
        key = key_of(name)
        more = [key, *(("prompt_index",) if name == "rollout" and "prompts" in entries else ())]
        table = store.read(entry, None if wanted is None else list(dict.fromkeys([*wanted, *more])))
        keys[name] = table[key]
        if name == "rollout" and "prompts" in entries:
            _check_prompts(store, entry, table["prompt_index"], entries["prompts"].rows)
        tables[name] = table if wanted is None else table.select([column for column in wanted if column in table.column_names])
    first: str | None = None
    for name in entries.keys() - {"prompts"}:
        first = first or name
        if not keys[name].equals(keys[first]):
            raise StoreError(
                f"the rows are not those of stage {first}", store.locate(entries[name].path), _again(store, entries[name])
            )
    return tables


def _check_prompts(store: Store, entry: Entry, indices: pa.ChunkedArray, prompts: int) -> None:
    """Raise StoreError unless the rows of a rollout are groups of equal size, one for each prompt, in their order."""
    rows = len(indices)
    size = rows // prompts if prompts else 0
    if rows != size * prompts or (rows and not np.array_equal(indices.to_numpy(), np.arange(rows) // max(1, size))):
        what = f"column prompt_index: {rows} rows are not equal groups of the {prompts} prompts in their order"
        raise StoreError(what, store.locate(entry.path), _again(store, entry))


def _again(store: Store, entry: Entry) -> str:
    first = command("stage", entry.stage, "--run", store.uri, "--round", round_of(entry.area), "--shard", entry.shard, "--force")
    return f"Compute the stages of this shard again: first {first}"


def joined_round(work: Round, columns: Collection[str] | None = None) -> pa.Table:
    """All rows of a round, one per trace: `round`, the columns of its prompt, then the columns of every stage that exists.

    reject_reason is the first one that a stage gave. Where a shard lacks a later stage, or has one of traces from before, the
    columns of that stage are null. Every shard of prompts and rollout must exist. With `columns` only these are read, and come in
    their order. Raises StoreError when a shard is damaged, and UserError for a column that no shard has.
    """
    inventory = Inventory(work)
    wanted = None if columns is None else _wanted(columns)
    entries = {stage.name: inventory.entries(stage.name) for stage in PLAN}
    tables = []
    for shard in sorted(work.shards):
        made = of_now({name: shards[shard] for name, shards in entries.items() if shard in shards})
        here = {name: entry for name, entry in made.items() if wanted is None or name in wanted}
        parts = read_shard(work.store, here, wanted)
        parts["prompts"] = parts["prompts"].take(parts["rollout"]["prompt_index"])
        found = {"round": pa.array([work.number] * parts["rollout"].num_rows, pa.int32())}
        there = [c for c in COLUMNS.values() if c.writer in parts and c.name in parts[c.writer].column_names]
        found |= {c.name: parts[c.writer][c.name] for c in there}
        if "reward" in parts:
            found |= {c.name: parts["reward"][c.name] for c in reward_columns(parts["reward"].column_names)}
        for name in _REASONS:
            found[name] = pc.coalesce(*(part[name] for part in parts.values()))
        tables.append(pa.table(found))
    whole = pa.concat_tables(tables, promote_options="default")
    if columns is None:
        return whole
    if unknown := set(columns) - set(whole.column_names):
        raise UserError(
            f"no column {', '.join(sorted(unknown))} in {work.area}", work.store.uri, "pipeline/README.md has all columns"
        )
    return whole.select(list(columns))


def of_now(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The stages of one shard in their order, without those that were made from traces, or signals, of before.

    A trace_id does not tell that: it stays when a trace is written again.
    """
    kept: dict[str, Entry] = {}
    for stage in PLAN:
        entry = entries.get(stage.name)
        if entry is None:
            continue
        later = {name: made for name, made in entry.inputs.items() if name in entries and name != "prompts"}
        if all(name in kept and kept[name].sha256 == made for name, made in later.items()):
            kept[stage.name] = entry
    return kept


def are_of_now(store: Store, version: int, answers: Iterable[Entry]) -> bool:
    """Whether the stored policy of this version gave these answers: it may have been trained again since.

    answers: entries of stage `rollout` or `score`. An entry that does not name its policy is trusted. Nothing is known of a
    policy behind the latest one: it is set aside, or was deleted, to be trained again.
    """
    if version and not store.has_policy(version):
        return version < store.latest_policy()
    if not version:
        return True
    now = store.content(version)
    return all(entry.inputs.get("policy", now) == now for entry in answers)


_REASONS = ("reject_reason", "reject_detail")


def _wanted(columns: Collection[str]) -> dict[str, list[str]]:
    """The columns to read of each stage, with the reasons of rejected rows. The rows are those of prompts and rollout."""
    of = {name: COLUMNS[name].writer for name in columns if name in COLUMNS}
    of |= {name: "reward" for name in columns if name.startswith(REWARD_PREFIX) and name not in COLUMNS}
    later = set(_REASONS) & set(columns)
    stages = {"prompts", "rollout", *of.values(), *((stage.name for stage in PLAN) if later else ())}
    rest = {"rollout": ["prompt_index"]}
    return {stage: [*(n for n in of if of[n] == stage), *rest.get(stage, ()), *_REASONS] for stage in sorted(stages)}


def shard_tables(store: Store, number: int, ready: Ready, further: tuple[str, ...] = ()) -> Iterator[pa.Table]:
    """Training rows of a committed round, one per trace, shard by shard. `ready` says which shards were committed.

    The columns are those of rollout, grade and score that training reads, prompt_tokens, and the row's first reject_reason.
    `further` names columns that only some objectives read; one that a shard does not have is left out.
    Raises StoreError when a shard is no longer the one that was committed.
    """
    where = area("rounds", number)
    if not ready.shards:
        raise StoreError("shards: names none", store.locate(f"{where}/ready.json"), RESTORE)
    for shard, hashes in sorted(ready.shards.items()):
        yield without(training_rows(store, where, shard, hashes, ready.policy, further), ready.left_out.get(shard, []))


def is_comparable(store: Store, number: int) -> bool:
    """Whether the policy that this run has now is the one whose log-probs a committed round holds.

    It is not where earlier rounds were trained again, and this round kept its traces.
    """
    ready = store.ready(number)
    if ready is None:
        return False
    expected = store.content(ready.policy)
    entries = (store.entry(area("rounds", number), "score", shard) for shard in ready.shards)
    return all(entry is not None and entry.inputs.get("policy") == expected for entry in entries)


def joined(tables: list[pa.Table]) -> pa.Table:
    """The rows of all shards, with the columns that every shard has."""
    common = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    return pa.concat_tables([table.select(common) for table in tables])


def training_rows(
    store: Store, where: str, shard: str, hashes: dict[str, str], policy: int, further: tuple[str, ...] = ()
) -> pa.Table:
    """Training rows of one shard, as in `shard_tables`. `hashes` has the sha256 of each stage's shard.

    `policy` is the version that had to answer. Raises StoreError when a stage has other bytes by now.
    """
    if missing := set(MEASURE) - hashes.keys():
        raise StoreError(f"shards.{shard}: lacks {', '.join(sorted(missing))}", store.locate(f"{where}/ready.json"), RESTORE)
    entries = {stage: _committed(store, where, stage, shard, hashes[stage]) for stage in MEASURE}
    tables = read_shard(store, entries, {stage: _read_by_training(stage, further) for stage in MEASURE})
    rollout = tables["rollout"]
    _check_vocabulary(store, entries, tables["prompts"])
    prompts = tables["prompts"].take(rollout["prompt_index"])
    columns = {name: rollout[name] for name in ("trace_id", "prompt_index", "trace_source", "response_tokens")}
    # policy of the student log-probs: a trace that the student did not write was scored with the policy of its round
    by_others = pc.not_equal(rollout["trace_source"], "student")
    columns["policy_version"] = pc.if_else(by_others, pa.scalar(policy, pa.int32()), rollout["policy_version"])
    columns |= {"prompt_tokens": prompts["prompt_tokens"], "rollout_entropy": rollout["rollout_entropy"]}
    columns["advantage"] = tables["grade"]["advantage"]
    columns |= {name: tables["score"][name] for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy")}
    for name in further:
        source = tables[COLUMNS[name].writer]
        columns |= {name: source[name]} if name in source.column_names else {}
    columns["reject_reason"] = pc.coalesce(*(tables[s]["reject_reason"] for s in ("rollout", "grade", "score")))
    return pa.table(columns)


def without(rows: pa.Table, left_out: list[int]) -> pa.Table:
    """Training rows of a shard without the traces of the prompts `left_out`, which are places in the shard."""
    return rows.filter(pc.invert(pc.is_in(rows["prompt_index"], pa.array(left_out, pa.int32())))) if left_out else rows


def signals(work: Round) -> dict[str, np.ndarray]:
    """Whether the group of each prompt has a signal: bool [prompts of the shard] by shard, in the order of the plan.

    A group has a signal when one of its traces has an advantage other than 0. Every shard must be graded.
    """
    entries, found = Inventory(work).entries(COLUMNS["advantage"].writer), {}
    for shard, indices in work.shards.items():
        advantage = pc.fill_null(work.store.read(entries[shard], ["advantage"])["advantage"], 0.0).to_numpy()
        found[shard] = (np.nan_to_num(advantage) != 0).reshape(len(indices), -1).any(axis=1)
    return found


def left_out(work: Round) -> dict[str, list[int]]:
    """The prompts of a filled round whose traces are not trained on, by shard, as places in the shard.

    These are the groups without signal, and those behind the number of groups that the round asks for. It is empty for a round
    that is not filled (rollout.fill_groups) or has no group with a signal, and where the objective reads no advantage.
    """
    plan = read_plan(work.store, work.kind, work.number)
    if work.run.objective.name not in USES_ADVANTAGE or plan is None or plan.filling is None or plan.asked is None:
        return {}
    found, before, left = signals(work), 0, {}
    for shard, signal in found.items():
        trained = signal & (before + np.cumsum(signal) <= plan.asked)
        before += int(signal.sum())
        left[shard] = np.flatnonzero(~trained).tolist()
    return {shard: places for shard, places in left.items() if places} if before else {}


def _read_by_training(stage: str, further: tuple[str, ...]) -> list[str]:
    """Columns of a stage, without the optional ones that the objective does not read."""
    return [name for name in types_of(stage) if name not in COLUMNS or not COLUMNS[name].optional or name in further]


def _committed(store: Store, where: str, stage: str, shard: str, digest: str) -> Entry:
    """The entry of the shard with sha256 `digest`. Raises StoreError when the shard has other bytes by now."""
    entry = store.entry(where, stage, shard)
    if entry is None or entry.sha256 != digest:
        raise StoreError(
            "the shard has changed since its round was committed to the trainer",
            store.locate(f"{where}/{stage}/{shard}.json"),
            f"{command('status', store.uri)} names the command that mends it",
        )
    return entry


def _check_vocabulary(store: Store, entries: Mapping[str, Entry], prompts: pa.Table) -> None:
    """Raise StoreError for an id of a prompt that is outside the vocabulary of the engine that wrote the traces."""
    size = entries["rollout"].facts.get("vocab_size")
    try:
        check_columns("prompts", prompts, size)
    except ContractError as error:
        raise StoreError(
            f"{error.where}: {error.what}", store.locate(entries["prompts"].path), _again(store, entries["prompts"])
        ) from error
