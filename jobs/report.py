"""`egrsd report`: write one self-contained HTML file that shows one run or compares several, or serve it while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.opened import open_folder, open_run
from jobs.screen.terminal import session
from jobs.serving import Watched, serve
from pipeline.errors import UserError
from pipeline.notices import NOTICE_S, late
from pipeline.report.collect import collect_all, read_comparison
from pipeline.report.page import page
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from jobs.screen.terminal import Session

REPORT = "report.html"


def report_run(uris: list[str], compare: str | None, out_uri: str | None, debug: bool, replace: bool = False) -> None:
    """Write the report of one run to `out_uri`, or to report.html in the run. Several runs share one page.

    `compare` names a folder whose comparison it shows. A file at `out_uri` is replaced only with `replace`; the report in the
    first run is made anew. Raises UserError for such a file, when a run has no measured round, or when the folder has no
    comparison.
    """
    with session(debug) as out:
        runs = [open_run(uri) for uri in uris]
        target, name = _target(out_uri) if out_uri else (runs[0][0], REPORT)
        if out_uri and not replace and target.read_bytes(name) is not None:
            raise UserError("is there already", out_uri, "Name another file, or pass --replace")
        target.is_ours = out_uri is None
        target.check_writable()
        compared = read_comparison(open_folder(compare)) if compare else None
        with late("report", f"the rounds of {', '.join(uris)} have been read for {NOTICE_S:g} s so far."):
            document = collect_all(runs) | {"compare": compared}
            html = page(document)
        target.write(name, html)
        out.told.result = {"report": target.locate(name), "bytes": len(html), "runs": uris}
        out.say(f"{target.locate(name)}: {len(html) / 1e6:.1f} MB")
        for run in document["runs"]:
            _tell(out, run, f"{run['run']['folder']}: " if len(uris) > 1 else "")


def serve_run(uris: list[str], compare: str | None, port: int, debug: bool) -> None:
    """Serve the report on the loopback address, and follow the runs until the command is interrupted.

    Raises UserError when there is no run, or when the port is taken.
    """
    with session(debug) as out:
        runs = [open_run(uri) for uri in uris]
        compared = read_comparison(open_folder(compare)) if compare else None
        with serve(Watched(runs, compared), port) as served:
            out.told.result = {"address": served.address, "runs": uris}
            out.say(f"{served.address} (Ctrl-C ends it)")
            served.watch(out.say)


def _tell(out: Session, run: dict[str, Any], who: str) -> None:
    sample = run["sample"]
    shown = len(sample["traces"].get("id", ()))
    out.say(f"{who}{len(run['rounds'])} rounds, {shown} of {sample['labelled']} labelled traces")
    if not run["ledger"]["adds_up"]:
        out.say(f"{who}The ledger does not add up: see the Run view.")


def _target(uri: str) -> tuple[Store, str]:
    """(folder, file name) of a file's path or URI. Raises UserError when it names a folder."""
    folder, _, name = uri.rpartition("/")
    if not name:
        raise UserError("is a folder", "--out", "Name a file, for example report.html")
    return open_folder(folder or ("/" if uri.startswith("/") else ".")), name
