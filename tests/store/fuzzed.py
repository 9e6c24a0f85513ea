"""A small run with every kind of file, the readers of it, and what can be done to its files. The fuzz tests share it."""

import contextlib
import copy
import hashlib
import io
import json
import random
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from committed import round_table
from rich.console import Console

from jobs import status
from jobs.screen.terminal import Session
from pipeline.config import Source
from pipeline.errors import EgrsdError
from pipeline.evidence import documents, sweep
from pipeline.inspection.proof import prove
from pipeline.inspection.remaining import Remaining
from pipeline.live.lease import read_lease
from pipeline.problems.sources import open_source
from pipeline.report.collect import collect
from pipeline.rounds import contents, origin
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import joined_round
from pipeline.stages import PLAIN
from pipeline.store.directory import Store
from pipeline.store.folders import put_folder
from pipeline.store.manifest import Origin, data_name
from pipeline.training import batches, checkpoint

STORED = Path(__file__).parent.parent / "stored_run" / "running.tar.xz"
WRONG = (None, True, "8", -1, 1e308, float("nan"), 10**30, [], {}, ["x"], {"x": None}, "../../x", "/x", "0" * 3000)
EVERY = 8  # of this many mutations that the file's own reader refuses, one is tried with all readers
FIGURE = {"settings": {}, "cosine": [1.0], **{name: [0.5] for name in ("factors", "restored", "shares", "gates")}}
FIGURE |= {
    "decile_gates": [1.0],
    "decile_factors": [1.0],
    "kept": 1,
    "effective_share": 1,
    "effective_tokens": 9,
    "correlation": None,
}
EVIDENCE = {"axes": {"label.gamma": [0.5]}, "points": [FIGURE], "regimes": ["lock"], "rounds": [0], "tokens": 9, "traces": 1}
EVIDENCE |= {"deciles": {"tokens": [9], "entropy": [0.5], "delta": [0.1]}}


def complete_run(folder):
    """A run of two rounds with every kind of file, in a folder."""
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    made = Store(str(folder / "running"))
    made.save_run(made.load_run(), made.run_file().versions)
    for name in ("policy/0002", "train/0002"):
        content = folder / name.replace("/", "-")
        content.mkdir()
        for file in (made.local_root / name).iterdir():
            if file.name != "manifest.json":
                (content / file.name).write_bytes(file.read_bytes())
        put_folder(made, name, content)
    documents.write_evidence(made, EVIDENCE)
    held = folder / "held.jsonl"
    held.write_text('{"problem": "1+1", "solution": "2", "answer": "2"}\n')
    opened = {"source": open_source(made.load_run().source), "evaluation.source": open_source(Source(uri=str(held)))}
    origin.keep(made, opened)
    contents.keep(made, made.load_run(), contents.look(made.load_run()))
    made.write_json("lease.json", {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1, "beats": 3})
    made.summarise("rounds/0001", "score")
    return made


def shown(store):
    """What `egrsd status` prints."""
    text = io.StringIO()

    @contextlib.contextmanager
    def session(_):
        yield Session(Console(file=text, width=200), True, contextlib.ExitStack())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "session", session)
        status.show(store.uri, True)
    return text.getvalue()


def exported(store):
    run = store.load_run()
    store.check_policy(store.latest_policy())
    return [joined_round(work).to_pylist() for work in open_rounds(store, run) if Inventory(work).is_whole("rollout")]


def swept(store):
    run = store.load_run()
    return repr(sweep.read(run, sweep.choose_rounds(store, run, None)).signals)


def planned(store):
    """What a resume would do, and what its trainer would read."""
    run = store.load_run()
    remaining = Remaining.of(store, run)
    read_lease(store)
    with store.local("train/0002") as folder:
        cursor = checkpoint.read_cursor(folder)
    traces = [
        batches.usable(batches.RoundTable(number, number, round_table(store, number)), number).trace_ids.tolist()
        for number in store.numbers("rounds")
    ]
    return remaining, cursor, traces


