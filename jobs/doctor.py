"""`egrsd doctor`: check whether this machine or a cluster can run a recipe, in lines of ok, warning and error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from actors.folders import judge_folders
from actors.inference.engine import judge_entropy
from actors.resources import placement_of
from actors.served import Served
from jobs.opened import look_at, open_folder
from jobs.screen.terminal import Session, divert_output, session
from jobs.settle import Choices, Settled, settled
from pipeline import config
from pipeline.driver import open_sources
from pipeline.errors import EgrsdError, UnreachableError, command
from pipeline.evidence import trackers
from pipeline.fit import footprint, machine, one_card, pace
from pipeline.fit.machine import Facts, Line
from pipeline.grader.code import Code, codes_of
from pipeline.inspection import looked as rows
from pipeline.inspection.shown import show_prompts
from pipeline.live.probe import judge_store
from pipeline.models import fitness
from pipeline.models.layers import with_targets
from pipeline.models.resolve import has_weights
from pipeline.models.tokenizers.agreement import check_teachers
from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of
from pipeline.notices import NOTICE_S, late
from pipeline.overrides import refuse_unread_objective
from pipeline.problems.sources import named as named_source
from pipeline.problems.sources import open_source
from pipeline.problems.survey import overlap, survey
from pipeline.rounds.round import reward_codes
from pipeline.stages.chat import unheard_end
from pipeline.stages.reward import check as check_rewards
from pipeline.store.directory import Store

SOURCES = ("source", "evaluation.source")  # settings that say which problems a run has


def doctor(choices: Choices, uri: str | None, address: str | None, debug: bool) -> None:
    """Print every finding, and end with exit code 1 when one is an error. Raises SettingError for an unknown recipe.

    A source that a file or a `--set` line names is looked at too. Three of its prompts are shown as the models will see them.
    """
    with session(debug) as out:
        store = open_folder(uri) if uri is not None else None
        found = chosen(choices, store)
        run, changed = found.run, found.changed()
        known = store is not None and store.exists() and bool(store.numbers("rounds"))
        own_source = choices.config is not None or any(line.startswith(SOURCES) for line in choices.sets)
        here = machine.gather(nearest_folder(store))
        findings = tell([*machine.judge(here, machine.requirements()), *judge_folders()], out)
        largest = here
        with contextlib.suppress(EgrsdError):  # what is wrong with the model is a finding of its own below
            run = with_targets(run, new=not known)
        if address is not None:
            nodes = look_at(out, address)
            findings += tell(machine.judge_nodes(nodes, machine.requirements()), out)
            largest = machine.best([facts for facts in nodes.values() if isinstance(facts, Facts)] or [here])
        if own_source:
            findings += tell(judge("source", lambda: judge_sources(run)), out)
        elif run.source.uri.startswith("reasoning-gym:"):  # an extra brings it
            findings += tell(judge("source", lambda: [judge_extra(run)]), out)
        findings += tell(judge("tokenizer", lambda: [judge_tokenizer(run)]), out)
        findings += tell(judge("model", lambda: judge_layers(run, known)), out)
        findings += tell(judge("model", lambda: judge_model(run, largest)), out)
        findings += tell(judge("rewards", lambda: judge_rewards(run, store)), out)
        findings += tell(judge("teachers", lambda: judge_teachers(run, largest)), out)
        asked = choices.config is not None or bool(choices.sets)
        if asked and not any(line.level == "error" for line in findings):
            findings += tell(judge("settings", lambda: judge_settings(run, choices, known, store)), out)
            if found.begun and changed:
                text = f"only with --accept-changes, since the run has other values of {', '.join(name for name, *_ in changed)}"
                findings += tell([Line("warning", "settings", text)], out)
        findings += tell(judge("resources", lambda: [judge_room(run, here, address)]), out)
        findings += tell(judge("exact entropy", lambda: [judge_hook(run, here, address, debug)], "a real engine to start"), out)
        if store is not None:
            findings += tell(judge("store", lambda: judge_store(store)), out)
        if own_source:
            show_real_prompts(run, out)
        errors, warnings = (sum(line.level == level for line in findings) for level in ("error", "warning"))
        out.say(f"{'settings' if choices.config else 'recipe'} {run.name}: {errors} errors, {warnings} warnings")
        out.told.result = (out.told.result or {}) | {"findings": [asdict(line) for line in findings]}
        if errors:
            sys.exit(1)
        if choices.config is not None:
            out.say(f"{offered(choices, found, uri)} runs it.")


def chosen(choices: Choices, store: Store | None) -> Settled:
    """The settings to check, which `distill` would take. Without a run, recipe or file they are those of `demo`."""
    return settled(store, choices if store is not None and store.exists() else choices.or_demo())


def offered(choices: Choices, found: Settled, uri: str | None) -> str:
    """The command that runs what was checked."""
    accept = ["--accept-changes"] if found.begun and found.changed() else []
    return command("distill", *choices.words(), *accept, "--run", uri or f"runs/{found.run.name}")


def judge_sources(run: config.Run) -> list[Line]:
    """What the run makes of its problems and of its held-out problems. Raises SourceError."""
    training = open_source(run.source)
    lines = rows.look(training, run)
    counted = survey(training, None, solutions=run.reads_solutions)
    lines += [Line("warning", "rows", said)] if (said := counted.repeats()) else []
    if run.evaluation.problems:
        held_out = open_source(run.evaluation.source, setting="evaluation.source").without_solutions()
        asked = survey(held_out, None, run.evaluation.problems)
        usable = asked.rows - asked.rejected.total()
        size = f"{len(held_out)} rows, of which {asked.rows} are asked and {usable} can be used"
        lines.append(Line("ok" if usable else "error", "held out", f"{named_source(run.evaluation.source)}: {size}"))
        lines += [Line("warning", "held out", said) for said in (asked.lacks(), overlap(counted, asked)) if said]
    return lines


def judge_extra(run: config.Run) -> Line:
    """Whether the package that makes the problems of a recipe is here. Raises SourceError."""
    return Line("ok", "source", f"{named_source(run.source)}: {len(open_source(run.source))} problems")


def show_real_prompts(run: config.Run, out: Session) -> None:
    """Print three real prompts, ids and text. Nothing is printed where the findings have told why there are none."""
    with contextlib.suppress(EgrsdError):
        found = show_prompts(open_source(run.source), run)
        out.told.result = {"prompts": [one.document() for one in found]}
        for line in (line for one in found for line in one.lines()):
            out.say(line)


def look_at_source(source: str, choices: Choices, uri: str | None = None, debug: bool = False) -> None:
    """Print what a run would make of a source, and end with exit code 1 when none of its rows can be used.

    Prompts and imported traces are made with the settings of a recipe, a file or the run at `uri`. Without these only columns are
    read. Raises SettingError for a wrong setting, and SourceError for a source that cannot be read.
    """
    with session(debug) as out:
        asked = replace(choices, sets=[f"source.uri={source}", *choices.sets])
        store = open_folder(uri) if uri is not None else None
        if asked.can_begin:
            run = settled(store, asked).run
        else:
            run = asked.over(store.load_run() if store is not None else config.Run(name="source"))
        whole = store is not None or asked.can_begin
        findings = tell(rows.look(open_source(run.source), run if whole else None), out)
        out.told.result = {"findings": [asdict(line) for line in findings]}
        if any(line.level == "error" for line in findings):
            sys.exit(1)


def judge(topic: str, find: Callable[[], list[Line]], who: str = "") -> list[Line]:
    """The findings on one topic. An error of this project or of the file system is a finding too.

    What only the hub knows, which cannot be reached, is a warning. `who` is waited for, and named when that takes long.
    """
    try:
        with late(topic, f"{topic}: waiting for {who or 'this check'}, for {NOTICE_S:g} s so far."):
            return find()
    except UnreachableError as error:
        text = "not checked: no folder here has this name, the hub cannot be reached, and its copy on this machine lacks it"
        return [Line("warning", topic, f"{error.where}: {text}. A run needs it on its nodes")]
    except (EgrsdError, OSError) as error:
        return [Line("error", topic, str(error))]


def tell(lines: Iterable[Line], out: Session) -> list[Line]:
    """Print findings in columns, and return them."""
    findings = list(lines)
    for line in findings:
        out.say(f"{line.level:<8} {line.topic:<16} {' '.join(line.text.split())}")
    return findings


def nearest_folder(store: Store | None) -> str:
    """The nearest existing folder above a run's local directory; the run will use its disk."""
    folder = store.local_root if store is not None and store.local_root is not None else Path()
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def judge_tokenizer(run: config.Run) -> Line:
    """Whether the tokenizer loads, and the hash of its chat template. Student and teacher share it. Raises ModelError."""
    tokenizer = tokenizer_of(run.model)
    check_teachers(run)
    return Line("ok", "tokenizer", f"{len(tokenizer)} tokens, hash {template_hash(tokenizer)}, student and teacher alike")


