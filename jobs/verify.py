"""`egrsd verify`: read every file of a run and prove that it is what was written, and that all files fit together."""

from __future__ import annotations

import sys

from jobs.opened import open_run
from jobs.terminal import session
from pipeline.evidence.sweep import read_evidence
from pipeline.evidence.trackers import read_fed
from pipeline.rounds.proof import prove
from pipeline.store.lease import read_lease


def verify_run(uri: str, debug: bool) -> None:
    """Print one line for each finding. The exit code is 1 when there is one. Nothing is changed.

    Raises UserError when there is no run, and StoreError for a damaged run.json, without which nothing else can be read.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        proof = prove(store, run)
        for read in (read_evidence, read_lease, read_fed):
            with proof.found():
                read(store)
        for finding in proof.findings:
            out.say(f"found: {finding}")
        if proof.findings:
            out.say(f"{len(proof.findings)} findings in {store.uri}.")
            sys.exit(1)
        out.say(f"{store.uri} is whole: {proof.read} rounds, shards, policies and files were read, and nothing was found.")
