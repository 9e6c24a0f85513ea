"""Undoes the mend of a row of the README's table, and sees its test fail: `python -m tests.mutations [ROW ...]`.

Rows A, D and E stand here, and rows B and C in mutations.toml.
Each mutation is one change of text in a copy of the tree. A test that passes all the same guards nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANGS_S = 180  # a test without its mend may wait for ever


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
KINDS, KEEPER = "tests/grader/test_answers_by_kind.py::test_", "tests/screen/test_keeper.py::test_"
VERIFIER, FUZZ = "tests/grader/test_verifier.py::test_", "tests/store/test_fuzz.py::test_"
_PEOPLE = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))
MUTATIONS = [
    _row(
        "A2",
        "pipeline/problems/splits.py",
        "    found = {path: split_of(",
        "    return files\n    found = {path: split_of(",
        SPLITS,
    ),
    _row("A2 overlap", "pipeline/problems/survey.py", "if key in training.problems)", "if not key)", SURVEY),
    _row("A2 words", "pipeline/problems/splits.py", 'r"[A-Z]?[a-z]+|[A-Z]+"', 'r"[A-Za-z0-9=-]+"', SPLITS),
    _row("A2 globs", "pipeline/problems/splits.py", 'if first == "**":', "if True:", SPLITS),
    _row("A2 twice", "pipeline/problems/jsonl.py", "if len(found) < len(pairs):", "if False:", SPLITS),
    _row(
        "A3 rows", "pipeline/problems/jsonl.py", "if _mark(line) != self", "if False and self", "tests/problems/test_sources.py"
    ),
    _row(
        "A3 groups",
        "pipeline/problems/parquet.py",
        ".roots(names)) != mark:",
        ".roots(names)) == 0:",
        "tests/problems/test_sources.py",
    ),
    _row(
        "A3 carried", "pipeline/rounds/origin.py", "if rewards and before", "if False and before", "tests/rounds/test_origin.py"
    ),
    _row("A5 aliases", "pipeline/written.py", "    if size(node) > _MOST_PARTS:", "    if False:", "tests/test_written.py"),
    _row(
        "A12 export", "jobs/export.py", "            os.rename(old, target)\n", "            pass\n", "tests/jobs/test_export.py"
    ),
    _row(
        "A12 reading",
        "pipeline/store/directory.py",
        "if before and fetched",
        "if False and fetched",
        "tests/store/test_directory.py",
    ),
    _row(
        "E4 Arrow", "jobs/screen/terminal.py", "(out.asked is not None and not", "(False and not", "tests/screen/test_terminal.py"
    ),
    _row("E4 crash", "jobs/screen/keeper.py", "    if is_kept() and code:\n", "    if False:\n", "tests/screen/test_keeper.py"),
    _row(
        "E4 taken",
        "pipeline/live/lease.py",
        "        if now is not None and now.token == lease.token:",
        "        if thread.ident is not None and now is not None and now.token == lease.token:",
        "tests/live/test_lease.py",
    ),
    _row(
        "E4 lease",
        "pipeline/live/lease.py",
        "            _give_back(store)\n        on_free()",
        "            pass\n        on_free()",
        "tests/live/test_lease.py",
    ),
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
        "A1",
        "pipeline/fit/code.py",
        "REMEDY) if differs else None",
        "REMEDY) if False else None",
        "tests/fit/test_code.py::test_every_kind_of_worker_refuses_other_code",
    ),
    _row("A6", "pipeline/problems/sources.py", "elif self.size < self.total:", "elif False:", SURVEY),
    _row("A9", "pipeline/problems/sources.py", 'raise SettingError("is empty", f"source.', 'print("is empty", f"source.', SPLITS),
    _row(
        "A12",
        "jobs/train.py",
        "if target is None or not target.replace:",
        "if False:",
        "tests/jobs/test_train.py::test_a_policy_is_not_replaced_without_a_word",
    ),
    _row(
        "D money",
        "pipeline/answers/spelling.py",
        r'_MONEY = re.compile(r"\\[$#]|',
        '_MONEY = re.compile(r"',
        f"{KINDS}every_answer_has_its_verdict",
    ),
    _row(
        "D denied",
        "pipeline/answers/responses.py",
        "return bool(_DENIED_BEFORE.search",
        "return False and bool(_DENIED_BEFORE.search",
        f"{KINDS}no_hostile_answer_is_accepted",
    ),
    _row(
        "D processor seconds",
        "pipeline/grader/children.py",
        "signal.setitimer(signal.ITIMER_PROF, processor_s)",
        "signal.setitimer(signal.ITIMER_REAL, processor_s)",
        "tests/grader/test_children.py::test_the_deadline_counts_processor_seconds_and_no_time_in_which_a_question_is_stopped",
    ),
    _row(
        "D stopped",
        "pipeline/grader/children.py",
        'if outcome.ended not in ("", OVERRAN, LATE)]',
        "if False]",
        f"{VERIFIER}a_stopped_child_is_replaced_and_its_row_tried_again",
    ),
    _row(
        "D old verdicts",
        "pipeline/inspection/regrade.py",
        "if row[3] != row[4]",
        "if False",
        "tests/inspection/test_regrade.py",
    ),
    _row(
        "E1",
        "actors/pool/asking.py",
        "if member.silent_s >= stall_timeout_s or gone():",
        "if gone():",
        "tests/pool/test_pool.py::test_a_stopped_engine_is_replaced_and_its_batch_asked_again",
    ),
    _row("E1 word", "pipeline/notices.py", "    timer.start()\n", "", "tests/test_notices.py"),
    _row(
        "E2",
        "actors/watch.py",
        "            if _is_stopped(process.pid):\n",
        "            if False:\n",
        "tests/actors/test_watch.py::test_a_part_that_is_stopped_gets_a_word_and_then_ends_the_command",
    ),
    _row(
        "E3",
        "jobs/screen/keeper.py",
        'return 128 - self._status, f"the command',
        'return 128 - self._status, "" and f"the command',
        f"{KEEPER}an_end_is_told_once_with_its_exit_code",
    ),
    _row(
        "E4",
        "jobs/screen/keeper.py",
        "                    process.kill()\n",
        "                    pass\n",
        f"{KEEPER}what_a_command_has_started_ends_with_it_also_an_orphan",
    ),
    _row("E5", "actors/folders.py", "if free < ROOM_BYTES:", "if False:", "tests/actors/test_folders.py"),
    _row(
        "E6",
        "pipeline/store/names.py",
        'if name in ("", ".", "..")',
        'if False and name in ("", ".", "..")',
        "tests/store/test_names.py",
    ),
    _row(
        "E7",
        "pipeline/store/private.py",
        "found.st_uid != os.geteuid() or found.st_mode & 0o022",
        "False",
        "tests/inference/test_adapters.py",
    ),
    _row("E8", "pipeline/store/private.py", 'f"e-{os.geteuid()}"', '"e"', "tests/inference/test_adapters.py"),
    _row("E9", "pipeline/stages/template.py", "        allow(cpu_s)\n", "        allow(0)\n", "tests/stages/test_template.py"),
    _row("E10", "jobs/parcel.py", "|token(?!iz)|secret|", "|", "tests/jobs/test_parcel.py"),
    _row("E11", "jobs/parcel.py", "if not real.is_relative_to(folder.resolve()):", "if False:", "tests/jobs/test_parcel.py"),
    _row("E12", "actors/cluster.py", "if path.stat().st_mode & 0o077:", "if False:", "tests/actors/test_cluster_start.py"),
    _row(
        "E13",
        "pipeline/store/names.py",
        r'ENTRY = re.compile(r"(?P',
        r'ENTRY = re.compile(r"\\W*(?P',
        f"{FUZZ}what_does_not_belong_is_passed_over_in_every_folder",
    ),
    _row("E14", "pipeline/store/files.py", "        if self.is_gone():\n", "        if False:\n", "tests/live/test_lease.py"),
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
    _row(
        "E17",
        "pipeline/store/directory.py",
        "found = cut_short(self, folder)",
        "found = None",
        f"{FUZZ}an_extra_shard_and_a_cut_adapter_are_said",
    ),
    _row("E18", "pipeline/rounds/baseline.py", " or not _is_whole(kept, keep):", ":", "tests/rounds/test_baseline.py"),
    _row(
        "E19",
        "pipeline/store/owner.py",
        'return _start(int(owner["pid"])) != int(owner["start"])',
        "return True",
        "tests/store/test_directory.py::test_who_writes_while_another_sweeps_writes_all_the_same",
    ),
    *(_row(row, one["path"], one["old"], one["new"], *one["tests"]) for row, one in _PEOPLE.items()),
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
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"--timeout={HANGS_S}", *mutation.tests]
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
