"""Everything that the page shows of a run, in one JSON document. The page computes none of these figures itself."""

from __future__ import annotations

import contextlib
from typing import Any

from pipeline.choice.plans import told
from pipeline.config import Run
from pipeline.errors import UserError, command
from pipeline.evidence.comparison import COMPARE, Compared
from pipeline.evidence.evaluation import MEANS, held_out, same_problems
from pipeline.evidence.evaluation import figures as evaluated
from pipeline.evidence.plain import plain
from pipeline.evidence.sweep import read_evidence
from pipeline.models.vocabulary import token_reader
from pipeline.problems.sources import named
from pipeline.report import figures, ledger, traces
from pipeline.report.figures import Measured
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store

MOST_REJECTED = 100  # rejected rows that are listed


def collect(store: Store, run: Run) -> dict[str, Any]:
    """The document of a run. Raises UserError when no round is measured."""
    measured = _measured(store, run)
    stored = store.run_file()
    document = {
        "run": {
            "name": run.name,
            "source": named(run.source),
            "folder": store.uri.rstrip("/").rsplit("/", 1)[-1],
            "versions": stored.versions if stored is not None else {},
        },
        "warnings": [text for part in measured if (text := part.labelled.seen.warning()) is not None],
        "notes": told(store, run),
        "settings": run.to_yaml(),
        "window": run.profile.window,
        "rounds": [part.figures for part in measured],
        "ledger": _ledger(measured, run.rollout.group_size),
        "rejected": [row for part in measured for row in part.rejected][:MOST_REJECTED],
        "evaluations": _evaluations(store, run),
        "sample": traces.sample([part.labelled for part in measured], token_reader(run.model)),
        "sweep": read_evidence(store),
    }
    return dict(plain(document))


def read_comparison(store: Store) -> dict[str, Any]:
    """compare.json of a folder. Raises UserError when the file is missing, and StoreError when it holds no comparison."""
    found = store.read_document(COMPARE, Compared, "Compare anew")
    if found is None:
        raise UserError(f"no comparison here: {COMPARE} is missing", store.uri, "Make one with `egrsd compare`")
    return dict(plain(found.model_dump(exclude_unset=True)))


def _measured(store: Store, run: Run) -> list[Measured]:
    metrics: dict[int, list[dict[str, Any]]] = {}
    for row in store.metrics():
        metrics.setdefault(int(row["round"]), []).append(row)
    measured = [figures.measure(Inventory(work), metrics.get(work.number, [])) for work in open_rounds(store, run)]
    if not any(part.figures["traces"] for part in measured):
        raise UserError(
            "nothing to report: no round has graded and scored traces",
            store.uri,
            f"Run {command('distill', '--run', store.uri)} first",
        )
    return measured


def _ledger(measured: list[Measured], group_size: int) -> dict[str, Any]:
    counts = [part.counts for part in measured]
    return {
        "total": ledger.document(ledger.total(counts)),
        "rounds": [ledger.document(part.counts) | {"round": part.figures["round"]} for part in measured],
        "group_size": group_size,
        "adds_up": all(check["ok"] is not False for part in counts for check in ledger.checks(part)),
    }


def _evaluations(store: Store, run: Run) -> list[dict[str, Any]]:
    """Accuracy and length of policies on the held-out problems, with intervals, where two problems at least were answered.

    An evaluation of other problems than those of the last one is left out: its figures stand beside no others.
    """
    found = {version: held_out(store, run, version) for version in store.numbers("evals")}
    whole = {version: answered for version, answered in found.items() if answered is not None}
    last = whole[max(whole)] if whole else None
    shown = []
    for version, answered in whole.items():
        with contextlib.suppress(ValueError):
            if last is None or not same_problems(answered, last):
                continue
            values = evaluated(answered, 1, names=MEANS)
            figures_of = {"accuracy": plain(values["avg"]), "length": plain(values["length"])}
            source = {"source": named(run.evaluation.source)}
            shown.append({"policy": version, "problems": len(answered), **figures_of, **source})
    return shown
