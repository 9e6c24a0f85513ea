"""A run directory in an object store, against moto's S3 server on loopback: files, lease, a whole run with a kill in it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import pytest
from committed import round_table
from waiting import race

from actors.fakes import UNWATCHED
from actors.inference import adapters
from jobs import export, status
from jobs.distill import distill
from jobs.settle import Choices
from pipeline.config import Source
from pipeline.errors import SourceError, UserError
from pipeline.live import lease
from pipeline.problems.sources import open_source
from pipeline.store.directory import Store, area
from pipeline.store.folders import NEEDED

ROUNDS, PROMPTS, GROUP = 2, 8, 4
SETS = [
    *UNWATCHED,
    f"rounds={ROUNDS}",
    f"rollout.prompts_per_round={PROMPTS}",
    "rollout.prompts_per_shard=4",
    f"rollout.group_size={GROUP}",
    "grade.advantage=running",  # a fake engine solves nothing, and a group without a right answer teaches nothing
    "evaluation.problems=8",
]
PARTS = b"x" * 12_000_000  # more than one part
DRIVER = """
import sys, time
sys.path.insert(0, "tests")
import trainer_here
from actors.fakes import FakeEngine
from jobs.distill import distill
from jobs.settle import Choices
from jobs.stage import Redo, run_stage
from jobs.train import Target, train_committed
from pipeline.store.directory import Store
uri, *sets = sys.argv[1:]
publish = Store.publish_policy
def publish_and_wait(store, *given):
    publish(store, *given)
    time.sleep(3600)
if sets:  # this driver is killed after policy 1, which it must not outrun
    Store.publish_policy = publish_and_wait
with trainer_here.instead_of_ray_train():
    distill(uri, Choices("demo", sets), engine_class=FakeEngine)
    if not sets:
        before = Store(uri).read_json("policy/0002/manifest.json")
        run_stage(uri, Redo("label", "0", ["label.gamma=1.0"]))
        train_committed(uri, 0, [], None, False, Target(replace=True))
if not sets:
    print("trained alike:", Store(uri).read_json("policy/0002/manifest.json") == before)
"""
WRITER = """
import os, sys
from pipeline.store.directory import Store
filesystem, root = Store(sys.argv[1]).opened
stream = filesystem.open_output_stream(f"{root}/torn/big")
stream.write(b"x" * 12_000_000)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def store(s3):
    return Store(f"s3://runs/{uuid4().hex}")


@contextlib.contextmanager
def denied(s3, action, what):
    """The server answers AccessDenied to `action` on objects of the bucket."""
    statement = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": f"arn:aws:s3:::runs/{what}"}
    s3.put_bucket_policy(Bucket="runs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    try:
        yield
    finally:
        s3.delete_bucket_policy(Bucket="runs")


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"small", PARTS], ids=["small", "in parts"])
def test_what_is_written_is_read_listed_and_deleted_at_once(store, data):
    for content in (data, data + b"newer"):
        store.write("a/b/file", content)
        assert store.read_bytes("a/b/file") == content
    assert (store.names("a"), store.names("a/b")) == (["b"], ["file"])
    store.delete("a/b/file")
    assert store.read_bytes("a/b/file") is None
    assert store.names("a/b") == []


def test_an_empty_object_is_one_that_is_still_being_written_and_nobody_writes_one(store):
    filesystem, root = store.opened
    filesystem.open_output_stream(f"{root}/file").close()  # as Azure shows one
    assert store.read_bytes("file") is None
    with pytest.raises(AssertionError):
        store.write("file", b"")


def test_a_trainer_sees_the_request_to_stop(store):
    """It was an empty object, which counts as none: every stop took half a minute, and the ranks trained on."""
    assert not store.stop_requested()
    store.request_stop()
    assert store.stop_requested()
    store.request_stop(False)
    assert not store.stop_requested()


