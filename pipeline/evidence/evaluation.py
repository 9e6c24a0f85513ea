"""Samples of policies on held-out problems, and the figures of them, each with its interval.

Every figure is computed from `Samples`, N problems x K samples, in which NaN stands for a rejected row. Intervals are over
problems (intervals.py). A difference is paired by problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.answers.texts import normal_form
from pipeline.config import Run
from pipeline.contract import REWARD_PREFIX, PooledEngines, Reject, Verdict
from pipeline.digest import digest
from pipeline.evidence.intervals import Estimate, between, of_gaps, of_means, of_median, of_ratio, of_shares, ranked, together
from pipeline.problems.sources import ProblemSet
from pipeline.problems.survey import normal
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round, with_engines
from pipeline.rounds.rows import are_of_now, read_shard
from pipeline.rounds.running.schedule import execute, inflight
from pipeline.stages import EVALUATION, chain_of
from pipeline.store.directory import Entry, Store

FIGURES = ("avg", "pass", "maj", "length", "median_length", "truncated", "tokens_per_correct")
MEANS = ("avg", "length")  # `egrsd distill` and the report show these
SHARES = ("avg", "pass", "maj", "truncated")
MEANT = ("avg", "pass", "maj", "length", "truncated")
INTERVAL = (
    "95 % over problems. Shares: Wilson with the effective number of problems; their differences: Bonett and Price, paired. "
    "Lengths: the wider ends of Student's t and Hall's transformation. Median: Woodruff. "
    "Tokens per correct answer: the delta method on its logarithm."
)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one policy: N problems x K samples, NaN where a row was rejected.

    correct and truncated [N, K] in {0, 1}; length [N, K] tokens; majority [N] in [0, 1], see the function `majority`. `verdicts`
    counts rows by verdict, `rejected` counts them by reason. `problems` [N] tells which problem each row answers, see
    `problems_of`; without it the places stand for the problems. `gave_up` counts the rows on which the verifier gave up: they
    were graded wrong, or rejected. `made_by` has a name and a hash of all settings that made the answers and their grades.
    `earlier` tells that the run has other settings by now.
    """

    correct: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    majority: np.ndarray
    verdicts: dict[str, int]
    rejected: dict[str, int]
    problems: tuple[str, ...] = ()
    gave_up: int = 0
    made_by: tuple[tuple[str, str], ...] = ()
    earlier: bool = False

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """A key of each problem: what it is, and how many equal ones stand before it."""
        seen: Counter[str] = Counter()
        keys = []
        for problem in self.problems or map(str, range(len(self))):
            keys.append((problem, seen[problem]))
            seen[problem] += 1
        return keys


def samples(tables: list[tuple[pa.Table, pa.Table]], size: int, problems: tuple[str, ...] = ()) -> Samples:
    """Samples from the (rollout, grade) shards of an evaluation in order. The `size` rows of a problem are neighbours.

    problems: what each problem is, in the same order.
    """
    grade = pa.concat_tables([g.select(["reject_reason", "verdict", "extracted_answer"]) for _, g in tables])
    lengths = pa.concat_tables([r.select(["response_tokens"]) for r, _ in tables])["response_tokens"]
    live = np.array(pc.is_null(grade["reject_reason"]))
    verdict = np.array(grade["verdict"].to_pylist(), object)

    def shaped(values: np.ndarray) -> np.ndarray:
        """One row per problem, NaN where rejected."""
        return np.where(live, values, np.nan).reshape(-1, size)

    answers = np.array(grade["extracted_answer"].to_pylist(), object).reshape(-1, size)
    correct = shaped((verdict == Verdict.CORRECT).astype(float))
    return Samples(
        correct,
        shaped((verdict == Verdict.TRUNCATED).astype(float)),
        shaped(pc.fill_null(pc.list_value_length(lengths), 0).to_numpy().astype(float)),
        np.array([majority(right, given) for right, given in zip(correct, answers, strict=True)]),
        dict(Counter(verdict[live | (verdict == Verdict.TIMEOUT)])),  # others were rejected for a reward that failed
        dict(Counter(pc.drop_null(grade["reject_reason"]).to_pylist())),
        problems,
    )


CONTENT = ("prompt_id", "problem", "messages", "answer")  # columns of prompts that `content_of` reads


