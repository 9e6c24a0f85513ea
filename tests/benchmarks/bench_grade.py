"""Rows a second that mathematics grades, with one process and with two, and what 100 answers that hang cost.

python -m tests.benchmarks.bench_grade [ROWS]
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

from pipeline.grader.verifier import Grader


def slow_rows(number: int) -> tuple[list[str], list[str], list[str]]:
    """Different rows that no comparison of texts decides."""
    responses = [rf"\boxed{{\frac{{{i + 2}}}{{{i + 3}}} + \sqrt{{{i + 5}}} x}}" for i in range(number)]
    golds = [rf"\sqrt{{{i + 5}}} x + 1 - \frac{{1}}{{{i + 3}}}" for i in range(number)]
    return responses, golds, ["stop"] * number


def rate(processes: int, rows: int) -> float:
    """Rows a second, after the children have started."""
    with closing(Grader(processes=processes)) as grader:
        grader.grade(*slow_rows(processes * 2))
        started = time.perf_counter()
        results = grader.grade(*slow_rows(rows))
        seconds = time.perf_counter() - started
    assert all(result.verdict == "correct" for result in results)
    return rows / seconds


def hanging(number: int) -> tuple[float, int]:
    """Seconds for `number` different answers that no computer finishes, and how many of them used up their deadline."""
    forms = (r"9^{9^{9^{9^{K}}}}", r"(10^9+K)!", r"\sum_{k=1}^{10^{9}+K} \frac{1}{k^2+\sin k}", r"\binom{10^8}{10^7+K}")
    responses = [f"\\boxed{{{forms[i % len(forms)].replace('K', str(i + 2))}}}" for i in range(number)]
    with closing(Grader()) as grader:
        started = time.perf_counter()
        results = grader.grade(responses, ["5/2"] * number, ["stop"] * number)
        seconds = time.perf_counter() - started
    assert all(result.verdict == "wrong" for result in results)
    return seconds, sum(result.gave_up for result in results)


def main() -> None:
    """Print the figures."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    one, two, again = rate(1, rows), rate(2, rows), rate(1, rows)
    print(f"one process {one:.0f} and {again:.0f} rows/s, two {two:.0f} rows/s: ratio {2 * two / (one + again):.2f}")
    seconds, overran = hanging(100)
    print(f"100 answers that hang: {seconds:.1f} s, {overran} of them used up their deadline")


if __name__ == "__main__":
    main()