def judge_layers(run: config.Run, known: bool) -> list[Line]:
    """Whether trainer and engines can use the model, and which layers are trained. known: the run exists. Raises ModelError."""
    run = with_targets(run, new=not known)
    lines = [Line("ok", "model", note.removeprefix("note: ")) for note in fitness.check(run, machine.vllm_for_gpus(), known)]
    unheard = unheard_end(run.model)
    return [*lines, Line("warning", "model", unheard.removeprefix("note: "))] if unheard else lines


def judge_settings(run: config.Run, choices: Choices, known: bool, store: Store | None) -> list[Line]:
    """All that `egrsd distill` checks of these settings before it starts anything. Raises what it raises."""
    refuse_unread_objective([run], list(choices.sets))
    trackers.check(run)
    open_sources(with_targets(run, new=not known), _codes(store, run), begun=known)
    return [Line("ok", "settings", "a run would start with them")]


def judge_rewards(run: config.Run, store: Store | None) -> list[Line]:
    """What the rewards of a run are, after each was tried here. What else is said of them is a warning. Raises SettingError."""
    notes = check_rewards(run, _codes(store, run), open_source(run.source)) if run.grade.rewards else []
    return [Line("ok" if "in child processes" in note else "warning", "rewards", note.removeprefix("note: ")) for note in notes]


