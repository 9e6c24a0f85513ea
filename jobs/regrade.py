"""`egrsd stage grade --diff --run URI`: which stored verdicts the grader of now would change. It writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jobs.opened import open_run
from jobs.tables import aligned
from jobs.terminal import session
from pipeline.errors import UserError
from pipeline.overrides import differences, resolve
from pipeline.rounds.regrade import Change, regrade
from pipeline.rounds.round import open_round, open_rounds
from pipeline.stages import check_settings, find_stage
from pipeline.stages.verifier import grader_of

_SHOWN_CHARS = 60


def show_changes(uri: str, stage: str, number: int | None, sets: Sequence[str] = (), debug: bool = False) -> None:
    """Grade the stored traces of a round, or of all rounds, and print the verdicts that would change.

    Raises UserError for another stage than grade, for an unknown round, and for a setting that the stage does not read.
    """
    with session(debug) as out:
        if stage != "grade":
            raise UserError(f"'{stage}' has no verdicts", "--diff", "Use `egrsd stage grade --run URI --diff`")
        store, old = open_run(uri)
        run = resolve(old, list(sets))
        check_settings(find_stage(stage), (setting for setting, _, _ in differences(old, run)))
        rounds = open_rounds(store, run) if number is None else [open_round(store, run, "rounds", number)]
        grader = grader_of(run)
        rows, counts = 0, Counter[tuple[str, str]]()
        table = aligned("", "round", "problem", "gold", "answer's end", "stored", "now")
        for work in rounds:
            for shard in regrade(work, grader):
                rows += shard.rows
                counts.update((change.old, change.new) for change in shard.changes)
                for change in shard.changes:
                    table.add_row(str(work.number), *_cells(change))
        grader.close()
        if counts:
            out.console.print(table)
        out.say(f"{counts.total()} of {rows} stored verdicts would change{':' if counts else '.'}")
        for (before, after), count in counts.most_common():
            out.say(f"  {count} {before} -> {after}")
        if counts:
            out.say("Nothing was changed. `egrsd stage grade --run URI --round N --force` grades a round again.")


def _cells(change: Change) -> tuple[str, ...]:
    end = " ".join(change.response.split())[-_SHOWN_CHARS:]
    return change.prompt_id, " ".join(change.gold.split())[:_SHOWN_CHARS], end, change.old, change.new
