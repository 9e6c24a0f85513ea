"""The run directory, in which engines, stages and trainer meet. Shards, policies and training states are committed atomically.

    <run>/run.json                                  Settings, versions and code revision.
    <run>/sources.json                              The sources of problems; pipeline/rounds/origin.py reads and writes it.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import contract
from pipeline.config import Run
from pipeline.errors import StoreError, UserError
from pipeline.overrides import load
from pipeline.store.files import RESTORE, Files
from pipeline.store.folders import POLICY_REMEDY, STATE_REMEDY, check_folder, fetch_folder, is_whole, put_folder
from pipeline.store.manifest import ENTRY_FIELDS, SUMMARY, Entry, Origin, data_name, survey, to_summary
from pipeline.store.shards import check_table, count_rejected, to_parquet

_READERS = 16  # entries read at one time, since an object store needs tens of milliseconds for each


def area(kind: str, number: int) -> str:
    """Folder of a round ('rounds', 3) or of an evaluation ('evals', 0)."""
    return f"{kind}/{number:04d}"


class Store(Files):
    """A run directory at `uri`: a local path or any URI that pyarrow.fs opens."""

    # ---- the run -----------------------------------------------------------------------------------------------------

    def save_run(self, run: Run, versions: dict[str, str]) -> None:
        """Store the settings of the run and the versions of the software that it runs with."""
        self.write_json("run.json", {"config": run.model_dump(mode="json"), "versions": versions})
        self.begun = "run.json"

    def load_run(self) -> Run:
        """The settings of this run. Raises UserError when there is no run here."""
        document = self.read_json("run.json", "config")
        if document is None:
            raise UserError(
                "no run here: run.json is missing", self.uri, "Start one with `egrsd distill --recipe NAME --run URI`"
            )
        self.begun = "run.json"
        return load(document["config"])

    def exists(self) -> bool:
        """Whether a run was started here."""
        if found := self.read_bytes("run.json") is not None:
            self.begun = "run.json"
        return found

    # ---- shards ------------------------------------------------------------------------------------------------------

    def commit(self, where: str, stage: contract.Stage, shard: str, table: pa.Table, origin: Origin) -> Entry:
        """Check a shard against the contract, write its data, and then its entry. Raises ContractError or StoreError."""
        tokens = check_table(stage, table)
        data = to_parquet(stage, table)
        digest = hashlib.sha256(data).hexdigest()
        entry = Entry(
            area=where,
            stage=stage.name,
            shard=shard,
            data=data_name(shard, digest, origin),
            rows=table.num_rows,
            tokens=tokens,
            rejected=count_rejected(table),
            bytes=data.size,
            sha256=digest,
            settings=origin.settings,
            inputs=origin.inputs,
            seconds=round(origin.seconds, 4),
            facts=origin.facts,
        )
        old = self.entry(where, stage.name, shard)
        self.write(f"{where}/{stage.name}/{entry.data}", data)
        self.write_json(f"{where}/{stage.name}/{shard}.json", asdict(entry))
        if old is not None and old.data != entry.data:
            self.delete(f"{where}/{stage.name}/{old.data}")
        return entry

    def entry(self, where: str, stage: str, shard: str) -> Entry | None:
        """The manifest entry of a shard, or None when the shard does not exist."""
        document = self.read_json(f"{where}/{stage}/{shard}.json", *ENTRY_FIELDS)
        return None if document is None else Entry(**{name: document[name] for name in ENTRY_FIELDS})

    def entries(self, where: str, stage: str) -> dict[str, Entry]:
        """All entries of a stage, by shard."""
        known, unknown = self._survey(f"{where}/{stage}")
        if not unknown:
            return known
        with ThreadPoolExecutor(min(_READERS, len(unknown))) as pool:
            known |= {e.shard: e for e in pool.map(lambda shard: self.entry(where, stage, shard), unknown) if e is not None}
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
        for name in self.names(f"{where}/{stage}"):
            if name.endswith(".parquet") and named.get(name.rpartition("-")[0], name) != name:
                self.delete(f"{where}/{stage}/{name}")

    def _survey(self, folder: str) -> tuple[dict[str, Entry], list[str]]:
        names = self.names(folder)
        return survey(names, (self.read_bytes(f"{folder}/{SUMMARY}") if SUMMARY in names else None) or b"")

    def read(self, entry: Entry, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard, after a check of its sha256. Raises StoreError when the file is missing or has other bytes."""
        path = f"{entry.area}/{entry.stage}/{entry.data}"
        data = self.read_bytes(path)
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StoreError(
                "the shard is missing" if data is None else "the bytes are not those that were committed (sha256 differs)",
                self.locate(path),
                _remedy(entry),
            )
        return pq.read_table(pa.BufferReader(data), columns=columns)

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def numbers(self, kind: str) -> list[int]:
        """Sorted numbers of the rounds, evaluations, policies or training states that exist, by the name of their folder."""
        return sorted(int(name) for name in self.names(kind) if name.isascii() and name.isdigit())

    def ready(self, number: int) -> dict[str, Any] | None:
        """A round's ready.json: `policy`, and `shards` as shard to stage to sha256. None while it is not committed."""
        return self.read_json(f"{area('rounds', number)}/ready.json", "policy", "shards")

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

    def has_policy(self, version: int) -> bool:
        """Whether policy `version` is published. Policy 0, the base, always is."""
        return version == 0 or is_whole(self, area("policy", version))

    def latest_policy(self) -> int:
        """The highest published version. 0 is the base."""
        return max((number for number in self.numbers("policy") if self.has_policy(number)), default=0)

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

    def fetch(self, folder: str) -> Path | None:
        """A local copy of a policy or a training state, or the folder itself on a local disk. Every file is checked.

        None when it is not published. Raises StoreError when a file is missing or damaged.
        """
        return fetch_folder(self, folder, POLICY_REMEDY if folder.startswith("policy/") else STATE_REMEDY)

    @contextlib.contextmanager
    def local(self, folder: str) -> Iterator[Path | None]:
        """The result of `fetch`, for the length of a block. A copy is deleted after the block."""
        fetched = self.fetch(folder)
        try:
            yield fetched
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

    def metrics(self) -> Iterator[dict[str, Any]]:
        """All rows of metrics in the order of round and writer. Raises StoreError for a line that is not JSON."""
        for name in self.names("metrics"):
            for line in (self.read_bytes(f"metrics/{name}") or b"").splitlines():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise StoreError(f"is not JSON ({error})", self.locate(f"metrics/{name}"), RESTORE) from error
                yield {"writer": name[5:-6], **row}

    def request_stop(self, stop: bool = True) -> None:
        """Ask the trainer to end after its current step. With `stop` False take the request back."""
        if stop:
            self.write("train/stop", b"")
        else:
            self.delete("train/stop")

    def stop_requested(self) -> bool:
        """Whether the trainer is asked to end."""
        return self.read_bytes("train/stop") is not None


def _remedy(entry: Entry) -> str:
    if entry.area.startswith("evals"):
        return f"Delete the folder {entry.area} and run `egrsd distill` or `egrsd evaluate` again: it evaluates anew"
    return f"Recompute it with `egrsd stage {entry.stage} --round {int(entry.area[-4:])} --shard {entry.shard} --force`"
