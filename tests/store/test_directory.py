"""Commit protocol: what was committed is read back, what was not does not exist, what was damaged is refused."""

import errno
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from score_shards import SCORE, commit, score_table

from pipeline import contract
from pipeline.config import Run
from pipeline.digest import digest
from pipeline.errors import ContractError, StoreError, UserError
from pipeline.recipes import demo
from pipeline.store import files, shards
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED


@pytest.fixture
def run_dir(tmp_path):
    return Store(str(tmp_path / "run"))


def test_a_committed_shard_is_read_back_whole(run_dir):
    entry = commit(run_dir, peak=0.25)
    assert run_dir.read(run_dir.entry("rounds/0000", "score", "0000")).equals(score_table())
    assert (entry.rows, entry.tokens, entry.rejected, entry.facts) == (3, 12, {}, {"peak": 0.25})
    assert run_dir.entries("rounds/0000", "score") == {"0000": entry}


def test_a_shard_without_an_entry_does_not_exist(run_dir):
    entry = commit(run_dir)
    run_dir.delete("rounds/0000/score/0000.json")
    assert run_dir.entry("rounds/0000", "score", "0000") is None
    assert run_dir.entries("rounds/0000", "score") == {}
    assert entry.data in run_dir.names("rounds/0000/score")


def test_a_flipped_bit_is_refused_with_the_way_out(run_dir):
    entry = commit(run_dir)
    path = run_dir.local_root / "rounds/0000/score" / entry.data
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"sha256 differs.*egrsd stage score --run .* --round 0 --shard 0000 --force"):
        run_dir.read(entry)


def test_a_torn_entry_is_refused(run_dir):
    commit(run_dir)
    path = run_dir.local_root / "rounds/0000/score/0000.json"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match="is not JSON"):
        run_dir.entry("rounds/0000", "score", "0000")


def test_the_same_rows_have_the_same_name_and_a_recommit_leaves_one_file(run_dir):
    first, second = commit(run_dir), commit(run_dir)
    assert first.data == second.data
    third = commit(run_dir, score_table(teacher_entropy=[[0.5] * 4] * 3))
    assert third.data != first.data
    assert run_dir.names("rounds/0000/score") == sorted(["0000.json", third.data])


def test_two_writers_of_one_shard_leave_one_whole_shard(run_dir):
    tables = [score_table(teacher_entropy=[[k / 10] * 4] * 3) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda table: commit(run_dir, table), tables))
    winner = run_dir.entry("rounds/0000", "score", "0000")
    assert winner in entries
    assert run_dir.read(winner).equals(tables[entries.index(winner)])
    assert not [name for name in run_dir.names("rounds/0000/score") if name.startswith(".tmp")]


def test_who_writes_while_another_sweeps_writes_all_the_same(run_dir):
    """An evaluation, which holds no lease on the run, beside a driver that takes the run or leaves it."""
    store, done = Store(run_dir.uri), threading.Event()

    def sweep():
        while not done.is_set():
            store.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(3000):
            store.write(f"evals/x/{number}", b"whole")
    finally:
        done.set()
        sweeper.join()
    assert all(store.read_bytes(f"evals/x/{number}") == b"whole" for number in range(3000))


def test_no_space_left_is_told_and_leaves_nothing(run_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left.*Free some space"):
        commit(run_dir)
    monkeypatch.undo()
    assert run_dir.names("rounds/0000/score") == []


def test_a_store_travels_between_processes(run_dir):
    commit(run_dir)
    again = pickle.loads(pickle.dumps(run_dir))
    assert again.entries("rounds/0000", "score") == run_dir.entries("rounds/0000", "score")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"teacher_entropy": [[0.1] * 3] * 3}, "differ in length"),
        ({"teacher_entropy": [[0.1, np.nan, 0.1, 0.1]] * 3}, "column teacher_entropy: not finite"),
        ({"teacher_logprobs": [[-np.inf] * 4] * 3}, "column teacher_logprobs: not finite"),
        ({"entropy_method": ["exact", None, "exact"]}, "column entropy_method: null in a row that was not rejected"),
        ({"trace_id": ["a", "a", "b"]}, "keys are not unique"),
    ],
)
def test_a_shard_that_breaks_the_contract_is_not_committed(run_dir, replaced, message):
    with pytest.raises(ContractError, match=message):
        commit(run_dir, score_table(**replaced))
    assert run_dir.entries("rounds/0000", "score") == {}


