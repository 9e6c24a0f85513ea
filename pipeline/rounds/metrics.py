"""Metrics of a run: the meaning of each, and the counts and shares of one round."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import REWARD_PREFIX, Regime, Verdict
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import left_out, of_now, read_shard, signals
from pipeline.stages import PLAN
from pipeline.store.directory import Store


class Metric(NamedTuple):
    """One metric: its name, the unit of its value, how values of many rows become one, and its meaning."""

    name: str
    unit: str
    reduction: Literal["sum", "mean", "max", "last"]
    meaning: str


# Every metric of a run, by writer. `train` writes a row per optimiser step, and `round` writes a row per round.
METRICS: dict[str, tuple[Metric, ...]] = {
    "train": (
        Metric("round", "", "last", "round whose traces the step trained on"),
        Metric("step", "", "last", "optimiser steps before this one"),
        Metric("loss", "nats", "mean", "loss of the objective (Eq. 7): by default a mean over response tokens of the minibatch"),
        Metric("grad_norm", "", "mean", "norm of the adapter's gradient before clipping"),
        Metric("lr", "", "last", "learning rate of the step"),
        Metric("traces", "traces", "sum", "traces of the minibatch"),
        Metric("tokens", "tokens", "sum", "response tokens of the minibatch"),
        Metric("rejected", "traces", "last", "traces of the round that the loss leaves out, since they are not finite"),
        Metric("advantage", "", "mean", "mean advantage of the traces"),
        Metric("positive_share", "share", "mean", "share of traces with a positive advantage"),
        Metric("peak_entropy", "nats", "max", "M of Eq. 5: largest teacher entropy of the minibatch, at least min_normaliser"),
        Metric("weight", "", "mean", "mean factor of the advantage over tokens with a signal; without one, mean token advantage"),
        Metric("divergence", "nats", "mean", "mean divergence from the teacher's most likely tokens, if the objective has one"),
        Metric("delta", "nats", "mean", "mean |teacher log-prob - student log-prob|"),
        Metric("logprob_gap", "nats", "mean", "mean |trainer's - engine's log-prob|, in the first step of a round"),
        Metric("logprob_gap_max", "nats", "max", "the largest of these gaps"),
        Metric("padded_share", "share", "mean", "share of the tokens of forward passes that are padding; 0 without a pass"),
        Metric("shared_share", "share", "mean", "share of the minibatch's tokens that packing saved, as traces share a prompt"),
        Metric("seconds", "s", "sum", "time of the step"),
        Metric("tokens_per_s", "tokens/s", "mean", "response tokens of the step in a second, those of silent traces too"),
    ),
    "round": (
        Metric("round", "", "last", "number of the round"),
        Metric("policy_lag", "rounds", "mean", "rounds by which the policy that wrote the traces is behind; 0: on-policy"),
        *(Metric(f"num_{verdict}", "traces", "sum", f"traces with verdict {verdict}") for verdict in Verdict),
        Metric("num_rows", "traces", "sum", "traces, with the rejected ones"),
        Metric("num_rejected", "traces", "sum", "traces that a stage rejected"),
        Metric("accuracy", "share", "mean", "share of correct traces among those that are not rejected"),
        Metric("mean_reward", "", "mean", "mean reward"),
        Metric("mean_length", "tokens", "mean", "mean response length of traces that are not rejected"),
        Metric("student_entropy", "nats", "mean", "mean entropy of the policy that wrote these traces, over response tokens"),
        Metric("teacher_entropy", "nats", "mean", "mean entropy of the teacher, over response tokens"),
        Metric("num_positive_advantage", "traces", "sum", "traces with a positive advantage"),
        Metric("num_groups", "groups", "sum", "groups, each a prompt with its traces"),
        Metric("num_groups_without_signal", "groups", "sum", "groups whose advantages are all 0"),
        Metric("num_prompts_further", "prompts", "sum", "prompts asked in place of groups without signal (rollout.fill_groups)"),
        Metric("num_groups_left_out", "groups", "sum", "groups of a filled round that are not trained on"),
        Metric("num_groups_lacking", "groups", "sum", "groups with a signal that a filled round has fewer than it asks for"),
        *(Metric(f"share_{name}", "share", "mean", f"share of response tokens in regime {name}") for name in Regime.NAMES),
        Metric("tokens_measured", "tokens", "sum", "response tokens within seconds_measure; 0: some traces or scores were there"),
        Metric("seconds_measure", "s", "sum", "prompts to score, until the round is committed to the trainer"),
        Metric("seconds_engines", "s", "sum", "work of the busiest engine of each pool within seconds_measure"),
        Metric("seconds_engines_idle", "s", "sum", "idle time within seconds_measure, summed over engines that could answer"),
        Metric("seconds_label", "s", "sum", "time of profile and label"),
        Metric("seconds_round", "s", "sum", "time from the first prompt to the new policy"),
        *(Metric(f"seconds_stage_{stage.name}", "s", "sum", f"time of stage {stage.name}, summed over shards") for stage in PLAN),
    ),
}

_TIMES = ("seconds_", "tokens_")  # how the names of times begin, and of what was made in them
_SUMMARISED = {
    "grade": ["reject_reason", "verdict", "reward", "advantage"],
    "profile": ["lookahead_entropy", "entropy_mean", *(f"share_{name}" for name in Regime.NAMES)],
    "rollout": ["response_tokens", "rollout_entropy"],
}


def is_timed(row: dict[str, Any]) -> bool:
    """Whether all traces and scores of a round were made within its `seconds_measure`.

    Rows of earlier versions tell only that some traces were.
    """
    return "seconds_measure" in row and bool(row.get("tokens_measured", row.get("seconds_stage_rollout")))


def agreement(metrics: Iterable[dict[str, Any]]) -> str | None:
    """How far trainer and engine are apart, in words: mean and largest gap over all steps that were compared.

    Rounds that trained and were not compared are counted: their policy was no longer there. None without a trained round.
    """
    rows = [row for row in metrics if "tokens_per_s" in row]
    compared = [row for row in rows if "logprob_gap" in row]
    trained, watched = {row["round"] for row in rows}, {row["round"] for row in compared}
    missed = len(trained - watched)
    if not compared:
        return f"not compared in {missed} rounds" if missed else None
    tokens = sum(row["tokens"] for row in compared)
    mean = sum(row["logprob_gap"] * row["tokens"] for row in compared) / max(1, tokens)
    largest = max(row["logprob_gap_max"] for row in compared)
    told = f"{mean:.2g} nat on average, {largest:.2g} at most, over {len(compared)} steps"
    return f"{told}; not compared in {missed} of {len(trained)} rounds" if missed else told


def summarise_round(work: Round) -> dict[str, float]:
    """Figures of a round that is graded and profiled, by their names in METRICS, and the mean of each reward of its own."""
    inventory = Inventory(work)

    entries = {stage: inventory.entries(stage) for stage in _SUMMARISED}
    shards = [
        read_shard(work.store, {stage: entries[stage][shard] for stage in entries}, _SUMMARISED) for shard in sorted(work.shards)
    ]
    grades, profiles, rollouts = ([tables[stage] for tables in shards] for stage in _SUMMARISED)
    kept = [table.filter(pc.is_null(grade["reject_reason"])) for table, grade in zip(rollouts, grades, strict=True)]
    lengths = [np.array(pc.drop_null(pc.list_value_length(table["response_tokens"]))) for table in kept]
    scored = [pc.fill_null(pc.list_value_length(table["lookahead_entropy"]), 0).to_numpy() for table in profiles]
    shares = regime_summary(profiles, scored)
    return {
        "policy_lag": work.lag,
        **round_summary(grades, lengths, work.run.rollout.group_size),
        **_filling_summary(work),
        **shares,
        **_entropies(kept, profiles, scored),
        **reward_means(inventory),
    }


def has_figures(row: Mapping[str, Any]) -> bool:
    """Whether a row of a round has its figures. One without them keeps the times of the round, until `add_lost`."""
    return not all(name in ("writer", "round") or name.startswith(_TIMES) for name in row)


def withdraw(work: Round, times: bool = True) -> None:
    """Take the figures of a round back, before its shards are made again. A process that dies meanwhile leaves no old ones.

    times: whether the times stay. Those of engines that work again would be of other traces.
    """
    rows = [row for row in work.store.metrics(work.number) if row["writer"] == "round"]
    kept = {name: value for row in rows for name, value in row.items() if name.startswith(_TIMES)} if times else {}
    if kept:
        work.store.write_metrics("round", work.number, [{"round": work.number, **kept}])
    elif rows:
        work.store.delete_metrics("round", work.number)


def add_lost(store: Store, run: Run) -> None:
    """Write the figures of trained rounds that have none: their driver died too early, or `withdraw` took them back.

    A round that is not graded and profiled with the settings of now keeps none.
    """
    known = {row["round"]: row for row in store.metrics() if row["writer"] == "round"}
    trained = store.latest_policy()
    for work in itertools.takewhile(lambda work: work.number < trained, open_rounds(store, run)):
        row = {name: value for name, value in known.get(work.number, {}).items() if name != "writer"}
        if not has_figures(row) and _is_summable(Inventory(work)):
            store.write_metrics("round", work.number, [{**row, "round": work.number, **summarise_round(work)}])


def _is_summable(seen: Inventory) -> bool:
    """Whether the shards of a round are graded and profiled with the settings of now, and from one another."""
    made = {stage.name: seen.entries(stage.name) for stage in PLAN}
    parts = ({name: entries[shard] for name, entries in made.items() if shard in entries} for shard in seen.work.shards)
    return seen.is_fresh("grade", "profile") and all(_SUMMARISED.keys() <= of_now(part).keys() for part in parts)


def _entropies(rollouts: list[pa.Table], profiles: list[pa.Table], scored: list[np.ndarray]) -> dict[str, float]:
    """Mean entropies over response tokens, in nats: the writer's and the teacher's. One that is not known is left out.

    scored: response tokens of the traces of each table of `profiles`.
    """
    own = np.concatenate([pc.list_flatten(table["rollout_entropy"]).to_numpy() for table in rollouts])
    weight = np.concatenate(scored).astype(np.float64)
    means = np.concatenate([pc.fill_null(table["entropy_mean"], 0.0).to_numpy() for table in profiles]).astype(np.float64)
    found = {"student_entropy": float(own.mean(dtype=np.float64))} if own.size and np.isfinite(own).all() else {}
    return found | ({"teacher_entropy": float((means * weight).sum() / weight.sum())} if weight.sum() else {})


def _filling_summary(work: Round) -> dict[str, float]:
    """Counts of a filled round: further prompts, and groups that are left out or lack. Empty for a round that is not filled."""
    plan = read_plan(work.store, work.kind, work.number)
    if plan is None or plan.filling is None or plan.asked is None:
        return {}
    with_signal = sum(int(found.sum()) for found in signals(work).values())
    ready = work.store.ready(work.number)
    left = left_out(work) if ready is None else ready.left_out  # the objective may have changed since
    return {
        "num_prompts_further": float(sum(part.prompts for part in plan.further)),
        "num_groups_left_out": float(sum(map(len, left.values()))),
        "num_groups_lacking": float(max(0, plan.asked - with_signal)),
    }


def reward_means(inventory: Inventory) -> dict[str, float]:
    """Mean of each reward of `grade.rewards` over the traces where it is present, as `reward_<name>`. Empty without rewards."""
    work = inventory.work
    means: dict[str, float] = {}
    entries = inventory.entries("reward") if work.run.grade.rewards else {}
    for name in (f"{REWARD_PREFIX}{reward.name}" for reward in work.run.grade.rewards):
        tables = [work.store.read(entry, [name]) for entry in entries.values() if name in entry.inputs]
        mean = pc.mean(pa.concat_tables(tables)[name]).as_py() if tables else None
        means |= {name: float(mean)} if mean is not None else {}
    return means


def warning(summary: dict[str, float], scales_advantage: bool = True) -> str | None:
    """Why a round with these figures teaches little, nothing, or only what not to write. None when it has a signal.

    scales_advantage: whether the objective is the advantage times a factor. Others learn where the advantage is 0, too.
    """
    rows, positive = summary["num_rows"] - summary["num_rejected"], summary["num_positive_advantage"]
    if not rows:
        return f"nothing to learn from. All {summary['num_rows']:.0f} rows were rejected: `egrsd status` says why."
    if not scales_advantage:
        return None
    if summary["num_correct"] == 0 and positive == 0:
        none = (
            f"None of {rows:.0f} traces was correct "
            f"({summary['num_truncated']:.0f} truncated, {summary['num_unparsable']:.0f} unparsable)"
        )
        what, means = (
            ("no signal", "every advantage is 0")
            if summary["num_groups_without_signal"] == summary["num_groups"]
            else ("all is pushed down", "no advantage is above 0, so every token that was written becomes less likely")
        )
        return f"{what}. {none}: {means}. Choose easier problems, more traces per prompt or a higher rollout.max_new_tokens."
    if summary.get("num_groups_lacking"):
        lacking, further = summary["num_groups_lacking"], summary["num_prompts_further"]
        return (
            f"{lacking:.0f} groups with a signal are lacking after {further:.0f} further prompts. Raise rollout.fill_groups, or "
            "choose problems by pass rate."
        )
    if positive < 0.02 * rows:
        return f"weak signal. {positive:.0f} of {rows:.0f} traces have a positive advantage."
    return None


def round_summary(grades: list[pa.Table], lengths: list[np.ndarray], group_size: int) -> dict[str, float]:
    """Counts that show early whether a round has a signal: verdicts, rewards and groups without signal.

    grades: tables of the shards of stage `grade`. lengths: response tokens of the traces, an array for each shard.
    A rejected row may have a verdict, since its reward failed later. It counts under `timeout` alone.
    """
    table = pa.concat_tables(grades)
    live = table.filter(pc.is_null(table["reject_reason"]))
    counts = Counter(live["verdict"].to_pylist())
    counts[Verdict.TIMEOUT] = pc.sum(pc.equal(table["verdict"], str(Verdict.TIMEOUT))).as_py() or 0
    reward = live["reward"].to_numpy()
    advantage = np.array(table["advantage"].to_pylist(), np.float64)
    groups = np.nan_to_num(advantage).reshape(-1, group_size) if len(advantage) % group_size == 0 else advantage[None]
    summary = {f"num_{verdict}": float(counts.get(str(verdict), 0)) for verdict in Verdict}
    return summary | {
        "num_rows": float(table.num_rows),
        "num_rejected": float(table.num_rows - live.num_rows),
        "accuracy": float(counts.get("correct", 0) / max(live.num_rows, 1)),
        "mean_reward": float(reward.mean()) if reward.size else 0.0,
        "mean_length": float(np.mean(np.concatenate(lengths))) if lengths and sum(map(len, lengths)) else 0.0,
        "num_positive_advantage": float((live["advantage"].to_numpy() > 0).sum()),
        "num_groups": float(len(groups)),
        "num_groups_without_signal": float((np.abs(groups).max(axis=1) == 0).sum()),
    }


def regime_summary(tables: list[pa.Table], lengths: list[np.ndarray]) -> dict[str, float]:
    """Share of all response tokens in each regime. `lengths` has the tokens of every row, an array for each profile shard."""
    weight = np.concatenate(lengths).astype(np.float64)
    total = max(weight.sum(), 1.0)
    shares = {}
    for name in Regime.NAMES:
        column = np.concatenate([np.nan_to_num(np.array(t[f"share_{name}"].to_pylist(), np.float64)) for t in tables])
        shares[f"share_{name}"] = float((column * weight).sum() / total)
    return shares
