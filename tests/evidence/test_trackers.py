"""Metrics at TensorBoard, W&B and MLflow: real clients, read back; nothing twice, nothing lost, no secret, no run ended."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trainer_here
from waiting import until

from actors.fakes import UNWATCHED, FakeEngine
from jobs import distill, train
from jobs.settle import Choices, settle
from pipeline import notices, recipes
from pipeline.errors import SettingError
from pipeline.evidence import trackers
from pipeline.rounds import metrics
from pipeline.stages import check_settings, find_stage
from pipeline.store.directory import Store

SECRET = "0123456789abcdef0123456789abcdef01234567"
ROUNDS = 2
SETS = [
    *UNWATCHED,
    f"rounds={ROUNDS}",
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "grade.advantage=running",  # fake traces are never right: a group of zeros would teach nothing
    "train.batch_traces=8",
    "evaluation.problems=0",
]
ALL = "metrics.sinks=tensorboard,wandb,mlflow"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No tracker here may phone out; a key is there, to be looked for afterwards."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path):
    """A run of two trained rounds by its files alone: two optimiser steps each."""
    store = Store(str(tmp_path / "run"))
    store.save_run(recipes.demo(), {})
    for number in range(2):
        add_round(store, number)
    return store


def add_round(store, number, accuracy=0.5):
    steps = [{"round": number, "step": 2 * number + i, "loss": number + i / 10, "logprob_gap": 1e-6} for i in range(2)]
    store.append_metrics(steps)
    store.write_json(f"policy/{number + 1:04d}/manifest.json", {"files": {}})
    store.write_metrics("round", number, [{"round": number, "accuracy": accuracy + number / 10}])


def feed(store, *names):
    """What a driver's thread does, once, to its end; nothing fails."""
    for name in names:
        said = []
        trackers.Feeder(name, store, recipes.demo(), said.append).catch_up(last=True)
        assert said == []


def tensorboard_points(store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{store.uri}/tensorboard")
    events.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_points(store, run=0):
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{store.uri}/mlflow")
    experiment = client.get_experiment_by_name("egrsd")
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda r: r.info.start_time)
    names = runs[run].data.metrics
    points = {name: client.get_metric_history(runs[run].info.run_id, name) for name in names}
    return {name: sorted((p.step, round(p.value, 6)) for p in history) for name, history in points.items()}


def wandb_rows(store, least):
    """At least so many rows, as soon as W&B's own process has written them: `finish` does not wait for it on a busy machine."""
    return until(lambda: rows if len(rows := wandb_history(store)) >= least else None, what=f"{least} rows in W&B's files")


def contents(store):
    """What each file of a run holds. W&B's own process may still work there, and take a file away."""
    found = {}
    for folder, _, names in os.walk(store.uri):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.read_bytes()
    return found


