"""`egrsd export --model`: what is refused before anything is written, the model card, and a push to a hub."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.cli import app
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A finished run of two rounds with an adapter of rank 1."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(ROOT / "tests" / "stored_run" / "group.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return Store(str(folder / "group"))


def export(capfd, *arguments):
    """(exit code, what the verb says)."""
    try:
        app(["export", *map(str, arguments)], standalone_mode=False)
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, " ".join("".join(capfd.readouterr()).split())


def test_a_policy_goes_out_with_card_and_record(stored, tmp_path, capfd):
    code, said = export(capfd, "--run", stored.uri, "--model", tmp_path / "out")
    assert (code, said) == (0, f"policy 2 of {stored.uri} in {tmp_path / 'out'}")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "egrsd.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-generation\n")
    for part in (
        "tiny-arithmetic, split train",
        "`cl_egrsd`, 2 of 2 rounds",
        "| base | policy 2 |",
        "- code 31aa128",
        "lora_rank: 1",
    ):
        assert part in card, part
    record = json.loads((tmp_path / "out" / "egrsd.json").read_text())
    assert (record["policy"], record["weights"], record["versions"]["code"]) == (2, "adapter", "31aa128")


def test_an_untrained_policy_is_told_as_the_base_on_the_terminal_and_on_its_card(stored, tmp_path, capfd):
    code, said = export(capfd, "--run", stored.uri, "--model", tmp_path / "out", "--policy", "0", "--merge")
    assert (code, "note: No round was trained for policy 0: these are the base's weights" in said) == (0, True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No round was trained for policy 0: these are the base's weights, and nothing was learned." in card
    assert "None of this was trained for policy 0." in card
    assert "The model learned" not in card


def test_an_earlier_policy_without_evaluation_says_so(stored, tmp_path, capfd):
    assert export(capfd, "--run", stored.uri, "--model", tmp_path / "out", "--policy", "1")[0] == 0
    assert "This policy has answered no held-out problems." in (tmp_path / "out" / "README.md").read_text()


def test_what_egrsd_evaluate_asked_stands_in_the_card(stored, tmp_path, capfd):
    shutil.copytree(stored.uri, tmp_path / "run")
    figure = {"avg": {"value": 0.5, "low": 0.25, "high": 0.75}}
    document = {"source": {"uri": "gsm8k"}, "problems": 8, "samples": 4, "policies": {"2": {"figures": figure}}}
    Store(str(tmp_path / "run")).write_json("evals/gsm8k-0123abcd/summary.json", document)
    document["settings"] = {"temperature": 0.6, "top_p": 1.0, "top_k": 1, "seed": 0}
    Store(str(tmp_path / "run")).write_json("evals/gsm8k-4567abcd/summary.json", document)
    assert export(capfd, "--run", tmp_path / "run", "--model", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- 8 problems x 4 samples of gsm8k: accuracy 50.0 [25.0, 75.0] %" in card
    assert "- 8 problems x 4 samples of gsm8k (T 0.6, top-p 1, top-k 1): accuracy 50.0 [25.0, 75.0] %" in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "7"), "policy 7 is not published. Policies here: 0 to 2"),
        (("--policy", "0..2"), "--policy 0..2: names several policies. Export one at a time"),
        (("--policy", "best"), "'best' is no number or range of numbers"),
        (("--policy", "0"), "--policy 0: policy 0 is the base model, which has no adapter"),
        (("--push", "a b/c"), "--push a b/c: is no name of a repository"),
        (("--push", "me/policy"), "--push me/policy: HF_HUB_OFFLINE is set, so no hub is asked"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(stored, tmp_path, capfd, arguments, said):
    code, told = export(capfd, "--run", stored.uri, "--model", tmp_path / "out", *arguments)
    assert code == 2
    assert said in told
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_the_earlier_one_in_its_place(stored, tmp_path, capfd, monkeypatch):
    def interrupted(source, target):
        if Path(target).name == "out" and not Path(source).name.endswith("-old"):
            raise KeyboardInterrupt
        rename(source, target)

    def content():
        return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert export(capfd, "--run", stored.uri, "--model", tmp_path / "out", "--policy", "1")[0] == 0
    before, rename = content(), os.rename
    monkeypatch.setattr(os, "rename", interrupted)
    assert export(capfd, "--run", stored.uri, "--model", tmp_path / "out", "--replace")[0] == 130
    assert content() == before
    monkeypatch.undo()
    assert export(capfd, "--run", stored.uri, "--model", tmp_path / "out", "--replace")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_exported_policy_is_replaced_and_only_when_asked(stored, tmp_path, capfd):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    code, said = export(capfd, "--run", stored.uri, "--model", mine, "--replace")
    assert (code, "is there already, and is no exported policy" in said) == (2, True)
    assert export(capfd, "--run", stored.uri, "--model", out)[0] == 0
    code, said = export(capfd, "--run", stored.uri, "--model", out, "--merge")
    assert (code, "a policy was exported there already" in said) == (2, True)
    assert export(capfd, "--run", stored.uri, "--model", out, "--merge", "--replace")[0] == 0
    assert (out / "model.safetensors").exists()
    assert not (out / "adapter_config.json").exists()
    code, said = export(capfd, "--run", stored.uri, "--model", "s3://bucket/policy")
    assert (code, "is a URI, and programs open models from folders" in said) == (2, True)


class Hub(BaseHTTPRequestHandler):
    """The part of a hub that a push uses: who am I, make a repository, which way files go, commit. It keeps what it got."""

    def _answer(self, document, code=200):
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        good = self.headers.get("Authorization") == "Bearer hf_good"
        if self.path == "/api/whoami-v2" and not good:
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        return self._answer({"name": "me"} if self.path == "/api/whoami-v2" else {"error": "not here"}, 200 if good else 404)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.made = json.loads(data)
            return self._answer({"url": f"http://{self.headers['Host']}/me/policy", "id": "me/policy"})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in data.splitlines()]
            self.server.header = lines[0]["value"]["summary"]
            self.server.files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
            }
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/policy/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
            )
        return self._answer({"error": f"unknown {self.path}"}, 404)

    def log_message(self, *_):
        """Nothing is logged."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub, run, out, **environment):
    """The command with the hub's address, in a process of its own: the hub's client reads its environment when it is imported."""
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(out.parent / "hf")}
    command = [sys.executable, "-m", "jobs", "export", "--run", run, "--model", str(out), "--push", "me/policy"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | there | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment, cwd=ROOT)
    return done.returncode, " ".join(done.stdout.split()), done.stderr


def test_a_policy_is_pushed_to_a_private_repository_in_one_commit(stored, hub, tmp_path):
    code, said, stderr = pushed(hub, stored.uri, tmp_path / "out", HF_TOKEN="hf_good")
    assert code == 0, said + stderr
    assert "pushed to http://" in said
    assert (hub.made["name"], hub.made["organization"]) == ("policy", "me")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.header == "Policy 2 of recipe demo"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "--push me/policy: HF_TOKEN is not set"),
        ({"HF_TOKEN": "hf_bad"}, "--push me/policy: the hub refuses"),
        ({"HF_TOKEN": "hf_good", "HF_ENDPOINT": "http://127.0.0.1:9"}, "--push me/policy: the hub does not answer"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_anything_is_written(stored, hub, tmp_path, environment, said):
    code, told, stderr = pushed(hub, stored.uri, tmp_path / "out", **environment)
    assert (code, said in stderr) == (2, True), told + stderr
    assert "Traceback" not in told + stderr
    assert not (tmp_path / "out").exists()
    assert not hasattr(hub, "made")
