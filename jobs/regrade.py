"""`egrsd stage grade --run R --diff`: which stored verdicts the grader of now would change. It writes nothing; no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.markup import escape

from jobs.opened import open_run
from jobs.screen.tables import aligned
from jobs.screen.terminal import printable, session
from jobs.settle import parse_numbers
from pipeline.config import Run
from pipeline.errors import UserError, command
from pipeline.grader.verifier import grader_of
from pipeline.inspection.regrade import Change, regrade
from pipeline.notices import NOTICE_S, late
from pipeline.overrides import differences, resolve
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round, open_rounds
from pipeline.stages import check_settings, find_stage
from pipeline.store.directory import Store
from pipeline.store.names import EVALUATION_FOLDER

_SHOWN_CHARS = 60


def show_changes(uri: str, stage: str, rounds: str | None, sets: Sequence[str] = (), debug: bool = False) -> None:
    """Grade the stored traces of some rounds, or of all rounds and evaluations, and print the verdicts that would change.

    Raises UserError for another stage than grade, for an unknown round, and for a setting that the stage does not read.
    """
    with session(debug) as out:
        if stage != "grade":
            raise UserError(f"'{stage}' has no verdicts", "--diff", f"Use {command('stage', 'grade', '--run', uri, '--diff')}")
        store, old = open_run(uri)
        run = resolve(old, list(sets))
        if run.grade.verdict_reward is not None:
            what = f"the reward '{run.grade.verdict_reward}' decides the verdicts of this run, and no verifier"
            raise UserError(
                what,
                "--diff",
                f"{command('stage', 'reward', '--run', uri, '--round', rounds or '0', '--force')} runs the rewards again",
            )
        check_settings(find_stage(stage), (setting for setting, _, _ in differences(old, run)))
        out.exits.enter_context(late("regrade", f"stored answers of {store.uri} have been graded for {NOTICE_S:g} s so far."))
        numbers = parse_numbers(rounds, "--round", "3 or 0..15") if rounds is not None else []
        works = _all_works(store, run) if rounds is None else [open_round(store, run, "rounds", number) for number in numbers]
        grader = grader_of(run)
        rows, stale, counts = 0, 0, Counter[tuple[str, str]]()
        table = aligned("", "round", "problem", "gold", "answer's end", "stored", "now")
        for work in works:
            for shard in regrade(work, grader):
                rows, stale = rows + shard.rows, stale + shard.stale
                counts.update((change.old, change.new) for change in shard.changes)
                for change in shard.changes:
                    table.add_row(str(work.number) if work.kind == "rounds" else work.area, *_cells(change))
        grader.close()
        if counts:
            out.console.print(table)
        out.say(f"{counts.total()} of {rows} stored verdicts would change{':' if counts else '.'}")
        for (before, after), count in counts.most_common():
            out.say(f"  {count} {before} -> {after}")
        if rounds is None and (others := [name[0] for name in store.named("evals", EVALUATION_FOLDER)]):
            out.say(f"Left out, because they have grading settings of their own: evals/{', evals/'.join(others)}.")
        out.told.result = {"rows": rows, "stale": stale, "changes": [[*pair, count] for pair, count in counts.most_common()]}
        again = command("stage", "grade", "--run", uri, "--round", rounds or "0", "--force")
        if stale:
            out.say(f"{stale} shards were left out: their traces changed since. {command('status', uri)} tells which.")
        if counts:
            out.say(f"Nothing was changed. {again} grades again.")


def _all_works(store: Store, run: Run) -> Iterator[Round]:
    """All rounds, then all evaluations of the run's own held-out problems.

    An evaluation on another source has grading settings of its own, and is left out.
    """
    yield from open_rounds(store, run)
    for version in store.numbers("evals"):
        if read_plan(store, "evals", version) is not None:
            yield open_round(store, evaluation_run(run), "evals", version)


def _cells(change: Change) -> tuple[str, ...]:
    end = " ".join(change.response.split())[-_SHOWN_CHARS:]
    cells = change.prompt_id, " ".join(change.gold.split())[:_SHOWN_CHARS], end, change.old, change.new
    return tuple(escape(printable(cell)) for cell in cells)
