"""The examples of jobs/README.md, as they stand there: a larger model as teacher, and the same model at a vLLM server."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from waiting import until

from pipeline.models.resolve import asset_path

ROOT = Path(__file__).parent.parent.parent
SMALL = ["rounds=1", "rollout.prompts_per_round=4", "rollout.group_size=2", "evaluation.problems=0", "teachers.big.sample=2"]


def commands():
    """The commands of the section on teachers, by their first words. A line that ends with a backslash goes on."""
    section = re.search(r"\n## Teachers\n(.*?)\n## ", (ROOT / "jobs/README.md").read_text(), re.DOTALL)[1]
    lines = [line.strip() for line in re.findall(r"(?m)^    (.*)$", section)]
    return [line for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines() if line]


def run(line, folder, *sets):
    """Run a command of the project in a folder, as a person would, with smaller settings. What it said."""
    words = shlex.split(line)
    more = [word for text in sets for word in ("--set", text)]
    command = [sys.executable, "-m", "jobs", *words[1:], *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def rows(folder, line):
    """The score rows of the only round that a command made."""
    where = folder / shlex.split(line)[shlex.split(line).index("--run") + 1] / "rounds/0000/score"
    return [row for path in sorted(where.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_larger_model_teaches_in_its_own_engines_and_at_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make, here, status, token, serve, there = commands()
    assert make.startswith("python -m pipeline.models.warmstart --out runs/teacher --teacher")
    shutil.copytree(asset_path(), tmp_path / "runs/teacher")  # in the place of one that takes minutes to make
    assert "of 2 sampled problems" in run(here, tmp_path, *SMALL)
    local = rows(tmp_path, here)
    assert {row["teacher_name"] for row in local} == {"big"}
    assert {row["entropy_method"] for row in local} == {"exact"}
    assert "1 of 1 rounds" in run(status, tmp_path)
    name, _, secret = token.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, secret)
    words = shlex.split(serve)
    settings = dict(word.split("=", 1) for word in words[: words.index("python")])
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (tmp_path / "server.log").open("w") as log:
        command = [sys.executable, *words[words.index("python") + 1 :]]
        server = subprocess.Popen(command, cwd=tmp_path, env=os.environ | settings, stdout=log, stderr=log)
        try:
            until(
                lambda: server.poll() is not None or "startup complete" in (tmp_path / "server.log").read_text(), 300, "it is up"
            )
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            run(there, tmp_path, *SMALL)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(300)
    served = rows(tmp_path, there)
    assert {row["entropy_method"] for row in served} == {"exact"}
    assert [row["trace_id"] for row in served] == [row["trace_id"] for row in local]
    for ours, theirs in zip(local, served, strict=True):
        for column in ("teacher_logprobs", "teacher_entropy"):
            assert max(abs(a - b) for a, b in zip(ours[column], theirs[column], strict=True)) < 1e-3
