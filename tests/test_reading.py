"""A run read from a notebook: tables, figures and policies, without Ray, vLLM or torch, and a script that draws three plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import large_run

import pipeline
from pipeline import open_run
from pipeline.errors import UserError

NOTEBOOK = Path(__file__).parent / "notebook.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two rounds of 100 traces."""
    return large_run(tmp_path_factory.mktemp("read"), 200, per_round=100)


def test_a_round_is_a_table_of_traces(store):
    run = open_run(store.uri)
    assert list(run.rounds) == [0, 1]
    whole, some = run.rounds[1].traces(), run.rounds.last.traces(["verdict", "reward", "problem", "round", "reject_reason"])
    assert some.column_names == ["verdict", "reward", "problem", "round", "reject_reason"]
    assert some.equals(whole.select(some.column_names))
    assert whole.num_rows == 100
    frame = some.to_pandas()
    assert frame["reward"].mean() == pytest.approx(sum(some["reward"].to_pylist()) / 100)


def test_figures_and_steps_are_tables_by_round(store):
    run = open_run(store.uri)
    assert run.steps["loss"].to_pylist() == [0.1, 0.1]
    assert run.figures.column_names[0] == "round"
    assert run.figures["seconds_round"].to_pylist() == [3.0, 3.0]
    assert run.rounds[0].figures["seconds_round"] == 3.0
    assert [policy.version for policy in run.policies] == [0]
    assert len(run.evaluations) == 0


def test_what_is_not_there_is_named(store):
    run = open_run(store.uri)
    with pytest.raises(UserError, match="rounds has no 7"):
        run.rounds[7]
    with pytest.raises(UserError, match="no column wrong in rounds/0000"):
        run.rounds[0].traces(["wrong"])
    with pytest.raises(UserError, match=r"run\.json is missing"):
        open_run(Path(store.uri) / "rounds")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipeline.nothing


def test_the_notebook_draws_three_plots_and_loads_no_engine(store, tmp_path):
    """Executed as people run it: in a process of its own, where one line tells what was imported."""
    asked = f"import runpy, sys; sys.argv = ['notebook', {store.uri!r}, {str(tmp_path)!r}]; runpy.run_path({str(NOTEBOOK)!r})"
    told = "print(*({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)), 'none')"
    done = subprocess.run([sys.executable, "-c", f"{asked}; {told}"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["none"]
    assert {path.name for path in tmp_path.iterdir()} == {"learning.png", "rewards.png", "entropy.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
