"""Damage and forgery of every file of a run: what is not as it was written is refused, or it changes nothing.

The run is one that earlier code made (tests/stored_run), completed with the files that later code writes. Every mutation changes
one file, then the readers behind the verbs look, in this process. None may raise an error that is not ours. A reader may give
another result than before only where `egrsd verify` finds something. With renewed hashes `egrsd verify` always finds it.
"""

import contextlib
import itertools
import json
from dataclasses import asdict, replace

import pytest
from fuzzed import (
    EVERY,
    READERS,
    changed,
    complete_run,
    exported,
    findings,
    json_mutations,
    judge,
    looked_at,
    mutated,
    own_reader,
    refusal,
    renewed,
    shown,
    table_mutations,
    with_reason,
)

from pipeline.errors import EgrsdError
from pipeline.stages import PLAIN
from pipeline.store.manifest import Origin, data_name


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run of two rounds with every kind of file."""
    return complete_run(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def before(store):
    assert findings(store) == []
    results = looked_at(store)
    assert not [error for error in results.values() if isinstance(error, EgrsdError)]
    return results


# ---- JSON


@pytest.mark.parametrize("step", [15, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_damaged_or_forged_json_file_is_refused_or_changes_nothing(store, before, step):
    """`step`: of this many mutations one is tried."""
    refused_at_once, tried = 0, 0
    for name, data, what in itertools.islice(json_mutations(store), 0, None, step):
        tried += 1
        with changed(store, {name: data}):
            error = refusal(own_reader(store, name))
            if error is not None:
                assert name.rsplit("/", 1)[-1] in error.where, what
                assert error.remedy, what
                refused_at_once += 1
            if error is None or refused_at_once % EVERY == 0:
                judge(store, before, what)
    assert tried >= 500 / step
    assert refused_at_once >= 200 / step
    assert findings(store) == []


# ---- Parquet


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("stage", PLAIN, ids=lambda stage: stage.name)
def test_a_forged_shard_with_right_hashes_is_found_where_it_breaks_an_invariant(store, before, stage, step):
    """`step`: of this many mutations one is tried."""
    for number, (what, change) in itertools.islice(enumerate(table_mutations(stage)), 0, None, step):
        for counts in (True, False) if number < 4 else (True,):
            files = renewed(store, "rounds/0001", "0001", stage.name, change, counts)
            with changed(store, files):
                shard = [line for line in findings(store) if "0001" in line]
                assert shard, f"{stage.name}: {what} was not found"
                if number % EVERY == 0:
                    for name, read in READERS.items():
                        with contextlib.suppress(EgrsdError):
                            assert read(store) is not None, name
    assert findings(store) == []


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_damaged_shard_or_tensor_file_is_refused_or_changes_nothing(store, before, step):
    """`step`: of this many files one is damaged."""
    root = store.local_root
    data = [path for path in sorted(root.rglob("*")) if path.suffix in (".parquet", ".safetensors")]
    for number, path in list(enumerate(data))[::step]:
        whole, name = path.read_bytes(), str(path.relative_to(root))
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        others = (bytes(flipped), whole[:-7], b"", data[number - 1].read_bytes(), None)
        for index, damage in enumerate(others):
            with changed(store, {name: damage}):
                assert any(path.name in line for line in findings(store)), f"{name}: {index} was not found"
                if (number + index) % EVERY == 0:
                    judge(store, before, f"{name}: {index}")


# ---- whole rounds, files that do not belong


def test_a_round_copied_over_another_is_refused_with_and_without_its_number(store, before):
    first, files = store.local_root / "rounds/0000", {}
    for path in sorted((store.local_root / "rounds/0001").rglob("*")):
        if path.is_file():
            files[str(path.relative_to(store.local_root))] = None
    for path in sorted(first.rglob("*")):
        if path.is_file():
            files[f"rounds/0001/{path.relative_to(first)}"] = path.read_bytes()
    with changed(store, files):
        refused, _ = judge(store, before, "round 0 over round 1")
        assert set(refused) == set(READERS)
    entries = [name for name in files if name.endswith(".json") and len(name.split("/")) == 4]
    again = {name: data and data.replace(b"rounds/0000", b"rounds/0001") for name, data in files.items() if name in entries}
    with changed(store, files | again):
        assert any("of another round" in line for line in findings(store))


STRANGERS = (".DS_Store", "._0000.json", "notes.txt", "0000 (1).json", "0000-copy.parquet", "0000.json~", "9")


def test_what_does_not_belong_is_passed_over_in_every_folder(store, before):
    folders = [path for path in store.local_root.rglob("*") if path.is_dir()]
    files = {f"{folder.relative_to(store.local_root)}/{name}": b"Bud1\x00\x01" for folder in folders for name in STRANGERS}
    files |= dict.fromkeys(STRANGERS, b"\x00")
    with changed(store, files):
        assert looked_at(store) == before
        assert findings(store) == []


def test_an_extra_shard_and_a_cut_adapter_are_said(store, before):
    entry = store.entry("rounds/0001", "grade", "0001")
    data = (store.local_root / entry.path).read_bytes()
    named = data_name("0007", entry.sha256, Origin(entry.settings, entry.inputs))
    extra = asdict(replace(entry, shard="0007", data=named))
    files = {f"rounds/0001/grade/{named}": data, "rounds/0001/grade/0007.json": json.dumps(extra).encode()}
    with changed(store, files):
        assert any("the plan does not name" in line for line in findings(store))
        assert looked_at(store) == before
    adapter = "policy/0002/adapter_model.safetensors"
    with changed(store, {adapter: (store.local_root / adapter).read_bytes()[:-1]}):
        assert "damaged: " in shown(store)
        with pytest.raises(EgrsdError, match=r"adapter_model\.safetensors: the file is missing or damaged"):
            exported(store)


def test_a_manifest_that_does_not_name_every_file_is_refused(store, before):
    for name in ("policy/0002/manifest.json", "train/0002/manifest.json"):
        whole = json.loads((store.local_root / name).read_bytes())
        for file in whole["files"]:
            bare = {"files": mutated(whole["files"], (file,), ...)}  # as early versions wrote it, without sizes
            for document in (bare, whole | bare):
                with changed(store, {name: json.dumps(document).encode()}):
                    refused, found = judge(store, before, f"{name} without {file}")
                    assert refused
                    assert any(f"{name}: files: {file} is missing" in line for line in found)


def test_a_committed_round_without_a_stage_is_found(store, before):
    name = "rounds/0000/ready.json"
    whole = json.loads((store.local_root / name).read_bytes())
    with changed(store, {name: json.dumps(mutated(whole, ("shards", "0001", "rollout"), ...)).encode()}):
        _, found = judge(store, before, name)
        assert any("ready.json: shards.0001: a stage is missing" in line for line in found)


def test_a_reason_that_no_stage_gives_is_refused(store, before):
    entry = store.entry("rounds/0001", "rollout", "0001")
    files = renewed(store, "rounds/0001", "0001", "rollout", with_reason("banana"), counts=True)
    with changed(store, files), pytest.raises(EgrsdError, match=r"column reject_reason: has other texts than missing_problem"):
        store.read(store.entry("rounds/0001", "rollout", entry.shard))


def test_forged_facts_are_refused(store, before):
    where, shard = "rounds/0001", "0001"
    for name, facts in (("score", {"entropy_max": 0.01}), ("rollout", {"vocab_size": 5}), ("score", {"vocab_size": 5000})):
        entry = store.entry(where, name, shard)
        forged = dict(entry.facts) | facts
        named = data_name(shard, entry.sha256, Origin(entry.settings, entry.inputs, facts=forged))
        new = replace(entry, facts=forged, data=named)
        data = (store.local_root / entry.path).read_bytes()
        with changed(store, {f"{where}/{name}/{shard}.json": json.dumps(asdict(new)).encode(), new.path: data}):
            assert findings(store), facts
