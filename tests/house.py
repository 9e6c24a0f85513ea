"""Measures the shape of the code: sizes, parameters, imports, prose. It needs the standard library only, to read any checkout.

    python tests/house.py [ROOT] [--json] [--constant NAME]

Run it on two checkouts to compare them. A code line has a token that is neither comment nor docstring. A function's lines run
from `def` to its end, with the docstring. `self` and `cls` are not counted as parameters. Imports under TYPE_CHECKING are not
followed.

ENTRIES are the stage executor, the engine, the pool of engines and the trainer. A row's way is the set of product modules that
the modules of ENTRIES import, directly or not. A new gate constant must be written into the files that name an existing one, so
the number of these files estimates that work.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import re
import statistics
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PRODUCT = ("pipeline", "actors", "jobs")
ENTRIES = ("execute", "Engine", "EnginePool", "train_loop")
MOST_LINES, MOST_PARAMETERS, MOST_FILE_LINES, MOST_WORDS = 80, 6, 400, 25
_QUIET = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Function:
    """One function or method: its place, its lines and its parameters."""

    where: str
    lines: int
    parameters: int


@dataclass
class Module:
    """The measures of one file of product code. `imports` has names that are, or may be, product modules."""

    name: str
    path: str
    lines: int
    code: int
    docstring: int
    comment: int
    functions: list[Function] = field(default_factory=list)
    defines: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)
    local_imports: int = 0
    names: set[str] = field(default_factory=set)


def house(root: Path, constant: str = "floor") -> dict[str, Any]:
    """Every figure of the checkout at `root`. Raises SyntaxError for a file that is not valid Python."""
    paths = sorted(path for folder in PRODUCT for path in (root / folder).rglob("*.py"))
    modules = {module.name: module for module in (read(path, root) for path in paths)}
    functions = [function for module in modules.values() for function in module.functions]
    lengths = sorted(function.lines for function in functions)
    code = sum(module.code for module in modules.values())
    graph = {name: _edges(module, modules) for name, module in modules.items()}
    starts = [name for name, module in modules.items() if module.defines & set(ENTRIES)]
    way = [modules[name] for name in sorted(reach(graph, starts))]
    chain = longest_chain(graph)
    readme = _text(root / "README.md")
    return {
        "code lines": code,
        "modules": sum(1 for module in modules.values() if module.code),
        "modules per folder": _per_folder(modules),
        "functions": len(lengths),
        "function lines, median": statistics.median(lengths),
        "function lines, p90": statistics.quantiles(lengths, n=10, method="inclusive")[-1],
        "function lines, max": lengths[-1],
        f"functions over {MOST_LINES} lines": _named(functions, lambda f: f.lines > MOST_LINES, "lines"),
        f"functions over {MOST_PARAMETERS} parameters": _named(functions, lambda f: f.parameters > MOST_PARAMETERS, "parameters"),
        "imports inside functions": sum(module.local_imports for module in modules.values()),
        "docstring lines per code line": round(sum(module.docstring for module in modules.values()) / code, 3),
        "comments per code line": round(sum(module.comment for module in modules.values()) / code, 3),
        f"files over {MOST_FILE_LINES} lines": [f"{m.path} {m.lines}" for m in modules.values() if m.lines > MOST_FILE_LINES],
        f"sentences over {MOST_WORDS} words": [
            f"{module.path}:{found}" for module in modules.values() for found in long_sentences(_text(root / module.path))
        ],
        "README lines": len(readme.splitlines()),
        "README words": len(readme.split()),
        "layers in pyproject": layers(_text(root / "pyproject.toml")),
        "longest import chain": len(chain),
        "longest import chain, modules": chain,
        "files on a row's way": len(way),
        "files on a row's way, names": [module.path for module in way],
        "code lines on a row's way": sum(module.code for module in way),
        f"files that name `{constant}`": naming(root, modules, constant),
    }


def read(path: Path, root: Path) -> Module:
    """The measures of one file."""
    text = path.read_text()
    tree, where = ast.parse(text), path.relative_to(root)
    prose = {line for node in ast.walk(tree) for line in _docstring_lines(node)}
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    busy = {line for t in tokens if t.type not in _QUIET for line in range(t.start[0], t.end[0] + 1)}
    name = ".".join(where.with_suffix("").parts).removesuffix(".__init__")
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    module = Module(name, str(where), len(text.splitlines()), len(busy - prose), len(prose), comments)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    module.defines = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    module.functions = [_function(node, str(where)) for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    module.imports = {found for node in _running(tree) for found in _imported(node, package)}
    inside = (node for function in ast.walk(tree) if isinstance(function, _FUNCTIONS) for node in ast.walk(function))
    module.local_imports = len({node.lineno for node in inside if isinstance(node, ast.Import | ast.ImportFrom)})
    module.names = {found for node in ast.walk(tree) for found in _identifiers(node)}
    return module


def long_sentences(text: str) -> list[str]:
    """`line: sentence` of each sentence of more than MOST_WORDS words, in docstrings, comments, messages and other texts."""
    found = []
    for line, prose in _texts(text):
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*|] )", prose):
            for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph.replace("\n", " ")):
                if sum(bool(re.search(r"\w", word)) for word in sentence.split()) > MOST_WORDS:
                    found.append(f"{line}: {sentence.strip()}")
    return found


def _texts(text: str) -> Iterator[tuple[int, str]]:
    """Every text of a file with its line: strings, in which a value is one word, and comments."""
    tree = ast.parse(text)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in ast.walk(node) if part is not node}
    for node in joined:
        if id(node) not in parts:
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "value" for v in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, inspect.cleandoc(node.value)
    yield from _comments(text)


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Each comment and its line. Comments on neighbouring lines are one when no code stands before them."""
    lines, last = text.splitlines(), (0, "")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, comment = token.start[0], token.string.lstrip("# ")
            goes_on = number == last[0] + 1 and all(lines[n - 1].lstrip().startswith("#") for n in (number - 1, number))
            if not goes_on:
                yield last
            last = number, f"{last[1]} {comment}" if goes_on else comment
    yield last