def kept(tokens=((3, 1),), logprobs=((-0.1, -3.0),), **replaced):
    """A score shard with kept tokens, the same at each position."""
    table = score_table(**replaced)
    for name, values in zip(contract.TOPK, (tokens, logprobs), strict=True):
        rows = [(list(map(list, values)) * 4)[:4]] * 3
        table = table.append_column(name, pa.array(rows, contract.COLUMNS[name].type))
    return table.select(contract.schema(SCORE, contract.TOPK).names)


def test_kept_tokens_are_stored_and_a_shard_without_them_is_whole(run_dir):
    entry = commit(run_dir, kept(), vocab_size=57)
    assert run_dir.read(entry).equals(kept())
    assert (
        run_dir.read(entry, ["teacher_topk_logprobs"])["teacher_topk_logprobs"][2].as_py()[3] == np.float32([-0.1, -3]).tolist()
    )
    plain = commit(run_dir, shard="0001")
    assert run_dir.read(plain).column_names == contract.schema(SCORE).names
    assert run_dir.read(plain, ["teacher_topk_tokens", "teacher_entropy"]).column_names == ["teacher_entropy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [(3, 57)]}, "column teacher_topk_tokens: 57 is impossible: 0 to 56"),
        ({"tokens": [(3, 3)]}, "column teacher_topk_tokens: names a token twice at one position"),
        ({"tokens": [(3, 1), (3,)]}, "column teacher_topk_tokens: keeps 1 tokens at one position and 2 at another"),
        ({"tokens": [(1, 2, 3)]}, "column teacher_topk_tokens: keeps another number of tokens than of log-probs"),
        ({"tokens": [()], "logprobs": [()]}, "keeps 0 tokens at one position and 0 at another"),
        ({"logprobs": [(-3.0, -0.1)]}, "column teacher_topk_logprobs: log-probs do not descend"),
        ({"logprobs": [(-0.1, -0.2)]}, "probabilities of one position add up to 1.72"),
        ({"logprobs": [(-0.1, -np.inf)]}, "column teacher_topk_logprobs: not finite"),
        ({"teacher_logprobs": [[-0.5] * 3] * 3}, "differ in length"),
    ],
)
def test_kept_tokens_that_cannot_be_are_not_committed(run_dir, changes, message):
    with pytest.raises(ContractError, match=message):
        commit(run_dir, kept(**changes), vocab_size=57)


def test_another_schema_is_refused():
    with pytest.raises(ContractError, match="schema is"):
        shards.check_table(SCORE, score_table().drop_columns(["entropy_error"]))


def test_rejected_rows_may_be_null_and_are_counted(run_dir):
    gone = score_table(
        reject_reason=[None, "non_finite", None],
        teacher_entropy=[[0.1] * 4, None, [0.1] * 4],
        teacher_logprobs=[[-0.1] * 4, None, [-0.1] * 4],
    )
    entry = commit(run_dir, gone)
    assert (entry.rows, entry.tokens, entry.rejected) == (3, 8, {"non_finite": 1})


