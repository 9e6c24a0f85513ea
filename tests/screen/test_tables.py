"""The tables of evaluations: what stands in them, and what would only repeat."""

from __future__ import annotations

import io

from rich.console import Console

from jobs import summary
from jobs.screen import tables
from pipeline.recipes import demo

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75}


def shown(samples: int, uri: str = "tiny-arithmetic") -> str:
    """The table of one source whose figures are all the same."""
    summary = {
        "source": {"uri": uri, "split": "test"},
        "problems": 30,
        "samples": samples,
        "k": samples,
        "policies": {"0": {"figures": dict.fromkeys(tables.FIGURES, FIGURE), "verdicts": {}, "rejected": {}}},
        "differences": [],
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(tables.of_source("sums", summary))
    return " ".join(console.file.getvalue().split())


def test_with_one_sample_pass_and_majority_are_not_repeated():
    """A newcomer read three equal rows: avg@1, pass@1 and maj@1."""
    said = shown(1)
    assert "avg@1" in said
    assert "pass@1" not in said
    assert "maj@1" not in said
    assert "median length" in said
    for name in ("avg@4", "pass@4", "maj@4"):
        assert name in shown(4)


def test_a_round_whose_driver_died_has_no_time_and_halves_no_stage():
    shares = {f"share_{name}": 0.25 for name in ("lock", "mid", "pivot", "fork")}
    counts = {"num_rejected": 0.0, "num_rows": 8.0, "num_groups": 2.0, "num_groups_without_signal": 1.0, "num_correct": 4.0}
    clock = {"seconds_round": 9.0, "seconds_measure": 6.0, "seconds_engines": 5.0, "seconds_stage_rollout": 4.0}
    console = Console(file=io.StringIO(), width=200)
    console.print(summary._rounds_table([shares | counts | clock, shares | counts], demo(), None))
    said = console.file.getvalue()
    assert "9.00: rollout to score 6.00, of which engines 5.00" in said
    assert "rollout 4.00 (summed over shards)" in said
    assert "8 correct" in said


def test_a_title_is_text_that_rules_no_terminal():
    """A folder `[new]` was left out of its path, and a run that somebody sent could write escape sequences."""
    assert "samples of /data/[new]/part-[ab].jsonl, split test;" in shown(1, "/data/[new]/part-[ab].jsonl")
    assert "samples of /data/\\x1b]0;x.jsonl;" in shown(1, "/data/\x1b]0;x.jsonl")


def test_a_single_file_has_no_split():
    assert "30 problems x 1 samples of tiny-arithmetic, split test;" in shown(1)
    assert "30 problems x 1 samples of /data/mine.jsonl;" in shown(1, "/data/mine.jsonl")