def content_of(row: dict[str, Any]) -> str:
    """What the problem of a prompt is, wherever it stands: a hash of its text and its answer.

    For a rejected problem, whose text is not kept, it is the hash of its source row.
    """
    text = row.get("messages") or row["problem"]
    return row["prompt_id"] if row["problem"] is None else digest(f"{normal(text)}\n{row['answer']}")


def problems_of(seen: Inventory) -> tuple[str, ...]:
    """What each problem of an evaluation is, in the order of its shards: its content. Without its prompts it is its place in the
    source that the plan names.
    """
    work, prompts = seen.work, seen.entries("prompts")
    plan = read_plan(work.store, work.kind, work.number)
    found: list[str] = []
    for shard in sorted(work.shards):
        if shard not in prompts:
            found += [f"{plan.source if plan else None}/{index}" for index in work.shards[shard]]
            continue
        found += map(content_of, work.store.read(prompts[shard], list(CONTENT)).to_pylist())
    return tuple(found)


StartBar = Callable[[int], Callable[[], None]]  # takes the number of steps, and returns what moves the bar by one of them


def answer(work: Round, source: ProblemSet, engines: Mapping[str, PooledEngines], start_bar: StartBar) -> None:
    """Have the policy of an evaluation answer its problems, and grade the answers. Fresh shards are left alone."""
    chain = chain_of(work.run, EVALUATION)
    advance = start_bar(len(work.shards) * len(chain))
    execute(with_engines(work, engines), chain, source, inflight=inflight(work.run, engines), on_entry=lambda *_: advance())


def read(work: Round) -> Samples:
    """The samples of an evaluation that has all its shards, in the order of its problems.

    Raises ValueError when its shards have different numbers of samples per problem.
    """
    seen = Inventory(work)
    rollouts, grades = seen.entries("rollout"), seen.entries("grade")
    tables = []
    for shard in sorted(work.shards):
        read_here = read_shard(work.store, {"rollout": rollouts[shard], "grade": grades[shard]})
        tables.append((read_here["rollout"], read_here["grade"]))
    [size] = _sample_counts(seen)
    found = samples(tables, int(size), problems_of(seen))
    gave_up = sum(_gave_up(grades[shard]) for shard in work.shards)
    return replace(found, gave_up=gave_up, made_by=_made_by(seen), earlier=_is_earlier(seen))


def _made_by(seen: Inventory) -> tuple[tuple[str, str], ...]:
    """The hashes of the settings behind all shards of an evaluation, by stage, and of the code that judged the answers."""
    entries = [entry for name in chain_of(seen.work.run, EVALUATION) for entry in seen.entries(name).values()]
    judges = (pair for entry in entries for pair in entry.inputs.items() if pair[0].startswith(REWARD_PREFIX))
    return tuple(sorted({*((entry.stage, entry.settings) for entry in entries), *judges}))


def _is_earlier(seen: Inventory) -> bool:
    """Whether a stage of an evaluation was made with other settings, or by another judge, than the run has now."""
    reasons = {why for name in chain_of(seen.work.run, EVALUATION) for why in seen.begun_and_stale(name)}
    return any(why == "settings" or why.startswith(REWARD_PREFIX) for why in reasons)


def _gave_up(entry: Entry) -> int:
    """Rows of a grade shard on which the verifier gave up. Shards from before 2026-11-28 count the rejected ones only."""
    failed = sum(entry.rejected.get(reason, 0) for reason in (Reject.VERIFIER_TIMEOUT, Reject.VERIFIER_ERROR))
    return int(entry.facts.get("gave_up", failed))


def held_out(store: Store, run: Run, version: int) -> Samples | None:
    """The samples of a policy on the run's own held-out problems.

    None when that evaluation is missing or incomplete, or when answers were written again since they were graded. None too for
    answers of a policy that was trained again since, and when its shards have different settings. An evaluation that is whole,
    from settings that changed since, is shown as it is.
    """
    if read_plan(store, "evals", version) is None:
        return None
    seen = Inventory(open_round(store, evaluation_run(run), "evals", version))
    made = _made_by(seen)
    whole = seen.is_whole("rollout", "grade") and len(_sample_counts(seen)) == 1 and len(dict(made)) == len(made)
    rollouts, grades = seen.entries("rollout"), seen.entries("grade")
    if whole and any(grades[shard].inputs.get("rollout") not in (None, rollouts[shard].sha256) for shard in seen.work.shards):
        return None  # answers were written again, and wait for their verdicts
    return read(seen.work) if whole and are_of_now(store, version, rollouts.values()) else None


