"""The measuring script counts what it says it counts, on a house small enough to count by hand."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import house
import pytest
from mutations import MUTATIONS, ROOT

FILES = {
    "pipeline/__init__.py": '"""A row\'s journey."""\n',
    "pipeline/contract.py": '"""Columns."""\n\nNAMES = (\n    "a",  # the first\n    "b",\n)\n',
    "pipeline/method/__init__.py": "",
    "pipeline/method/gate.py": '''"""The gate.

Two lines more.
"""

import math
from typing import TYPE_CHECKING

from pipeline import contract

if TYPE_CHECKING:
    from jobs import cli


def gate(entropy, *, floor):
    """At least floor."""
    # a whole line
    return max(floor, math.floor(entropy))
''',
    "pipeline/stages/__init__.py": "",
    "pipeline/stages/label.py": """import numpy


def label(run):
    from pipeline.method.gate import gate

    return gate
""",
    "pipeline/schedule.py": """from pipeline.stages import label


def execute(a, b, c, d, e, f, g):
    return label
""",
    "pipeline/report.js": "const least = settings.floor\n",
    "pipeline/page.js": "Math.floor(2.5)\n",
    "actors/engine.py": """from pipeline.contract import NAMES


class Engine:
    def answer(self, a, b, c, d, e, f):
        return NAMES
""",
    "jobs/cli.py": """import actors.engine
import pipeline.schedule


async def sweep(**settings):
    return settings['label.floor']
""",
    "README.md": "# House\n\nTwo words.\n",
    "pyproject.toml": '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["jobs", "actors", "pipeline"]\n'
    '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["schedule", "stages", "method", "contract"]\n',
}


@pytest.fixture
def figures(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return house.house(tmp_path)


def test_lines_are_code_or_prose(figures):
    assert figures["code lines"] == 4 + 7 + 4 + 3 + 4 + 4
    assert figures["docstring lines per code line"] == round((1 + 1 + 4 + 1) / 26, 3)
    assert figures["comments per code line"] == round(2 / 26, 3)
    assert (figures["README lines"], figures["README words"]) == (3, 4)


def test_functions_are_measured_from_def_to_end(figures):
    assert figures["functions"] == 5
    assert (figures["function lines, median"], figures["function lines, max"]) == (2, 4)
    assert figures["functions over 6 parameters"] == ["pipeline/schedule.py:execute 7"]
    assert figures["imports inside functions"] == 1


def test_folders_count_files_with_code(figures):
    assert figures["modules per folder"] == {"actors": 1, "jobs": 1, "pipeline": 2, "pipeline/method": 1, "pipeline/stages": 1}


def test_a_rows_way_follows_what_a_running_program_imports(figures):
    way = [
        "actors/engine.py",
        "pipeline/contract.py",
        "pipeline/method/gate.py",
        "pipeline/schedule.py",
        "pipeline/stages/label.py",
    ]
    assert figures["files on a row's way, names"] == way
    assert figures["code lines on a row's way"] == 22


def test_the_longest_chain_and_the_layers(figures):
    chain = ["jobs.cli", "pipeline.schedule", "pipeline.stages.label", "pipeline.method.gate", "pipeline.contract"]
    assert figures["longest import chain, modules"] == chain
    assert figures["layers in pyproject"] == 6


def test_modules_that_import_each_other_are_one_link():
    assert house.longest_chain({"a": {"b"}, "b": {"a", "c"}, "c": set()}) == ["a", "c"]


def test_a_constant_is_found_by_name_and_not_in_other_functions(figures):
    assert figures["files that name `floor`"] == ["jobs/cli.py", "pipeline/method/gate.py", "pipeline/report.js"]


def test_this_repository_is_measured_from_the_command_line():
    done = subprocess.run([sys.executable, house.__file__, "--json"], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["modules"] > 50
    assert len(figures["files on a row's way, names"]) == figures["files on a row's way"]
    assert "pipeline/contract/columns.py" in figures["files on a row's way, names"]


def test_a_sentence_is_found_wherever_it_stands():
    words = "w " * 25
    assert house.long_sentences(f'"""{words}end."""\n') == [f"1: {words}end."]
    assert house.long_sentences(f'"""{words.strip()}. {words.strip()}"""\n') == []
    assert house.long_sentences(f'raise ValueError(f"{words}{{x}}")\n') == [f"1: {words}value"]
    assert house.long_sentences(f"# {words.strip()}\n# end.\nx = 1  # {words}\n") == [f"2: {words}end."]


def test_no_sentence_of_the_product_is_longer_than_a_reader_holds():
    """Docstrings, comments and messages are for strangers who read English as a second language."""
    root = Path(house.__file__).parent.parent
    files = [path for folder in house.PRODUCT for path in (root / folder).rglob("*.py")]
    assert [f"{path}:{found}" for path in files for found in house.long_sentences(path.read_text())] == []


def test_every_package_that_is_imported_is_asked_for():
    """Another package that happens to bring it along may stop doing so."""
    root = Path(house.__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    asked = {re.split(r"[^\w-]", line)[0].lower() for line in (*project["dependencies"], *extras)}
    files = [path for folder in house.PRODUCT for path in (root / folder).rglob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in house.read(path, root).imports}
    known, foreign = packages_distributions(), imported - sys.stdlib_module_names - set(house.PRODUCT)
    assert len(foreign) > 15
    assert not [
        name for name in sorted(foreign) if not asked & {found.lower().replace("_", "-") for found in known.get(name, [name])}
    ]


def test_every_mend_that_can_be_undone_stands_where_the_script_looks_for_it():
    lost = [m.row for m in MUTATIONS if (ROOT / m.path).read_text(encoding="utf-8").count(m.old) != 1]
    assert not lost
    named = {test.partition("[")[0] for m in MUTATIONS for test in m.tests}
    there = {path: (ROOT / path).read_text(encoding="utf-8") for path in {test.partition("::")[0] for test in named}}
    assert not [
        test for test in named if "::" in test and f"\ndef {test.partition('::')[2]}(" not in there[test.partition("::")[0]]
    ]