def _codes(store: Store | None, run: config.Run) -> dict[str, Code]:
    """The code of each reward. None of it may lie in the folder of the run."""
    return codes_of(run) if store is None else reward_codes(store, run)


def judge_teachers(run: config.Run, facts: Facts) -> list[Line]:
    """Whether the engines of teachers fit a machine, and whether their servers answer as they must. Raises ModelError."""
    lines = []
    for name, teacher in run.teachers.items():
        model, pool = run.model_of(teacher), run.pool_of(teacher)
        if teacher.server:
            served = Served(name, teacher, model, pool, run.score)
            found = served.facts()
            served.close()
            lines.append(
                Line("ok", f"teachers.{name}", f"{teacher.server} answers: {found.engine}, entropies {found.entropy_method}")
            )
        elif run.has_pool(teacher):
            lines.append(footprint.engine_fit(model, pool, footprint.measure(model), facts, f"teachers.{name}"))
    return lines


def judge_room(run: config.Run, here: Facts, address: str | None) -> Line:
    """Whether the run's actors fit the cluster at `address`, or this machine without it. Raises ResourceError."""
    from actors import cluster  # imports Ray, which must see the environment that the session sets

    return cluster.judge_room(run, len(here.gpus), joined=address is not None)


def judge_model(run: config.Run, facts: Facts) -> list[Line]:
    """Memory and pace of a run on a machine, and whether the weights of a hub's model are here. Raises ModelError."""
    size = footprint.measure(run.model)
    lines = [*footprint.fit(run, size, facts), *one_card.judge(run, size, facts), *pace.estimate(run, size, facts)]
    lines += pace.threads(run, facts)
    if has_weights(run.model):
        return lines
    text = f"{run.model.path}: not on this machine. The first engine of each node loads them from the hub, within start_timeout_s"
    return [*lines, Line("warning", "weights", text)]


def judge_hook(run: config.Run, here: Facts, address: str | None, debug: bool) -> Line:
    """The entropies that a real engine gives: on a node of the cluster when the engines want GPUs, else on this machine.

    vLLM's output is shown with `debug` only. Raises ModelError or EngineError when the engine does not start.
    """
    with divert_output(Path("/dev/stderr" if debug else os.devnull)):
        if address is not None and placement_of(run.engines.rollout).gpus > 0:
            from actors import cluster

            return cluster.entropy_there(run)
        if machine.vllm_for_gpus() and not here.gpus:
            text = "not checked: the GPU build of vLLM starts on no machine without a GPU. Run this with --address on the cluster"
            return Line("warning", "exact entropy", text)
        return judge_entropy(run, len(here.gpus))
