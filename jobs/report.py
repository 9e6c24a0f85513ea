"""`egrsd report`: write one self-contained HTML file that shows a run."""

from __future__ import annotations

from jobs.opened import open_folder, open_run
from jobs.terminal import session
from pipeline.errors import UserError
from pipeline.notices import NOTICE_S, late
from pipeline.report.collect import collect, read_comparison
from pipeline.report.page import page
from pipeline.store.directory import Store

REPORT = "report.html"


def report_run(uri: str, compare: str | None, out_uri: str | None, debug: bool, replace: bool = False) -> None:
    """Write the report of a run to `out_uri`, or to report.html in the run. `compare` names a folder whose comparison it shows.

    A file at `out_uri` is replaced only with `replace`; the run's own report is made anew. Raises UserError for such a file, when
    the run has no measured round, or when the folder has no comparison.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        target, name = _target(out_uri) if out_uri else (store, REPORT)
        if out_uri and not replace and target.read_bytes(name) is not None:
            raise UserError("is there already", out_uri, "Name another file, or pass --replace")
        compared = read_comparison(open_folder(compare)) if compare else None
        with late("report", f"the rounds of {store.uri} have been read for {NOTICE_S:g} s so far."):
            document = collect(store, run)
            html = page(document | {"compare": compared})
        target.write(name, html)
        shown, whole = len(document["sample"]["traces"]), document["sample"]["labelled"]
        size = f"{len(html) / 1e6:.1f} MB, {len(document['rounds'])} rounds, {shown} of {whole} labelled traces"
        out.say(f"{target.locate(name)}: {size}")
        out.told.result = {"report": target.locate(name), "rounds": len(document["rounds"]), "traces": [shown, whole]}
        if not document["ledger"]["adds_up"]:
            out.say("The ledger does not add up: see the Run view.")


def _target(uri: str) -> tuple[Store, str]:
    """(folder, file name) of a file's path or URI. Raises UserError when it names a folder."""
    folder, _, name = uri.rpartition("/")
    if not name:
        raise UserError("is a folder", "--out", "Name a file, for example report.html")
    return open_folder(folder or ("/" if uri.startswith("/") else ".")), name
