"""The check for people with a GPU, in its small form on the CPU. Its figures are not looked at: they say nothing about a GPU."""

import argparse
import importlib.util
import os
import re

import pytest
from benchmarks import gpu_check
from benchmarks import gpu_work as work
from benchmarks.gpu_check import PARTS, TINY, Row


def cells(text, part):
    """The rows of a part in a printed table: what was done -> the figure."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {what: figure for name, what, figure, *_ in lines if name == part}


def test_the_trainers_part_runs_without_vllm_and_ray(monkeypatch, tmp_path, capsys):
    for name in ("ray", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} is not to be imported')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code = gpu_check.main(["--tiny", "--parts", "trainer"])
    found = cells(capsys.readouterr().out, "trainer")
    assert list(found) == PARTS["trainer"].rows(TINY)
    assert code == 0, found
    assert all(re.fullmatch(r"[\d,]+ tokens/s, peak \d+ MiB", figure) for figure in found.values()), found


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part_without_its_packages_says_which(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package in {"vllm", "peft"} else package)
    lacks = "peft" if name == "trainer" else "peft, vllm"
    with pytest.raises(SystemExit, match=f"^not run: {lacks} is not installed$"):
        gpu_check.run_part(name, argparse.Namespace(tiny=True))


def test_every_row_is_there_with_the_reason_when_a_part_does_not_get_to_it():
    late = gpu_check.ask_part("engine", ["--tiny"], TINY, 0.0)
    assert late == [Row(what, "not run: 0 s were over") for what in PARTS["engine"].rows(TINY)]
    broken = gpu_check.ask_part("round", ["--tiny", "--no-such-option"], TINY, 60.0)
    assert [row.what for row in broken] == PARTS["round"].rows(TINY)
    assert broken[0].figure.startswith("failed: ")
    assert "--no-such-option" in broken[0].figure


def test_the_row_of_a_run_that_fails_has_its_error_and_not_the_name_of_its_log():
    assert work.reason("begins\nerror: runs/a: no room\nlog: runs/a/logs/1.log\n") == "error: runs/a: no room"
    assert work.reason("Killed\n\n") == "Killed"


def test_a_check_in_which_nothing_ran_or_something_failed_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "machine_rows", list)
    for figure, code in (("not run: torch sees no GPU", 1), ("failed: died", 1), ("12 s", 0)):
        monkeypatch.setattr(gpu_check, "ask_part", lambda *_, figure=figure: [Row("a | b", figure)])
        assert gpu_check.main(["--tiny", "--parts", "round"]) == code
        assert f"| round | a / b | {figure} |" in capsys.readouterr().out
