"""Benchmarks by name: where each lies on the hub, its split, and the columns in which its copies keep problem and answer.

A user may name a copy instead (`gsm8k=/data/gsm8k`), which is read with the same columns. An answer is read as its source states
it: `#### 42` in GSM8K, the last \\boxed{} of a worked solution in Minerva and MATH, a cell of its own elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import product

from pipeline.config import Source
from pipeline.errors import SettingError, SourceError, nearest
from pipeline.overrides import read_section
from pipeline.problems.sources import ProblemSet, open_source

# `question` is tried first: a copy that has both columns keeps the number of a problem in `problem`
COLUMNS = tuple(product(("question", "problem", "Problem"), ("answer", "Answer", "solution", "Solution")))


@dataclass(frozen=True)
class Benchmark:
    """A dataset of the hub, its split, and further arguments of `datasets.load_dataset`."""

    hub: str
    split: str
    options: dict[str, str] = field(default_factory=dict)


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),  # problem, solution, answer
    "aime25": Benchmark("math-ai/aime25", "test"),  # problem, answer
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train"),  # problem, answer
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),  # problem, solution, answer
    "minerva": Benchmark("math-ai/minervamath", "test"),  # question, answer; other copies: problem, boxed in solution
    "gsm8k": Benchmark("openai/gsm8k", "test", {"name": "main"}),  # question, answer: the working, then #### 42
}


def benchmark(spec: str) -> str | None:
    """The benchmark that `gsm8k` or `gsm8k=/data/gsm8k` names, or None for another kind of source."""
    name = spec.partition("=")[0].lower()
    return name if name in BENCHMARKS else None


def near(spec: str) -> str:
    """A hint for a name that is no benchmark: the nearest name, or all of them."""
    return nearest(spec.partition("=")[0].lower(), BENCHMARKS, f"Benchmarks: {', '.join(BENCHMARKS)}")


def open_benchmark(spec: str) -> ProblemSet:
    """The problems of `gsm8k`, or of its copy in `gsm8k=/data/gsm8k` (a file, a folder, datasets:NAME), without solutions.

    Raises SourceError, which names the place that was tried first, when nothing can be read or no pair of COLUMNS is there.
    """
    name, _, copy = spec.partition("=")
    failures: list[SourceError] = []
    for source in _places(BENCHMARKS[name.lower()], copy):
        for problem, answer in COLUMNS:
            columns = {"problem": problem, "solution": "", "answer": answer}
            try:
                return open_source(source.model_copy(update=columns), look=False)
            except SourceError as error:
                failures.append(error)
                if "has no column" not in error.what:
                    break
    hint = f"Name a copy: --source {name}=/path/to/file.jsonl, .parquet or folder"
    raise SourceError(failures[0].what, f"{name}, {failures[0].where}", hint)


def _places(known: Benchmark, copy: str) -> list[Source]:
    """Sources to try, in order: the hub or its cache, or the copy as a folder of splits, a file, a folder of Parquet files."""
    plain = {"split": known.split, "solution": ""}
    name = f"datasets:{copy.removeprefix('datasets:') or known.hub}"
    try:
        hub = read_section(Source, {"uri": name, **plain})
    except SettingError as error:
        raise SettingError(error.what, f"the copy of {known.hub} in --source", "Write another address") from error
    if not copy or copy.startswith("datasets:"):
        return [hub.model_copy(update={"options": dict(known.options)})]
    direct = read_section(Source, {"uri": copy, **plain})
    return [hub, direct] if os.path.isdir(copy) else [direct]
