"""`egrsd submit` against a real head on loopback: what travels, once only, to the end, with the token and without."""

import asyncio
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
import typer
from waiting import free_port, until

from jobs import submit
from jobs.parcel import MARKS
from jobs.screen import envelope
from pipeline import notices
from pipeline.errors import EgrsdError, SettingError

ROOT = Path(__file__).parents[2]
TOKEN = "b5d1c0ffee" * 4
SHIPPED = (
    *("pipeline/token_weights.py", "pyproject.toml", "data/mine.jsonl", "models/small/tokenizer.json"),
    *("models/small/special_tokens_map.json", "models/small/monkey.txt", "jobs/page.html", *MARKS),
)
KEPT_HOME = (
    *("runs/demo/run.json", "assets-cache/model.bin", ".venv/bin/python", ".git/config", "notes.txt", "problems.jsonl"),
    *(".env", "tls.pem", "HF_TOKEN", "wandb_api_key.txt", "gcp-sa.json", "key.json", ".s3cfg", ".boto", "rclone.conf"),
    *("jobs/secrets.py", "pipeline/aws_credentials.py", "jobs/notes.txt", "pipeline/.env", "actors/__pycache__/x.py"),
    *("models/small/.env", "models/small/api_key.json", "models/small/deploy_key", "models/small/key.pem.bak"),
    *("models/small/id_rsa", "models/small/my-tokens.txt", "models/small/backup.env.old", "models/small/terraform.tfvars"),
)
# a project of its own: `python -m jobs` there lists its files, and `train` then runs until it is interrupted
PROBE = """
import pathlib, sys, time
print("FILES", sorted(p.as_posix() for p in pathlib.Path(".").rglob("*") if p.is_file()))
try:
    while sys.argv[1] == "train":
        time.sleep(0.2)
except KeyboardInterrupt:
    print("ended well")
    sys.exit(130)
"""


