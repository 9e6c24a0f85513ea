"""`egrsd audit`: which objective's gradient points where accuracy rises, on the stored traces of one round, without engines."""

from __future__ import annotations

import contextlib
from typing import Any, cast, get_args

from rich.table import Table

from jobs.opened import open_run
from jobs.screen.tables import aligned
from jobs.screen.terminal import Session, session
from pipeline.audit import figures, measure
from pipeline.audit.tokens import MADE
from pipeline.errors import SettingError, StoreError
from pipeline.evidence.comparison import chosen_objectives
from pipeline.evidence.documents import is_of_now, path_of, read_audit, write_audit
from pipeline.evidence.sweep import choose_rounds, sampling_note, stale_note
from pipeline.notices import NOTICE_S, late
from pipeline.overrides import resolve
from pipeline.rounds import contents
from pipeline.store.directory import Store
from pipeline.training.alignment import Space

FIGURES = ("cosine", "batch_cosine", "batch_share")
NOTES = (
    "cosine: of the expected gradient with the gradient of accuracy; batch cosine: of the gradient of {batch} traces;",
    "signal: share of the expected gradient in the squared norm of that gradient; 95 % intervals over blocks of problems.",
    "averaged cosine: of AdamW's first moment, which averages many minibatches;",
    "push: what a weighting adds to accuracy, as a multiple of the reference; longer: its cosine with the gradient of length.",
    "AdamW's step: cosine of the step that AdamW makes of these blocks; its own noise is in it.",
    "Shares: 95 % intervals over problems, for the direction that these traces gave.",
    "A dash: these traces are too few, or too noisy, to tell a direction.",
    "These figures describe one policy and one round. On nine generated worlds cosines ranked what training gained:",
    "rank correlation .39 to .48, p below .004 (tests/benchmarks/MAP.md). --verdict says what they say of the gate.",
)
GATED = ("egrsd", "cl_egrsd")  # objectives whose gate a verdict is about
UNGATED = "egrsd+off"  # what both are without their gate
MEANING = (
    "On nine generated worlds such differences ranked what gates gained. Where all audits put a gate above, in five worlds, "
    "training gained .3 points on average, beyond noise in one; where they put it below, in one, it lost 1.1 "
    "(tests/benchmarks/MAP.md)."
)


def audit_run(
    uri: str, number: int, wanted: tuple[str, list[str], tuple[int, int, str]], debug: bool, judge: bool = False
) -> None:
    """Print the audit of a round, and write evidence/audit-NNNN.json and evidence/audit-NNNN.parquet.

    wanted: objectives, `--set` lines, and blocks and problems at most with the parameters. judge: also say in words whether the
    gate helps. The first weighting is then the gated objective without its gate. Raises SettingError for an option that is none,
    and what `measure.measure` raises.
    """
    names, sets, (blocks, problems, space) = wanted
    with session(debug) as out:
        store, run = open_run(uri)
        if space not in get_args(Space):
            raise SettingError(f"'{space}' are no parameters", "--parameters", "Write weights or adapter")
        asked = list(dict.fromkeys(name.strip() for name in names.split(",")))
        if trained := [name for name in asked if name not in MADE]:
            chosen_objectives(",".join(trained))
        if judge:
            if not any(map(_is_gated, asked)):
                raise SettingError("--verdict is about a gate", "--objectives", "Name egrsd, cl_egrsd or one of their gates")
            asked = list(dict.fromkeys([UNGATED, *asked]))
        objectives = measure.objectives(run, asked, sets)
        [work] = choose_rounds(store, resolve(run, sets), [number])
        contents.refuse_other(store, work.run)
        for note in (stale_note(work), sampling_note(work.run)):
            if note is not None:
                out.say(note)
        held = _held(store, number)
        with late("audit", f"round {number} of {store.uri} has been audited for {NOTICE_S:g} s so far."):
            document, table = measure.measure(work, objectives, measure.Plan(blocks, cast(Space, space), problems))
        if document["blocks"] < min(blocks, document["problems"]):
            out.say(
                f"note: {document['blocks']} blocks are made, because gradients of more take over {measure.MOST_BYTES >> 30} GiB"
            )
        told = verdicts(document) if judge else []
        out.told.result = document | {"verdicts": told}
        show(document, out, work.run.train.batch_traces)
        for sentence in told:
            out.say(sentence)
        same = held is not None and held["policy"] == document["policy"] and is_of_now(held, {number: document["measured"]})
        if held is not None and same and held["traces"] > document["traces"]:
            kept = store.locate(path_of(number, "json"))
            out.say(f"not kept: round {number} has an audit of {held['traces']} traces. Delete {kept} for a smaller one")
            return
        write_audit(store, number, document, table)
        out.say(f"figures: {store.locate(path_of(number, 'json'))}; alignment of every token: ...{number:04d}.parquet")


def _is_gated(name: str) -> bool:
    return name.split("+")[0] in GATED and name != UNGATED and "+off" not in name


def _held(store: Store, number: int) -> dict[str, Any] | None:
    """The stored audit of this round, as it is before another is made. One that cannot be read is none, and gives way."""
    with contextlib.suppress(StoreError):
        return read_audit(store, number)
    return None


