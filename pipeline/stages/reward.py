"""Stage `reward`: the verdict on each trace, and the value of each reward of `grade.rewards`, in a column of its own.

Only a run with rewards has this stage. Its `grade` then needs no verifier: it adds the values up with their weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import Run
from pipeline.config.rewards import PythonTests
from pipeline.contract import COLUMNS, REWARD_PREFIX, ShardInputs, ShardResult, Stage
from pipeline.grader.code import Code, check_codes
from pipeline.grader.python_tests import Judged, check_tests
from pipeline.grader.rewards import Failed, Traces, Value, check_functions, values_of
from pipeline.grader.verifier import CORRECT, TRUNCATED, UNPARSABLE, WRONG, Graded, grader_of
from pipeline.problems.sources import Problem, ProblemSet
from pipeline.stages.prompts import ABSENT, why_unusable
from pipeline.stages.tables import Draft, clean

_SAMPLES, _LOOKED_AT = 2, 64  # problems whose reference a reward is tried on, and rows among which they are looked for
_EXTRA = tuple(name for name in ("extra", "messages") if name in COLUMNS)


def judge(prompts: pa.Table, rollout: pa.Table, run: Run, codes: dict[str, Code], absent: Sequence[str] = ()) -> ShardResult:
    """Verdict and rewards of every trace. A row is rejected when its verifier or one of its rewards failed.

    absent: columns of the source that no row of the shard has. The fact `gave_up` counts the rows on which the verifier gave up.
    Raises SettingError when the code of a reward is not there.
    """
    check_codes(codes)
    draft = Draft.after(STAGE, rollout)
    for values in draft.values:
        values |= {f"{REWARD_PREFIX}{reward.name}": None for reward in run.grade.rewards}
    gave_up = _verify(draft, prompts, rollout, run) if run.grade.verdict_reward is None else 0
    live = draft.live()
    verdicts = [draft.values[row].get("judged_verdict") for row in live]
    traces = _traces(prompts, rollout, live, verdicts, absent)
    for reward in run.grade.rewards:
        found = values_of(reward, codes[reward.name], traces, run)
        for row, value in zip(live, found, strict=True):
            _take(draft, row, f"{REWARD_PREFIX}{reward.name}", value)
        if reward.name == run.grade.verdict_reward:
            _decide(draft, live, found, rollout["finish_reason"].take(pa.array(live, pa.int64())).to_pylist())
    columns = [f"{REWARD_PREFIX}{reward.name}" for reward in run.grade.rewards]
    columns += ["judged_said"] if run.grade.tests_decide else []
    return ShardResult(draft.table(columns), {"gave_up": gave_up} if gave_up else {})


def _verify(draft: Draft, prompts: pa.Table, rollout: pa.Table, run: Run) -> int:
    """Let the verifier decide the verdicts. Returns the number of rows on which it gave up."""
    live = draft.live()
    chosen = rollout.take(pa.array(live, pa.int64()))
    answers = prompts["answer"].take(chosen["prompt_index"]).to_pylist()
    found = grader_of(run).grade(chosen["response_text"].to_pylist(), answers, chosen["finish_reason"].to_pylist())
    for row, graded in zip(live, found, strict=True):
        _store(draft, row, graded)
    return sum(graded.gave_up for graded in found)


def _store(draft: Draft, row: int, graded: Graded) -> None:
    draft.values[row] |= {"judged_verdict": graded.verdict, "judged_answer": graded.answer and clean(graded.answer)}
    if graded.reject is not None:
        draft.reject(row, graded.reject, graded.detail)


def _decide(draft: Draft, rows: list[int], values: list[Value], finished: list[str]) -> None:
    """Let the values of one reward decide the verdicts: correct from 1 on. A response at its cap is truncated all the same."""
    for row, value, finish in zip(rows, values, finished, strict=True):
        if finish == "length":
            graded = TRUNCATED
        elif value is None:
            graded = UNPARSABLE
        else:
            graded = CORRECT if not isinstance(value, Failed) and _number(value) >= 1 else WRONG
        _store(draft, row, graded)
        if isinstance(value, Judged):
            draft.values[row]["judged_said"] = clean(value.said)


def _take(draft: Draft, row: int, column: str, value: Value) -> None:
    """Keep the value of one reward. A failure rejects the row; the values of its other rewards stay for whoever looks."""
    if isinstance(value, Failed):
        draft.reject(row, value.reason, value.detail)
    else:
        draft.values[row][column] = None if value is None else _number(value)


def _number(value: float | Judged) -> float:
    return value.value if isinstance(value, Judged) else value


def _traces(prompts: pa.Table, rollout: pa.Table, live: list[int], verdicts: list[Any], absent: Sequence[str]) -> Traces:
    chosen = rollout.take(pa.array(live, pa.int64()))
    groups = chosen["prompt_index"].to_pylist()
    columns = _columns([_row(row) for row in prompts.to_pylist()], groups, absent)
    texts, ids = chosen["response_text"].to_pylist(), chosen["response_tokens"].to_pylist()
    return Traces(columns["problem"], texts, ids, columns, groups, verdicts)


def _row(prompt: dict[str, Any]) -> dict[str, Any]:
    """What a reward may know of a problem: the other columns of its source (`extra`), and problem, solution and answer.

    A conversation is the column `messages`, as a list of its turns.
    """
    extra = json.loads(prompt.get("extra") or "{}")
    extra |= {"messages": json.loads(prompt["messages"])} if prompt.get("messages") else {}
    return extra | {name: prompt[name] for name in ("problem", "solution", "answer")}


def _columns(rows: list[dict[str, Any]], places: list[int], more: Sequence[str]) -> dict[str, list[Any]]:
    """One list of values for each column that a row has, and for `more`. Rows without it have None."""
    names = dict.fromkeys([*(name for row in rows for name in row), "problem", "solution", "answer", *more])
    return {name: [rows[place].get(name) for place in places] for name in names}


def check(run: Run, codes: dict[str, Code], problems: ProblemSet | None) -> list[str]:
    """Try every reward before anything starts: on the reference solutions of two problems, where a source is given.

    Returns notes for the user. Raises SettingError that names the reward.
    """
    if not run.grade.rewards:
        return []
    if problems is None:
        return check_functions(run, codes, None, None)
    rows = problems.rows(range(min(_LOOKED_AT, len(problems))))
    rows = [row for row in rows if why_unusable(row, run)[0] is None]
    given, too_large = (
        {problems.source.row_of(row.index): _of_source(row) for row in rows},
        {name for row in rows for name in row.left_out},
    )
    samples = list(given.values())[:_SAMPLES]
    others = [name for name in map(clean, problems.shape.other) if name not in too_large]
    known = _columns(list(given.values()), list(range(len(samples))), others)
    texts = [str(row["solution"] or row["answer"] or "") for row in samples]
    places = list(range(len(texts)))
    traces = Traces(known["problem"], texts, [[0] for _ in texts], known, places, [None for _ in texts])
    notes = check_functions(run, codes, list(known), traces)
    for reward in run.grade.rewards:
        if reward.function == "python_tests":
            settings = PythonTests.model_validate(reward.settings)
            notes += check_tests(f"grade.rewards.{reward.name}", problems.source.uri, settings, given)
    return notes


def _of_source(problem: Problem) -> dict[str, Any]:
    names = ("problem", "solution", "answer", "extra", "messages")
    return _row({name: getattr(problem, name, None) for name in names})


def _compute(shard: ShardInputs) -> ShardResult:
    absent = shard.facts["prompts"].get(ABSENT, ())
    return judge(shard.tables["prompts"], shard.tables["rollout"], shard.run, dict(shard.codes), absent)


# the settings that a verdict and its length-shaped reward depend on
JUDGING = (
    "grade.verifier",
    "grade.answer_pattern",
    "grade.deadline_s",
    "grade.fallback",
    "grade.set_relations",
    "grade.beta_length",
)

STAGE = Stage(
    "reward",
    "CPU",
    "trace_id",
    reads=("problem", "solution", "answer", *_EXTRA, "prompt_index", "response_text", "response_tokens", "finish_reason"),
    settings=(
        *JUDGING,
        "grade.verdict_reward",
        "rollout.max_new_tokens",
    ),
    compute=_compute,
    round_inputs=lambda run: tuple(f"{REWARD_PREFIX}{reward.name}" for reward in run.grade.rewards),
    in_run=lambda run: bool(run.grade.rewards),
    by_round=("grade.rewards",),
)