@dataclass
class Head:
    """A cluster of one machine, and the shell of somebody who may use it."""

    address: str
    folder: Path
    environment: dict[str, str] = field(repr=False)
    egrsd: Callable[..., subprocess.CompletedProcess] = field(repr=False)

    def command(self, *arguments):
        """The command in words, for one that runs beside another."""
        return [sys.executable, "-m", "jobs", "submit", "--address", self.address, *arguments]

    def submit(self, *arguments, address=None, **environment):
        """The command as its user runs it."""
        shell = {name: value for name, value in {**self.environment, **environment}.items() if value is not None}
        done = self.egrsd("submit", "--address", address or self.address, *arguments, env=shell)
        assert TOKEN not in done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def head(egrsd, signals_are_heard):
    """A head with a job server and token authentication, in folders of its own (short: Ray's sockets lie there)."""
    folder = Path(tempfile.mkdtemp(prefix="egrsd"))
    (folder / "token").write_text(TOKEN)
    gcs, dashboard, client, agent = (str(free_port()) for _ in range(4))
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mine.pop("PYTHONPATH", None)  # a job must run what was submitted, not the code that these tests run
    mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    mine["RAY_JOB_STOP_WAIT_TIME_S"] = "30"  # on a busy machine a job needs longer than Ray's 3 s to say that it ends
    mine |= {"HOME": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = ["--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client]
    options += ["--dashboard-agent-listen-port", agent, "--metrics-export-port", "0", "--dashboard-host", "127.0.0.1"]
    options += ["--include-dashboard=true", "--num-cpus", "4", "--object-store-memory", "100000000"]
    options += ["--temp-dir", str(folder / "ray"), "--labels", "egrsd-role=head", "--resources", '{"desk": 1}']
    with open(folder / "head.log", "w") as log:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *options]
        process = subprocess.Popen(command, env=mine, stdout=log, stderr=log, cwd=folder)
    started = Head(f"http://127.0.0.1:{dashboard}", folder, mine, egrsd)
    try:
        yield started
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        for left in family[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(head):
    """The head once it takes jobs."""
    try:
        until(lambda: "no such job" in head.submit("--stop", "nobody").stderr)
    except AssertionError as error:
        raise AssertionError((head.folder / "head.log").read_text()) from error
    return head


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A folder to submit, full of what must stay at home."""
    folder = tmp_path_factory.mktemp("project")
    for name in (*SHIPPED, *KEPT_HOME):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "pyproject.toml").write_text('[tool.setuptools.package-data]\njobs = ["*.html"]\n')
    (folder / "jobs" / "__main__.py").write_text(PROBE)
    return folder


def test_a_verb_runs_there_and_again_under_a_new_id(cluster):
    first, second = cluster.submit("recipes"), cluster.submit("recipes")
    for done, ending in ((first, ""), (second, "-2")):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "qwen3_4b" in done.stdout
        assert f"job {submit.default_id(['recipes'])}{ending}: SUCCEEDED." in done.stdout


def test_a_verb_that_fails_gives_back_its_exit_code(cluster):
    done = cluster.submit("--entrypoint-cpus", "1", "--entrypoint-resources", "desk=1", "status", "--run", "/no/such/run")
    assert "no run here" in done.stdout  # a job has one stream of output
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr


def interrupted(cluster, *verb):
    """What `submit` says that follows a job and gets Ctrl-C."""
    follower = subprocess.Popen(
        cluster.command(*verb), env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in follower.stdout:
        said.append(line)
        if line.startswith("FILES"):
            break
    follower.send_signal(signal.SIGINT)
    rest, errors = follower.communicate(timeout=300)
    assert (follower.returncode, errors) == (130, "error: Interrupted (SIGINT)\n")
    return "".join(said) + rest


def test_one_job_however_often_submitted_without_secrets_until_stopped(cluster, probe):
    asked = ("train", "--run", "/shared/run", "--set", "source.uri=data/mine.jsonl")
    verb = ("--working-dir", str(probe), "--include", "models/small", "--entrypoint-label", "egrsd-role=head", *asked)
    name = submit.default_id(list(asked))
    pair = [
        subprocess.Popen(cluster.command(*verb), env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    running = cluster.submit("--no-wait", *verb)
    log = cluster.folder / "ray" / "session_latest" / "logs" / f"job-driver-{name}.log"
    until(lambda: log.exists() and "FILES" in log.read_text(), what="the job lists its files")
    other = cluster.submit("--working-dir", str(probe), "--submission-id", name, "train", "--run", "/shared/other")
    watched = interrupted(cluster, *verb)
    [offered] = re.findall(r"`egrsd (submit [^`]*--stop [^`]*)`", watched)
    assert f"job {name} runs on. The same command follows it again; `egrsd {offered}` ends it." in watched
    stopped = cluster.egrsd(*shlex.split(offered), env=cluster.environment)  # as a person would paste it
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert f"job {name} " in running.stdout or f"job {name}:" in running.stdout
    assert f"job {name}: STOPPED." in stopped.stdout
    again = json.loads(cluster.submit("--stop", name, "--json").stdout)
    assert f"job {name} had ended already: STOPPED." in again["messages"]
    assert again["result"] == {"job": name, "status": "STOPPED", "asked": False}
    assert sum(f"job {name}: submitted." in text for text in (*outputs, running.stdout)) == 1
    for process, text in zip(pair, outputs, strict=True):
        assert process.returncode == 130
        assert text.count("FILES") == text.count("ended well") == 1
    assert other.returncode == 2
    assert f"{name} is the id of another command" in other.stderr
    assert f"sends {len(SHIPPED) + 1} files" in running.stdout
    assert "models/small/api_key.json" in running.stdout.partition("stays here")[2]
    travelled = set(re.findall(r"'([^']+)'", log.read_text().partition("FILES")[2]))
    assert travelled == {*SHIPPED, "jobs/__main__.py"}


def test_rays_own_command_works_as_the_documents_show_it(cluster, probe):
    """Ray's client sends no token before RAY_AUTH_MODE=token is set, whatever file holds one: it was an AuthenticationError."""
    shown = [line for line in (ROOT / "jobs" / "README.md").read_text().splitlines() if "ray job submit" in line]
    [words] = [re.search(r"`([^`]*ray job submit [^`]*)`", line)[1] for line in shown]
    shell = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    command = words.replace("http://HEAD:8265", cluster.address).removesuffix(" ...")
    done = subprocess.run(["bash", "-c", command], cwd=probe, env=shell, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'jobs/__main__.py'" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong-token"}, "Invalid authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": None}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "RAY_AUTH_TOKEN_PATH"),
    ],
)
def test_a_token_that_does_not_fit_is_one_line(cluster, shell, message):
    done = cluster.submit("recipes", RAY_AUTH_MODE=None, **shell)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Put the cluster's token into RAY_AUTH_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "wrong-token" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_the_token_travels_from_wherever_ray_looks(cluster, tmp_path, way):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN if way == "home" else "another")
    shell = {"RAY_AUTH_TOKEN": {"RAY_AUTH_TOKEN": TOKEN}, "RAY_AUTH_TOKEN_PATH": {}, "home": {"RAY_AUTH_TOKEN_PATH": None}}[way]
    done = cluster.submit("--stop", "nobody", RAY_AUTH_MODE=None, HOME=str(tmp_path), **shell)
    assert "no such job" in done.stderr


def test_an_address_that_does_not_answer_is_one_line(egrsd):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        done = Head(address, ROOT, dict(os.environ), egrsd).submit("recipes", RAY_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {address}: no Ray job server answers")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "--rn", "/x"), "No such option: --rn"),
        (("statu", "--run", "/x"), "Did you mean 'status'"),
        (("submit", "recipes"), "cannot submit itself"),
        ((), "give a verb to run"),
        (("--stop", "x", "recipes"), "give a verb to run, or --stop ID"),
        (("status", "--run", "runs/demo"), "absolute path that every node reaches"),
        (("--working-dir", "/no/such", "recipes"), "no such folder"),
        (("--working-dir", "/", "recipes"), "holds your home directory"),
        (("--entrypoint-resources", "desk", "recipes"), "'desk' is not NAME=VALUE"),
        (("--entrypoint-resources", "desk=many", "recipes"), "Write NAME=AMOUNT"),
        (("--entrypoint-resources", "desk=1e999", "recipes"), "--entrypoint-resources: is inf, which is no amount"),
        (("--entrypoint-cpus", "nan", "recipes"), "--entrypoint-cpus: is nan, which is no amount"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(egrsd, arguments, message):
    done = Head("http://127.0.0.1:9", ROOT, dict(os.environ), egrsd).submit(*arguments)
    assert done.returncode == 2
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "http://user:pass@head:8265"])
def test_only_a_plain_http_address_is_taken(egrsd, address):
    done = Head(address, ROOT, dict(os.environ), egrsd).submit("recipes")
    assert done.returncode == 2
    assert "Give the head's dashboard" in done.stderr
    assert "pass@" not in done.stderr