def test_a_folder_is_deleted_whole_and_its_marker_is_no_file(store):
    for number in (3, 4):
        store.write(f"train/{number:04d}/deep/file", b"x")
    store.delete("train/0003")
    assert store.numbers("train") == [4]
    store.delete("train/0004/deep/file")  # pyarrow leaves an empty object as the folder's mark
    assert store.names("train/0004/deep") == []
    store.delete("nothing/here")


def test_a_small_file_goes_up_in_one_request(store, s3):
    """An upload in parts leaves an ETag with a dash."""
    store.write("small", b"x" * 100_000)
    store.write("large", PARTS)
    keys = [store.locate(name).removeprefix("s3://runs/") for name in ("small", "large")]
    tags = [s3.head_object(Bucket="runs", Key=key)["ETag"] for key in keys]
    assert ["-" in tag for tag in tags] == [False, True]


def test_a_writer_that_is_killed_leaves_nothing_to_see(store, s3):
    store.write("torn/other", b"x")
    assert subprocess.run([sys.executable, "-c", WRITER, store.uri]).returncode == -signal.SIGKILL
    assert store.names("torn") == ["other"]
    assert store.read_bytes("torn/big") is None


def test_a_part_that_is_refused_leaves_nothing_to_see(store, s3):
    with denied(s3, "s3:PutObject", "*"), pytest.raises(UserError, match=r"cannot write .*ACCESS_DENIED.*Give these credentials"):
        store.write("file", PARTS)
    assert store.names("") == []


