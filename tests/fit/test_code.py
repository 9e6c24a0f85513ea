"""Workers import the driver's packages, whatever the current folder holds; other code is named and ends the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import cluster
from actors.pool.dispatcher import Dispatcher
from actors.pool.member import EngineActor
from pipeline.config import Pool
from pipeline.errors import UserError
from pipeline.fit import builds, code, versions
from pipeline.training import worker

ROOT = Path(__file__).parents[2]
RIVAL = "raise RuntimeError('the rival was imported')\n"
SMALL = (
    *("rounds=1", "rollout.prompts_per_round=2", "rollout.prompts_per_shard=2", "rollout.group_size=2"),
    *("evaluation.problems=0", "grade.advantage=running", "train.batch_traces=4", "train.warmup_steps=0", "grade.verifier=math"),
)
# a worker of a run that was started in a folder full of rivals: what it imports, its entropy hook, and what listens meanwhile
PROBE = """
import json, os, sys
from jobs.screen.terminal import QUIET
os.environ.update(QUIET)
from jobs import opened
opened._stay_at_home(None)
from actors import cluster
from pipeline.fit import code
cluster.connect(None)
cluster.check_nodes()
import psutil, ray

@ray.remote
def look():
    import multiprocessing, os
    from pipeline.fit import code
    os.environ["EGRSD_EXACT_ENTROPY"] = "1"
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.v1.sample.sampler import Sampler
    with multiprocessing.get_context("spawn").Pool(1) as children:
        child = children.apply(code.look)
    return os.getcwd(), code.look(), child, Sampler.gather_logprobs.__globals__["__file__"]

