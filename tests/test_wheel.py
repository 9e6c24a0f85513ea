"""The wheel alone, in a clean environment and an empty folder, runs the demo. The demo itself is left to `make wheel`.

The environment sees the pinned packages of the one that runs this test, but neither its editable install of the project (a path
file adds a folder without the path files in it) nor the repository.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PRODUCT = ("pipeline", "actors", "jobs")
SMALL = (
    "rounds=1",
    "rollout.prompts_per_round=2",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "evaluation.problems=2",
)
HOOKED = """
import os
os.environ["EGRSD_EXACT_ENTROPY"] = "1"
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.sample.sampler import Sampler
print(Sampler.gather_logprobs.exact_entropy, Sampler.gather_logprobs.__globals__["__file__"])
"""

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves its traces in the folder, and an old one's would get into the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PRODUCT:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", str(out), cwd=source)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Commands of an environment that holds the wheel and sees the pinned packages; the folder they run in is empty."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", str(home / "env"))
    python = home / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel))
    [packages] = (home / "env/lib").glob("python*/site-packages")
    (packages / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (home / "empty").mkdir()
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    return lambda name, *arguments: run(
        shutil.which(name, path=environment["PATH"]), *arguments, cwd=home / "empty", **environment
    )


def run(*command, cwd=None, **variables):
    """What a command says. Fails, with all of it, when its exit code is not 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def light(wheel, tmp_path_factory):
    """Commands of an environment that holds the wheel and its base alone: no torch, Ray, vLLM or transformers."""
    home = tmp_path_factory.mktemp("light")
    run(sys.executable, "-m", "venv", "--without-pip", str(home / "env"))
    python = home / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel))
    [packages] = (home / "env/lib").glob("python*/site-packages")
    for name in sorted(base()):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in {"..", "__pycache__"} and not (packages / top).exists():
                (packages / top).symlink_to(Path(sysconfig.get_path("purelib")) / top)
    (home / "empty").mkdir()
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    return lambda name, *arguments: run(
        shutil.which(name, path=environment["PATH"]), *arguments, cwd=home / "empty", **environment
    )


def base():
    """The packages of the base, with what they need themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, asked = set(), [Requirement(line) for line in project["dependencies"]]
    while asked:
        one = asked.pop()
        if one.name.lower() in found or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name.lower())
        asked += [Requirement(line) for line in metadata.requires(one.name) or ()]
    return found


def test_a_light_installation_reads_runs(light, tmp_path):
    for name in ("torch", "ray", "vllm", "transformers"):
        light("python", "-c", f"import importlib.util; assert importlib.util.find_spec({name!r}) is None")
    with tarfile.open(ROOT / "tests/stored_run/group.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    uri = str(tmp_path / "group")
    assert "2 of 2 rounds trained" in light("egrsd", "status", uri)
    assert "62.5" in light("egrsd", "ls", str(tmp_path))
    assert "traces of 2 rounds" in light("egrsd", "export", uri, "--out", str(tmp_path / "out"))
    assert "nothing was found" in light("egrsd", "verify", uri)
    assert "labelled traces" in light("egrsd", "report", uri)
    assert "<script" in (Path(uri) / "report.html").read_text()
    assert "number, above 0" in light("egrsd", "explain", "rollout.temperature")
    said = light("sh", "-c", f"egrsd distill --recipe demo --run {tmp_path}/new 2>&1; test $? = 2")
    assert "pip install 'egrsd[cpu]'" in said


def test_every_file_of_the_product_is_in_the_wheel(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in PRODUCT}
    files = (path for name in PRODUCT for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    there = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".md"}
    assert found == there


def test_the_project_is_the_wheels(clean):
    said = clean("python", "-c", "import pipeline, actors, jobs; print(pipeline.__file__, actors.__file__, jobs.__file__)")
    assert [Path(part).parts[-4] for part in said.split()] == [f"python{sys.version_info[0]}.{sys.version_info[1]}"] * 3
    assert str(ROOT) not in said


def test_vllm_finds_the_entropy_hook(clean):
    said = clean("python", "-c", HOOKED)
    assert said.startswith("True ")
    assert str(ROOT) not in said
    assert said.endswith("site-packages/actors/inference/hooks/exact_entropy.py")


@pytest.mark.wheel
def test_the_demo_runs_to_its_end(clean, tmp_path):
    uri = str(tmp_path / "run")
    assert "demo" in clean("egrsd", "recipes")
    assert "entropy" in clean("egrsd", "doctor", "--recipe", "demo")
    clean("egrsd", "distill", "--recipe", "demo", "--run", uri, *(part for one in SMALL for part in ("--set", one)))
    assert "Nothing to do" in clean("egrsd", "distill", "--run", uri)
    assert "stale:" not in clean("egrsd", "status", "--run", uri)
    [scored] = Path(uri).glob("rounds/0000/score/*.parquet")
    assert pq.read_table(scored)["entropy_method"].to_pylist() == ["exact"] * 8
    assert "8 of 8 labelled traces" in clean("egrsd", "report", "--run", uri)
    assert "<script" in (Path(uri) / "report.html").read_text()


def test_submit_sends_the_packages_of_the_wheel(clean, tmp_path):
    code = "import sys, pathlib, jobs.parcel as p; p.collect(pathlib.Path.cwd(), {}, []).put(pathlib.Path(sys.argv[1]))"
    clean("python", "-c", code, str(tmp_path))
    sent = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = (path for name in PRODUCT for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert sent == {str(path.relative_to(ROOT)) for path in files if path.suffix != ".md"}
    said = clean("sh", "-c", f"cd {tmp_path} && python -m jobs recipes")
    assert "demo" in said