def test_a_policy_is_fetched_by_an_engine_and_published_whole(store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in NEEDED["policy"]:
        (folder / name).write_bytes(b"weights")
    store.publish_policy(1, folder)
    local, _ = adapters.fetch(store.policy(1).adapter)
    assert Path(local, "adapter_model.safetensors").read_bytes() == b"weights"
    store.delete(f"{area('policy', 1)}/manifest.json")
    assert store.latest_policy() == 0


# ---- lease -------------------------------------------------------------------------------------------------------------


def test_a_silent_holder_elsewhere_loses_it(store):
    store.write_json(lease.LEASE, {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1, "beats": 7})
    with lease.held(store, ttl_s=0.5) as mine:
        assert store.read_json(lease.LEASE)["token"] == mine.token
    assert store.read_json(lease.LEASE) is None


def test_of_many_that_start_together_one_holds(store):
    assert race(store, 5) == (1, 4)


# ---- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder():
    """Makes folders with a short path, as Ray's sockets need, and deletes them."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="egr", dir="/tmp", ignore_cleanup_errors=True))


def start_driver(uri, scratch, *sets):
    """A driver with fake engines and a Ray of its own, whose logs lie in `scratch`. `tests/test_cluster.py` has ranks on S3."""
    environment = {**os.environ, "RAY_TMPDIR": scratch, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", DRIVER, uri, *sets]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(900)
def test_a_run_whose_driver_is_killed_goes_on_and_every_verb_reads_it(store, s3, short_folder, capfd):
    scratch, other_scratch = short_folder(), short_folder()
    first = start_driver(store.uri, scratch, *SETS)
    while not store.has_policy(1):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    for number in store.numbers("rounds"):  # what has an entry is whole, whatever the kill tore
        for stage in store.names(area("rounds", number)):
            for entry in store.entries(area("rounds", number), stage).values():
                store.read(entry)
    assert store.read_json(lease.LEASE)["pid"] == first.pid

    second = start_driver(store.uri, other_scratch)
    said = second.communicate(timeout=800)[0]
    assert second.returncode == 0, said
    assert "resuming: rounds" in said
    assert "rounds/0000 label: 2 shards computed" in said
    assert "trained rounds 0 to 1" in said
    assert "trained alike: True" in said  # the run that was killed ended with the policy of one that was not
    for number in range(ROUNDS):
        assert round_table(store, number).num_rows == PROMPTS * GROUP
    rows = [(row["writer"], row["round"]) for row in store.metrics()]
    assert sorted(set(rows)) == [(writer, number) for writer in ("round", "train") for number in range(ROUNDS)]
    assert len(rows) == len(set(rows))
    assert store.read_json(lease.LEASE) is None

    status.show(store.uri, False)
    assert "2 of 2 rounds" in (table := capfd.readouterr().out)
    assert "stale: label of round 1, 2 of 2 shards (settings)" in table
    export.export_run(store.uri, f"{store.uri}-out", False)
    assert f"{ROUNDS * PROMPTS * GROUP} traces of 2 rounds" in capfd.readouterr().out
    assert len(Store(f"{store.uri}-out").names("")) == ROUNDS

    logs = [store.read_bytes(f"logs/{name}") for name in store.names("logs")]
    assert any(b"run s3://" in log for log in logs)
    written = [s3.get_object(Bucket="runs", Key=o["Key"])["Body"].read() for o in s3.list_objects_v2(Bucket="runs")["Contents"]]
    written += [p.read_bytes() for s in (scratch, other_scratch) for p in Path(s).rglob("logs/**/*") if p.is_file()]
    assert len(written) > 50
    for private in (os.environ[f"AWS_{name}"] for name in ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID", "ENDPOINT_URL")):
        assert not [data for data in written if private.encode() in data]


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["s3://runs/x?endpoint_override=127.0.0.1:9000", "s3://key:secret@runs/x"])
def test_a_uri_that_would_put_settings_into_logs_is_refused(uri):
    with pytest.raises(UserError, match=r"would end up in logs\. Give them by environment"):
        Store(uri)


def test_a_bucket_that_is_not_there_is_named(s3, capfd):
    with pytest.raises(SystemExit) as ended:
        distill("s3://nowhere/run", Choices("demo"))
    assert ended.value.code == 2
    assert "error: s3://nowhere/run/lease.json: cannot write" in (said := "".join(capfd.readouterr()))
    assert "Create the bucket" in said


def test_a_store_that_may_be_read_but_not_written_is_named(store, s3, capfd):
    with denied(s3, "s3:PutObject", "*"), pytest.raises(SystemExit) as ended:
        distill(store.uri, Choices("demo"))
    assert ended.value.code == 2
    assert "lease.json: cannot write" in (said := "".join(capfd.readouterr()))
    assert "Give these credentials the right to" in said


def test_a_run_that_another_holds_is_refused(store, capfd):
    with lease.held(store), pytest.raises(SystemExit) as ended:
        distill(store.uri, Choices("demo"))
    assert ended.value.code == 2
    assert f"{store.uri}: process {os.getpid()} on" in "".join(capfd.readouterr())


def test_an_endpoint_that_does_not_answer_is_named(monkeypatch, capfd):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SystemExit) as ended:
        distill("s3://runs/none", Choices("demo"))
    assert ended.value.code == 2
    assert "Check AWS_ENDPOINT_URL and the network" in "".join(capfd.readouterr())


def test_problems_in_a_bucket_are_read_and_a_refusal_is_told(s3):
    row = json.dumps({"problem": "1+1", "solution": "2", "answer": "2"})
    s3.put_object(Bucket="runs", Key="data/p.jsonl", Body=f"{row}\n{row}\n".encode())
    source = Source(uri="s3://runs/data/p.jsonl", problem="problem", solution="solution", answer="answer")
    assert [p.problem for p in open_source(source).rows([1, 0])] == ["1+1", "1+1"]
    with denied(s3, "s3:HeadObject", "data/*"), pytest.raises(SourceError, match="ACCESS_DENIED"):
        open_source(source)


def test_a_folder_that_may_be_read_but_not_written_is_named(short_folder):
    """As another user, where root runs the tests: root may write anywhere."""
    folder = Path(short_folder())
    folder.chmod(0o555)
    other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"] if os.getuid() == 0 else []
    code = "import sys\nfrom jobs.screen.terminal import session\n"
    code += "from pipeline.live import lease\nfrom pipeline.store.directory import Store\n"
    code += f"with session(False), lease.held(Store({str(folder)!r})): pass"
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([*other, sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert (
        f"error: {folder}/lease.json: cannot write (Permission denied). Get the right to do this, or use another place"
        in ended.stderr
    )
