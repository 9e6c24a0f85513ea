"""What the Markdown files of the project name: links, paths, commands, settings and tables, and what is wrong with them.

Tables that derive from code are written anew by `python -m tests.documents`, which also lists long sentences.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic import BaseModel

from jobs.cli import app
from pipeline import recipes
from pipeline.config import Reward, Run, Teacher
from pipeline.contract import COLUMNS
from pipeline.errors import EgrsdError
from pipeline.inspection.explained import settings
from pipeline.overrides import resolve
from pipeline.rounds.metrics import METRICS
from pipeline.stages import PLAN
from pipeline.written import read_document

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "actors", "jobs", "tests")
DOCUMENTS = [ROOT / "README.md", *sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MOST_LINES, MOST_CHARACTERS, MOST_WORDS, MOST_WORDS_OF_SENTENCE = 200, 130, 2500, 25
SHOWN_SETTINGS = (
    *("objective.name", "objective.gamma", "objective.window", "rounds", "max_staleness"),
    *(f"rollout.{name}" for name in ("prompts_per_round", "group_size", "temperature", "max_new_tokens", "teacher_share")),
    *("grade.verifier", "grade.advantage", "model.lora_rank"),
    *(f"train.{name}" for name in ("strategy", "workers", "batch_traces", "learning_rate")),
    *(f"engines.rollout.{name}" for name in ("min", "max", "threads", "max_num_seqs")),
)
REPEATED = ("engines.score.", "evaluation.source.", "teachers.NAME.engines.", "train.placement.")  # settings of other sections
STANDS_FOR = {"N": "0", "NAME": "demo", "LABEL": "label"}  # placeholders that an option would not take
EXAMPLES = {"secrets.py", "steps.py", "file.py"}  # names that no file of the project has
ENTRY = re.compile(r"grade\.rewards\.\w+\.")  # begins a setting of one entry of a list, which a recipe may lack
AXES = {"label.window"}  # what `sweep` takes although it is no setting of a run


class Document(NamedTuple):
    """A Markdown file in parts: lines of code, prose without code blocks and tables, `spans` in backticks, and YAML blocks."""

    text: str
    code: list[str]
    prose: str
    spans: list[str]
    settings: list[str]


def stage_table():
    """The plan as a Markdown table, for the documents."""
    lines = ["| stage | where | reads | writes |", "| --- | --- | --- | --- |"]
    for stage in PLAN:
        writes = ", ".join(_with_shape(column) for column in stage.writes)
        lines.append(f"| {stage.name} | {stage.where} | {', '.join(stage.reads) or 'a source'} | {writes} |")
    return "\n".join(lines)


def _with_shape(column):
    return f"{column.name} `[{column.shape}]`" if column.shape else column.name


def metric_table():
    """Every metric as a Markdown table, for pipeline/README.md."""
    bar = r"\|"  # a bar within a cell
    rows = [
        f"| `{writer}/{metric.name}` | {metric.unit} | {metric.reduction} | {metric.meaning.replace('|', bar)} |"
        for writer, metrics in METRICS.items()
        for metric in metrics
    ]
    return "\n".join(["| metric | unit | over rows | meaning |", "| --- | --- | --- | --- |", *rows])


def read(text: str) -> Document:
    """A Markdown text in parts. A code block is fenced, or indented by four columns or more after an empty line."""
    code, prose, spans, settings = [], [], [], []
    fence, indented, empty = "", False, True
    for line in text.splitlines():
        if line.startswith("```"):
            fence = "" if fence else line[3:] or "text"
            settings += [""] if fence == "yaml" else []
        elif fence:
            code.append(line)
            settings[-1:] = [settings[-1] + line + "\n"] if fence == "yaml" else settings[-1:]
        else:
            indented = line.startswith("    ") and (empty or indented)
            (code if indented else prose).append(line)
        empty = not line.strip()
    for paragraph in re.split(r"\n\s*\n|\n(?=[|#-] ?)", "\n".join(prose)):
        spans += re.findall(r"`([^`]+)`", paragraph.replace("\n", " "))
    joined = re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines()
    return Document(text, joined, "\n".join(line for line in prose if not line.startswith(("|", "#"))), spans, settings)


def document(name: str) -> Document:
    return read((ROOT / name).read_text())


# ---- tables that derive from code


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def column_table() -> str:
    """Every column of the contract."""
    rows = [
        (f"`{c.name}`", c.writer, f"`[{c.shape}]`" * bool(c.shape), c.unit, f"`{str(c.type).replace('item: ', '')}`", c.doc)
        for c in COLUMNS.values()
    ]
    return markdown(("column", "stage", "shape", "unit", "type", "meaning"), rows)


def settings_table() -> str:
    """Settings that people change, in two recipes."""
    runs = [run.model_dump() for run in (recipes.demo(), recipes.qwen3_8b())]
    values = [[reduce(lambda part, key: part[key], name.split("."), run) for run in runs] for name in SHOWN_SETTINGS]
    rows = [(f"`{name}`", str(a), str(b)) for name, (a, b) in zip(SHOWN_SETTINGS, values, strict=True)]
    return markdown(("setting", "demo", "qwen3_8b"), rows)


def explained_table() -> str:
    """Every setting, but those of sections that have the settings of another section."""
    rows = [
        (f"`{one.name}`", one.kind, f"`{one.default[:44]}`" if one.default else "must be given", one.meaning, one.stale)
        for one in settings().values()
        if not one.name.startswith(REPEATED)
    ]
    return markdown(("setting", "type", "default", "what it does", "what a change makes stale"), rows)


def verb_table() -> str:
    """Every verb of the command line with its options."""
    rows = []
    for name, verb in sorted(typer.main.get_command(app).commands.items()):
        options = [f"`{p.opts[0] if p.opts[0].startswith('-') else p.name.upper()}`" for p in verb.params if p.name != "help"]
        rows.append((f"`{name}`", (verb.help or "").splitlines()[0], " ".join(options)))
    return markdown(("verb", "what it does", "arguments and options"), rows)


def family_table() -> str:
    """Every family of models with the gap that `make families` measured. Its file of figures is written by that command."""
    found = json.loads((ROOT / "tests" / "families" / "measured.json").read_text())
    rows = [
        (name, *(f"{gap:.0e}" for gap in row["largest"]), f"{row['moved']:.2g}", ", ".join(row["targets"]))
        if "largest" in row
        else (name, "refused", "", "", row["refused"])
        for name, row in sorted(found.items())
    ]
    return markdown(("family", "gap, policy 0", "gap, policy 1", "moved", "layers that LoRA trains"), rows)


def module_table(room: str) -> str:
    """Every module of a folder with the first sentence of its docstring."""
    rows = []
    for path in sorted((ROOT / room).rglob("*.py"), key=lambda path: (len(path.relative_to(ROOT).parts), path)):
        said = ast.get_docstring(ast.parse(path.read_text()))
        if said:
            first = re.split(r"(?<=[.])\s", " ".join(said.split("\n\n")[0].split()))[0]
            rows.append((f"`{path.relative_to(ROOT / room)}`", first))
    return markdown(("module", "what it is"), rows)


def tables(name: str) -> list[str]:
    """The tables of a document that derive from code."""
    match name:
        case "pipeline/README.md":
            return [stage_table(), explained_table(), column_table(), metric_table().strip(), module_table("pipeline")]
        case "actors/README.md":
            return [family_table(), module_table("actors")]
        case "jobs/README.md":
            return [verb_table(), settings_table(), module_table("jobs")]
    return []


def with_table(text: str, table: str) -> str:
    """`text` with the rows below the table's header replaced."""
    changed, count = re.subn(rf"(?m)^{re.escape(table.splitlines()[0])}\n(\|.*\n?)*", lambda _: table + "\n", text)
    assert count == 1, f"{count} tables with the header {table.splitlines()[0]}"
    return changed