def verdicts(document: dict[str, Any]) -> list[str]:
    """A sentence for each gated objective, and what they are worth: whether its gate helps, hurts or cannot be told apart.

    Each is compared with itself without the gate, by averaged cosine; the intervals hold for all sentences together. The map of
    tests/benchmarks/MAP.md found that this figure ranks what training gains. So does the batch cosine. But that can be high by
    its signal alone, of which the map found nothing.
    """
    gated, found = [point for point in document["points"] if _is_gated(point["name"])], []
    for point in gated:
        gap = figures.together(point["difference"].get("averaged_cosine"), document["blocks"], len(gated))
        if gap is None:
            found.append(f"{point['name']}: these traces do not tell whether its gate helps")
            continue
        told = "helps" if gap["low"] > 0 else "hurts" if gap["high"] < 0 else "cannot be told apart from no gate"
        found.append(f"{point['name']}: the gate {told} here, averaged cosine {_text(gap, '+')} against the same without it")
    return [*found, MEANING]


def show(document: dict[str, Any], out: Session, batch: int) -> None:
    """Print the figures of an audit as tables."""
    size = f"{document['traces']} traces of {document['problems']} problems, policy {document['policy']}"
    table = aligned(f"{size}, {document['blocks']} blocks", "weighting", "cosine", "batch cosine", "signal", "against the first")
    for point in document["points"]:
        gap = point["difference"].get("batch_cosine")
        table.add_row(point["name"], *(_text(point[name]) for name in FIGURES), _text(gap, "+"))
    out.console.print(table)
    table = aligned(
        "in the long run, along accuracy and length", "weighting", "averaged cosine", "push", "longer", "AdamW's step"
    )
    for point in document["points"]:
        told = (_text(point["averaged_cosine"]), _text(point["push"]), _text(point["longer"], "+"), _text(point[figures.STEP]))
        table.add_row(point["name"], *told)
    out.console.print(table)
    out.console.print(_class_table(document))
    out.console.print(_decile_table(document))
    if document["classes"]["each"]:
        out.console.print(_alone_table(document))
    if "labels" in document["classes"]:
        for labels in _label_tables(document["classes"]["labels"]):
            out.console.print(labels)
    for note in NOTES:
        out.console.print(note.format(batch=batch), style="dim", highlight=False)
    clock = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in document["seconds"].items())
    out.say(f"{document['parameters']} parameters ({document['space']}); {clock}")


def _class_table(document: dict[str, Any]) -> Table:
    """Share of each regime in the push towards accuracy, one row for each weighting."""
    shares, names = document["classes"]["regime"], document["classes"]["regimes"]
    table = aligned("share of the push towards accuracy by regime, %", "weighting", *names)
    table.add_row("tokens", *(f"{100 * share:.1f}" for share in shares["tokens"]))
    for point in document["points"]:
        table.add_row(point["name"], *(_text(part, scale=100, digits=0) for part in shares[point["name"]]))
    return table


def _alone_table(document: dict[str, Any]) -> Table:
    """The reference's gradient on the tokens of one class alone: which tokens' gradients point up?"""
    title = "the reference on the tokens of one class alone"
    table = aligned(title, "tokens", "cosine", "batch cosine", "signal", "push")
    names = {"regime": document["classes"]["regimes"], "decile": [f"tenth {1 + place}" for place in range(figures.DECILES)]}
    for kind, points in document["classes"]["each"].items():
        for name, point in zip(names[kind], points, strict=True):
            table.add_row(name, *(_text(point[figure]) for figure in ("cosine", "batch_cosine", "batch_share", "push")))
    return table


def _decile_table(document: dict[str, Any]) -> Table:
    """The same by decile of the teacher's entropy, without intervals: ten of them fit no terminal."""
    shares = document["classes"]["decile"]
    title = "share of the push by tenth of the teacher's entropy, the lowest first, % (the report has intervals)"
    table = aligned(title, "weighting", *(str(1 + place) for place in range(figures.DECILES)))
    for point in document["points"]:
        values = (part and f"{100 * part['value']:.0f}" for part in shares[point["name"]])
        table.add_row(point["name"], *(value or "-" for value in values))
    return table


def _label_tables(labels: dict[str, Any]) -> list[Table]:
    """What a tiny world knows: the signals of each true class, and how well the regimes find the classes."""
    signals = ("entropy", "lookahead", "log_ratio", "delta")
    truth = aligned("means by true class, nats", "class", "tokens", *signals)
    for name, row in labels["by_class"].items():
        truth.add_row(name, str(row["tokens"]), *("-" if row[key] is None else f"{row[key]:.3f}" for key in signals))
    found = aligned("regimes as signs of a true class", "regime", "class", "precision", "recall")
    for name, row in labels["regimes"].items():
        scores = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("precision", "recall"))
        found.add_row(name, row["class"], *scores)
    return [truth, found]


def _text(found: dict[str, float] | None, sign: str = "", scale: float = 1.0, digits: int = 3) -> str:
    if found is None:
        return "-"
    value, low, high = (f"{scale * found[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