READERS = {
    "status": shown,
    "export": exported,
    "report": lambda store: json.dumps(collect(store, store.load_run()), default=str),
    "sweep": swept,
    "resume": planned,
}


def looked_at(store):
    """What every reader says: its result, or the error that it refuses with."""
    results = {}
    for name, read in READERS.items():
        try:
            results[name] = read(store)
        except EgrsdError as error:
            results[name] = error
    assert all(result.where for result in results.values() if isinstance(result, EgrsdError)), results
    return results


def findings(store):
    """What `egrsd verify` finds."""
    try:
        found = prove(store, store.load_run())
        for read in (documents.read_evidence, read_lease):
            with found.found():
                read(store)
    except EgrsdError as error:
        return [str(error)]
    return found.findings


@contextlib.contextmanager
def changed(store, files):
    """Some files, by path below the run, with other content (None: deleted) for the length of a block."""
    paths = [store.local_root / name for name in files]
    old = {path: path.read_bytes() if path.is_file() else None for path in paths}
    for path, data in zip(paths, files.values(), strict=True):
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
    try:
        yield
    finally:
        for path, data in old.items():
            path.unlink(missing_ok=True) if data is None else path.write_bytes(data)


def judge(store, before, what):
    """Nothing of ours fails in another way, and what is read differently is named."""
    results = looked_at(store)
    other = [name for name, result in results.items() if not isinstance(result, EgrsdError) and result != before[name]]
    refused = [name for name, result in results.items() if isinstance(result, EgrsdError)]
    found = findings(store) if other or not refused else [str(results[refused[0]])]
    assert not other or found, f"{what}: {other} used it in silence"
    assert set(other) <= {"status", "resume", "report"}, f"{what}: {other} used it, and only `verify` would say so"
    return refused, found


# ---- JSON


