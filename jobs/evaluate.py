"""`egrsd evaluate`: a run's policies solve benchmarks or other problems, with the run's engines, store and grader."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.pool.member import EngineClass
from jobs.engines import open_engines
from jobs.opened import hold, holding_for, open_folder, open_run, start
from jobs.screen import tables
from jobs.screen.progress import open_screen, phase
from jobs.screen.terminal import Session, session
from jobs.settle import Choices, chosen_policies
from pipeline.config import Run
from pipeline.errors import SettingError, UserError
from pipeline.evidence.asked import Asked, ask, is_missing, macro_mean, summarise
from pipeline.fit.machine import vllm_for_gpus
from pipeline.fit.versions import versions
from pipeline.models import fitness
from pipeline.models.layers import with_targets
from pipeline.overrides import differences
from pipeline.rounds import contents
from pipeline.rounds.refused import refuse_unusable
from pipeline.rounds.round import reward_codes
from pipeline.stages.chat import unheard_end
from pipeline.stages.grade import check_references
from pipeline.stages.reward import check as check_rewards
from pipeline.store.directory import Store


@dataclass(frozen=True)
class Options:
    """The options of the command line: policies such as `0,last`, sources, the k of pass@k, and `--set` lines.

    Without sources the run's own held-out problems are used. `recipe` or the file `config` makes a run that has no round yet.
    """

    policies: str
    sources: list[str]
    k: int | None
    sets: list[str]
    recipe: str | None = None
    config: str | None = None


def evaluate(uri: str, options: Options, address: str | None, debug: bool, engine_class: EngineClass | None = None) -> None:
    """Evaluate policies on every source. Print tables, and write summary.json beside the shards, also of policies asked before.

    Only missing traces are generated. There are `k` samples per problem, unless `--set evaluation.samples=n` asks for more. Then
    pass@k is the unbiased estimate from n samples. Raises UserError or SettingError for mistaken options, and UserError when no
    problem of a source can be asked.
    """
    with session(debug) as out:
        store, run = begun(uri, options, out)
        numbers = chosen_policies(store, options.policies)
        with phase(out, "reading problems and model"):
            asked = [ask(run, source, options.k, options.sets) for source in options.sources or [""]]
        if twice := [a.kind for i, a in enumerate(asked) if a.kind in {b.kind for b in asked[:i]}]:
            raise UserError("is given twice with the same settings", f"--source {twice[0].removeprefix('evals/')}")
        notes = [note for one in asked for note in (*one.source.cautions(), check_references(one.source, one.run)) if note]
        for note in dict.fromkeys(notes):
            out.say(note)
        missing = [one for one in asked if any(is_missing(store, one, number) for number in numbers)]
        for one in missing:
            refuse_unusable(one.source, range(one.problems), one.run, "the evaluation")
            for note in check_rewards(one.run, reward_codes(store, one.run), one.source):
                out.say(note)
        if missing:
            contents.refuse_other(store, run)
            evals = open_folder(store.locate("evals"))
            hold(out, evals)
            start(out, store, address, held=evals)
            answer(store, asked, numbers, out, engine_class)
        summaries = {}
        samples = [{number: one.read(store, number) for number in numbers} for one in asked]
        for one, by_policy in zip(asked, samples, strict=True):
            summaries[one.kind] = summarise(store, one, one.with_earlier(store, by_policy))
            show(out, one, summaries[one.kind])
        out.told.result = dict(summaries)
        if len(asked) > 1:
            out.told.result["macro_mean"] = macro_mean(asked[0], samples)
            out.console.print(tables.of_macro_mean(out.told.result["macro_mean"]))
        for kind, summary in summaries.items():  # at the end: a run that may only be read takes no file
            store.keep_json(f"{kind}/summary.json", summary)
            out.say(f"{store.locate(kind)}/summary.json")


def begun(uri: str, options: Options, out: Session) -> tuple[Store, Run]:
    """The run to evaluate. A recipe or a file makes it when it is not there, so that its base can be measured first.

    Raises SettingError when a run of other settings is there.
    """
    choices = Choices(options.recipe, (), options.config)  # `--set` changes the evaluation, and not the run
    if not choices.can_begin:
        return open_run(uri)
    store = open_folder(uri)
    run = with_targets(choices.fresh())
    for note in filter(None, (*fitness.check(run, vllm_for_gpus()), unheard_end(run.model))):
        out.say(note)
    with holding_for(out, store):
        if not store.exists():
            store.save_run(run, versions())
            contents.keep(store, run, contents.look(run))
        elif changed := differences(store.load_run(), run):
            listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:4])
            remedy = "Leave out --recipe and --config, or use another --run"
            raise SettingError(f"this run was made with other settings: {listed}", store.uri, remedy)
    return store, run


def answer(store: Store, asked: list[Asked], numbers: list[int], out: Session, engine_class: EngineClass | None) -> None:
    """Generate and grade the missing traces of every policy on every source, with one pool of engines."""
    run = asked[0].run
    one_pool = run.engines.model_copy(update={"score": None})  # an evaluation scores nothing
    run = run.model_copy(update={"engines": one_pool})
    with open_engines(run, engine_class, say=out.say) as engines, open_screen(out) as screen:
        for one in asked:
            for number in numbers:
                one.answer(store, number, engines, partial(screen.bar, f"{one.name}, policy {number}: steps"))


def show(out: Session, one: Asked, summary: dict[str, Any]) -> None:
    """Print the table of one source, and below it the settings that its figures rest on."""
    out.console.print(tables.of_source(one.name, summary))
    s = summary["settings"]
    out.say(
        f"T {s['temperature']:g}, top-p {s['top_p']:g}, top-k {s['top_k']}, at most {s['max_new_tokens']} tokens, "
        f"seed {s['seed']}; {s['engine']}, {s['dtype']}; {s['model']}, template {s['template_hash']}; verifier {s['verifier']}; "
        "lengths in tokens; maj: ties count 1/m, wrong answers are told apart by their text"
    )