# ---- what a document names


def has_setting(name: str, model: type[BaseModel] = Run) -> bool:
    """Whether `name` is a setting, dotted; `*` stands for any part."""
    if (entry := ENTRY.match(name)) is not None:
        return name[entry.end() :].partition(".")[0] in Reward.model_fields
    first, _, rest = name.partition(".")
    if first == "*":
        return any(has_setting(f"{field}.{rest}" if rest else field, model) for field in model.model_fields)
    if first not in model.model_fields or not rest:
        return first in model.model_fields
    kind = model.model_fields[first].annotation
    sections = [part for part in (kind, *getattr(kind, "__args__", ())) if isinstance(part, type) and issubclass(part, BaseModel)]
    if first == "teachers":  # behind it stands the name of a teacher
        return not rest.partition(".")[2] or has_setting(rest.partition(".")[2], Teacher)
    free_form = first in {"options", "resources", "labels"}
    return free_form or any(rest == "*" or has_setting(rest, section) for section in sections)


def is_function(name: str) -> bool:
    """Whether a dotted name is a function of the method: its module `objective` is called like a section of settings."""
    module, _, function = name.partition(".")
    room = ROOT / "pipeline" / "method"
    return any(f"\ndef {function}(" in path.read_text() for path in (*room.glob(f"{module}.py"), *room.glob(f"{module}/*.py")))


