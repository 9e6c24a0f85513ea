"""Code answers against the tests of their problems, in the forms that data sets have."""

from __future__ import annotations

import pytest

from pipeline.grader.python_tests import NoTests, code_of, python_tests, read_tests

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
DOUBLE = "```\nprint(int(input()) * 2)\n```"
UNLIKE = [{"inputs": ["1", "2"], "outputs": ["1"]}, [{"input": "1", "output": "1", "testtype": "functional"}]]
DATACLASS = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 3\n"
HUMANEVAL = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n"


@pytest.mark.parametrize(
    ("answer", "tests", "more", "value"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], {}, 1.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], {}, 0.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], {"partial": True}, 0.5),
        (ADD, '["assert add(1, 2) == 3"]', {}, 1.0),
        (ADD, "x = [1]\nassert add(x, x) == [1, 1]", {}, 1.0),
        (DOUBLE, {"inputs": ["3\n", "4\n"], "outputs": ["6\n", "9\n"]}, {"partial": True}, 0.5),
        (DOUBLE, '{"inputs": ["3"], "outputs": ["6"]}', {}, 1.0),
        (DOUBLE, {"inputs": "31", "outputs": "62"}, {}, 1.0),
        (DOUBLE, [{"input": "3", "output": "6  \n\n"}, {"input": ["4"], "output": 8}], {}, 1.0),
        (DOUBLE, [{"input": "3", "output": "6"}, {"input": "x", "output": "8"}], {"most_tests": 1}, 1.0),
        ("import numpy\nprint(numpy.arange(4).sum())", [{"input": "", "output": "6"}], {}, 1.0),
        (DATACLASS, ["assert P().x == 3"], {}, 1.0),
        ("not python at all", ["assert True"], {}, 0.0),
    ],
)
def test_the_value_is_1_when_all_tests_pass_or_the_share_of_passed_ones(answer, tests, more, value):
    assert [one.value for one in python_tests([answer], more, tests=[tests])] == [value]


@pytest.mark.parametrize(
    ("answer", "tests", "said"),
    [
        (ADD, ["assert add(1, 2) == 3"], "It passed 1 of 1 tests."),
        (
            ADD,
            ["assert add(1, 2) == 3", "assert add(2, 2) == 5", "assert add(0, 0) == 1"],
            "It passed 1 of 3 tests. The first test that failed was 'assert add(2, 2) == 5': the program ended with an error, "
            "which a wrong assertion is too.",
        ),
        (
            DOUBLE,
            {"inputs": ["4\n"], "outputs": ["9\n"]},
            "It passed 0 of 1 tests. The first test that failed was with the input '4' and the output '9': the program printed "
            "'8'.",
        ),
        ("while True: pass", ["assert True"], "was ended at a limit of its time or memory."),
        ("raise SystemExit", ["assert True"], "the program ended before the test did."),
    ],
)
def test_what_the_tests_said_is_told_in_words(answer, tests, said):
    [found] = python_tests([answer], {"time_s": 0.5} if "while" in answer else {}, tests=[tests])
    assert found.said.endswith(said)


@pytest.mark.parametrize(
    "trick",
    [
        "import os\nos.write(4, os.read(3, 32))\nos._exit(0)",
        "import os\nos.write(4, os.pread(3, 32, 0))\nos._exit(0)",
        "import builtins\nreal = builtins.compile\nbuiltins.compile = lambda text, *more: real('', *more)",
        "import builtins\nbuiltins.exec = lambda *more: None",
        "import os\nreal = os.write\nos.write = lambda fd, word: real(fd, word)\nraise SystemExit",
    ],
)
def test_an_answer_that_reads_the_word_or_replaces_what_runs_the_tests_gets_nothing(trick):
    assert [one.value for one in python_tests([trick], {}, tests=[["assert False"]])] == [0.0]


def test_an_answer_that_replaces_builtins_which_its_tests_do_not_use_is_judged_by_them():
    answer = "import builtins, os\nos.write = builtins.open = builtins.exec = None\n" + "def add(a, b):\n    return a + b\n"
    found = python_tests([answer] * 2, {}, tests=[["assert add(1, 2) == 3"], ["assert add(1, 2) == 4"]])
    assert [one.value for one in found] == [1.0, 0.0]


def test_a_check_function_is_called_with_the_entry_point():
    answers = [ADD, "```python\ndef add(a, b):\n    return 3\n```"]
    found = python_tests(answers, {}, tests=[HUMANEVAL] * 2, entry_point=["add"] * 2)
    assert [one.value for one in found] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nfirst\n```\n```py\nlast\n```", "last\n"),
        ("no fence", "no fence"),
        ("```bash\npip install x\n```\n```python\ncode\n```", "code\n"),
        ("```python\ncode\n```\nIt prints:\n```text\n5\n```", "code\n"),
        ("```python\ncode\n```\nIt prints:\n```\n5\n```", "code\n"),
        ('```json\n{"a": 1}\n```\n```\ncode\n```', "code\n"),
        ("```Python 3\ncode\n```", "code\n"),
        ("```python main.py\ncode\n```", "code\n"),
        ("```python3\r\ncode\r\n```\r\n", "code\r\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\ncode\n```   ", "code\n"),
        ("```python\ncode```", "code"),
        ("So: ```python\ncode\n```", "code\n"),
        ("So: ```python\ncode\n```\nIt prints:\n```\n5\n```", "code\n"),
        ("- ```python\n  code\n  ```", "code\n"),
        ("````python\ncode\n````", "code\n"),
        ("```pypy\ncode\n```", "```pypy\ncode\n```"),
    ],
)
def test_the_last_block_of_python_is_the_answer(response, code):
    assert code_of(response) == code


@pytest.mark.parametrize(
    "tests",
    [
        "",
        None,
        [],
        3,
        {"inputs": [1]},
        {"inputs": 1, "outputs": 1},
        {"inputs": None, "outputs": None},
        [{"input": 1}],
        {"inputs": [], "outputs": [], "fn_name": "f"},
        *UNLIKE,
    ],
)
def test_tests_of_an_unknown_form_are_refused(tests):
    with pytest.raises(NoTests):
        read_tests(tests)


def test_a_problem_without_the_column_is_refused():
    with pytest.raises(NoTests, match="nothing in column 'tests'"):
        python_tests([ADD], {}, answer=["x"])
