"""The run directory, in which engines, stages and trainer meet. Shards, policies and training states are committed atomically.

    <run>/run.json                                  Settings, versions and code revision.
    <run>/sources.json                              The sources of problems; pipeline/rounds/origin.py reads and writes it.
    <run>/models.json                               Hashes of the models; pipeline/rounds/contents.py reads and writes it.
    <run>/rounds/0003/plan.json                     The shards of a round, and the policy that must answer.
    <run>/rounds/0003/<stage>/0001-<sha>.parquet    A shard, named by its content.
    <run>/rounds/0003/<stage>/0001.json             Its manifest entry. A shard without an entry does not exist.
    <run>/rounds/0003/<stage>/summary               A cache of all entries of a stage with many shards.
    <run>/rounds/0003/ready.json                    The shards that the trainer takes. With it the round is committed.
    <run>/policy/0004/                              The adapter of a policy. Its manifest.json is written last.
    <run>/train/0004/                               The exact training state beside that policy, written likewise.
    <run>/metrics/                                  One file per writer and round. A repeated round replaces its file.
    <run>/.tmp/                                     Files that are being written. A driver empties it at its start and end.

The name of a data file has a hash of its content and its entry. An entry is replaced in one step. So two processes that commit
the same shard cannot mix: the last entry wins and points at a whole file. files.py says what makes a file whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, JsonValue, TypeAdapter

from pipeline import contract
from pipeline.config import Run
from pipeline.digest import digest
from pipeline.errors import ContractError, SettingError, StoreError, UserError, command
from pipeline.fit.versions import stand, versions
from pipeline.overrides import UNKNOWN, load
from pipeline.store.documents import RESTORE, Count, Digest, Document, Number, Sha256, check, parse
from pipeline.store.files import Files
from pipeline.store.folders import (
    POLICY_REMEDY,
    STATE_REMEDY,
    check_folder,
    cut_short,
    digest_of,
    drop_weights,
    fetch_folder,
    is_whole,
    put_folder,
)
from pipeline.store.manifest import SUMMARY, Entry, Origin, data_name, survey, to_entry, to_summary
from pipeline.store.names import DATA, EVALUATION_FOLDER, METRICS_FILE, NUMBER, SHARD
from pipeline.store.shards import check_table, count_rejected, from_parquet, to_parquet

_READERS = 16  # entries read at one time from an object store, which needs tens of milliseconds for each; a disk does not
RUN_REMEDY = "Restore the file from a copy: without it the run cannot go on"
EDITED = "Undo the edit, and change settings with `egrsd distill --set ... --accept-changes`"
Shard = Annotated[str, Field(pattern=f"^{SHARD.pattern}$")]
Figure = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]
_FIGURES: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Figure])


class RunFile(Document):
    """run.json: the settings, the versions of the software, and the hash of the settings. Early versions wrote no hash."""

    config: dict[str, JsonValue]
    versions: dict[str, str | None]
    config_digest: Digest | None = None


class Ready(Document):
    """ready.json: the policy that had to answer, and the sha256 of every shard, by shard and then by stage.

    left_out: prompts whose traces are not trained on, by shard, as places in the shard.
    """

    policy: Number
    shards: dict[Shard, dict[str, Sha256]]
    left_out: dict[Shard, list[Count]] = Field(default_factory=dict)


def area(kind: str, number: int) -> str:
    """Folder of a round ('rounds', 3) or of an evaluation ('evals', 0)."""
    return f"{kind}/{number:04d}"


class Store(Files):
    """A run directory at `uri`: a local path or any URI that pyarrow.fs opens."""

    # ---- the run -----------------------------------------------------------------------------------------------------

    def save_run(self, run: Run, versions: dict[str, str]) -> None:
        """Store the settings of the run and the versions of the software that it runs with."""
        config = run.model_dump(mode="json")
        self.write_json("run.json", {"config": config, "versions": versions, "config_digest": digest(config)})
        self.begun = "run.json"

    def load_run(self) -> Run:
        """The settings of this run.

        Raises UserError when there is no run here, or one with a setting that this code does not have. Raises StoreError when
        run.json is damaged, or was changed by hand.
        """
        document = self.run_file()
        if document is None:
            raise UserError(
                "no run here: run.json is missing",
                self.uri,
                f"Start one with {command('distill', '--recipe', 'demo', '--run', self.uri)}",
            )
        if document.config_digest is not None and digest(document.config) != document.config_digest:
            raise StoreError("config: was changed by hand, since config_digest differs", self.locate("run.json"), EDITED)
        self.begun = "run.json"
        try:
            return load(document.config)
        except SettingError as error:
            if error.what == UNKNOWN:
                what = f"the setting {error.where} is unknown to this code, {stand(versions())}"
                remedy = f"Use the version that wrote it, {stand(document.versions)}, or a later one"
                raise UserError(what, self.locate("run.json"), remedy) from error
            raise StoreError(f"config.{error.where}: {error.what}", self.locate("run.json"), RUN_REMEDY) from error

    def run_file(self) -> RunFile | None:
        """The content of run.json, or None. Raises StoreError when it is damaged."""
        return self.read_document("run.json", RunFile, RUN_REMEDY)

    def exists(self) -> bool:
        """Whether a run was started here."""
        if found := self.read_bytes("run.json") is not None:
            self.begun = "run.json"
        return found

    # ---- shards ------------------------------------------------------------------------------------------------------

    def commit(self, where: str, stage: contract.Stage, shard: str, table: pa.Table, origin: Origin) -> Entry:
        """Check a shard against the contract, write its data, and then its entry. Raises ContractError or StoreError."""
        tokens = check_table(stage, table, origin.facts.get("vocab_size"))
        data = to_parquet(stage, table)
        sha256 = hashlib.sha256(data).hexdigest()
        document = {
            "area": where,
            "stage": stage.name,
            "shard": shard,
            "data": data_name(shard, sha256, origin),
            "rows": table.num_rows,
            "tokens": tokens,
            "rejected": count_rejected(table),
            "bytes": data.size,
            "sha256": sha256,
            "settings": origin.settings,
            "inputs": origin.inputs,
            "seconds": round(origin.seconds, 4),
            "facts": origin.facts,
        }
        path = f"{where}/{stage.name}/{shard}.json"
        entry, old = check(Entry, document, self.locate(path)), self.entry(where, stage.name, shard)
        self.write(entry.path, data)
        self.write_json(path, document)
        if old is not None and old.data != entry.data:
            self.delete(f"{where}/{stage.name}/{old.data}")
        return entry

    def entry(self, where: str, stage: str, shard: str) -> Entry | None:
        """The manifest entry of a shard, or None when the shard does not exist. Raises StoreError for a damaged entry."""
        path = f"{where}/{stage}/{shard}.json"
        data = self.read_bytes(path)
        return None if data is None else to_entry(data, self.locate(path), path)

    def entries(self, where: str, stage: str) -> dict[str, Entry]:
        """All entries of a stage, by shard."""
        known, unknown = self._survey(f"{where}/{stage}")
        if not unknown:
            return known
        with ThreadPoolExecutor(min(_READERS, len(unknown))) if self.local_root is None else contextlib.nullcontext() as pool:
            found = (pool.map if pool else map)(lambda shard: self.entry(where, stage, shard), unknown)
            known |= {entry.shard: entry for entry in found if entry is not None}
        return dict(sorted(known.items()))

    def summarise(self, where: str, stage: str) -> None:
        """Write the summary of a stage, unless the existing one has all its entries."""
        if self._survey(f"{where}/{stage}")[1]:
            self.write(f"{where}/{stage}/{SUMMARY}", to_summary(self.entries(where, stage).values()))

    def tidy(self, where: str, stage: str, named: dict[str, str]) -> None:
        """Delete the data files that no entry names. `named` has the data file of each shard; other shards are left alone.

        Such files come from a writer that was killed before it wrote its entry. Call it while holding the run, when nothing
        is being written.
        """
        for name in self.named(f"{where}/{stage}", DATA):
            if named.get(name["shard"], name[0]) != name[0]:
                self.delete(f"{where}/{stage}/{name[0]}")

    def _survey(self, folder: str) -> tuple[dict[str, Entry], list[str]]:
        names = self.names(folder)
        return survey(folder, names, (self.read_bytes(f"{folder}/{SUMMARY}") if SUMMARY in names else None) or b"")

    def read(self, entry: Entry, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard, or some of its columns, after a check of its sha256, its counts and the values of these columns.

        Raises StoreError when the file is missing, has other bytes, or holds what the stage cannot have written.
        """
        data = self.read_bytes(entry.path)
        where, remedy = self.locate(entry.path), _remedy(self.uri, entry)
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            what = "the shard is missing" if data is None else "the bytes are not those that were committed (sha256 differs)"
            raise StoreError(what, where, remedy)
        try:
            return from_parquet(entry, data, columns)
        except ContractError as error:
            raise StoreError(f"{error.where}: {error.what}", where, remedy) from error

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def numbers(self, kind: str) -> list[int]:
        """Sorted numbers of the rounds, evaluations, policies or training states that exist, by the name of their folder."""
        return sorted(int(name[0]) for name in self.named(kind, NUMBER))

    def ready(self, number: int) -> Ready | None:
        """A round's ready.json. None while it is not committed. Raises StoreError for a damaged file."""
        return self.read_document(f"{area('rounds', number)}/ready.json", Ready)

    # ---- policies and training state -----------------------------------------------------------------------------------

    def publish_policy(self, version: int, folder: str | Path) -> None:
        """Publish the adapter in a local folder as policy `version`. It is atomic, since its manifest is written last."""
        put_folder(self, area("policy", version), Path(folder))

    def save_state(self, version: int, folder: str | Path) -> None:
        """Store the training state in a local folder, so that training can go on from policy `version` exactly."""
        put_folder(self, area("train", version), Path(folder))

    def has_state(self, version: int) -> bool:
        """Whether the training state beside policy `version` is kept. Policy 0, the base, needs none."""
        return version == 0 or is_whole(self, area("train", version))

    def prune_states(self, keep: int) -> None:
        """Delete the training states of published policies, except the last `keep`."""
        for old in [version for version in self.numbers("train") if self.has_policy(version)][:-keep]:
            self.delete(area("train", old))

    def prune_policies(self, keep: int) -> None:
        """Drop the weights of policies, except the first, the last `keep`, and those that an evaluation names. 0 keeps all."""
        folders = ["evals", *(f"evals/{name[0]}" for name in self.named("evals", EVALUATION_FOLDER))]
        named = {1, *(number for folder in folders for number in self.numbers(folder))}
        for old in [version for version in self.numbers("policy") if self.has_policy(version)][:-keep] if keep else ():
            if old not in named:
                drop_weights(self, area("policy", old))

    def has_policy(self, version: int) -> bool:
        """Whether policy `version` is published. Policy 0, the base, always is."""
        return version == 0 or is_whole(self, area("policy", version))

    def latest_policy(self) -> int:
        """The highest published version. 0 is the base."""
        return max((number for number in self.numbers("policy") if self.has_policy(number)), default=0)

    def content(self, version: int) -> str | None:
        """Hash of the content of a policy, as its manifest tells it. None for version 0, the base."""
        return digest_of(self, area("policy", version)) if version else None

    def policy(self, version: int) -> contract.Policy:
        """The policy that an engine must answer with. Raises StoreError when it is not published."""
        if not self.has_policy(version):
            raise StoreError(
                f"policy {version} is not published", self.locate("policy"), f"Policies here: 0 to {self.latest_policy()}"
            )
        return contract.Policy(version, self.locate(area("policy", version)) if version else None)

    def check_policy(self, version: int) -> None:
        """Raise StoreError when a file of a published policy is missing or damaged. An engine might not notice it."""
        if version:  # 0 is the base
            check_folder(self, area("policy", version), POLICY_REMEDY)

    def damaged_policy(self) -> str | None:
        """A sentence on the last policy, when one of its files is missing or cut short. None when all sizes are right.

        No file is read, so this takes no time: `check_policy` proves the content.
        """
        folder = area("policy", self.latest_policy())
        found = cut_short(self, folder)
        return None if found is None else f"{self.locate(folder)}: {found}. {POLICY_REMEDY}"

    def fetch(self, folder: str) -> Path | None:
        """A local copy of a policy or a training state, or the folder itself on a local disk. Every file is checked.

        None when it is not published. Raises StoreError when a file is missing or damaged.
        """
        return fetch_folder(self, folder, POLICY_REMEDY if folder.startswith("policy/") else STATE_REMEDY)

    @contextlib.contextmanager
    def local(self, folder: str) -> Iterator[Path | None]:
        """The result of `fetch`, for the length of a block. A copy is deleted after the block.

        Raises StoreError after the block for a policy that was replaced meanwhile: its files may be of both.
        """
        before = digest_of(self, folder) if folder.startswith("policy/") else ""
        fetched = self.fetch(folder)
        try:
            yield fetched
            if before and fetched is not None and digest_of(self, folder) != before:
                raise StoreError("was replaced while it was read", self.locate(folder), "Run the same command again")
        finally:
            if fetched is not None and self.local_root is None:
                shutil.rmtree(fetched, ignore_errors=True)

    # ---- metrics and signals -----------------------------------------------------------------------------------------

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Store the trainer's metrics. When a round is trained again, its new rows replace the old ones."""
        by_round: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_round.setdefault(int(row["round"]), []).append(row)
        for number, group in by_round.items():
            self.write_metrics("train", number, group)

    def write_metrics(self, writer: str, number: int, rows: list[dict[str, Any]]) -> None:
        """Write one writer's metrics of one round. They replace those that it wrote before."""
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        self.write(f"metrics/{number:04d}-{writer}.jsonl", lines.encode())

    def delete_metrics(self, writer: str, number: int) -> None:
        """Delete one writer's metrics of one round, if there are some."""
        self.delete(f"metrics/{number:04d}-{writer}.jsonl")

    def metrics(self, number: int | None = None) -> Iterator[dict[str, Any]]:
        """All rows of metrics in the order of round and writer, or those of round `number`.

        Raises StoreError for a line that is no row of figures, or a row of another round than its file.
        """
        for name in self.named("metrics", METRICS_FILE):
            path, here = f"metrics/{name[0]}", int(name["number"])
            for row in read_figures(self.read_bytes(path) or b"", self.locate(path)) if number in (None, here) else ():
                if row.get("round") != here:
                    raise StoreError(f"round: is {row.get('round')}, in the file of round {here}", self.locate(path), RESTORE)
                yield {"writer": name["writer"], **row}

    def request_stop(self, stop: bool = True) -> None:
        """Ask the trainer to end after its current step. With `stop` False take the request back."""
        if stop:
            self.write("train/stop", b"stop" if self.local_root is None else b"")  # a full disk takes an empty file
        else:
            self.delete("train/stop")

    def stop_requested(self) -> bool:
        """Whether the trainer is asked to end."""
        return self.read_bytes("train/stop") is not None


def read_figures(data: bytes, where: str) -> list[dict[str, Any]]:
    """The rows of a file of metrics. Raises StoreError, with the line, for a row that is not made of figures."""
    return [parse(_FIGURES, line, f"{where}, line {count}") for count, line in enumerate(data.splitlines(), 1)]


def round_of(where: str) -> int:
    """The number of a round, from its folder such as `rounds/0003`."""
    return int(where.rpartition("/")[2])


def _remedy(uri: str, entry: Entry) -> str:
    if entry.area.startswith("evals"):
        return f"Delete the folder {entry.area} and run `egrsd distill` or `egrsd evaluate` again: it evaluates anew"
    again = command("stage", entry.stage, "--run", uri, "--round", round_of(entry.area), "--shard", entry.shard, "--force")
    return f"Recompute it with {again}"