def test_a_policy_without_its_manifest_is_not_published(run_dir, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert run_dir.latest_policy() == 0
    run_dir.publish_policy(1, adapter)
    assert run_dir.latest_policy() == 1
    assert run_dir.policy(1) == contract.Policy(1, run_dir.locate("policy/0001"))
    run_dir.delete("policy/0001/manifest.json")
    assert run_dir.latest_policy() == 0
    with pytest.raises(StoreError, match="policy 1 is not published"):
        run_dir.policy(1)


def test_a_policy_in_between_that_is_gone_is_told_with_the_way_out(run_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in NEEDED["policy"]:
        (tmp_path / "adapter" / name).write_bytes(b"x")
    for version in (1, 2):
        run_dir.publish_policy(version, tmp_path / "adapter")
    run_dir.check_policy(0)
    run_dir.check_policy(1)
    run_dir.delete("policy/0001")
    with pytest.raises(StoreError, match=r"policy/0001: is not published\. Delete its folder and those of all later policies"):
        run_dir.check_policy(1)


def test_a_data_file_that_no_entry_names_is_dropped(run_dir):
    folder = run_dir.local_root / "rounds/0000/score"
    entry = commit(run_dir)
    (folder / f"{entry.shard}-0123456789ab.parquet").write_bytes(b"of a writer that was killed")
    (folder / "0099-0123456789ab.parquet").write_bytes(b"its entry is still to come")
    run_dir.tidy("rounds/0000", "score", {entry.shard: entry.data})
    assert sorted(path.name for path in folder.glob("*.parquet")) == sorted([entry.data, "0099-0123456789ab.parquet"])


def test_training_state_is_checked_and_only_the_last_are_kept(run_dir, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    for name in NEEDED["train"]:
        (state / name).write_bytes(b"x")
    for version in (1, 2, 3):
        (state / "optimizer.safetensors").write_bytes(bytes([version]))
        run_dir.save_state(version, state)
        run_dir.publish_policy(version, state)
        run_dir.prune_states(keep=2)
    run_dir.save_state(4, state)
    run_dir.prune_states(keep=2)  # 4 has no policy yet: the state before it must stay
    assert run_dir.numbers("train") == [2, 3, 4]
    with run_dir.local("train/0001") as folder:
        assert folder is None
    with run_dir.local("train/0003") as folder:
        assert (folder / "optimizer.safetensors").read_bytes() == b"\x03"
    (run_dir.local_root / "train/0003/optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match="missing or damaged"), run_dir.local("train/0003"):
        pass


def test_metrics_of_a_round_that_is_trained_again_replace_the_first(run_dir):
    run_dir.append_metrics([{"round": 0, "loss": 1.0}, {"round": 1, "loss": 2.0}])
    run_dir.append_metrics([{"round": 1, "loss": 3.0}])
    assert [(row["round"], row["loss"]) for row in run_dir.metrics()] == [(0, 1.0), (1, 3.0)]


def test_no_run_is_said_so(run_dir):
    assert not run_dir.exists()
    with pytest.raises(UserError, match=r"no run here.*egrsd distill"):
        run_dir.load_run()
    run_dir.save_run(Run(name="t"), {})
    assert run_dir.load_run() == Run(name="t")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="cannot be opened"):
        Store("gopher://somewhere/run").names("rounds")


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": 1', "null"])
def test_a_file_of_another_shape_is_named_and_not_guessed(run_dir, text):
    for path, read in (
        ("run.json", run_dir.load_run),
        ("rounds/0000/score/0000.json", lambda: run_dir.entry("rounds/0000", "score", "0000")),
        ("rounds/0000/ready.json", lambda: run_dir.ready(0)),
        ("policy/0001/manifest.json", lambda: run_dir.fetch("policy/0001")),
    ):
        run_dir.write(path, text.encode())
        with pytest.raises(StoreError, match=path):
            read()


def test_an_entry_of_a_later_version_is_read(run_dir):
    entry = commit(run_dir)
    document = run_dir.read_json("rounds/0000/score/0000.json")
    run_dir.write_json("rounds/0000/score/0000.json", document | {"compression": "new"})
    assert run_dir.entry("rounds/0000", "score", "0000") == entry


@pytest.mark.parametrize("uri", ["", "  ", "~nobody-here/x"])
def test_a_run_needs_a_place(uri):
    with pytest.raises(UserError, match="Name a folder or a URI"):
        Store(uri)


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(UserError, match="holds credentials") as caught:
        Store("s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="holds credentials"):
        Store("abfss://user:hunter2@account.dfs.core.windows.net/run")
    assert Store("abfss://container@account.dfs.core.windows.net/run").uri.startswith("abfss://container@")
    assert demo().source.model_copy().model_validate({"uri": "abfss://container@account/x.jsonl"}).uri


def test_a_policy_that_is_replaced_while_it_is_read_is_told(run_dir, tmp_path):
    def publish(weights: bytes) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / "new" / name).write_bytes(weights)
        run_dir.publish_policy(7, tmp_path / "new")

    publish(b"old")
    with run_dir.local("policy/0007"):
        publish(b"old")  # the same content is the same policy
    with (
        pytest.raises(StoreError, match=r"was replaced while it was read\. Run the same command again"),
        run_dir.local("policy/0007"),
    ):
        publish(b"new")


@pytest.mark.parametrize("hashed", [True, False])
def test_a_run_of_a_later_version_is_not_called_damaged(run_dir, hashed):
    config = demo().model_dump(mode="json")
    config["train"]["brand_new"] = 5
    recorded = {"egrsd": "9.1", "code": "v9.1-3-g0123abc"}
    document = {"config": config, "versions": recorded} | ({"config_digest": digest(config)} if hashed else {})
    run_dir.write_json("run.json", document)
    with pytest.raises(UserError, match=r"the setting train\.brand_new is unknown to this code, egrsd ") as told:
        run_dir.load_run()
    assert "Use the version that wrote it, egrsd 9.1 (v9.1-3-g0123abc), or a later one" in str(told.value)
    assert "Restore" not in str(told.value)
    run_dir.write_json("run.json", document | {"versions": {}})
    with pytest.raises(UserError, match="Use the version that wrote it, egrsd, or a later one"):
        run_dir.load_run()