def wrong_settings(found: Document) -> Iterator[str]:
    """Settings that do not exist, and YAML that is no configuration."""
    for span in found.spans:
        name = span.removeprefix("--set ").partition("=")[0]
        dotted = re.fullmatch(r"[a-z_]+(\.([a-z_]+|\*))+", name) and not re.search(r"\.(py|json|html)$", name)
        if dotted and name.split(".")[0] in Run.model_fields and not (has_setting(name) or is_function(name)):
            yield f"no setting {name}"
    for text in found.settings:
        try:
            resolve(recipes.demo(), [], read_document(Run, text, "settings"))
        except EgrsdError as error:
            yield f"settings in YAML: {error}"


def commands(found: Document) -> Iterator[tuple[list[str], bool]]:
    """(words after `egrsd`, whether the command stands in a sentence) of every command shown."""
    for line, in_sentence in (*((line, False) for line in found.code), *((span, True) for span in found.spans)):
        shown = re.search(r"^\s*(?:\$ )?(?:\S*/)?egrsd (.*)|python -m jobs (.*)", line)
        if shown and not (shown[1] or "").startswith("-"):
            yield shlex.split(shown[1] or shown[2], comments=True), in_sentence


def wrong_command(words: list[str], mention: bool) -> str | None:
    """Why the command line would refuse a command; None when it takes it. A `mention` may be a verb alone."""
    group = typer.main.get_command(app)
    verb = group.commands.get(words[0]) if words else None
    if words[:1] == ["VERB"]:
        return None
    if verb is None:
        return f"no verb in `egrsd {' '.join(words)}`"
    if words[1:] == ["..."] or (mention and len(words) == 1):
        return None
    try:
        given = verb.make_context(words[0], [STANDS_FOR.get(word, word) for word in words[1:]], parent=group.context_class(group))
        if words[0] == "submit":
            return wrong_command(given.params["verb"], mention) if given.params["verb"] else None
        _check_settings(words[0], given.params)
    except Exception as error:  # Typer's own copy of click raises what cannot be imported from a public place
        said = error.format_message() if hasattr(error, "format_message") else error
        return f"`egrsd {' '.join(words)}`: {said}"
    return None


