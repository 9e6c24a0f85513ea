"""Values of rewards: each function runs in child processes of its own, with a deadline, and may be killed at any moment.

A failure of a function rejects the rows of its call, and names the reward. A value is never made up in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import regex

from pipeline.config import Reward, Run
from pipeline.config.rewards import Format, PythonTests, SoftOverlong
from pipeline.contract import Reject, Verdict
from pipeline.errors import SettingError
from pipeline.fit.machine import processors
from pipeline.grader.children import LATE, Children, Outcome
from pipeline.grader.code import Code
from pipeline.grader.functions import FAILED, READY, VALUES, Call, Job, serve
from pipeline.grader.python_tests import Judged, longest_s, verdict_of_locks
from pipeline.method.rewards import length_shaped_reward, soft_overlong

_PATTERN_S = 5.0  # seconds that the pattern of `format` may take on one response


class Failed(NamedTuple):
    """Why a reward gave a trace no value: the reason and the detail with which its row is rejected."""

    reason: Reject
    detail: str


Value = float | Judged | Failed | None


@dataclass(frozen=True)
class Traces:
    """What rewards judge, N traces.

    completion_ids: [N] lists of ids.
    columns: [N] values by the name of a column of the source, with problem, solution and answer.
    groups: [N] number of the prompt. The traces of a prompt are neighbours.
    verdicts: [N], of the verifier. None where a reward decides the verdict, or where the verifier failed.
    """

    prompts: list[Any]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    groups: list[int]
    verdicts: list[str | None]

    def __len__(self) -> int:
        return len(self.completions)

    def arguments(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The arguments of a function for some of the traces."""
        named = {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.completion_ids}
        return {name: [values[row] for row in rows] for name, values in (self.columns | named).items()}


def values_of(reward: Reward, code: Code, traces: Traces, run: Run) -> list[Value]:
    """The value of one reward for each trace, in order: a number, None where it is absent, or why there is none."""
    match reward.function:
        case "accuracy":
            return _accuracy(traces, run)
        case "format":
            return [_format(Format.model_validate(reward.settings), text, reward.name) for text in traces.completions]
        case "soft_overlong":
            return _soft_overlong(SoftOverlong.model_validate(reward.settings), traces, run)
    children = _shared(reward.model_dump_json(exclude={"weight"}), code, run.grade.processes or processors())
    return _called(children, reward, traces)


def _accuracy(traces: Traces, run: Run) -> list[Value]:
    """The length-shaped reward of the verifier's verdict. A row without verdict is rejected by the verifier's own reason."""
    correct = np.array([verdict == Verdict.CORRECT for verdict in traces.verdicts], bool)
    lengths = np.array([len(ids) for ids in traces.completion_ids], int)
    return list(length_shaped_reward(correct, lengths, run.rollout.max_new_tokens, run.grade.beta_length).tolist())


def _soft_overlong(settings: SoftOverlong, traces: Traces, run: Run) -> list[Value]:
    lengths = np.array([len(ids) for ids in traces.completion_ids], int)
    return list(soft_overlong(lengths, settings.limit or run.rollout.max_new_tokens, settings.cache).tolist())


def _format(settings: Format, text: str, name: str) -> Value:
    pattern = regex.compile(settings.pattern)
    try:
        found = (pattern.fullmatch if settings.whole else pattern.search)(text, timeout=_PATTERN_S)
    except TimeoutError:
        return Failed(Reject.REWARD_TIMEOUT, f"reward '{name}': its pattern ran for more than {_PATTERN_S:g} s")
    return float(found is not None)


def _called(children: Children, reward: Reward, traces: Traces) -> list[Value]:
    """Ask the children: one call for each group or each trace."""
    alone = reward.per == "trace" or reward.function == "python_tests"
    calls: dict[int, list[int]] = {}
    for row, group in enumerate(traces.groups):
        calls.setdefault(row if alone else group, []).append(row)
    outcomes = children.ask([Call(traces.arguments(rows), len(rows)) for rows in calls.values()])
    values: list[Value] = [None] * len(traces)
    for rows, outcome in zip(calls.values(), outcomes, strict=True):
        for row, value in zip(rows, _read(outcome, reward, len(rows)), strict=True):
            values[row] = value
    return values


