"""`egrsd verify`: read every file of a run and prove that it is what was written, and that all files fit together."""

from __future__ import annotations

import contextlib
import sys

from jobs.opened import open_folder, open_run
from jobs.screen.terminal import session
from pipeline.choice.rates import read_kept
from pipeline.errors import StoreError
from pipeline.evidence.documents import read_evidence
from pipeline.evidence.trackers import read_fed
from pipeline.inspection.proof import prove
from pipeline.live.lease import LeaseFile, is_dead, read_lease
from pipeline.notices import NOTICE_S, late
from pipeline.store.directory import Store

AGAIN = "Verify once more when that command has ended"


def verify_run(uri: str, debug: bool) -> None:
    """Print one line for each finding. The exit code is 1 when there is one. Nothing is changed.

    Raises UserError when there is no run, and StoreError for a damaged run.json, without which nothing else can be read.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        live = [lease.holder for lease in (_lease(store), _lease(open_folder(store.locate("evals")))) if lease is not None]
        with late("verify", f"the files of {store.uri} have been read for {NOTICE_S:g} s so far."):
            proof = prove(store, run)
            for read in (read_evidence, read_lease, read_fed, read_kept):
                with proof.found():
                    read(store)
        out.told.result = {"run": store.uri, "read": proof.read, "findings": [str(finding) for finding in proof.findings]}
        for finding in proof.findings:
            out.say(f"found: {finding}")
        if proof.findings:
            out.say(f"{len(proof.findings)} findings in {store.uri}.")
            for holder in live:
                out.say(f"note: {holder} was working on this run. A file that it was writing may be found. {AGAIN}.")
            sys.exit(1)
        out.say(f"{store.uri} is whole: {proof.read} parts (shards, policies, files) were read, and nothing was found.")


def _lease(store: Store) -> LeaseFile | None:
    """The lease of a command that may be alive. None for a damaged one, which is found later."""
    with contextlib.suppress(StoreError):
        lease = read_lease(store)
        return lease if lease is not None and not is_dead(lease) else None
    return None
