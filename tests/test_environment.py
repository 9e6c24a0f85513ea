"""Files of tests give Ray's variables back: what a fixture of one file has set is not there for the next one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE = """
import os
import pytest

@pytest.fixture(scope="module")
def joined():
    os.environ["RAY_AUTH_MODE"] = "token"  # as every verb sets it that starts a Ray

def test_one(joined):
    assert os.environ["RAY_AUTH_MODE"] == "token"
"""
TWO = """
import os

def test_two():
    assert "RAY_AUTH_MODE" not in os.environ
"""


def test_a_variable_of_ray_ends_with_the_file_whose_fixture_has_set_it(tmp_path):
    (tmp_path / "test_one.py").write_text(ONE)
    (tmp_path / "test_two.py").write_text(TWO)
    settings = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "conftest", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-m", "pytest", *settings, str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "2 passed" in ended.stdout, ended.stdout + ended.stderr