def fields(document, path=()):
    """The place of every value in a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from fields(value, (*path, key))


def mutated(document, place, value):
    """A copy with another value at a place. `...` drops it."""
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


def json_files(store):
    """Every JSON file, but of shards only those of one shard of each stage."""
    root = store.local_root
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*.json"))]
    kept = [name for name in names if "/0000.json" not in name and "rounds/0000/label" not in name]
    return [name for name in kept if "adapter_config" not in name]


def json_mutations(store):
    """(file, its content, what was done): every field dropped and set to wrong values, drawn evenly over the files."""
    draw = random.Random(0)
    for name in json_files(store):
        document = json.loads((store.local_root / name).read_bytes())
        places = list(fields(document))
        if name == "run.json":
            places = [("config",), ("versions",), ("config_digest",), ("config", "rounds"), ("config", "label", "gamma")]
        for place in draw.sample(places, min(len(places), 5)):
            for value in (..., *draw.sample(WRONG, 2)):
                yield name, json.dumps(mutated(document, place, value)).encode(), f"{name}: {place} = {value!r}"
        for data in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, json.dumps([document]).encode()):
            yield name, data, f"{name}: {data[:20]!r}"


def own_reader(store, name):
    """The one reader of a file, or None when the file is of a kind that is proven by its hash."""
    parts = name.split("/")
    if parts[0] in ("rounds", "evals") and len(parts) == 4:
        return lambda: store.entry("/".join(parts[:2]), parts[2], parts[3][:-5])
    return {
        "run.json": store.load_run,
        "lease.json": lambda: read_lease(store),
        "sources.json": lambda: origin.read_sources(store),
        "models.json": lambda: contents.read_models(store),
    }.get(name)


def refusal(read):
    """The error of ours that a reader raises, or None."""
    try:
        read and read()
    except EgrsdError as error:
        return error
    return None


# ---- Parquet


def bytes_of(store, entry, change):
    path = store.local_root / entry.path
    table = change(pq.read_table(path))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="lz4")
    return sink.getvalue(), table.num_rows


def renewed(store, where, shard, stage, change, counts):
    """Files, by path, of one shard after a change of one stage, with right hashes in all entries and in ready.json."""
    files, hashes = {}, {}
    ready = json.loads((store.local_root / where / "ready.json").read_bytes())
    for name in [part.name for part in PLAIN]:
        entry = store.entry(where, name, shard)
        data, rows = (store.local_root / entry.path).read_bytes(), entry.rows
        if name == stage:
            data, rows = bytes_of(store, entry, change)
        digest = hashlib.sha256(data).hexdigest()
        inputs = {key: hashes.get(key, value) for key, value in entry.inputs.items()}
        named = data_name(shard, digest, Origin(entry.settings, inputs, facts=dict(entry.facts)))
        new = replace(entry, sha256=digest, bytes=len(data), inputs=inputs, data=named, rows=rows if counts else entry.rows)
        hashes[name] = digest
        files[new.path] = data
        files[f"{where}/{name}/{shard}.json"] = json.dumps(asdict(new)).encode()
        if name in ready["shards"][shard]:
            ready["shards"][shard][name] = digest
    files[f"{where}/ready.json"] = json.dumps(ready).encode()
    return files


def with_value(name, value):
    """The first value of a column replaced; in a list, the first value of its first list."""

    def change(table):
        column = table[name].to_pylist()
        row = next(i for i, old in enumerate(column) if old not in (None, []))
        column[row] = [value, *column[row][1:]] if isinstance(column[row], list) else value
        return table.set_column(table.schema.get_field_index(name), name, pa.array(column, table.schema.field(name).type))

    return change


def with_type(name, kind):
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))


def permuted(table):
    return table.take(list(range(table.num_rows))[::-1])


def table_mutations(stage):
    """What is done to the table of a stage, by name."""
    yield "permuted", permuted
    yield "a row missing", lambda table: table.slice(1)
    yield "a row twice", lambda table: pa.concat_tables([table, table.slice(0, 1)])
    yield "no rows", lambda table: table.slice(0, 0)
    written = [column for column in stage.writes if not column.optional]
    for column in written:
        yield f"{column.name} missing", lambda table, name=column.name: table.drop_columns([name])
        if not column.nullable:
            yield f"{column.name} null", with_value(column.name, None)
        if column.shape == "T":
            yield f"{column.name} shorter", lambda table, name=column.name: shortened(table, name)
    yield f"{stage.key} of others", with_value(stage.key, "0123456789abcdef")
    holds = {
        "rollout_logprobs": (50.0, float("nan")),
        "rollout_entropy": (-5.0, 100.0),
        "response_tokens": (57, -1, 2**31 - 1),
        "prompt_tokens": (-1,),
        "prompt_index": (1, 10**6),
        "teacher_logprobs": (0.5, float("-inf")),
        "teacher_entropy": (100.0, 4.0),
        "lookahead_entropy": (5.0,),
        "share_lock": (2.0,),
        "regime": (9,),
        "verdict": ("banana",),
        "trace_source": ("me",),
        "advantage": (float("inf"),),
        "policy_version": (7,),
        "gate": (1.5,),
    }
    for column in stage.writes:
        for value in holds.get(column.name, ()):
            yield f"{column.name} = {value}", with_value(column.name, value)
    other = {"float": pa.float64(), "int32": pa.int64(), "string": pa.large_string(), "int64": pa.string()}
    for column in written:
        if str(column.type) in other:
            yield f"{column.name} of another type", with_type(column.name, other[str(column.type)])


def shortened(table, name):
    lists = [None if values is None else values[:-1] for values in table[name].to_pylist()]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(lists, table.schema.field(name).type))


def with_reason(text):
    def change(table):
        place = table.schema.get_field_index("reject_reason")
        return table.set_column(place, "reject_reason", pa.array([text, *table["reject_reason"].to_pylist()[1:]]))

    return change
