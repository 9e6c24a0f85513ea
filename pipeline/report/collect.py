"""Everything that the page shows of runs, in one JSON document. The page computes none of these figures itself."""

from __future__ import annotations

import json
from typing import Any

from pipeline.choice.plans import told
from pipeline.config import Run
from pipeline.config.objective import USES_ADVANTAGE
from pipeline.errors import UserError, command
from pipeline.evidence.comparison import COMPARE, Compared
from pipeline.evidence.documents import asked, is_of_now, plain, read_audit, read_evidence
from pipeline.models.tokenizers.vocabulary import token_reader
from pipeline.overrides import differences
from pipeline.problems.sources import named
from pipeline.recipes import called
from pipeline.report import figures, held_out, ledger, story
from pipeline.report.figures import Measured
from pipeline.report.held_out import Evaluations
from pipeline.report.sampled import sample
from pipeline.report.sampled.drawn import Limits
from pipeline.rounds.inventory import Inventory, warning_over
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store

MOST_REJECTED = 100  # rejected rows that are listed


def collect_all(runs: list[tuple[Store, Run]]) -> dict[str, Any]:
    """The document of a page: each run, and how the last policy of each differs from that of the first run.

    Raises UserError when no round of a run is measured.
    """
    limits = Limits().shared(len(runs))
    evaluated = [Evaluations.of(store, run) for store, run in runs]
    documents = [collect(store, run, limits, found) for (store, run), found in zip(runs, evaluated, strict=True)]
    for (store, _), document in zip(runs, documents, strict=True):
        if sum(other["run"]["folder"] == document["run"]["folder"] for other in documents) > 1:
            document["run"]["folder"] = "/".join(store.uri.rstrip("/").rsplit("/", 2)[-2:])
    return {
        "runs": documents,
        "against": [_against(other, evaluated[0]) for other in evaluated[1:]],
        "settings": _differences([run for _, run in runs]),
        "compare": None,
        "live": False,
    }


def collect(store: Store, run: Run, limits: Limits | None = None, evaluated: Evaluations | None = None) -> dict[str, Any]:
    """The document of one run. Raises UserError when no round is measured."""
    limits = limits or Limits()
    measured = _measured(store, run)
    evaluated = evaluated or Evaluations.of(store, run)
    evidence, outdated = _evidence(store, {part.figures["round"]: part.labelled.seen.measured for part in measured})
    document = {
        "run": _identity(store, run),
        "warnings": [text] if (text := warning_over(part.labelled.seen for part in measured)) is not None else [],
        "notes": [*told(store, run), *outdated, *evaluated.notes()],
        "settings": run.to_yaml(),
        "window": run.profile.window,
        "rounds": [part.figures for part in measured],
        "ledger": _ledger(measured),
        "rejected": [row for part in measured for row in part.rejected][:MOST_REJECTED],
        "evaluations": evaluated.figures(),
        "change": evaluated.change(),
        "asked": {version: lines for version in (0, *store.numbers("policy")) if (lines := asked(store, version))},
        "answers": evaluated.answers(limits.text),
        "sample": sample.sample([part.labelled for part in measured], token_reader(run.model), limits),
        **evidence,
    }
    return dict(plain(document | {"story": story.tell(document)}))


def waiting(runs: list[tuple[Store, Run]], why: str) -> dict[str, Any]:
    """The document of runs that have nothing to show yet."""
    empty: dict[str, Any] = {"warnings": [], "notes": [], "rounds": [], "rejected": [], "evaluations": [], "story": []}
    empty |= {"change": None, "answers": None, "sweep": None, "audits": [], "settings": "", "window": 0, "waiting": why}
    empty |= {"ledger": _ledger([]), "sample": {"traces": {}, "groups": {}, "blocks": [], "rounds": {}}}
    found = [empty | {"run": _identity(store, run)} for store, run in runs]
    return {"runs": found, "against": [None for _ in runs[1:]], "settings": [], "compare": None, "live": False}