def _check_settings(verb: str, given: dict[str, Any]) -> None:
    """Raise SettingError for a recipe, a setting or a value that the verb would refuse."""
    start = recipes.recipe(given.get("recipe") or given.get("show") or "demo")
    sets = given.get("set") or []
    unknown = [name for name in (text.partition("=")[0] for text in sets) if not (has_setting(name) or name in AXES)]
    assert not unknown, f"no setting {unknown[0]}"
    if verb != "sweep":  # whose values are lists
        resolve(start, [text for text in sets if not ENTRY.match(text)])


def wrong_paths(found: Document, folder: Path) -> Iterator[str]:
    """Files, folders and modules that are named in backticks or code and do not exist."""
    text = "\n".join((*found.code, *found.spans))
    named = re.findall(rf"(?<![\w/.<])(?:{'|'.join(ROOMS)})/[\w./-]*\w/?", text)
    named += [span for span in found.spans if re.fullmatch(r"[\w./-]+\.(py|md|js|lock|toml)", span)]
    for name in named:
        if name not in EXAMPLES and not any((root / name).exists() for root in (ROOT, folder)):
            yield f"no file {name}"
    for module in re.findall(r"python -m ((?:pipeline|actors|jobs|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").exists()):
            yield f"no module {module}"
    targets = re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text())
    shown = re.findall(r"(?m)(?:^\s*(?:\$ )?)make ([a-z][\w-]*)", text)
    yield from (f"no target {target} in Makefile" for target in shown if target not in targets)


def wrong_links(found: Document, folder: Path) -> Iterator[str]:
    """Links within the project that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", found.text):
        path, _, heading = link.partition("#")
        target = folder / path if path else None
        if "://" in link:
            continue
        if target is not None and not target.exists():
            yield f"no file behind the link {link}"
        elif heading:
            text = found.text if target is None else target.read_text()
            headings = re.findall(r"(?m)^#+ (.*)", text)
            if heading not in [re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in headings]:
                yield f"no heading behind the link {link}"


def lost_references(text: str) -> Iterator[str]:
    """References to numbered traps that pipeline/method/README.md does not have."""
    method = ROOT / "pipeline/method/README.md"
    there = method.read_text() if method.exists() else ""
    for numbers in re.findall(r"\btraps?[ _]((?:\d+(?:, | and )?)+)", text):
        for number in re.findall(r"\d+", numbers):
            if not re.search(rf"(?mi)^\W*(?:trap )?{number}\b", there):
                yield f"trap {number} stands in no list"


def long_sentences(found: Document) -> Iterator[str]:
    """Sentences of prose with more words than a reader of English as a second language should meet."""
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found.prose)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose):
        for sentence in re.split(r"(?<=[.?!:])\s+(?=[^\w\s]*[A-Z0-9]|`|\*)", " ".join(paragraph.split())):
            if len([word for word in sentence.split() if re.search(r"\w", word)]) > MOST_WORDS_OF_SENTENCE:
                yield sentence


def empty_tables(text: str) -> Iterator[str]:
    """Tables with a header and no row."""
    for header in re.findall(r"(?m)^(\|.*\|)\n\|(?: ?:?-+:? ?\|)+ *(?:\n(?!\|)|\Z)", text):
        yield f"no row in the table {header}"


def faults(text: str, folder: Path) -> list[str]:
    """Everything that is wrong with a document that stands in `folder`."""
    found = read(text)
    wrong = [wrong_command(*command) for command in commands(found)]
    wrong += [
        *wrong_settings(found),
        *wrong_paths(found, folder),
        *wrong_links(found, folder),
        *lost_references(text),
        *empty_tables(text),
    ]
    wrong += ["something is left to fill in: @@"] * ("@@" in text)
    return [fault for fault in wrong if fault is not None]


def main() -> None:
    """Write the tables that derive from code; list long sentences."""
    for name in NAMES:
        path = ROOT / name
        text = reduce(with_table, tables(name), path.read_text())
        path.write_text(text)
        for sentence in long_sentences(read(text)):
            print(f"{name}: {len(sentence.split())} words: {sentence}")


if __name__ == "__main__":
    main()
