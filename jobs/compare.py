"""`egrsd compare`: train objectives and controls from one base, and evaluate all of them on the same problems.

pipeline/evidence/comparison.py describes the folder. The engines stay up for all runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.pool.member import EngineClass
from actors.resources import demands_of
from jobs.engines import open_engines
from jobs.opened import hold, holding_for, open_folder, start
from jobs.screen.progress import open_screen, phase
from jobs.screen.tables import check_csv, of_comparison, write_csv
from jobs.screen.terminal import Session, session
from jobs.settle import Choices, parse_numbers
from pipeline.choice.plans import prepare
from pipeline.config.objective import approximation
from pipeline.driver import Driver, cautions, open_sources
from pipeline.evidence.asked import check_problems
from pipeline.evidence.comparison import COMPARE, Comparison, Key, Series, chosen_objectives, keep_point
from pipeline.fit.versions import versions
from pipeline.inspection.remaining import Remaining
from pipeline.models.layers import with_targets
from pipeline.overrides import refuse_unread_objective
from pipeline.recipes import called
from pipeline.rounds import contents, origin
from pipeline.rounds.round import reward_codes
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.pool.pool import EnginePool


ACCEPT = "Put the old file back, or use another --out"
SAME_MODEL = "Put the old model back, or use another --out"


@dataclass(frozen=True)
class Options:
    """The options of the command line. `recipe`, `sets` and `config` make the base run.

    `baseline` is the objective that the others are compared with; None is the first. `csv` is a file for the figures.
    """

    recipe: str | None
    objectives: str
    seeds: str
    baseline: str | None
    sets: list[str]
    config: str | None
    csv: str | None = None

    @property
    def choices(self) -> Choices:
        """What makes the base run: a recipe, a file over it or over the defaults, or else the recipe `demo`."""
        return Choices(self.recipe, self.sets, self.config).or_demo()


def compare(uri: str, options: Options, address: str | None, debug: bool, engine_class: EngineClass | None = None) -> None:
    """Train every objective with every seed, evaluate each on the same problems, and say which differences are beyond noise.

    A run that is done is not touched, and a run that was cut off goes on. `engine_class` answers instead of vLLM in tests.
    Raises UserError or SettingError for mistaken options, and what `jobs.opened.start` raises.
    """
    with session(debug) as out:
        if options.csv is not None:
            check_csv(options.csv)
        compared = chosen(open_folder(uri), options)
        remaining = {key: Remaining.of(compared.folder(key), run) for key, run in compared.runs.items()}
        left = [key for key in compared.runs if not remaining[key].is_empty]
        if left:
            hold(out, compared.store)
        asking = {part for key in left for part in remaining[key].asking}
        size = f"{len(compared.objectives)} objectives x {len(compared.seeds)} seeds, {len(left)} to do"
        out.say(f"{len(compared.runs)} runs of {called(compared.base)}: {size}")
        if (note := compared.unnamed()) is not None:
            out.say(note)
        settings = compared.describe(options.choices.recipe, options.sets)
        if left:
            with phase(out, "checking settings, problems and model"):
                sources = open_sources(compared.base)
            assert sources.evals is not None
            check_problems(sources.evals, compared.base.evaluation.problems)
            partly = [note for run in compared.runs.values() for note in approximation(run.objective, run.score)]
            for caution in dict.fromkeys([*cautions(compared.base, sources), *partly]):
                out.say(caution)
            rewards = bool(compared.base.grade.rewards)
            models = contents.look(compared.base)
            for key in compared.runs:
                contents.refuse_changes(compared.folder(key), models, accept=False, remedy=SAME_MODEL)
                origin.refuse_changes(compared.folder(key), sources.opened, accept=False, rewards=rewards, remedy=ACCEPT)
            noted = [prepare(compared.folder(key), compared.runs[key], sources.rounds, remaining[key].train) for key in left]
            for text in dict.fromkeys(text for notes in noted for text in notes):
                out.say(text)
            trains = any(remaining[key].train for key in left)
            start(out, compared.store, address, demands_of(compared.base, asking, trains))
        series, document = {name: Series() for name in compared.objectives}, {}
        with contextlib.ExitStack() as stack:
            engines = stack.enter_context(open_engines(compared.base, engine_class, say=out.say, asking=asking)) if asking else {}
            for place, key in enumerate(sorted(compared.runs, key=left.__contains__), 1):  # what is done is written first
                if key in left:
                    out.say(f"{key.objective}, seed {key.seed} ({place} of {len(compared.runs)})")
                    train_one(compared, key, engines, models, out)
                document = keep_point(compared, series, key, settings)
        out.told.result = document
        show(out, document)
        out.say(compared.store.locate(COMPARE))
        if options.csv is not None:
            write_csv(options.csv, [*document["objectives"], *document["pairs"]])


def chosen(store: Store, options: Options) -> Comparison:
    """The comparison that the options ask for. Raises SettingError."""
    names = chosen_objectives(options.objectives)
    baseline = chosen_objectives(options.baseline, "--baseline")[0] if options.baseline else names[0]
    seeds = list(dict.fromkeys(parse_numbers(options.seeds, "--seeds", "0..4 or 0,3,7")))
    base = with_targets(options.choices.fresh())
    compared = Comparison.of(store, base, names, seeds, baseline)
    refuse_unread_objective(compared.runs.values(), options.sets)
    return compared


def train_one(
    compared: Comparison, key: Key, engines: dict[str, EnginePool], models: Mapping[str, contents.KeptModel], out: Session
) -> None:
    """Bring one run of the comparison to its end, on engines that are up. `models` is what the engines were started with."""
    from pipeline.training import worker  # imports Ray, which reads the environment that `start` has set

    store, run = compared.folder(key), compared.runs[key]
    compared.share(key)
    sources = open_sources(run, reward_codes(store, run))
    with holding_for(out, store) as holding, open_screen(out) as screen:
        store.save_run(run, versions())
        origin.keep(store, sources.opened, bool(run.grade.rewards))
        contents.keep(store, run, models)
        Driver(store, run, sources, engines, worker.start, screen).bring_to_end(Remaining.of(store, run), holding)


def show(out: Session, document: dict[str, Any]) -> None:
    """Print the table of compare.json, and below it the test and the settings that it rests on."""
    out.console.print(of_comparison(document))
    settings = document["settings"]
    out.say(f"{settings['test']}. Template {settings['template_hash']}, {settings['dtype']}, {settings['sampling']}.")
