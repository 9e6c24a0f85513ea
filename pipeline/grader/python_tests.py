"""The reward `python_tests`: a code answer is run against the tests of its problem, in a locked-down process.

Tests are read from a column of the source, in the forms that data sets of code have:

- a list of statements (`["assert add(1, 2) == 3"]`), or one text of Python, with `check(candidate)` and `entry_point` or without;
- `{"inputs": [...], "outputs": [...]}`, or a list of `{"input": ..., "output": ...}`: the program reads stdin and prints.

Statements run in the process of the answer, and so resist a careless trick only. What a program prints is compared outside.
A program that overruns its limits has failed its test: it gets 0, as a wrong one does.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config.rewards import PythonTests
from pipeline.errors import SettingError, first_line
from pipeline.grader import sandbox
from pipeline.grader.sandbox import Ended, Limits, Program, Report, SandboxError

_PYTHON = re.compile(r"(?:python|py)[ \d.]*\b", re.I)
_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.I)  # wherever it stands
_SAID_S = 30.0  # seconds beside the programs of a call

_IMPORTS = "import sys, os\nsys.path += {packages!r}\n"
_SCRIPT = (
    _IMPORTS
    + "os.close(3), os.close(4)\nexec(compile(open('answer.py').read(), 'answer.py', 'exec'), {{'__name__': '__main__'}})\n"
)
# The word is told only after the tests. What runs then is bound before the answer runs, since the answer may replace the rest.
_CHECKED = _IMPORTS + (
    "def _check(exec, compile, write):\n"
    "    with open(3) as file:\n"
    "        word, _, tests = file.read().partition('\\n')\n"
    "    word, tests = word.encode(), compile(tests, 'tests.py', 'exec')\n"
    "    module = sys.modules['answer'] = type(sys)('answer')\n"  # dataclasses look their module up
    "    space = module.__dict__\n\n"
    "    exec(compile(open('answer.py').read(), 'answer.py', 'exec'), space)\n"
    "    exec(tests, space)\n"
    "    write(4, word)\n"
    "_check(exec, compile, os.write)\n"
)


_SHOWN = 300  # most characters of a test, or of an output, that are told

_ENDS = {
    "failed": "ended with an error, which a wrong assertion is too",
    "time": "was ended at a limit of its time or memory",
    "still": "took too long by the clock, twice",
    "output": "printed more than it may",
}


Check = str | tuple[str, str]  # a test: statements that run after the answer, or stdin and the output that is expected


class Judged(NamedTuple):
    """The value of a code answer, and what the tests of its problem said of it in words."""

    value: float
    said: str


class NoTests(Exception):
    """The column of a problem holds no tests that can be read."""


def python_tests(completions: Sequence[str], settings: dict[str, Any], **columns: Any) -> list[Judged]:
    """1 for each completion whose code passes every test of its problem, else 0; or the share of passed tests. With words.

    Raises NoTests for a problem without tests, and SandboxError when no locked-down process can be had.
    """
    limits, nothing = PythonTests.model_validate(settings), [None] * len(completions)
    rows = zip(completions, columns.get(limits.column, nothing), columns.get("entry_point", nothing), strict=True)
    return [_judged(code_of(text), _checks(tests, entry, limits), limits) for text, tests, entry in rows]


def code_of(response: str) -> str:
    """The code of a response: its last block of Python, else its last block without a language, else all of it.

    Where no fence stands on a line of its own, two fences in their lines make a block.
    """
    blocks = _blocks(response) or [("", code) for code in _FENCE.findall(response)]
    python = [code for language, code in blocks if _PYTHON.match(language)] or [code for language, code in blocks if not language]
    return textwrap.dedent(python[-1]) if python else response


def _blocks(response: str) -> list[tuple[str, str]]:
    """The fenced blocks of a response, each with the word behind its first fence. A fence stands on a line of its own.

    Text may stand in front of the first fence where it names Python.
    """
    blocks: list[tuple[str, str]] = []
    language, lines = None, list[str]()
    for line in response.splitlines(keepends=True):
        fence, mark, word = line.strip().partition("```")
        if language is None and mark and "`" not in word and (not fence or _PYTHON.fullmatch(word.strip())):
            language, lines = word.strip(), []
        elif language is not None and line.strip() == "```":
            blocks.append((language, "".join(lines)))
            language = None
        else:
            lines.append(line)
    return blocks


def _judged(code: str, checks: Sequence[Check], settings: PythonTests) -> Judged:
    words = [secrets.token_hex(16) for _ in checks]
    programs = [_program(code, check, word) for check, word in zip(checks, words, strict=True)]
    runs = _run(programs, settings)
    for place in [place for place, run in enumerate(runs) if run.ended == "still"]:
        [runs[place]] = _run([programs[place]], settings)  # it may have got no processor, and be right
        if runs[place].ended == "still" and not settings.partial:
            break
    passed = [_passed(*one) for one in zip(checks, runs, words, strict=True)]
    value = sum(passed) / len(passed) if settings.partial else float(all(passed))
    return Judged(value, _said(checks, runs, passed))


def _run(programs: list[Program], settings: PythonTests) -> list[Ended]:
    """How each program ended. Raises SandboxError when a required lock is missing, so that none ran."""
    report = sandbox.run(programs, limits_of(settings))
    if len(report.runs) != len(programs):
        raise SandboxError(f"this machine gives no lock on {', '.join(report.missing)} (settings.locks)")
    return report.runs


def _said(checks: Sequence[Check], runs: Sequence[Ended], passed: Sequence[bool]) -> str:
    """What tests said of a program: how many it passed, and for the first other one what was asked and what came of it."""
    count = f"It passed {sum(passed)} of {len(passed)} tests."
    if all(passed):
        return count
    check, run = next((check, run) for check, run, held in zip(checks, runs, passed, strict=True) if not held)
    asked = f"with the input {_cut(check[0])} and the output {_cut(check[1])}" if isinstance(check, tuple) else _cut(check)
    came = _ENDS.get(run.ended, f"printed {_cut(run.stdout)}" if isinstance(check, tuple) else "ended before the test did")
    return f"{count} The first test that failed was {asked}: the program {came}."


def _cut(text: str) -> str:
    return repr(text.strip()[:_SHOWN])


def limits_of(settings: PythonTests) -> Limits:
    """The limits of each program."""
    return Limits(
        settings.time_s, settings.memory_mb, settings.scratch_mb, settings.output_kb, required=settings.locks == "required"
    )


def longest_s(settings: PythonTests) -> float:
    """Seconds by the clock that one call may take: all tests of one trace, and each once more, alone."""
    limits, tests = limits_of(settings), settings.most_tests
    return limits.longest_s(tests) + tests * limits.longest_s(1) + _SAID_S


def read_tests(tests: Any, entry: str | None = None) -> list[Check]:
    """Tests of one problem: statements to run after the answer, or pairs of stdin and the output that is expected.

    Raises NoTests when they have no known form.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):  # a text of Python may begin with a bracket
            tests = json.loads(tests)
    if isinstance(tests, str) and tests.strip():
        return [tests + (f"\ncheck({entry})\n" if entry and "def check(" in tests else "")]
    if isinstance(tests, dict) and not tests.get("fn_name"):
        inputs, outputs = ([part] if isinstance(part := tests.get(name), str) else part for name in ("inputs", "outputs"))
        if isinstance(inputs, list) and isinstance(outputs, list):
            if len(inputs) != len(outputs):
                raise NoTests(f"the tests of a problem have {len(inputs)} inputs and {len(outputs)} outputs")
            tests = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return list(tests)
    if isinstance(tests, list) and any(isinstance(test, dict) and test.get("testtype") == "functional" for test in tests):
        raise NoTests("a test of a problem calls a function (testtype: functional), and no program that reads stdin")
    if isinstance(tests, list) and tests and all(isinstance(t, dict) and {"input", "output"} <= t.keys() for t in tests):
        return [(_text(test["input"]), _text(test["output"])) for test in tests]
    raise NoTests("the tests of a problem are no list of statements, no Python text and no pairs of input and output")