def reach(graph: dict[str, set[str]], starts: list[str]) -> set[str]:
    """`starts`, and the modules that they import, directly or not."""
    found, open_ = set(starts), list(starts)
    while open_:
        new = graph[open_.pop()] - found
        found |= new
        open_ += new
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain in which each module imports the next. Modules that import each other count as one."""
    reached = {name: reach(graph, [name]) for name in graph}
    together = {name: min(other for other in reached[name] if name in reached[other]) for name in graph}
    edges: dict[str, set[str]] = {}
    for name, imports in graph.items():
        edges.setdefault(together[name], set()).update({together[other] for other in imports} - {together[name]})

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in sorted(edges[name])), key=len, default=()))

    return list(max((below(name) for name in sorted(edges)), key=len, default=()))


def layers(pyproject: str) -> int:
    """Number of layers in the import contracts. A layer that a second list divides is counted through its parts only."""
    contracts = tomllib.loads(pyproject).get("tool", {}).get("importlinter", {}).get("contracts", []) if pyproject else []
    counts = [len(contract["layers"]) for contract in contracts if contract.get("type") == "layers"]
    return sum(counts) - max(0, len(counts) - 1)


def naming(root: Path, modules: dict[str, Module], constant: str) -> list[str]:
    """Files of the product, with the report's scripts, in which `constant` is an identifier or part of a setting's name."""
    found = [module.path for module in modules.values() if constant in module.names]
    word = re.compile(rf"(?<!Math\.)\b{re.escape(constant)}\b")
    scripts = (path for folder in PRODUCT for path in sorted((root / folder).rglob("*.js")))
    return found + [str(path.relative_to(root)) for path in scripts if word.search(path.read_text())]


_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, where: str) -> Function:
    given = node.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a is not None]
    num_parameters = len(named) - (named[:1] in (["self"], ["cls"]))
    return Function(f"{where}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, num_parameters)


def _docstring_lines(node: ast.AST) -> range:
    if not isinstance(node, ast.Module | ast.ClassDef | _FUNCTIONS) or not node.body:
        return range(0)
    first = node.body[0]
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant) or not isinstance(first.value.value, str):
        return range(0)
    return range(first.lineno, (first.end_lineno or first.lineno) + 1)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that a running program may execute, so none under `if TYPE_CHECKING`."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from _running(child)


def _imported(node: ast.AST, package: str) -> set[str]:
    """Dotted names that an import may load; `from a import b` may load `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    above = package.rsplit(".", node.level - 1)[0] if node.level else ""
    source = ".".join(part for part in (above, node.module) if part)
    return {source, *(f"{source}.{alias.name}" for alias in node.names)}


def _edges(module: Module, modules: dict[str, Module]) -> set[str]:
    """Product modules that `module` imports, without empty __init__ files."""
    return {name for name in module.imports if name in modules and name != module.name and modules[name].code}


def _identifiers(node: ast.AST) -> set[str]:
    """Names in a node: variables, arguments, attributes (without those of math, np and torch), parts of a dotted setting."""
    match node:
        case ast.Attribute(value=ast.Name(id="math" | "np" | "torch")):
            return set()
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name):
            return {name}
        case ast.keyword(arg=str(name)):
            return {name}
        case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_.]+", text):
            return set(text.split("."))
    return set()


def _per_folder(modules: dict[str, Module]) -> dict[str, int]:
    folders = sorted(str(Path(module.path).parent) for module in modules.values() if module.code)
    return {folder: folders.count(folder) for folder in dict.fromkeys(folders)}


def _named(functions: list[Function], chosen: Callable[[Function], bool], figure: str) -> list[str]:
    found = sorted(((getattr(function, figure), function.where) for function in functions if chosen(function)), reverse=True)
    return [f"{where} {value}" for value, where in found]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def table(figures: dict[str, Any]) -> str:
    """The figures as text. A list of names shows its number first, and the names below."""
    lines = []
    for name, value in figures.items():
        names = [f"{key} {count}" for key, count in value.items()] if isinstance(value, dict) else value
        listed = isinstance(names, list)
        lines.append(f"{name:38}{len(names) if listed else names}")
        lines += [f"    {one}" for one in names] if listed else []
    return "\n".join(lines)


def main() -> None:
    """Measure the checkout that the command line names, or this one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--constant", default="floor", help="a gate constant that is there (floor, gamma, epsilon)")
    asked = parser.parse_args()
    figures = house(asked.root, asked.constant)
    print(json.dumps(figures, indent=1) if asked.json else table(figures))


if __name__ == "__main__":
    main()