def _read(outcome: Outcome, reward: Reward, rows: int) -> Sequence[Value]:
    """The values of one call, or the failure of all its traces."""
    if outcome.ended and reward.function == "python_tests" and READY in outcome.notes:
        return [0.0] * rows  # the model's program may have ended it: that must not be a way out
    if not outcome.ended and outcome.reply[0] == VALUES:
        return list(outcome.reply[1])
    return [failure(outcome, reward)] * rows


def failure(outcome: Outcome, reward: Reward) -> Failed:
    """What a failed call means for its rows, in words that name the reward."""
    who = f"reward '{reward.name}'"
    if outcome.ended == LATE:
        return Failed(
            Reject.REWARD_TIMEOUT, f"{who}: a call took more than {reward.deadline_s:g} s (deadline_s of grade.rewards)"
        )
    if outcome.ended:
        return Failed(Reject.REWARD_ERROR, f"{who}: its process {outcome.ended}, twice")
    assert outcome.reply[0] == FAILED
    return Failed(Reject.REWARD_ERROR, f"{who}: {outcome.reply[1]}")


@lru_cache(maxsize=64)
def _shared(reward: str, code: Code, number: int) -> Children:
    """The child processes of one reward in this process. They live as long as it does."""
    return children_of(Reward.model_validate_json(reward), code, number)


def children_of(reward: Reward, code: Code, number: int) -> Children:
    """New child processes for one reward. They start at the first question."""
    late = longest_s(PythonTests.model_validate(reward.settings)) if reward.function == "python_tests" else reward.deadline_s
    work = partial(serve, Job(reward.name, reward.function, reward.settings, code))
    return Children(work, number, stall_s=math.inf, deadline_s=late)


def check_functions(run: Run, codes: Mapping[str, Code], known: Sequence[str] | None, samples: Traces | None) -> list[str]:
    """Have every function imported, its signature checked and called once with `samples`. Returns notes for the user.

    known: names of the columns of the source; None when they are not known, which leaves the signatures to the samples.
    Raises SettingError that names the reward, for a file or function that is missing or fails. It raises it too where no trace
    could be correct.
    """
    notes = []
    for reward in run.grade.rewards:
        code, where = codes[reward.name], f"grade.rewards.{reward.name}"
        code.check(reward.name)
        if reward.function == "soft_overlong" and reward.name == run.grade.verdict_reward:
            what = f"reward '{reward.name}' (soft_overlong) is never above 0, so every verdict would be wrong"
            raise SettingError(what, "grade.verdict_reward", "Name a reward that gives a correct trace 1")
        unread = [name for name in ("deadline_s", "per") if getattr(reward, name) != Reward.model_fields[name].default]
        notes += [f"note: {where}.{name} is not read: it is for functions of your own" for name in unread if not code.place]
        if reward.function == "python_tests":
            notes += verdict_of_locks(where, PythonTests.model_validate(reward.settings))
        elif code.place:
            _check_function(reward, code, known, samples)
            notes.append(f"note: {where} runs {reward.function} (sha256 {code.hash}) as you, in child processes")
    return notes


def _check_function(reward: Reward, code: Code, known: Sequence[str] | None, samples: Traces | None) -> None:
    children = children_of(reward, code, 1)
    questions = [] if known is None else [Call({}, 0, tuple(known))]
    if samples is not None and len(samples):
        questions.append(Call(samples.arguments(range(len(samples))), len(samples)))
    try:
        for outcome in children.ask(questions):
            if outcome.ended or outcome.reply[0] == FAILED:
                what = failure(outcome, reward).detail.partition(": ")[2]
                remedy = (
                    f"Mend {reward.function}: it was tried on {len(samples or ())} reference solutions before anything starts"
                )
                raise SettingError(what, f"grade.rewards.{reward.name}", remedy)
    finally:
        children.close()