def _sample_counts(seen: Inventory) -> set[float]:
    """The different numbers of samples per problem among an evaluation's shards."""
    return {entry.rows / len(seen.work.shards[shard]) for shard, entry in seen.entries("rollout").items()}


def engine_facts(work: Round) -> dict[str, Any]:
    """Facts of the engines that made an evaluation's rollouts. A fact has several values, with commas, when engines differed."""
    entries = Inventory(work).entries("rollout").values()
    names = ("engine", "dtype", "logprobs_mode", "entropy_method")
    return {name: ", ".join(sorted({str(entry.fact(name)) for entry in entries})) for name in names}


def majority(correct: np.ndarray, answers: np.ndarray) -> float:
    """Whether the most frequent answer of one problem is right: 1, 0, or 1/m when it ties with m - 1 wrong answers.

    correct [K] in {0, 1} or NaN, answers [K] text or None. All right answers count as one answer. Wrong answers are the same when
    their normal forms are the same. A sample without an answer (truncated, unparsable) has no vote. The result is 0 when no
    sample votes, and NaN when every row was rejected.
    """
    if not np.isfinite(correct).any():
        return math.nan
    votes: Counter[Any] = Counter()
    for right, answer in zip(correct, answers, strict=True):
        if right == 1 or (right == 0 and answer is not None):
            votes[True if right == 1 else normal_form(answer)] += 1
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1 / len(winners) if True in winners else 0.0