def wandb_history(store):
    """History rows of every offline file, from W&B's own format: LevelDB log blocks that hold protobuf records."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(Path(store.uri, "wandb").glob("offline-run-*/run-*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            header = data[at + 4 : at + 7]
            length, kind = struct.unpack("<HB", header) if len(header) == 3 else (0, 0)
            if kind == 0 or at + 7 + length > len(data):
                break  # W&B's own process has not written the rest yet
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = wandb_internal_pb2.Record.FromString(whole)
                whole = b""
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                    rows.append({"_run": file.stem, **row})
    return rows


EXPECTED = {
    "train/loss": [(0, 0.0), (1, 0.1), (2, 1.0), (3, 1.1)],
    "round/accuracy": [(0, 0.5), (1, 0.6)],
}


def test_times_that_wait_for_their_figures_are_not_fed(store):
    """A run at W&B began anew for a row that lacked its figures, and again for the row that has them."""
    store.write_metrics("round", 0, [{"round": 0, "seconds_round": 3.0}])
    assert [rows.file for rows in trackers.pending(store, [], set())] == [
        "0000-train.jsonl",
        "0001-round.jsonl",
        "0001-train.jsonl",
    ]


def test_tensorboard_reads_back_what_the_run_stored(store):
    feed(store, "tensorboard")
    found = tensorboard_points(store)
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_mlflow_reads_back_what_the_run_stored(store):
    feed(store, "mlflow")
    found = mlflow_points(store)
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_wandb_offline_reads_back_what_the_run_stored(store):
    feed(store, "wandb")
    rows = wandb_rows(store, 6)
    assert [row["_step"] for row in rows] == list(range(6))
    found = [(row["train/step"], round(row["train/loss"], 6)) for row in rows if "train/loss" in row]
    assert found == EXPECTED["train/loss"]
    assert [(row["round/round"], round(row["round/accuracy"], 6)) for row in rows if "round/accuracy" in row] == [
        (0, 0.5),
        (1, 0.6),
    ]


def test_a_second_time_feeds_nothing(store):
    feed(store, "tensorboard", "mlflow", "wandb")
    before = tensorboard_points(store), mlflow_points(store), wandb_rows(store, 6)
    feed(store, "tensorboard", "mlflow", "wandb")
    assert (tensorboard_points(store), mlflow_points(store), wandb_rows(store, 6)) == before


def test_a_driver_killed_before_it_could_remember_counts_nothing_twice(store):
    """The state as it was before the last file: its rows are with the sink, and nobody knows."""
    feed(store, "tensorboard", "mlflow", "wandb")
    for name in ("tensorboard", "mlflow", "wandb"):
        state = store.read_json(f"sinks/{name}.json")
        state["fed"].pop()
        store.write_json(f"sinks/{name}.json", state)
    feed(store, "tensorboard", "mlflow", "wandb")
    assert tensorboard_points(store)["train/loss"] == EXPECTED["train/loss"]
    assert mlflow_points(store)["train/loss"] == EXPECTED["train/loss"]
    rows = wandb_rows(store, 7)
    assert len({row["_run"] for row in rows}) == 1
    assert len({row["_step"] for row in rows}) == 6  # repeated rows carry the place they had: the server drops them
    by_place = {}
    for row in rows:
        values = {k: v for k, v in row.items() if k.startswith(("train/", "round/"))}
        assert by_place.setdefault(row["_step"], values) == values


def test_later_rounds_follow_in_the_same_run(store):
    feed(store, "tensorboard", "mlflow", "wandb")
    add_round(store, 2)
    feed(store, "tensorboard", "mlflow", "wandb")
    assert [step for step, _ in tensorboard_points(store)["round/accuracy"]] == [0, 1, 2]
    assert [step for step, _ in mlflow_points(store)["round/accuracy"]] == [0, 1, 2]
    rows = wandb_rows(store, 9)
    assert sorted(row["_step"] for row in rows) == list(range(9))
    assert len({row["_run"] for row in rows}) == 1


def test_event_files_sort_in_the_order_they_were_fed(store):
    """TensorBoard reads a folder by name and never turns back."""
    feed(store, "tensorboard")
    add_round(store, 2)
    feed(store, "tensorboard")
    names = store.names("tensorboard")
    fed = [entry["file"].removesuffix(".jsonl") for entry in store.read_json("sinks/tensorboard.json")["fed"]]
    assert [name.split(".")[-1] for name in names] == fed


def test_rounds_trained_again_replace_points_or_begin_a_new_run(store):
    feed(store, "tensorboard", "mlflow", "wandb")
    add_round(store, 1, accuracy=0.8)
    feed(store, "tensorboard", "mlflow", "wandb")
    assert tensorboard_points(store)["round/accuracy"] == [(0, 0.5), (1, 0.9)]
    assert mlflow_points(store, 0)["round/accuracy"] == [(0, 0.5), (1, 0.6)]
    assert mlflow_points(store, 1)["round/accuracy"] == [(0, 0.5), (1, 0.9)]
    until(lambda: len({row["_run"] for row in wandb_history(store)}) == 2, what="two runs in W&B's files")


def test_rounds_trained_again_while_a_sink_looks_on_are_seen(store):
    """`egrsd train`: the old rows lie there without a policy when the sink first looks, the new ones replace them later."""
    feed(store, "tensorboard", "mlflow")
    store.delete("policy/0002")
    said = []
    feeders = [trackers.Feeder(name, store, recipes.demo(), said.append) for name in ("tensorboard", "mlflow")]
    for feeder in feeders:
        feeder.catch_up()
    add_round(store, 1)
    store.append_metrics([{"round": 1, "step": 2 + i, "loss": 7.0 + i} for i in range(2)])
    for feeder in feeders:
        feeder.catch_up(last=True)
    assert said == []
    assert tensorboard_points(store)["train/loss"] == [(0, 0.0), (1, 0.1), (2, 7.0), (3, 8.0)]
    assert mlflow_points(store, 0)["train/loss"] == EXPECTED["train/loss"]
    assert mlflow_points(store, 1)["train/loss"] == [(0, 0.0), (1, 0.1), (2, 7.0), (3, 8.0)]


def test_rows_of_a_trainer_wait_for_their_policy(store):
    store.append_metrics([{"round": 2, "step": 4, "loss": 9.0}])
    assert "0002-train.jsonl" not in [rows.file for rows in trackers.pending(store, [], set())]
    store.write_json("policy/0003/manifest.json", {"files": {}})
    assert "0002-train.jsonl" in [rows.file for rows in trackers.pending(store, [], set())]


def test_a_sink_that_fails_is_told_once_counted_and_catches_up(store):
    said = []
    blocked = Path(store.uri, "tensorboard")
    blocked.write_text("a file where the folder should be")
    feeder = trackers.Feeder("tensorboard", store, recipes.demo(), said.append)
    for _ in range(3):
        feeder.catch_up(last=True)
    assert feeder.failures == 3
    assert len(said) == 1
    assert "tensorboard failed" in said[0]
    blocked.unlink()
    feeder.catch_up(last=True)
    assert tensorboard_points(store)["round/accuracy"] == EXPECTED["round/accuracy"]


def test_a_tracker_nobody_answers_at_fails_without_its_password(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter22hunter@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = []
    feeder = trackers.Feeder("mlflow", store, recipes.demo(), said.append)
    feeder.catch_up(last=True)
    assert feeder.failures == 1
    assert "mlflow failed" in said[0]
    assert "hunter22hunter" not in said[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("401 at https://me:pass@host/api", "401 at https://***@host/api"),
        (f"key {SECRET} refused", "key *** refused"),
        ("nothing to hide: 1/2 @ 3", "nothing to hide: 1/2 @ 3"),
    ],
)
def test_what_is_told_of_a_failure_holds_no_secret(text, shown):
    assert trackers.public(text) == shown


def test_no_file_of_a_run_holds_the_key(store):
    feed(store, "tensorboard", "mlflow", "wandb")
    wandb_rows(store, 6)
    files = contents(store)
    assert len(files) > 20
    assert [path for path, data in files.items() if SECRET.encode() in data] == []


def test_a_sink_that_is_not_installed_is_one_line():
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from pipeline import config, overrides, recipes\n"
        "from pipeline.evidence import trackers\n"
        "trackers.check(overrides.resolve(recipes.demo(), ['metrics.sinks=[wandb]']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "SettingError" in done.stderr
    assert "metrics.sinks: 'wandb' is not installed. Install it with `pip install 'egrsd[wandb]'`" in done.stderr


def test_a_resume_may_change_sinks_and_nothing_else(store):
    store.write_json("rounds/0000/plan.json", {"policy": 0, "shards": {}, "source": ""})
    assert settle(store, Choices(sets=["metrics.sinks=mlflow"])).metrics.sinks == ("mlflow",)
    with pytest.raises(SettingError, match="rounds was 16, now 3"):
        settle(store, Choices(sets=["metrics.sinks=mlflow", "rounds=3"]))


def test_a_stage_does_not_take_sinks(store):
    with pytest.raises(SettingError, match="pass it to `egrsd distill`"):
        check_settings(find_stage("label"), ["metrics.sinks"])


# ---- a run from end to end -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(ray_local, tmp_path_factory):
    """A small run of fake engines, with all three sinks on."""
    uri = str(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch, trainer_here.instead_of_ray_train():
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        distill.distill(uri, Choices("demo", [*SETS, ALL]), engine_class=partial(FakeEngine))
    return Store(uri)


# metrics that other settings bring: an objective on distributions, rounds that are filled, rewards of one's own
BY_SETTINGS = {"divergence", "num_prompts_further", "num_groups_left_out", "num_groups_lacking", "seconds_stage_reward"}


@pytest.mark.timeout(900)
def test_every_metric_a_run_writes_is_in_the_table_and_every_one_in_the_table_is_written(finished):
    for writer, known in metrics.METRICS.items():
        rows = [row for row in finished.metrics() if row.pop("writer") == writer]
        assert len(rows) >= ROUNDS
        assert set().union(*rows) == {metric.name for metric in known} - BY_SETTINGS
        assert len(known) == len({metric.name for metric in known})


def test_a_run_feeds_its_sinks_what_it_stores(finished):
    loss = [(row["step"], round(row["loss"], 6)) for row in finished.metrics() if row["writer"] == "train"]
    assert len(loss) == 2 * ROUNDS
    assert mlflow_points(finished)["train/loss"] == loss
    assert tensorboard_points(finished)["train/loss"] == loss
    assert sorted(row["_step"] for row in wandb_rows(finished, 3 * ROUNDS)) == list(range(3 * ROUNDS))


def test_the_log_of_a_run_with_sinks_holds_no_key(finished):
    wandb_rows(finished, 3 * ROUNDS)
    files = contents(finished)
    assert any("logs" in path.parts for path in files)
    assert [path for path, data in files.items() if SECRET.encode() in data] == []


def test_a_sink_switched_on_after_the_run_catches_up(finished, capfd):
    shutil.rmtree(Path(finished.uri, "tensorboard"))
    finished.delete("sinks/tensorboard.json")
    distill.distill(finished.uri, Choices(sets=["metrics.sinks=tensorboard"]))
    assert "Nothing to do" in capfd.readouterr().out
    assert len(tensorboard_points(finished)["round/accuracy"]) == ROUNDS


@pytest.mark.timeout(900)
def test_training_again_feeds_the_new_figures(finished, trained_here):
    """The same weights come out, in another time: the seconds tell which training a point is of."""
    before = tensorboard_points(finished)["train/seconds"]
    train.train_committed(finished.uri, 1, ["metrics.sinks=tensorboard"], None, False, train.Target(replace=True))
    stored = [(row["step"], row["seconds"]) for row in finished.metrics() if row["writer"] == "train"]
    found = tensorboard_points(finished)["train/seconds"]
    assert dict(found) == pytest.approx(dict(stored), abs=1e-5)
    assert found[:2] == before[:2]
    assert found[2:] != before[2:]


def test_a_tracker_that_hangs_is_named_to_the_person_who_waits(monkeypatch):
    monkeypatch.setattr(notices, "NOTICE_S", 0.05)
    monkeypatch.setattr(trackers, "POLL_S", 0.01)
    said, end, answer = [], threading.Event(), threading.Event()
    hanging = SimpleNamespace(name="wandb", catch_up=lambda last: answer.wait(600))
    with notices.shown(said.append):
        thread = threading.Thread(target=trackers._watch, args=([hanging], end, SimpleNamespace(stolen_by=None)))
        thread.start()
        until(lambda: said)
        end.set()
        answer.set()
        thread.join(300)
    assert said == ["metrics.sinks: wandb has not answered for 30 s. The run goes on."]
    assert not thread.is_alive()
