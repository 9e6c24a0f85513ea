"""What pipeline/method/README.md names is there, and every reference to a trap leads to its list."""

from __future__ import annotations

import json
import re
from pathlib import Path

from golden import arithmetic

from pipeline.evidence.comparison import CONTROLS, OBJECTIVES
from pipeline.method import entropy, objective, regimes, rewards

ROOT = Path(__file__).parents[2]
README = (ROOT / "pipeline" / "method" / "README.md").read_text()
MODULES = {"entropy": entropy, "objective": objective, "regimes": regimes, "rewards": rewards}


def test_every_function_and_file_it_names_exists() -> None:
    table = README[README.index("## Equations") : README.index("## Objectives")]
    named = [(module, name) for module, name in re.findall(r"`(\w+)\.(\w+)`", table) if module in MODULES]
    assert len(named) > 15
    for module, name in named:
        assert hasattr(MODULES[module], name), f"{module}.{name}"
    for path in re.findall(r"`((?:tests|pipeline)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_it_lists_the_objectives_and_controls_that_there_are() -> None:
    parts = (README[README.index("## Objectives") : README.index("## Gates")], README[README.index("## Controls") :])
    found = [re.findall(r"^\| `(\w+)` \|", part, re.M) for part in parts]
    assert [set(names) for names in found] == [set(OBJECTIVES), set(CONTROLS)]


def test_its_golden_vector_is_the_tested_one() -> None:
    losses = [float(text) for text in re.findall(r"L = +(-?\.\d+)", README)]
    assert losses == [case["loss"] for case in json.loads((ROOT / "tests/golden/egrsd.json").read_text())["cases"]]
    gates = [re.findall(r"\(([^)]*)\)", line) for line in README.splitlines() if "omega (" in line]
    for case, rows in zip(arithmetic.GOLDEN["cases"], gates, strict=True):
        assert [[float(value) for value in row.split()] for row in rows] == case["gate"]


def test_every_trap_that_code_refers_to_is_in_the_list() -> None:
    listed = [int(number) for number in re.findall(r"^(\d+)\. ", README[README.index("## Traps") :], re.M)]
    assert listed == list(range(1, len(listed) + 1))
    files = [path for room in ("pipeline", "actors", "jobs") for path in (ROOT / room).rglob("*.py")]
    found = [number for path in files for number in re.findall(r"\btraps? (\d+)(?: and (\d+))?", path.read_text())]
    assert found
    assert {int(number) for pair in found for number in pair if number} <= set(listed)
