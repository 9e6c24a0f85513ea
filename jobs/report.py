"""`egrsd report`: one self-contained HTML file of a run, for people who would rather look than read."""

from __future__ import annotations

from typing import Any

from jobs.opened import open_folder, open_run
from jobs.terminal import session
from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.evidence.comparison import COMPARE
from pipeline.evidence.evaluation import MEANS, held_out
from pipeline.evidence.evaluation import figures as evaluated
from pipeline.evidence.plain import plain
from pipeline.evidence.sweep import EVIDENCE
from pipeline.models.tokenizer import tokenizer_of
from pipeline.report import figures, ledger, traces
from pipeline.report.page import page
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store

REPORT = "report.html"


def report_run(uri: str, compare: str | None, out_uri: str | None, debug: bool) -> None:
    """Write the report of a run to `out_uri`, or to report.html in the run; with `compare`, that folder's comparison is in it.

    Raises UserError when the run has no measured round, or there is no comparison where one was named.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        target, name = _target(out_uri) if out_uri else (store, REPORT)
        compared = read_comparison(compare) if compare else None
        document = collect(store, run)
        html = page(document | {"compare": compared})
        target.write(name, html)
        shown, whole = len(document["sample"]["traces"]), document["sample"]["labelled"]
        size = f"{len(html) / 1e6:.1f} MB, {len(document['rounds'])} rounds, {shown} of {whole} labelled traces"
        out.say(f"{target.locate(name)}: {size}")
        if not document["ledger"]["adds_up"]:
            out.say("The ledger does not add up: see the Run view.")


def collect(store: Store, run: Run) -> dict[str, Any]:
    """Everything the page shows, as plain JSON. Raises UserError when no round is measured."""
    metrics: dict[int, list[dict[str, Any]]] = {}
    for row in store.metrics():
        metrics.setdefault(int(row["round"]), []).append(row)
    measured = [figures.measure(work, metrics.get(work.number, [])) for work in open_rounds(store, run)]
    if not any(part.figures["traces"] for part in measured):
        raise UserError("nothing to report: no round has graded and scored traces", store.uri, "Run `egrsd distill` first")
    tokenizer = tokenizer_of(run.model)
    counts = [part.counts for part in measured]
    whole = ledger.document(ledger.total(counts))
    stored = store.read_json("run.json") or {}
    return plain(
        {
            "run": {"name": run.name, "folder": store.uri.rstrip("/").rsplit("/", 1)[-1], "versions": stored.get("versions", {})},
            "settings": run.to_yaml(),
            "labels": {**run.profile.model_dump(), **run.label.model_dump()},
            "rounds": [part.figures for part in measured],
            "ledger": {
                "total": whole,
                "rounds": [ledger.document(part.counts) | {"round": part.figures["round"]} for part in measured],
                "group_size": run.rollout.group_size,
                "adds_up": all(check["ok"] is not False for part in counts for check in ledger.checks(part)),
            },
            "rejected": [row for part in measured for row in part.rejected][:100],
            "evaluations": [shown for version in store.numbers("evals") if (shown := _evaluation(store, run, version))],
            "sample": traces.sample([part.rows for part in measured], tokenizer),
            "sweep": store.read_json(EVIDENCE, "points", "deciles", "axes"),
        }
    )


def read_comparison(uri: str) -> dict[str, Any]:
    """compare.json of a folder. Raises UserError where there is none, or it is not one."""
    store = open_folder(uri)
    found = store.read_json(COMPARE, "points", "objectives", "pairs")
    if found is None:
        raise UserError(f"no comparison here: {COMPARE} is missing", store.uri, "Make one with `egrsd compare`")
    for index, point in enumerate(found["points"] if isinstance(found["points"], list) else [None]):
        if not _is_point(point):
            what = f"point {index} lacks objective, or accuracy and length with value, low and high"
            raise UserError(what, store.locate(COMPARE), "Compare anew")
    return dict(plain(found))


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict) or not isinstance(point.get("objective"), str):
        return False
    ends = [point.get(name) for name in ("accuracy", "length")]
    return all(isinstance(end, dict) and all(isinstance(end.get(k), int | float) for k in _INTERVAL) for end in ends)


_INTERVAL = ("value", "low", "high")


def _evaluation(store: Store, run: Run, version: int) -> dict[str, Any] | None:
    """Accuracy and length of a policy on the held-out problems, with intervals; None where too few were answered."""
    found = held_out(store, run, version)
    if found is None:
        return None
    try:
        shown = evaluated(found, 1, names=MEANS)
    except ValueError:
        return None
    return {"policy": version, "problems": len(found), "accuracy": plain(shown["avg"]), "length": plain(shown["length"])}


def _target(uri: str) -> tuple[Store, str]:
    """The folder of a file, and its name in it. Raises UserError for a folder."""
    folder, _, name = uri.rpartition("/")
    if not name:
        raise UserError("is a folder", "--out", "Name a file, for example report.html")
    return open_folder(folder or ("/" if uri.startswith("/") else ".")), name
