"""`egrsd doctor`: whether this machine, or a cluster, can carry a recipe, said in lines of ok, warning and error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from jobs.opened import look_at, open_folder
from jobs.terminal import Session, divert_output, session
from pipeline import config
from pipeline.errors import EgrsdError
from pipeline.fit import footprint, machine
from pipeline.fit.machine import Facts, Line
from pipeline.models.tokenizer import template_hash, tokenizer_of
from pipeline.recipes import recipe as named
from pipeline.store.directory import Store
from pipeline.store.probe import judge_store


def doctor(recipe: str | None, uri: str | None, address: str | None, debug: bool) -> None:
    """Print every finding; exit code 1 when one is an error. Raises SettingError for an unknown recipe."""
    with session(debug) as out:
        store = open_folder(uri) if uri is not None else None
        run = store.load_run() if store is not None and recipe is None and store.exists() else named(recipe or "demo")
        here = machine.gather(nearest_folder(store))
        found = tell(machine.judge(here, machine.requirements()), out)
        carrier = here
        if address is not None:
            nodes = look_at(address)
            found += tell(machine.judge_nodes(nodes, machine.requirements()), out)
            carrier = machine.best([there for there in nodes.values() if isinstance(there, Facts)] or [here])
        found += tell(judge("tokenizer", lambda: [judge_tokenizer(run)]), out)
        found += tell(judge("model", lambda: footprint.fit(run, footprint.measure(run.model), carrier)), out)
        found += tell(judge("resources", lambda: [judge_room(run, here, address)]), out)
        found += tell(judge("exact entropy", lambda: [judge_hook(run, here, debug)]), out)
        if store is not None:
            found += tell(judge("store", lambda: judge_store(store)), out)
        errors, warnings = (sum(line.level == level for line in found) for level in ("error", "warning"))
        out.say(f"recipe {run.name}: {errors} errors, {warnings} warnings")
        if errors:
            sys.exit(1)


def judge(topic: str, find: Callable[[], list[Line]]) -> list[Line]:
    """The findings on one topic; an error that is understood is a finding of its own."""
    try:
        return find()
    except (EgrsdError, OSError) as error:
        return [Line("error", topic, str(error))]


def tell(lines: Iterable[Line], out: Session) -> list[Line]:
    """Print findings, aligned, and hand them on."""
    told = list(lines)
    for line in told:
        out.say(f"{line.level:<8} {line.topic:<16} {' '.join(line.text.split())}")
    return told


def nearest_folder(store: Store | None) -> str:
    """The existing folder that a run's local directory is in, or will be: its disk is what counts."""
    place = store.local_root if store is not None and store.local_root is not None else Path()
    while not place.is_dir():
        place = place.parent
    return str(place)


def judge_tokenizer(run: config.Run) -> Line:
    """Tokenizer and template hash. Student and teacher are one model, so that they see the same ids. Raises ModelError."""
    tokenizer = tokenizer_of(run.model)
    return Line("ok", "tokenizer", f"{len(tokenizer)} tokens, hash {template_hash(tokenizer)}, student and teacher alike")


def judge_room(run: config.Run, here: Facts, address: str | None) -> Line:
    """Actors against the resources of the cluster at `address`, or of this machine. Raises ResourceError."""
    from actors import cluster

    return cluster.judge_room(run, len(here.gpus), joined=address is not None)


def judge_hook(run: config.Run, here: Facts, debug: bool) -> Line:
    """The entropies that a real engine gives here; its own output is shown with `debug` only. Raises ModelError, EngineError."""
    with divert_output(Path("/dev/stderr" if debug else os.devnull)):
        from actors.trial import judge_entropy

        return judge_entropy(run, len(here.gpus))
