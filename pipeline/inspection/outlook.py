"""What a run would do, said before anything starts or is written (--dry-run)."""

from __future__ import annotations

from typing import Any

from pipeline.config import Run
from pipeline.inspection.remaining import Remaining
from pipeline.overrides import differences
from pipeline.problems.sources import ProblemSet, named
from pipeline.problems.survey import is_generated
from pipeline.stages import LABELS, MEASURE, chain_of
from pipeline.store.directory import Store


def outlook(store: Store, run: Run, remaining: Remaining, sources: tuple[ProblemSet, ProblemSet | None]) -> list[str]:
    """Lines about the work that remains, in the order in which it would be done."""
    if remaining.is_empty:
        return [f"nothing remains: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated"]
    problems, held_out = sources
    rollout, where = run.rollout, "is there" if store.exists() else "is made anew"
    lines = [f"run {store.uri} {where}: {remaining.describe(run)}"]
    if 0 in remaining.evaluate and held_out is not None:
        lines.append(_evaluation(run, 0, held_out))
    if rounds := remaining.train:
        traces = rollout.prompts_per_round * rollout.group_size
        kind = "problems" if is_generated(problems) else "rows"  # some rows may be rejected, which a note says
        asked = f"{rollout.prompts_per_round} of {len(problems)} {kind} of {named(run.source)} x {rollout.group_size} traces"
        lines.append(f"each of {len(rounds)} rounds: {asked} = {traces} traces of at most {rollout.max_new_tokens} tokens")
        chain = ", ".join(chain_of(run, (*MEASURE, *LABELS)))
        shards = -(-rollout.prompts_per_round // rollout.prompts_per_shard)
        lines.append(f"    stages {chain}: {shards} shards each; then one policy by {run.objective.name}")
        lines.append(
            f"    in all {len(rounds) * traces} traces, at most {len(rounds) * traces * rollout.max_new_tokens:,} tokens"
        )
    if remaining.label:
        lines.append(f"labels of {len(remaining.label)} rounds are made anew")
    if held_out is not None:
        lines += [_evaluation(run, version, held_out) for version in filter(None, remaining.evaluate)]
    engines = ", ".join(f"{name}: {pool.min} to {pool.max} engines" for name, pool in run.pools.items())
    return [*lines, f"engines {engines}; trainer: {run.train.workers} ranks", *remaining.stale]


def departures(run: Run) -> dict[str, Any]:
    """The settings that differ from their defaults, by dotted name."""
    return {name: now for name, _, now in differences(Run(name=run.name), run)}


def _evaluation(run: Run, version: int, held_out: ProblemSet) -> str:
    asked = min(run.evaluation.problems, len(held_out))
    what = f"{asked} held-out problems of {named(run.evaluation.source)} x {run.evaluation.samples}"
    return f"policy {version} answers {what}, {run.evaluation.sampling}"