place, found, child, hook = ray.get(look.remote())
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
listening = sorted({c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"})
words = [word for p in family for word in p.cmdline()]
session = os.stat(os.path.dirname(ray._private.worker._global_node.get_temp_dir_path())).st_mode & 0o777
print("FOUND", json.dumps({"here": code.here(), "place": place, "found": found, "child": child, "hook": hook, "words": words,
                           "listening": listening, "session": session}))
"""

# `egrsd distill` of the chaos harness, whose rounds are trained by a thread of it
TRAINED_HERE = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import trainer_here
with trainer_here.instead_of_ray_train():
    runpy.run_path({str(ROOT / "tests/chaos/driver.py")!r}, run_name="__main__")
"""


def run(folder, script, *arguments):
    """A script that lies elsewhere, as a console script does, run in `folder` with this code on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.timeout(600)
@pytest.mark.engine
def test_workers_their_children_and_the_entropy_hook_are_the_drivers_and_listen_on_loopback(tmp_path):
    """The current folder has bare folders and a whole rival: Ray alone would put it first on its workers' path."""
    for name in ("pipeline", "jobs"):
        (tmp_path / "home" / name).mkdir(parents=True)
    (tmp_path / "home" / "actors").mkdir()
    (tmp_path / "home" / "actors" / "__init__.py").write_text(RIVAL)
    (tmp_path / "probe.py").write_text(PROBE)
    done = run(tmp_path / "home", tmp_path / "probe.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found["place"] == str(tmp_path / "home")  # relative paths mean the same as for the driver
    assert found["found"]["hashes"] == found["child"]["hashes"] == found["here"]["hashes"] == code.here()["hashes"]
    assert found["found"]["folders"] == found["child"]["folders"] == {name: str(ROOT / name) for name in code.PACKAGES}
    assert found["hook"] == str(ROOT / "actors" / "inference" / "hooks" / "exact_entropy.py")
    assert set(found["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert found["session"] == 0o700
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert not [word for word in found["words"] if token.read_text() in word]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [False, pytest.param(True, marks=pytest.mark.chaos)])
def test_a_run_beside_rivals_ends_and_its_code_stands_in_run_json(tmp_path, ranks):
    home, here = tmp_path / "home", tmp_path / "trained_here.py"
    here.write_text(TRAINED_HERE)
    for name in code.PACKAGES:
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text(RIVAL)
    done = run(home, ROOT / "tests/chaos/driver.py" if ranks else here, str(home / "run"), "local", "0", "0", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((home / "run/run.json").read_text())["versions"]["fingerprint"] == code.fingerprint()
    token = (home / ".ray/auth_token").read_text()
    assert token not in done.stdout + done.stderr
    assert not [path for path in (home / "run").rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@pytest.fixture
def elsewhere(monkeypatch):
    """This process is a worker of a driver with another schedule.py and a file more."""
    theirs = {**code.here()["hashes"], "pipeline/rounds/running/schedule.py": "00000000", "jobs/fresh.py": "11111111"}
    monkeypatch.setenv(code.CODE, json.dumps(theirs))
    return r"imports other code than the driver, from .*: jobs/fresh\.py, pipeline/rounds/running/schedule\.py differ\. Install"


def test_every_kind_of_worker_refuses_other_code(elsewhere):
    with pytest.raises(UserError, match=elsewhere):
        EngineActor().load(None, None, None, None, "")
    with pytest.raises(UserError, match=elsewhere):
        worker.train_loop({})
    dispatcher = Dispatcher("rollout", Pool(), 4, ())
    assert isinstance(dispatcher._callers.failure, UserError)


def test_a_data_task_that_has_other_code_says_so_in_its_item(elsewhere):
    from pipeline.rounds.running.in_tasks import _bring_item_up_to_date

    told = _bring_item_up_to_date(None, "grade", None, False, {"error": None, "indices": [], "shard": "0000"})
    assert told["error"][0] == "UserError"
    assert "jobs/fresh.py" in told["error"][1]


def test_a_worker_of_the_same_code_and_a_process_without_driver_go_on(monkeypatch):
    assert code.other_code() is None
    monkeypatch.setenv(code.CODE, code.environment()[code.CODE])
    assert code.other_code() is None
    assert code.check() is None


def nodes(monkeypatch, *found):
    """A cluster of nodes of which each has (hashes, versions, role, GPUs)."""
    listed, looked = [], {}
    for number, (hashes, packages, role, gpus) in enumerate(found):
        node = {"NodeID": f"n{number}", "NodeManagerAddress": f"10.0.0.{number}", "Labels": {"egrsd-role": role}}
        listed.append({**node, "Alive": True, "Resources": {"GPU": gpus}})
        looked[f"n{number}"] = {"host": "h", "folders": {"jobs": "/opt/jobs"}, "hashes": hashes, "versions": packages}
    kept = {}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: listed)
    monkeypatch.setattr(cluster, "_look_at", lambda _: looked)
    monkeypatch.setattr(builds, "keep_first", lambda name, value: kept.setdefault(name, value))
    return kept


def test_a_node_with_other_code_is_named_with_its_folder_and_files(monkeypatch):
    same = code.here()["hashes"]
    nodes(monkeypatch, (same, {}, "", 0), ({**same, "actors/pool/pool.py": "0"}, {}, "", 0))
    with pytest.raises(UserError, match=r"node 10\.0\.0\.1 \(h\): imports other code .* from /opt: actors/pool/pool\.py"):
        cluster.check_nodes()


def test_nodes_of_one_role_have_the_same_builds_and_a_head_may_have_others(monkeypatch):
    same = code.here()["hashes"]
    head, gpu = (same, {"torch": "2.13+cpu"}, "head", 0), (same, {"torch": "2.14", "vllm": "0.33"}, "rollout", 8)
    kept = nodes(monkeypatch, head, gpu, gpu)
    cluster.check_nodes()
    assert [name for name in kept if name.startswith("role ")] == ["role head", "role rollout with GPUs"]
    assert len([name for name in kept if name.startswith("node ")]) == 3
    nodes(monkeypatch, head, gpu, (same, {"torch": "2.14", "vllm": "0.32"}, "rollout", 8))
    with pytest.raises(UserError, match=r"10\.0\.0\.2 \(h\): has vllm 0\.32, node 10\.0\.0\.1 \(h\) of the same role 0\.33"):
        cluster.check_nodes()


def test_the_first_task_on_a_node_that_joins_later_compares_its_builds(ray_local, monkeypatch):
    """No node was looked at when the driver started, and a node of the same role has another torch."""

    def first_work(sent, versions):
        """The first work of a driver on a node: what is refused there. `versions` replace those of the node's packages."""
        import os

        from pipeline.errors import UserError
        from pipeline.fit import builds, code

        os.environ[code.CODE], builds._job = sent, lambda: "the job of this test"
        code.here()["versions"].update(versions)
        try:
            builds.check()
        except UserError as error:
            return str(error)
        return ""

    sent = code.environment()[code.CODE]
    monkeypatch.setattr(builds, "_job", lambda: "the job of this test")
    work = ray_local.remote(num_cpus=1, max_calls=1, max_retries=0)(first_work)
    other = code.here()["versions"] | {"torch": "0.1"}
    assert builds.keep_first("role ", ["node 10.0.0.9 (far)", other]) == ["node 10.0.0.9 (far)", other]
    told = ray_local.get(work.remote(sent, {}))
    assert f": has torch {code.here()['versions']['torch']}, node 10.0.0.9 (far) of the same role 0.1. Install the same" in told
    assert told.startswith("node ")
    assert ray_local.get(work.remote(sent, {"torch": "0.1"})) == ""
    assert ray_local.get(work.remote(sent, {})) == ""  # this node has been looked at: nobody asks again


def test_files_that_an_editor_keeps_beside_its_own_are_no_code(tmp_path, monkeypatch):
    """Emacs marks a file with unsaved changes by a link `.#x.py` that leads nowhere."""
    for name in code.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "pipeline" / ".#x.py").symlink_to("somebody@somewhere.1234")
    (tmp_path / "pipeline" / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "pipeline" / "x (copy).py").write_text("")
    packages = {name: SimpleNamespace(__path__=[str(tmp_path / name)]) for name in code.PACKAGES}
    monkeypatch.setattr(code.importlib, "import_module", packages.__getitem__)
    assert sorted(code.look()["hashes"]) == [f"{name}/__init__.py" for name in sorted(code.PACKAGES)]


def test_packages_from_two_folders_are_refused(monkeypatch):
    mixed = {**code.here(), "folders": {"pipeline": "/a/pipeline", "actors": "/b/actors", "jobs": "/b/jobs"}}
    monkeypatch.setattr(code, "look", lambda: mixed)
    with pytest.raises(UserError, match="pipeline from /a/pipeline, actors from /b/actors"):
        code.here.__wrapped__()


def test_changed_code_is_told_on_resume_and_old_runs_say_nothing():
    assert versions.changed_code({"python": "3.11.7"}) == ""
    assert versions.changed_code({"fingerprint": code.fingerprint()}) == ""
    told = versions.changed_code({"fingerprint": "0123456789abcdef", "code": "v1"})
    assert told.startswith("the code has changed since the last command on this run: it was v1 0123456789abcdef, now ")