def pass_at(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k) (2107.03374).

    correct [N, K] in {0, 1}, or NaN for a rejected row, which is not counted -> [N]. Of the n samples of a problem that are left,
    c are right. The result is NaN where n < k.
    """
    left = np.isfinite(correct).sum(1)
    wrong = left - np.nansum(correct, axis=1).astype(int)
    chances = [1 - math.comb(int(w), k) / math.comb(int(n), k) if n >= k else math.nan for n, w in zip(left, wrong, strict=True)]
    return np.array(chances)


def figures(found: Samples, k: int, names: tuple[str, ...] = FIGURES) -> dict[str, Estimate]:
    """Figures, by name, with 95 % intervals over the problems that were answered. `values_of` and `_no_mean` define them.

    A figure without a value is left out, such as pass@k when rejected rows leave fewer than k samples. Raises ValueError when
    fewer than two problems were answered.
    """
    found = _select(found, _answered(found))
    _check_enough(len(found))
    made = {name: _over_problems(found, None, name, k) if name in MEANT else _no_mean(found, name)[0] for name in names}
    return {name: figure for name, figure in made.items() if figure is not None}


def differences(after: Samples, before: Samples, k: int, names: tuple[str, ...] = FIGURES) -> dict[str, Estimate]:
    """`after` - `before` in each figure, paired by problem, over the problems that both policies answered.

    A figure is left out when it is infinite on one side, because no answer is correct. Raises ValueError when the problems
    differ, or fewer than two problems have answers of both policies.
    """
    before = _in_order_of(after, before)
    both = _answered(after) & _answered(before)
    after, before = _select(after, both), _select(before, both)
    _check_enough(len(after))
    made = {name: _over_problems(after, before, name, k) if name in MEANT else _gap(after, before, name) for name in names}
    return {name: figure for name, figure in made.items() if figure is not None}


def macro(of_sources: list[tuple[Samples, Samples | None]], k: int) -> dict[str, Estimate]:
    """Mean over sources of each figure, or of its difference to a second policy. Every source counts the same.

    A figure that a source lacks is left out, and so is an infinite one.
    """
    parts = [figures(one, k) if other is None else differences(one, other, k) for one, other in of_sources]
    whole = [name for name in FIGURES if all(name in part and math.isfinite(part[name].value) for part in parts)]
    return {name: together([part[name] for part in parts]) for name in whole}


def _check_enough(problems: int) -> None:
    if problems < 2:
        raise ValueError(f"{problems} problems are too few for an interval: 2 at least")


def _no_mean(found: Samples, name: str) -> tuple[Estimate, np.ndarray]:
    """A figure that is no mean over problems, and how each problem moves it, in units of its own [N].

    median_length: median over all samples. tokens_per_correct: tokens of all samples per correct sample, infinite without one.
    """
    if name == "median_length":
        return of_median(found.length), -ranked(found.length)
    tokens, right = _row_mean(found.length), _row_mean(found.correct)
    return of_ratio(tokens, right), tokens / tokens.mean() - (right / right.mean() if right.any() else 0.0)


def _gap(after: Samples, before: Samples, name: str) -> Estimate | None:
    """The difference in a figure of `_no_mean`; None where one side is infinite."""
    (one, moves), (other, moved) = _no_mean(after, name), _no_mean(before, name)
    if not math.isfinite(one.value + other.value):
        return None
    spread = float(moves.std() * moved.std())
    shared = float(((moves - moves.mean()) * (moved - moved.mean())).mean()) / spread if spread else 0.0
    return between(one, other, min(1.0, max(-1.0, shared)))


def _over_problems(found: Samples, other: Samples | None, name: str, k: int) -> Estimate | None:
    """A mean over problems, or its difference to `other`, with its interval. None for fewer than two problems with a value."""
    values = values_of(found, name, k) - (values_of(other, name, k) if other is not None else 0.0)
    if np.isfinite(values).sum() < 2:
        return None
    if name not in SHARES:
        return of_means(values)
    samples = int(np.isfinite(values).sum()) if name == "maj" else int(np.isfinite(found.correct).sum())
    return of_shares(values, samples) if other is None else of_gaps(values)


def comparable(after: Samples, before: Samples) -> bool:
    """Whether `differences` can compare two policies: the same problems, at least two of them answered by both."""
    return same_problems(after, before) and int((_answered(after) & _answered(_in_order_of(after, before))).sum()) > 1


def same_problems(one: Samples, other: Samples) -> bool:
    """Whether two evaluations asked the same problems, in any order."""
    return sorted(one.keys) == sorted(other.keys)


def same_evaluation(one: Samples, other: Samples) -> bool:
    """Whether two policies of a run answered the same problems, and were sampled and graded with the same settings."""
    return one.made_by == other.made_by and same_problems(one, other)


def sampling(found: Samples, run: Run) -> str:
    """How the answers were sampled, in words that follow `sampled`."""
    return "and graded with earlier settings" if found.earlier else run.evaluation.sampling


def _in_order_of(first: Samples, other: Samples) -> Samples:
    """`other` with its problems in the order of `first`. Raises ValueError when they are not the same problems."""
    if len(first) != len(other):
        raise ValueError(f"{len(first)} and {len(other)} problems do not pair")
    if first.keys == other.keys:
        return other
    places = {key: place for place, key in enumerate(other.keys)}
    if missing := sum(key not in places for key in first.keys):
        raise ValueError(f"the evaluations asked different problems ({missing} of {len(first)}) and do not pair")
    return _select(other, np.array([places[key] for key in first.keys]))


def values_of(found: Samples, name: str, k: int) -> np.ndarray:
    """Values of each problem whose mean is the figure `name`: [N], NaN where a problem has none.

    avg: share of correct samples. pass: `pass_at` k. maj: `majority`. length: mean tokens. truncated: share of truncated samples.
    A problem with a rejected row counts as much as the others.
    """
    of_samples = {"avg": found.correct, "length": found.length, "truncated": found.truncated}
    if name in of_samples:
        return _row_mean(of_samples[name])
    return pass_at(found.correct, k) if name == "pass" else found.majority


def per_problem(found: Samples, name: str) -> np.ndarray:
    """Means over the samples of each problem [N] of `correct`, `length` or `truncated`; NaN where all were rejected."""
    return _row_mean(getattr(found, name))


def _answered(found: Samples) -> np.ndarray:
    """bool [N]: the problems that have a sample which was not rejected."""
    return np.isfinite(found.correct).any(1)


def _select(found: Samples, rows: np.ndarray) -> Samples:
    parts = {name: getattr(found, name)[rows] for name in ("correct", "truncated", "length", "majority")}
    problems = tuple(np.array(found.problems, object)[rows]) if found.problems else ()
    return replace(found, **parts, problems=problems)


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the samples of each problem [N, K] -> [N]; NaN without one."""
    count = np.isfinite(values).sum(1)
    return np.where(count, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)