def _checks(tests: Any, entry: str | None, settings: PythonTests) -> list[Check]:
    """The tests of one problem that are run. Raises NoTests when they cannot be read, and for one that is no Python."""
    if tests is None:
        raise NoTests(f"a problem has nothing in column '{settings.column}' (settings.column), which holds its tests")
    checks = read_tests(tests, entry)[: settings.most_tests]
    if not any(isinstance(check, tuple) or check.strip() for check in checks):
        raise NoTests("the tests of a problem are empty")
    for check in checks:
        if isinstance(check, str):
            try:
                with warnings.catch_warnings(action="ignore"):  # of the test's own escapes
                    compile(check, "tests.py", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise NoTests(f"a test of a problem is no Python: {check.strip()[:60]!r} ({first_line(error)})") from error
    return checks


def check_tests(where: str, source: str, settings: PythonTests, rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A note on problems of a source whose tests cannot be read. Raises SettingError when those of none can be.

    rows: of some problems the values by column. where: the name of the reward in the settings.
    """
    unread: dict[int, str] = {}
    for place, row in rows.items():
        try:
            _checks(row.get(settings.column), row.get("entry_point"), settings)
        except NoTests as error:
            unread[place] = str(error)
    if not unread:
        return []
    first, why = next(iter(unread.items()))
    if len(unread) == len(rows):
        what = f"none of the first {len(rows)} problems of {source} has tests that can be read (row {first}: {why})"
        names = ", ".join(sorted({name for row in rows.values() for name in row}))
        remedy = f"Set settings.column to the column of tests. Kept are: {names} (see source.carry and source.carry_bytes)"
        raise SettingError(what, where, remedy)
    what = f"{len(unread)} of the first {len(rows)} problems of {source} have no tests that can be read (row {first}: {why})"
    return [f"note: {where}: {what}. Their traces are rejected as reward_error"]


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _program(code: str, check: Check, word: str) -> Program:
    packages = sandbox.packages()
    if isinstance(check, tuple):
        return Program(_SCRIPT.format(packages=packages), code, stdin=check[0])
    return Program(_CHECKED.format(packages=packages), code, secret=f"{word}\n{check}")


def _passed(check: Check, run: Ended, word: str) -> bool:
    """Whether a test is passed: the output is the expected one, line by line without spaces at the ends, or the word was told."""
    if run.ended != "exit":
        return False
    if isinstance(check, tuple):
        return _lines(run.stdout) == _lines(check[1])
    return run.told == word


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def verdict_of_locks(where: str, settings: PythonTests) -> list[str]:
    """A note on locks that this machine does not have. Raises SettingError when they are required, or when nothing runs."""
    try:
        report = sandbox.run([Program(_SCRIPT.format(packages=[]), "print('ran')")], limits_of(settings))
    except SandboxError as error:
        raise SettingError(str(error), where, "Run it on Linux, where Python may start processes") from error
    if not report.runs:
        remedy = "Allow user namespaces, Landlock or seccomp, or accept it with settings.locks=available"
        raise SettingError(f"this machine gives no lock on {', '.join(report.missing)} for code of the model", where, remedy)
    if report.runs[0].ended != "exit" or report.runs[0].stdout.strip() != "ran":
        what = f"a program that prints one word does not run in the locked-down process ({report.runs[0].ended})"
        raise SettingError(what, where, "Raise settings.memory_mb or settings.time_s")
    return [_note(where, report)] if report.missing else []


def _note(where: str, report: Report) -> str:
    return f"note: {where}: code of the model runs here without a lock on {', '.join(report.missing)}"
