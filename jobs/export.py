"""`egrsd export`: join all stages of all rounds into one Parquet dataset, or write a policy as a model folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.opened import open_run
from jobs.screen.terminal import session
from jobs.settle import parse_numbers
from pipeline.errors import UserError, command
from pipeline.notices import NOTICE_S, late
from pipeline.recipes import called
from pipeline.rounds import contents
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import joined_round
from pipeline.store.directory import Store
from pipeline.store.files import Files

RECORD = "egrsd.json"  # in every exported model folder: it tells which run and policy it is


@dataclass(frozen=True)
class ModelFolder:
    """Which policy to write where, and how: as its adapter or as whole weights (`merge`).

    policy: a number or `last`. push: a repository of a hub that gets the folder too, or None.
    """

    folder: str
    policy: str = "last"
    merge: bool = False
    push: str | None = None
    replace: bool = False


def export_run(uri: str, out_uri: str, debug: bool, replace: bool = False) -> None:
    """Write `round-0000.parquet` and so on to a folder or URI, with every column of the contract.

    Without `replace`, rounds that are there already stay, and raise UserError. So do a run without traces and a place that may
    not be written. Raises StoreError for a damaged shard or last policy, or when writing fails.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        rounds = [work for work in open_rounds(store, run) if Inventory(work).is_whole("rollout")]
        if not rounds:
            raise UserError("no round has all its traces yet", store.uri, f"Run {command('distill', '--run', store.uri)} first")
        store.check_policy(store.latest_policy())
        target, rows = Files(out_uri), 0
        target.is_ours = False
        there = [name for name in target.names("") if re.fullmatch(r"round-\d{4,}\.parquet", name)]
        if there and not replace:
            raise UserError(f"{len(there)} rounds are there already", out_uri, "Name another folder, or pass --replace")
        with late("export", f"{len(rounds)} rounds of {store.uri} have been joined for {NOTICE_S:g} s so far."):
            for work in rounds:
                table, sink = joined_round(work), pa.BufferOutputStream()
                pq.write_table(table, sink, compression="zstd")
                target.write(f"round-{work.number:04d}.parquet", sink.getvalue())
                rows += table.num_rows
        for name in there:  # the rounds of another run, now that the new ones are there
            if name not in {f"round-{work.number:04d}.parquet" for work in rounds}:
                target.delete(name)
        out.told.result = {"out": out_uri, "rounds": [work.number for work in rounds], "traces": rows}
        out.say(f"{rows} traces of {len(rounds)} rounds in {out_uri}")


def export_model(uri: str, asked: ModelFolder, debug: bool) -> None:
    """Write a policy with tokenizer, generation configuration and model card into a new local folder, and push it where asked.

    The folder appears as a whole. Raises UserError for a policy that is not published, a folder that is there, and
    a token or repository that the hub refuses. Raises StoreError for damaged or dropped weights.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        version = _version(store, asked.policy)
        if asked.merge:
            contents.refuse_other(store, run)
        target = _free(asked)
        from jobs import model_folder  # torch and the hub's client take seconds to import

        token = model_folder.check_push(asked.push) if asked.push else ""
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            with late("export", f"policy {version} has been written for {NOTICE_S:g} s so far."):
                record = model_folder.write(store, run, version, asked.merge, unfinished)
            (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            unfinished.chmod(0o755)
            for file in unfinished.iterdir():
                file.chmod(0o755 if file.is_dir() else 0o644)
            _put(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        out.say(f"policy {version} of {store.uri} in {target}")
        if not version:
            out.say(f"note: {model_folder.UNTRAINED}")
        out.told.result = {"model": str(target), "policy": version, "run": store.uri, "merged": asked.merge, "pushed": None}
        if asked.push:
            out.told.result["pushed"] = model_folder.push(asked.push, target, token, f"Policy {version} of {called(run)}")
            out.say(f"pushed to {out.told.result['pushed']}")


def _put(new: Path, target: Path) -> None:
    """Put a whole folder in its place. An old one there is moved aside until the new one is there."""
    old = target.with_name(f"{new.name}-old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _version(store: Store, text: str) -> int:
    """The version that `last` or a number names. Raises SettingError for another text, UserError for one that is not there."""
    if text.strip() == "last":
        return store.latest_policy()
    number, *more = parse_numbers(text, "--policy", "last or 4")
    if more:
        raise UserError("names several policies", f"--policy {text}", "Export one at a time")
    if not store.has_policy(number):
        raise UserError(
            f"policy {number} is not published", store.locate("policy"), f"Policies here: 0 to {store.latest_policy()}"
        )
    return number


def _free(asked: ModelFolder) -> Path:
    """The folder to write. Raises UserError when it is a URI, or holds something that --replace may not replace."""
    if "://" in asked.folder:
        raise UserError("is a URI, and programs open models from folders", f"--model {asked.folder}", "Name a local folder")
    target = Path(asked.folder).expanduser().absolute()
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return target
    if not (target / RECORD).is_file():
        raise UserError("is there already, and is no exported policy", str(target), "Name another folder")
    if not asked.replace:
        raise UserError("a policy was exported there already", str(target), "Name another folder, or pass --replace")
    return target
