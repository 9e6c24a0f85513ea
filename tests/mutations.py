"""Undoes the mend of a row of the README's table, and sees its test fail: `python -m tests.mutations [ROW ...]`.

Each mutation is one change of text in a copy of the tree. A test that passes all the same guards nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One mend undone.

    row: its name in the table. path, old, new: the text that changes. tests: one of them must fail.
    """

    row: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


def _row(row: str, path: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(row, path, old, new, tests)


SPLITS, SURVEY = "tests/problems/test_splits.py", "tests/problems/test_survey.py"
VERIFIER, FUZZ = "tests/grader/test_verifier.py::test_", "tests/store/test_fuzz.py::test_"
MUTATIONS = [
    _row(
        "A2",
        "pipeline/problems/splits.py",
        "    found = {path: split_of(",
        "    return files\n    found = {path: split_of(",
        SPLITS,
    ),
    _row("A2 overlap", "pipeline/problems/survey.py", "if key in training.problems)", "if not key)", SURVEY),
    _row("A3", "pipeline/rounds/origin.py", "before.fingerprint == problems.fingerprint", "True", "tests/rounds/test_origin.py"),
    _row(
        "A4",
        "pipeline/evidence/evaluation.py",
        "return sorted(one.keys) == sorted(other.keys)",
        "return True",
        "tests/evidence/test_evaluation.py::test_only_equal_problems_pair_and_in_any_order",
    ),
    _row(
        "A5",
        "pipeline/written.py",
        '    return yaml.ScalarNode("", text)\n\n\ndef _read(',
        '    return yaml.compose(text, Loader=yaml.BaseLoader) or yaml.ScalarNode("", "")\n\n\ndef _read(',
        "tests/test_written.py::test_a_value_is_read_by_the_type_of_its_setting",
    ),
    _row(
        "A7",
        "pipeline/written.py",
        "if key.value in found:",
        "if False:",
        "tests/test_written.py::test_a_files_mistake_is_named_with_its_line",
    ),
    _row("A8", "pipeline/stages/chat.py", "(pattern.finditer(part.text) if pattern else ())", "()", "tests/stages/test_chat.py"),
    _row(
        "A10",
        "pipeline/rounds/refused.py",
        "    if reasons:\n",
        "    if False:\n",
        "tests/test_driver.py::test_sources_of_which_nothing_can_be_asked_are_refused_before_anything_starts",
    ),
    _row("A11", "pipeline/problems/survey.py", "if training.uri != held_out.uri:", "if False:", SURVEY),
    _row(
        "D hangs",
        "pipeline/grader/verifier.py",
        "if outcome.ended == OVERRAN and GOLD_READ",
        "if False and GOLD_READ",
        f"{VERIFIER}an_answer_that_hangs_is_wrong_and_holds_up_no_other_row",
    ),
    _row(
        "D fallback",
        "pipeline/grader/verifier.py",
        'return "boxed" not in',
        'return True or "boxed" not in',
        f"{VERIFIER}an_unmarked_answer_counts_unless_the_prompt_asks_for_a_box",
    ),
    _row("D references", "pipeline/stages/grade.py", "    if not unread:\n", "    if True:\n", "tests/stages/test_grade.py"),
    _row(
        "E6",
        "pipeline/store/names.py",
        'if name in ("", ".", "..")',
        'if False and name in ("", ".", "..")',
        f"{FUZZ}a_damaged_or_forged_json_file_is_refused_or_changes_nothing",
    ),
    _row(
        "E7",
        "pipeline/store/private.py",
        "found.st_uid != os.geteuid() or found.st_mode & 0o022",
        "False",
        "tests/inference/test_adapters.py",
    ),
    _row("E9", "pipeline/stages/template.py", "        allow(cpu_s)\n", "        allow(0)\n", "tests/stages/test_template.py"),
    _row("E11", "jobs/parcel.py", "if not real.is_relative_to(folder.resolve()):", "if False:", "tests/jobs/test_parcel.py"),
    _row(
        "E13",
        "pipeline/store/names.py",
        r'ENTRY = re.compile(r"(?P',
        r'ENTRY = re.compile(r"\\W*(?P',
        f"{FUZZ}what_does_not_belong_is_passed_over_in_every_folder",
    ),
    _row(
        "E15",
        "pipeline/store/possible.py",
        '"logprob": (-math.inf, SLACK)',
        '"logprob": (-math.inf, math.inf)',
        "tests/stages/test_stages.py",
    ),
    _row(
        "E16",
        "pipeline/store/possible.py",
        '"id": (0.0, size - 1.0)',
        '"id": (0.0, math.inf)',
        f"{FUZZ}a_forged_shard_with_right_hashes_is_found_where_it_breaks_an_invariant",
    ),
]


def dies(mutation: Mutation) -> bool:
    """Whether a test of the row fails once its mend is undone. Raises ValueError for text that is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("pipeline", "actors", "jobs", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        target = tree / mutation.path
        text = target.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.row}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.path}")
        target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", *mutation.tests]
        ended = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True)
    if ended.returncode not in (0, 1):
        raise ValueError(f"{mutation.row}: pytest ended with {ended.returncode}: {ended.stdout[-500:]}")
    return ended.returncode == 1


def main() -> int:
    """Try the named rows, or all. The exit code is the number of mutations that no test noticed."""
    survived = 0
    for mutation in MUTATIONS:
        if not sys.argv[1:] or mutation.row in sys.argv[1:]:
            died = dies(mutation)
            survived += not died
            sys.stdout.write(f"{mutation.row}: {'a test fails' if died else 'NO TEST FAILS'}\n")
            sys.stdout.flush()
    return survived


if __name__ == "__main__":
    sys.exit(main())