def test_the_id_depends_on_verb_and_arguments_only():
    assert submit.default_id(["train", "--run", "/a"]) == submit.default_id(["train", "--run", "/a"])
    assert submit.default_id(["train", "--run", "/a"]) != submit.default_id(["train", "--run", "/a b"])
    assert submit.default_id(["train", "--run /a"]) != submit.default_id(["train", "--run", "/a"])


class Hung:
    """A job server that lets its connections stand, and sends nothing."""

    def __init__(self, error=None):
        self.error, self.asked = error, 0

    async def tail_job_logs(self, name):
        yield "first\n"
        while not (self.error is None and self.asked):
            await asyncio.sleep(0.01)
        yield "last\n"

    def get_job_info(self, name):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(status="RUNNING")


def tailed(client, monkeypatch):
    monkeypatch.setattr(submit, "QUIET_S", 0.05)
    out = SimpleNamespace(console=SimpleNamespace(file=io.StringIO()))
    written = asyncio.run(submit._tail(client, "job", 0, out))
    return written, out.console.file.getvalue()


def test_a_job_that_prints_nothing_is_asked_about_and_followed(monkeypatch):
    assert tailed(Hung(), monkeypatch) == (11, "first\nlast\n")


def test_a_server_that_has_hung_ends_the_command(monkeypatch):
    with pytest.raises(EgrsdError, match=r"job: lost the cluster \(no answer in 120 s\)\. A job may still run"):
        tailed(Hung(requests.ReadTimeout("no answer in 120 s")), monkeypatch)


def test_every_request_to_the_job_server_has_a_deadline(monkeypatch):
    """The server accepts connections, answers the first two requests, and then nothing more."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/version"):
                body = b'{"ray_version": "%s", "version": "4"}' % metadata.version("ray").encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            else:
                over.wait(600)

        def log_message(self, *_):
            pass

    over, server, said = threading.Event(), ThreadingHTTPServer(("127.0.0.1", 0), Server), []
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or the client would turn tokens on for this process
    monkeypatch.setattr(submit, "SILENT_S", 1.0)
    monkeypatch.setattr(notices, "NOTICE_S", 0.2)
    with notices.shown(said.append), pytest.raises(EgrsdError, match="lost the cluster"):
        submit._info(submit.open_client(f"http://127.0.0.1:{server.server_port}"), "job")
    over.set()
    server.shutdown()
    assert said == ["waiting for the cluster's job server, about job: for 30 s so far."]


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        (["distill", "--run", "runs/a"], "run"),
        (["export", "--run", "s3://b/r", "--out", "traces"], "out"),
        (["export", "--run", "s3://b/r", "--model", "policy"], "model"),
        (["sweep", "--run", "s3://b/r", "--csv", "x.csv"], "csv"),
        (["export", "--run", "s3://b/r", "--model", "/data/policy"], None),
        (["report", "--run", "s3://b/r", "--run", "runs/b"], "run"),
        (["report", "--run", "s3://b/r", "--run", "/data/b"], None),
    ],
)
def test_what_would_be_written_into_the_jobs_own_folder_is_refused(verb, option):
    """Ray deletes that folder, so the model or the table was lost after a job that succeeded."""
    from jobs.cli import app

    context = typer.main.get_command(app).make_context("egrsd", ["submit", "--", *verb], resilient_parsing=True)
    parsed = submit.parse_verb(context, verb)
    advice = "Give an absolute path" if option in ("model", "csv") else "Give a URI, or an absolute path"  # these go to no URI
    with pytest.raises(SettingError, match=f"--{option}: .*which Ray deletes. {advice}") if option else contextlib.nullcontext():
        submit._check_paths(parsed)


def test_json_of_submit_is_its_own_whatever_the_verb_prints():
    """The verb's own default was noted over it: `submit --json` printed text."""
    from jobs.cli import app

    words = ["submit", "--json", "--", "status", "--run", "s3://b/r"]
    before = envelope.asked.get()
    try:
        typer.main.get_command(app).make_context("egrsd", words, resilient_parsing=True)
        envelope.asked.set(envelope.Asked("submit", True))
        context = typer.main.get_command(app).make_context("egrsd", ["submit"], resilient_parsing=True)
        submit.parse_verb(context, words[3:])
        assert envelope.asked.get() == envelope.Asked("submit", True)
    finally:
        envelope.asked.set(before)