def read_comparison(store: Store) -> dict[str, Any]:
    """compare.json of a folder. Raises UserError when the file is missing, and StoreError when it holds no comparison."""
    found = store.read_document(COMPARE, Compared, "Compare anew")
    if found is None:
        raise UserError(f"no comparison here: {COMPARE} is missing", store.uri, "Make one with `egrsd compare`")
    return dict(plain(found.model_dump(exclude_unset=True)))


def _identity(store: Store, run: Run) -> dict[str, Any]:
    """What the page says of a run itself."""
    stored, read = store.run_file(), "used" if run.objective.name in USES_ADVANTAGE else "unread"
    return {
        "name": run.name,
        "advantage": "needed" if run.objective.needs_advantage else read,  # without it a trace teaches nothing
        "called": called(run),
        "source": named(run.source),
        "folder": store.uri.rstrip("/").rsplit("/", 1)[-1],
        "versions": stored.versions if stored is not None else {},
        "largest_gap": run.accepted_gap[0],
        "dtype": min({run.model.dtype, run.train.dtype} - {"float32"}, default="float32"),
    }


def _measured(store: Store, run: Run) -> list[Measured]:
    metrics: dict[int, list[dict[str, Any]]] = {}
    for row in store.metrics():
        metrics.setdefault(int(row["round"]), []).append(row)
    measured = [figures.measure(Inventory(work), metrics.get(work.number, [])) for work in open_rounds(store, run)]
    if not any(part.figures["traces"] for part in measured):
        remedy = f"Run {command('distill', '--run', store.uri)} first"
        if store.numbers("evals"):  # who looks for the answers of policy 0 finds out with a question
            remedy += f", or ask the base yourself: {command('ask', '--run', store.uri, '--policy', '0', 'QUESTION')}"
        raise UserError("nothing to report: no round has graded and scored traces", store.uri, remedy)
    return measured


def _evidence(store: Store, measured: dict[int, str]) -> tuple[dict[str, Any], list[str]]:
    """The sweep and the audits of a run, and a note for each that read other traces than those of now. These are left out."""
    notes, swept = [], read_evidence(store)
    if swept is not None and not is_of_now(swept, measured):
        notes.append(f"The sweep is left out: rounds were made anew since. Run {command('sweep', '--run', store.uri)} again.")
        swept = None
    audits = [audit for number in measured if (audit := read_audit(store, number)) is not None]
    for audit in audits:
        if not is_of_now(audit, measured):
            again = command("audit", "--run", store.uri, "--round", audit["round"])
            notes.append(f"The audit of round {audit['round']} is left out: the round was made anew since. Run {again} again.")
    return {"sweep": swept, "audits": [audit for audit in audits if is_of_now(audit, measured)]}, notes


def _ledger(measured: list[Measured]) -> dict[str, Any]:
    counts = [part.counts for part in measured]
    return {
        "total": ledger.document(ledger.total(counts)),
        "rounds": [ledger.document(part.counts) | {"round": part.figures["round"]} for part in measured],
        "group_sizes": sorted({part.expected // part.prompts for part in counts if part.prompts}),
        "adds_up": all(check["ok"] is not False for part in counts for check in ledger.checks(part)),
    }


def _against(other: Evaluations, first: Evaluations) -> dict[str, Any] | None:
    """The last policy of a run against that of the first run, on the same held-out problems. None when they do not pair.

    A run that has evaluated its base alone has no last policy yet. The page shows the settings of now beside both.
    """
    if other.last is None or first.last is None or not (max(other.samples) and max(first.samples)):
        return None
    if other.last.earlier or first.last.earlier:
        return None
    return held_out.between(other.last, first.last)


def _differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The settings in which runs differ from the first: name, and the value of each run as text."""
    found = [{name: (value, other) for name, value, other in differences(runs[0], run)} for run in runs]
    rows = []
    for name in sorted({name for changed in found for name in changed}):
        first = next(changed[name][0] for changed in found if name in changed)
        values = [changed[name][1] if name in changed else first for changed in found]
        rows.append({"name": name, "values": [value if isinstance(value, str) else json.dumps(value) for value in values]})
    return rows
