"""Teachers that are policies of the student: which version a round has, its mean as a folder, and what makes scores stale."""

import pytest
import torch
from in_process import brought, planned
from safetensors.torch import load_file, save_file

from pipeline.contract import Policy
from pipeline.errors import StoreError
from pipeline.inspection.proof import prove
from pipeline.overrides import resolve
from pipeline.rounds import seats
from pipeline.rounds.round import open_round
from pipeline.stages import STAGES
from pipeline.store.directory import area
from pipeline.store.folders import ADAPTER, ADAPTER_CONFIG, check_folder, put_folder
from pipeline.store.manifest import Origin


def publish(store, tmp_path, version, value):
    folder = tmp_path / f"made-{version}-{value}"
    folder.mkdir()
    weights = {"q.lora_A.weight": torch.full((2, 3), float(value)), "q.lora_B.weight": torch.full((3, 2), float(value))}
    save_file(weights, folder / ADAPTER)
    (folder / ADAPTER_CONFIG).write_text("{}")
    put_folder(store, area("policy", version), folder)


@pytest.fixture
def work(tmp_path):
    """Round 3 of a run with policies 1 to 3, whose weights are their numbers, answered by policy 3."""
    made = planned(tmp_path / "run", "teachers.old.policy=lag:2", number=3, policy=3)
    for version in (1, 2, 3):
        publish(made.store, tmp_path, version, version)
    return made


def with_policy(work, policy):
    return open_round(work.store, resolve(work.run, [f"teachers.old.policy={policy}"]), "rounds", 3)


def test_a_lagging_teacher_is_an_earlier_policy_and_the_base_before_there_is_one(work):
    store = work.store
    assert seats.policy_of(work, "old") == store.policy(1)
    assert seats.policy_of(with_policy(work, "lag:7"), "old") == Policy(0)
    assert seats.policy_of(with_policy(work, "lag:0"), "old") == store.policy(3)
    assert seats.digest_of_policies(with_policy(work, "lag:7")) is None
    assert seats.digest_of_policies(with_policy(work, "lag:0")) != seats.digest_of_policies(work)


def test_a_mean_is_written_like_a_policy_and_made_again_only_when_its_policies_changed(work, tmp_path):
    mean = with_policy(work, "ema:.5")
    seats.prepare(mean)
    where = seats.policy_of(mean, "old")
    assert where.version == 3
    check_folder(work.store, "teachers/old/0003", "")
    found = load_file(f"{where.adapter}/{ADAPTER}")
    assert found["q.lora_B.weight"][0, 0].item() == 0.5 * (0.5 * (0.5 * 1) + 0.5 * 2) + 0.5 * 3
    assert found["q.lora_A.weight"][0, 0].item() == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3
    before, digest = (work.store.read_bytes(f"teachers/old/000{n}/manifest.json") for n in (2, 3))
    stamp = seats.digest_of_policies(mean)
    publish(work.store, tmp_path, 3, 9)
    assert seats.digest_of_policies(mean) != stamp
    seats.prepare(mean)
    assert work.store.read_bytes("teachers/old/0002/manifest.json") == before
    assert work.store.read_bytes("teachers/old/0003/manifest.json") != digest


@pytest.mark.parametrize("number", [2, 3])
def test_a_mean_of_a_driver_that_died_before_its_manifest_is_made_again(work, number):
    mean = with_policy(work, "ema:.5")
    seats.prepare(mean)
    last = load_file(work.store.local_root / "teachers/old/0003" / ADAPTER)
    work.store.delete(f"teachers/old/000{number}/manifest.json")
    if number == 2:  # it died two policies ago
        work.store.delete("teachers/old/0003/mean.json")
    seats.prepare(mean)
    for each in (2, 3):
        check_folder(work.store, f"teachers/old/000{each}", "")
    again = load_file(work.store.local_root / "teachers/old/0003" / ADAPTER)
    assert all(torch.equal(again[name], weight) for name, weight in last.items())


def test_a_mean_of_a_policy_that_is_gone_is_refused(work):
    work.store.delete("policy/0001/manifest.json")
    with pytest.raises(StoreError, match=r"policy 1 is not published.*keep them all"):
        seats.prepare(with_policy(work, "ema:.5"))


def test_a_damaged_mean_and_a_trace_that_is_its_own_sibling_are_found(work, tmp_path):
    mean = with_policy(work, "ema:.5")
    seats.prepare(mean)
    (work.store.local_root / "teachers/old/0002" / ADAPTER).write_bytes(b"x")
    assert [line for line in prove(work.store, mean.run).findings if "teachers/old/0002" in line and "Delete the folder" in line]
    odd = planned(tmp_path / "odd", "teachers.a={prompt: sibling, template: '{problem}|{solution}'}")
    brought(odd)
    assert not prove(odd.store, odd.run).findings
    entry = odd.store.entry(odd.area, "score", "0000")
    table = odd.store.read(entry)
    place = table.schema.get_field_index("teacher_sibling")
    own = table.set_column(place, "teacher_sibling", table["trace_id"])
    stage = STAGES["score"]
    odd.store.commit(odd.area, stage, "0000", own, Origin(entry.settings, entry.inputs, 0.0, dict(entry.facts)))
    assert [line for line in prove(odd.store, odd.run).findings if "column teacher_sibling" in line]
