"""Documents say what the code says: links, paths, commands, settings and tables of every Markdown file of the project."""

from __future__ import annotations

import re

import pytest
import typer
from documents import (
    MOST_CHARACTERS,
    MOST_LINES,
    MOST_WORDS,
    NAMES,
    ROOMS,
    ROOT,
    commands,
    document,
    faults,
    long_sentences,
    lost_references,
    markdown,
    read,
    tables,
    with_table,
)

from jobs.cli import app
from pipeline import config


@pytest.mark.parametrize("name", NAMES)
def test_a_document_names_only_what_exists(name):
    assert not faults((ROOT / name).read_text(), (ROOT / name).parent)


def test_the_number_of_pinned_packages_is_that_of_the_lock():
    pinned = (ROOT / "requirements.lock").read_text().count("==")
    assert f"({pinned} pinned packages)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if tables(name)])
def test_tables_are_what_the_code_says(name):
    text = (ROOT / name).read_text()
    for table in tables(name):
        assert with_table(text, table) == text, f"{name} differs from the code: run python -m tests.documents\n{table}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`egrsd distil --run x`", "no verb"),
        ("`egrsd distill --recipe demo`", "Missing option '--run'"),
        ("x\n\n    $ egrsd stage label --run x --rounds 3\n", "No such option: --rounds"),
        ("x\n\n    egrsd distill --recipe demo --run x \\\n      --set rollout.groupsize=4\n", "no setting rollout.groupsize"),
        ("```\negrsd distill --recipe demo --run x --set rounds=many\n```", "rounds"),
        ("`egrsd distill --recipe dmo --run x`", "unknown recipe"),
        ("`egrsd submit --address http://HEAD:8265 stat --run x`", "no verb"),
        ("`rollout.groupsize`", "no setting"),
        ("```yaml\nsource: {ur: x}\n```", "settings in YAML"),
        ("`pipeline/egrsd.py`", "no file"),
        ("`egrsd.py`", "no file"),
        ("x\n\n    python -m tests.benchmarks.bench_nothing\n", "no module"),
        ("`make demos`", "no target"),
        ("[x](pipeline/NOTHING.md)", "no file behind"),
        ("[x](README.md#nothing)", "no heading behind"),
        ("see trap 99", "trap 99 stands in no list"),
        ("@@", "left to fill in"),
        ("| a | b |\n| --- | --- |\n\nText.", "no row in the table | a | b |"),
        ("| a |\n|---|", "no row in the table | a |"),
    ],
)
def test_a_fault_is_seen(text, fault):
    assert [found for found in faults(text, ROOT) if fault in found]


def test_a_table_with_a_row_is_no_fault():
    assert not faults("| a | b |\n| --- | --- |\n| 1 | 2 |\n\nText.", ROOT)


def test_a_long_sentence_and_a_changed_table_are_seen():
    assert list(long_sentences(read("One. " + "word " * 26 + "end.")))
    assert not list(long_sentences(read("One two. " * 26)))
    table = markdown(("a", "b"), [("1", "2")])
    assert with_table("x\n" + table.replace("2", "3") + "\nrest", table) == "x\n" + table + "\nrest"


def test_readme_can_be_read_in_five_minutes():
    found = document("README.md")
    lines = found.text.splitlines()
    assert len(lines) <= MOST_LINES
    assert not [line for line in lines if len(line) > MOST_CHARACTERS]
    assert len(found.text.split()) <= MOST_WORDS


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_is_long(name):
    assert not list(long_sentences(document(name)))


def test_readme_shows_every_verb():
    shown = {words[0] for words, _ in commands(document("README.md"))}
    assert shown == set(typer.main.get_command(app).commands)


def test_the_setup_commands_exist_and_are_two():
    block = re.search(r"## Set up\n\nTwo commands [\s\S]*?\n\n((?:    [^\n]*\n)+)", document("README.md").text)
    assert block
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]


def test_the_tree_of_readme_is_the_tree():
    block = re.search(r"## The tree\n\n((?:    .*\n)+)", document("README.md").text)
    assert block
    shown, room = [], ""
    for indent, entry in re.findall(r"(?m)^    ( *)(\S+)", block[1]):
        room = room if indent else entry
        shown.append(room + entry if indent else entry)
    assert not [name for name in shown if not (ROOT / name).exists()]
    folders = {
        f"pipeline/{path.parent.name}/" for path in (ROOT / "pipeline").glob("*/*.py")
    }  # rooms inside rooms: pipeline/README.md
    modules = {f"pipeline/{path.name}" for path in (ROOT / "pipeline").glob("[a-z]*.py")}
    assert folders | modules <= set(shown)


def test_every_test_that_is_named_exists():
    """A name such as `::test_b` stands behind the `tests/file.py::test_a` whose file it shares."""
    text, file, missing = (ROOT / "tests" / "README.md").read_text(), "", []
    for path, name in re.findall(r"`((?:tests/[\w/]+\.py)?)::(test_\w+)", text):
        file = path or file
        if not (ROOT / file).exists() or f"def {name}(" not in (ROOT / file).read_text():
            missing.append(f"{file}::{name}")
    assert not missing


def test_the_gate_is_where_readme_says():
    text = document("README.md").text
    for name in ("pipeline/method/objective/gates.py", "pipeline/method/regimes.py"):
        assert f"`{name}`" in text
        assert "\ndef gate(" in (ROOT / name).read_text()
    assert {"gamma", "floor", "min_normaliser"} <= config.Weights.model_fields.keys()


def test_code_refers_to_lists_that_are_there():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "test_documents.py"]
    found = {str(path.relative_to(ROOT)): list(lost_references(path.read_text())) for path in files}
    assert not {name: lost for name, lost in found.items() if lost}
