"""The run directory as the protocol: shards, manifest entries, policies and training state, committed atomically.

    <run>/run.json                                  resolved configuration, versions, code revision
    <run>/rounds/0003/plan.json                     the shards of a round and the policy that must answer
    <run>/rounds/0003/<stage>/0001-<sha>.parquet    a shard, named by its content
    <run>/rounds/0003/<stage>/0001.json             its manifest entry: a shard without one does not exist
    <run>/rounds/0003/<stage>/summary               all entries of a long stage in one file: a cache that is checked by name
    <run>/rounds/0003/ready.json                    the shards the trainer takes: the round is committed
    <run>/policy/0004/ , train/0004/                adapter and exact training state; manifest.json is written last
    <run>/metrics/                                  one file per writer and round; a repeated round replaces its own
    <run>/.tmp/                                     what is being written; swept when a driver takes the run and when it leaves

Data files are named by the hash of what is in them and in their entry, and an entry is replaced in one step, so two processes
that commit the same shard cannot mix: the last entry wins and points at a whole file. files.py says what makes a file whole on a
disk and on an object store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import contract
from pipeline.config import Run, load
from pipeline.errors import StoreError, UserError
from pipeline.store.files import Files
from pipeline.store.manifest import ENTRY_FIELDS, SUMMARY, Entry, data_name, survey, to_summary
from pipeline.store.shards import check_table, count_rejected, to_parquet

MANIFEST = "manifest.json"
_READERS = 16  # entries that are read at one time: an object store answers each after tens of milliseconds
_RESTORE = "Restore it from a copy, or delete it and run the same command again: what it described is then made anew"


def area(kind: str, number: int) -> str:
    """Folder of a round ('rounds', 3) or of an evaluation ('evals', 0)."""
    return f"{kind}/{number:04d}"


class Store(Files):
    """A run directory at `uri`: a local path or any URI that pyarrow.fs opens."""

    # ---- JSON --------------------------------------------------------------------------------------------------------

    def write_json(self, path: str, value: Any) -> None:
        """Put a JSON file, atomically."""
        self.write(path, json.dumps(value, indent=1, sort_keys=True).encode())

    def read_json(self, path: str, *keys: str) -> Any | None:
        """A JSON file, or None where there is none. Raises StoreError when it is torn, or not an object with `keys`."""
        data = self.read_bytes(path)
        if data is None:
            return None
        try:
            document = json.loads(data)
        except ValueError as error:
            raise StoreError(f"is not JSON ({error})", self.locate(path), _RESTORE) from error
        if keys and not (isinstance(document, dict) and set(keys) <= document.keys()):
            raise StoreError(f"is not what belongs here: {', '.join(keys)} expected", self.locate(path), _RESTORE)
        return document

    # ---- the run -----------------------------------------------------------------------------------------------------

    def save_run(self, run: Run, versions: dict[str, str]) -> None:
        """Record the resolved configuration with the versions it runs under."""
        self.write_json("run.json", {"config": run.model_dump(mode="json"), "versions": versions})

    def load_run(self) -> Run:
        """The configuration of this run. Raises UserError when there is no run here."""
        document = self.read_json("run.json", "config")
        if document is None:
            raise UserError(
                "no run here: run.json is missing", self.uri, "Start one with `egrsd distill --recipe NAME --run URI`"
            )
        return load(document["config"])

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.read_bytes("run.json") is not None

    # ---- shards ------------------------------------------------------------------------------------------------------

    def commit(
        self,
        area: str,
        stage: contract.Stage,
        shard: str,
        table: pa.Table,
        *,
        settings: str,
        inputs: dict[str, str],
        seconds: float,
        facts: dict[str, Any] | None = None,
    ) -> Entry:
        """Check a shard against the contract, write it, then its entry. Raises ContractError or StoreError."""
        tokens = check_table(stage, table)
        data = to_parquet(stage, table)
        digest = hashlib.sha256(data).hexdigest()
        entry = Entry(
            area=area,
            stage=stage.name,
            shard=shard,
            data=data_name(shard, digest, settings, inputs, facts or {}),
            rows=table.num_rows,
            tokens=tokens,
            rejected=count_rejected(table),
            bytes=data.size,
            sha256=digest,
            settings=settings,
            inputs=inputs,
            seconds=round(seconds, 4),
            facts=facts or {},
        )
        old = self.entry(area, stage.name, shard)
        self.write(f"{area}/{stage.name}/{entry.data}", data)
        self.write_json(f"{area}/{stage.name}/{shard}.json", asdict(entry))
        if old is not None and old.data != entry.data:
            self.delete(f"{area}/{stage.name}/{old.data}")
        return entry

    def entry(self, area: str, stage: str, shard: str) -> Entry | None:
        """Manifest entry of a shard, or None when the shard does not exist."""
        document = self.read_json(f"{area}/{stage}/{shard}.json", *ENTRY_FIELDS)
        return None if document is None else Entry(**{name: document[name] for name in ENTRY_FIELDS})

    def entries(self, area: str, stage: str) -> dict[str, Entry]:
        """All entries of a stage, by shard."""
        known, unknown = self._survey(f"{area}/{stage}")
        if not unknown:
            return known
        with ThreadPoolExecutor(min(_READERS, len(unknown))) as pool:
            known |= {e.shard: e for e in pool.map(lambda shard: self.entry(area, stage, shard), unknown) if e is not None}
        return dict(sorted(known.items()))

    def summarise(self, area: str, stage: str) -> None:
        """Write the summary of a stage, unless the one that is there still holds."""
        if self._survey(f"{area}/{stage}")[1]:
            self.write(f"{area}/{stage}/{SUMMARY}", to_summary(self.entries(area, stage).values()))

    def tidy(self, area: str, stage: str, named: dict[str, str]) -> None:
        """Of the shards in `named` drop all data files but the one that is named: those of a writer that was killed before it
        wrote its entry, where the shard came out otherwise the next time. For whoever holds the run, with nothing under way."""
        for name in self.names(f"{area}/{stage}"):
            if name.endswith(".parquet") and named.get(name.rpartition("-")[0], name) != name:
                self.delete(f"{area}/{stage}/{name}")

    def _survey(self, folder: str) -> tuple[dict[str, Entry], list[str]]:
        names = self.names(folder)
        return survey(names, (self.read_bytes(f"{folder}/{SUMMARY}") if SUMMARY in names else None) or b"")

    def read(self, entry: Entry, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard, its sha256 checked first. Raises StoreError when the bytes are not those that were committed."""
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
        """Numbers of the rounds, evals, policies or training states that exist."""
        return sorted(int(name) for name in self.names(kind) if name.isascii() and name.isdigit())

    def ready(self, number: int) -> dict[str, Any] | None:
        """What the trainer takes of a round: shard -> stage -> sha256, or None while the round is not committed."""
        return self.read_json(f"{area('rounds', number)}/ready.json", "policy", "shards")

    def round_table(self, number: int) -> pa.Table | None:
        """Training rows of a committed round, one per trace in shard order; None while it is not committed.

        Columns: those of rollout, grade and score that training reads, prompt_tokens of each trace's prompt, and the first
        reject_reason of the row. Raises StoreError when a shard is no longer the one that was committed.
        """
        ready = self.ready(number)
        if ready is None:
            return None
        where, policy = area("rounds", number), ready["policy"]
        tables = [self.training_rows(where, shard, hashes, policy) for shard, hashes in sorted(ready["shards"].items())]
        return pa.concat_tables(tables)

    def training_rows(self, where: str, shard: str, hashes: dict[str, str], policy: int) -> pa.Table:
        """Training rows of one shard (see `round_table`) whose stages have the hashes given; `policy` was asked to answer.

        Raises StoreError when a stage has other bytes by now.
        """
        tables = {}
        for stage, digest in hashes.items():
            entry = self.entry(where, stage, shard)
            if entry is None or entry.sha256 != digest:
                raise StoreError(
                    "the shard has changed since its round was committed to the trainer",
                    self.locate(f"{where}/{stage}/{shard}.json"),
                    "Run `egrsd stage` for the stages that `egrsd status` shows as stale",
                )
            tables[stage] = self.read(entry)
        rollout = tables["rollout"]
        prompts = tables["prompts"].take(rollout["prompt_index"])
        columns = {name: rollout[name] for name in ("trace_id", "response_tokens")}
        # the policy whose student log-probs these are: a trace the teacher wrote was scored with the round's
        by_teacher = pc.equal(rollout["trace_source"], "teacher")
        columns["policy_version"] = pc.if_else(by_teacher, pa.scalar(policy, pa.int32()), rollout["policy_version"])
        columns |= {"prompt_tokens": prompts["prompt_tokens"], "rollout_entropy": rollout["rollout_entropy"]}
        columns["advantage"] = tables["grade"]["advantage"]
        columns |= {name: tables["score"][name] for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy")}
        columns["reject_reason"] = pc.coalesce(*(tables[s]["reject_reason"] for s in ("rollout", "grade", "score")))
        return pa.table(columns)

    # ---- policies and training state -----------------------------------------------------------------------------------

    def publish_policy(self, version: int, folder: str | Path) -> None:
        """Make the adapter in a local folder policy `version`, atomically: its manifest is written last."""
        self._put_folder(area("policy", version), Path(folder))

    def save_state(self, version: int, folder: str | Path) -> None:
        """Keep the exact training state that stands beside policy `version`."""
        self._put_folder(area("train", version), Path(folder))

    def prune_states(self, keep: int) -> None:
        """Drop all but the last `keep` training states that stand beside a published policy."""
        for old in [version for version in self.numbers("train") if self.has_policy(version)][:-keep]:
            self.delete(area("train", old))

    @contextlib.contextmanager
    def local(self, folder: str) -> Iterator[Path | None]:
        """What `fetch` gives, for the length of a block: a copy is gone after it."""
        found = self.fetch(folder)
        try:
            yield found
        finally:
            if found is not None and self.local_root is None:
                shutil.rmtree(found, ignore_errors=True)

    def has_policy(self, version: int) -> bool:
        """Whether policy `version` is published; 0, the base, always is."""
        return version == 0 or self.read_bytes(f"{area('policy', version)}/{MANIFEST}") is not None

    def latest_policy(self) -> int:
        """The highest published version; 0 is the base."""
        return max((number for number in self.numbers("policy") if self.has_policy(number)), default=0)

    def policy(self, version: int) -> contract.Policy:
        """What an engine must answer with. Raises StoreError when that policy was never published."""
        if not self.has_policy(version):
            raise StoreError(
                f"policy {version} is not published", self.locate("policy"), f"Policies here: 0 to {self.latest_policy()}"
            )
        return contract.Policy(version, self.locate(area("policy", version)) if version else None)

    def fetch(self, folder: str) -> Path | None:
        """A local copy (or the folder itself on a local disk) of a folder committed with a manifest; every file is checked."""
        manifest = self.read_json(f"{folder}/{MANIFEST}", "files")
        if manifest is None:
            return None
        target = self.local_root / folder if self.local_root else Path(tempfile.mkdtemp(prefix="egrsd-"))
        try:
            for name, data in self._checked(folder, manifest):
                if self.local_root is None:
                    (target / name).write_bytes(data)
        except BaseException:
            if self.local_root is None:
                shutil.rmtree(target, ignore_errors=True)
            raise
        return target

    def check_policy(self, version: int) -> None:
        """Raise StoreError when a file of a published policy is missing or damaged: an engine would answer all the same."""
        folder = area("policy", version)
        if version:  # 0 is the base
            for _ in self._checked(folder, self.read_json(f"{folder}/{MANIFEST}", "files")):
                pass

    def _checked(self, folder: str, manifest: dict[str, Any] | None) -> Iterator[tuple[str, bytes]]:
        remedy = "Delete the folder and resume"
        if "policy" in self.locate(folder).split("/")[-2:]:  # engines open the policies of an object store by themselves
            remedy = "Delete its folder and those of all later policies, and resume: they are trained again"
        if manifest is None:
            raise StoreError("is not published", self.locate(folder), remedy)
        for name, digest in manifest["files"].items():
            data = self.read_bytes(f"{folder}/{name}")
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise StoreError("the file is missing or damaged", self.locate(f"{folder}/{name}"), remedy)
            yield name, data

    def _put_folder(self, path: str, folder: Path) -> None:
        files = {}
        self.delete(f"{path}/{MANIFEST}")
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            self.write(f"{path}/{file.name}", data)
            files[file.name] = hashlib.sha256(data).hexdigest()
        self.write_json(f"{path}/{MANIFEST}", {"files": files})

    # ---- metrics and signals -----------------------------------------------------------------------------------------

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Keep the trainer's metrics; rows of a round that is trained again after a crash replace their first version."""
        by_round: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_round.setdefault(int(row["round"]), []).append(row)
        for number, group in by_round.items():
            self.write_metrics("train", number, group)

    def write_metrics(self, writer: str, number: int, rows: list[dict[str, Any]]) -> None:
        """Put one writer's metrics of one round."""
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        self.write(f"metrics/{number:04d}-{writer}.jsonl", lines.encode())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """All metrics, by round and writer."""
        for name in self.names("metrics"):
            for line in (self.read_bytes(f"metrics/{name}") or b"").splitlines():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise StoreError(f"is not JSON ({error})", self.locate(f"metrics/{name}"), _RESTORE) from error
                yield {"writer": name[5:-6], **row}

    def request_stop(self, stop: bool = True) -> None:
        """Ask the trainer to end after the step it is in, or take that back."""
        if stop:
            self.write("train/stop", b"")
        else:
            self.delete("train/stop")

    def stop_requested(self) -> bool:
        """Whether the trainer was asked to end."""
        return self.read_bytes("train/stop") is not None


def _remedy(entry: Entry) -> str:
    if entry.area.startswith("evals"):
        return f"Delete the folder {entry.area} and run `egrsd distill` or `egrsd evaluate` again: it evaluates anew"
    return f"Recompute it with `egrsd stage {entry.stage} --round {int(entry.area[-4:])} --shard {entry.shard} --force`"
