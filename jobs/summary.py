"""The tables at the end of a run: accuracy and length before and after it, verdicts, regimes, seconds and paths."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table

from jobs.screen.tables import aligned
from pipeline.choice.plans import told
from pipeline.errors import command
from pipeline.evidence.evaluation import (
    MEANS,
    Samples,
    comparable,
    differences,
    figures,
    held_out,
    same_evaluation,
    same_problems,
    sampling,
)
from pipeline.problems.sources import named
from pipeline.recipes import called
from pipeline.rounds.inventory import Inventory, warning_over
from pipeline.rounds.metrics import agreement, has_figures
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store, area

if TYPE_CHECKING:
    from jobs.screen.terminal import Session
    from pipeline.config import Run


def summarise(store: Store, run: Run, out: Session) -> None:
    """Print the results of a run, read from its run directory."""
    versions = [0, store.latest_policy()]
    before, after = (held_out(store, run, version) for version in versions)
    if before is not None and after is not None and versions[1] > 0:
        if same_evaluation(after, before) and comparable(after, before):
            out.console.print(_evaluation_table(before, after, versions[1], named(run.evaluation.source)))
            out.say(f"sampled {sampling(after, run)}. `evaluate --set evaluation.top_k=1` asks greedily.")
        elif not same_problems(after, before):
            out.say(f"policies 0 and {versions[1]} answered different held-out problems, which do not pair: no table.")
        elif not same_evaluation(after, before):
            out.say(f"policies 0 and {versions[1]} were evaluated with different settings, which do not pair: no table.")
    rounds = [row for row in store.metrics() if row["writer"] == "round" and has_figures(row)]
    if rounds:
        out.console.print(_rounds_table(rounds, run, agreement(store.metrics())))
    if (warning := warning_over(Inventory(work) for work in open_rounds(store, run))) is not None:
        out.say(f"warning: {warning}")
    for text in told(store, run):
        out.say(text)
    out.say(f"traces and labels: {store.locate('rounds')}")
    gap = agreement(store.metrics())
    out.told.result = {"run": store.uri, "policy": versions[1], "rounds": rounds, "trainer_engine": gap}
    if versions[1]:
        label = "adapter:           " if run.model.tuning == "lora" else "weights:           "
        out.say(f"{label}{store.locate(area('policy', versions[1]))}")
    metrics = store.locate("metrics")
    out.say(f"metrics and log:   {metrics}  {out.log_uri}" if out.log_uri else f"metrics:           {metrics}")
    if rounds:
        out.say(
            f"next: {command('report', store.uri)} shows every trace, {command('ask', store.uri, 'QUESTION')} asks both ends."
        )


def _evaluation_table(before: Samples, after: Samples, version: int, source: str) -> Table:
    """Accuracy and length of the base and of the last policy on a source, their difference, and the verdicts."""
    title = f"{len(before)} held-out problems of {source}: mean and 95 % interval, difference paired by problem"
    table = aligned(title, "", "policy 0", f"policy {version}", "difference")
    old, new = (figures(samples, 1, names=MEANS) for samples in (before, after))
    change = differences(after, before, 1, names=MEANS)
    for name, label, scale in (("avg", "accuracy, %", 100.0), ("length", "length, tokens", 1.0)):
        table.add_row(label, old[name].text(scale), new[name].text(scale), change[name].text(scale, signed=True))
    for verdict in sorted(before.verdicts.keys() | after.verdicts.keys()):
        table.add_row(verdict, str(before.verdicts.get(verdict, 0)), str(after.verdicts.get(verdict, 0)), "")
    if before.rejected or after.rejected:
        table.add_row("rejected rows", str(sum(before.rejected.values())), str(sum(after.rejected.values())), "")
    if before.gave_up or after.gave_up:
        table.add_row("verifier gave up", str(before.gave_up), str(after.gave_up), "")
    return table


def _rounds_table(rounds: list[dict[str, float]], run: Run, gap: str | None) -> Table:
    """Sums of verdicts and rejected rows over rounds, means of regime shares and seconds per round, and the gap in words."""
    title = f"{len(rounds)} training rounds of {called(run)} on {named(run.source)}"
    table = aligned(title, "", "", header=False)
    total: Counter[str] = Counter()
    spent: dict[str, list[float]] = {}  # a round whose driver died has no time
    for row in rounds:
        total.update({key: value for key, value in row.items() if isinstance(value, int | float) and key.startswith("num_")})
        for key in (key for key in row if key.startswith("seconds_")):
            spent.setdefault(key, []).append(row[key])
    verdicts = ("correct", "wrong", "unparsable", "truncated", "timeout")
    table.add_row("verdicts", ", ".join(f"{total[f'num_{v}']:.0f} {v}" for v in verdicts if total[f"num_{v}"]))
    table.add_row("rejected rows", f"{total['num_rejected']:.0f} of {total['num_rows']:.0f}")
    table.add_row("groups without signal", f"{total['num_groups_without_signal']:.0f} of {total['num_groups']:.0f}")
    shares = {name: sum(row[f"share_{name}"] for row in rounds) / len(rounds) for name in ("lock", "mid", "pivot", "fork")}
    parts = ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
    table.add_row("regimes", f"{parts} (mean of rounds)")
    if gap is not None:
        table.add_row("trainer - engine", gap)
    mean = {key: sum(values) / len(values) for key, values in spent.items()}
    stages = ", ".join(f"{key[14:]} {mean[key]:.2f}" for key in mean if key.startswith("seconds_stage_"))
    if "seconds_round" in mean:
        total_s, measure_s, engines_s = (mean[f"seconds_{n}"] for n in ("round", "measure", "engines"))
        table.add_row("seconds a round", f"{total_s:.2f}: rollout to score {measure_s:.2f}, of which engines {engines_s:.2f}")
    table.add_row("seconds a stage", f"{stages} (summed over shards)")
    return table
