"""Problems of reasoning-gym tasks, with what the tasks lack: a reference solution and a held-out split."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from pipeline.digest import short
from pipeline.errors import SettingError, SourceError, first_line, nearest

HELD_OUT = 5  # one problem text in five belongs to the test split
_NUMBER = re.compile(r"-?[\d.,/ ]+", re.ASCII)
TRIES = 256  # problems generated for one row before its split is given up as empty


def option_names(task: str) -> set[str]:
    """Names of the options of a task. Raises SourceError for a task that reasoning-gym does not have."""
    tasks = _library().factory.DATASETS
    if task not in tasks:
        hint = nearest(task, tasks, "reasoning_gym.factory.DATASETS lists the tasks")
        raise SourceError(f"reasoning-gym has no task '{task}'", "source.uri", hint)
    return set(tasks[task][1].__dataclass_fields__) - {"seed", "size"}


def check_options(task: str, options: dict[str, Any]) -> None:
    """Raise SettingError for an option of another type than its default, such as the text 'no' for a truth value."""
    fields = _library().factory.DATASETS[task][1].__dataclass_fields__
    for name, value in options.items():
        default = fields[name].default
        wanted = next((kind for kind in (bool, int, float, str) if type(default) is kind), None)
        if wanted and not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise SettingError(f"should be of type {wanted.__name__} (got {value!r})", f"source.options.{name}", "Write it so")


def problem(task: str, options: str, split: str, seed: int, size: int, index: int) -> dict[str, Any]:
    """Problem `index` of a split of `size` problems: its problem, solution and answer. `options` is JSON.

    Train and test draw from disjoint seeds. The hash of a problem's text also assigns it to one of the two, because small tasks
    make the same problem under different seeds. Raises SettingError for another split or for options that the task refuses.
    Raises SourceError when the task has too few different problems.
    """
    if split not in {"train", "test"}:
        raise SettingError(f"a generated task has no split '{split}'", "source.split", "Use 'train' or 'test'")
    for attempt in range(TRIES):
        # a task seeds each problem with seed + index, so seeds must lie `size` apart to share none
        draw = ((2 * seed + (split == "test")) * TRIES + attempt) * size
        item = _dataset(task, options, draw, size)[index]
        if (int(short(item["question"].encode(), 8), 16) % HELD_OUT == 0) == (split == "test"):
            answer = None if item["answer"] is None else str(item["answer"])
            return {"problem": item["question"], "solution": _solution(task, answer, item["metadata"]), "answer": answer}
    raise SourceError(f"{task} has too few different problems to hold some out for '{split}'", "source", "Widen source.options")


def caution(task: str, answers: list[str]) -> str | None:
    """A warning for a task whose problems may have right answers that differ from the reference, else None.

    Such a task has its own scorer, and answers that are not plain numbers: a sudoku, but not a game of 24. These scorers are not
    used, as some of them run the response as Python code.
    """
    library = _library()
    has_scorer = library.factory.DATASETS[task][0].score_answer is not library.dataset.ProceduralDataset.score_answer
    if not has_scorer or all(_NUMBER.fullmatch(answer) for answer in answers):
        return None
    return f"{task} may have several right answers; only what equals the reference counts as correct"


def _library() -> Any:
    """reasoning-gym, which takes long to import and which most runs do not need. Raises SourceError where it is missing."""
    try:
        import reasoning_gym
    except ImportError as error:
        remedy = "pip install 'egrsd[gym]', or `make gym` in a checkout: one of its packages needs a C compiler"
        raise SourceError(f"reasoning-gym cannot be imported ({first_line(error)})", "source.uri", remedy) from error
    return reasoning_gym


@lru_cache(maxsize=TRIES)
def _dataset(task: str, options: str, seed: int, size: int) -> Any:
    try:
        return _library().create_dataset(task, seed=seed, size=size, **json.loads(options))
    except (AssertionError, TypeError, ValueError) as error:
        raise SettingError(f"{task} refuses them: {error}", "source.options", "Change the options the message names") from error


def _solution(task: str, answer: str | None, metadata: dict[str, Any]) -> str | None:
    """A reference solution: a chain_sum worked from left to right, else the task's own text, else the answer in a sentence."""
    if answer is None:
        return None
    closing = f"The answer is \\boxed{{{answer}}}."
    if task != "chain_sum":
        worked = metadata.get("answer_cot") or metadata.get("solution")
        return f"{worked}\n{closing}" if isinstance(worked, str) else closing
    first, *rest = metadata["expression"].split()
    running, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total = running + int(term) if sign == "+" else running - int(term)
        steps.append(f"{running} {sign} {term} = {total}. ")
        running = total
    return "".join(steps) + closing
