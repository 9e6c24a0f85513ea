"""`egrsd compare`: objectives, and the controls that decide between them, trained from one base and evaluated on one problem set.

    <out>/cl_egrsd-s0/   the run of one objective and seed: a run directory like any other
    <out>/compare.json   one point per run, means over seeds, paired differences to the baseline, and what decided them

Runs go seed by seed, so whatever is done is balanced. What is the same under all objectives of a seed, the evaluation of the base
and the first round's evidence, is made once and copied by hash. The engines stay up for all runs.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Column, Table

from jobs.distill import Live, check_resources, open_inputs
from jobs.engines import open_engines
from jobs.evaluate import check_problems, facts, plain, read_samples, tokenizer_hash
from jobs.session import Session, connect, parse_numbers, read_config, session, versions
from pipeline.config import Run, differences, load, resolve
from pipeline.errors import SettingError, UserError, nearest
from pipeline.evidence.evaluation import Tested, figures, holm, over_seeds, per_problem
from pipeline.recipes import recipe as named
from pipeline.rounds.metrics import Estimate
from pipeline.rounds.round import evaluation_run, open_round
from pipeline.rounds.todo import Missing
from pipeline.stages import EVALUATION, MEASURE, STAGES
from pipeline.store import lease
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.pool import EnginePool
    from actors.serving import EngineClass

OBJECTIVES = ("grpo", "rlsd", "egrsd", "cl_egrsd", "position")
# each takes one thing from the recipe's own objective, which has to be egrsd or cl_egrsd
CONTROLS: dict[str, dict[str, str]] = {
    "shuffled": {"gate": "shuffled"},
    "uniform": {"gate": "uniform"},
    "inverted": {"gate": "inverted"},
    "no_reference": {},
    "student_entropy": {"entropy": "student"},
}
MEASURES = ("accuracy", "length")
REJECTED = "`reject_reason` in the shards of its evaluation says why; remove this run once that is mended"
TEST = (
    "paired by seed and problem: t over seeds, S - 1 degrees of freedom, seeds and problems both random; "
    "beyond noise: p < 0.05 after Holm's correction over the comparisons of one measure"
)


@dataclass
class Series:
    """What the runs of one objective gave: points by seed, and their accuracies and lengths by problem."""

    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    accuracy: dict[int, np.ndarray] = field(default_factory=dict)
    length: dict[int, np.ndarray] = field(default_factory=dict)


def compare(
    recipe: str,
    objectives: str,
    seeds: str,
    uri: str,
    baseline: str | None,
    sets: list[str],
    config: str | None,
    address: str | None,
    debug: bool,
    engine_class: EngineClass | None = None,
) -> None:
    """Train every objective with every seed, evaluate each on the same problems, and say which differences are beyond noise.

    Runs that are done are left alone, one that was cut off goes on. `baseline`: the first objective unless named.
    """
    with session(debug) as out:
        store = Store(uri)
        names = chosen_objectives(objectives)
        against = chosen_objectives(baseline, "--baseline")[0] if baseline else names[0]
        if against not in names:
            raise SettingError(f"'{against}' is not compared", "--baseline", f"Compared: {', '.join(names)}")
        numbers = list(dict.fromkeys(parse_numbers(seeds, "--seeds", "0..4 or 0,3,7")))
        base = resolve(named(recipe), sets, read_config(config) if config else {})
        if base.evaluation.problems < 2:
            raise SettingError(
                f"{base.evaluation.problems} problems are too few for an interval", "evaluation.problems", "2 at least are needed"
            )
        runs = {(name, seed): variant(base, name, seed) for seed in numbers for name in names}
        for key, run in runs.items():
            refuse_other_settings(folder(store, *key), run)
        missing = {key: Missing.of(folder(store, *key), run) for key, run in runs.items()}
        left = [key for key in runs if not missing[key].nothing]
        out.log_to(store)
        out.say(f"{len(runs)} runs of recipe {base.name}: {len(names)} objectives x {len(numbers)} seeds, {len(left)} to do")
        settings = describe(base, recipe, sets, against, numbers)
        found = {name: Series() for name in names}
        if left:
            evals = open_inputs(base).evals
            assert evals is not None
            check_problems(evals, base.evaluation.problems)
            connect(address)
            check_resources(base, missing[left[0]], out)
        with contextlib.ExitStack() as stack:
            engines = stack.enter_context(open_engines(base, engine_class)) if left else {}
            for place, (key, run) in enumerate(runs.items(), 1):
                if not missing[key].nothing:
                    out.say(f"{key[0]}, seed {key[1]} ({place} of {len(runs)})")
                    train_one(store, key, run, list(runs), engines, out)
                try:
                    add_point(found[key[0]], store, key, run)
                    write(store, found, against, settings, runs[key])
                except ValueError as error:  # fewer than two problems were answered
                    raise UserError(str(error), folder(store, *key).locate("evals"), REJECTED) from error
            document = write(store, found, against, settings, base)
        show(out, document, against)
        out.say(store.locate("compare.json"))


def chosen_objectives(text: str, option: str = "--objectives") -> list[str]:
    """Objectives and controls of `grpo,cl_egrsd,shuffled`, each once. Raises SettingError for an unknown one."""
    known = (*OBJECTIVES, *CONTROLS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            hint = nearest(name, known, f"Objectives: {', '.join(OBJECTIVES)}; controls: {', '.join(CONTROLS)}")
            raise SettingError(f"unknown objective '{name}'", option, hint)
    return names


def variant(base: Run, name: str, seed: int) -> Run:
    """The run of one objective, or of one control of the recipe's own objective. Raises SettingError when that has no gate."""
    data = base.model_dump(mode="json")
    if name in OBJECTIVES:
        data["objective"] |= {"name": name, "gate": "entropy", "entropy": "teacher"}
    else:
        data["objective"] |= CONTROLS[name]
    if name == "no_reference":
        data["prompts"]["teacher"] = data["prompts"]["student"]
        data["prompts"]["teacher_thinking"] = data["prompts"]["student_thinking"]
    return load(data | {"seed": seed})


def folder(store: Store, name: str, seed: int) -> Store:
    """The run directory of one objective and seed."""
    return Store(store.locate(f"{name}-s{seed}"))


def refuse_other_settings(store: Store, run: Run) -> None:
    """Raise SettingError when this run was made with other settings."""
    old = store.load_run() if store.exists() else None
    if old is not None and (changed := differences(old, run)):
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:4])
        raise SettingError(
            f"this run was made with other settings: {listed}", store.uri, "Use another --out, or the same settings"
        )


def train_one(
    store: Store,
    key: tuple[str, int],
    run: Run,
    keys: list[tuple[str, int]],
    engines: dict[str, EnginePool],
    out: Session,
) -> None:
    """Bring one run to its end on engines that are already up."""
    own = folder(store, *key)
    for other in keys:
        if other[1] == key[1] and other != key:
            share(folder(store, *other), own, run)
    sources = open_inputs(run)
    with lease.held(own) as holding:
        own.save_run(run, versions())
        missing = Missing.of(own, run)
        with Live.start(own, run, sources, out, missing, holding, engines=engines) as live:
            live.bring_to_end(missing, holding)


def share(donor: Store, own: Store, run: Run) -> None:
    """Copy what another objective of the same seed has already measured on the base: its evaluation and the first round.

    A shard is taken only when it was made with this run's settings, and only as the bytes that its entry names; what was made
    from other inputs is stale here like anywhere.
    """
    for area, stages, settings in (("rounds/0000", MEASURE, run), ("evals/0000", EVALUATION, evaluation_run(run))):
        for name in stages:
            there, here = donor.entries(area, name), own.entries(area, name)
            for shard, entry in there.items():
                path = f"{area}/{name}/{entry.data}"
                data = donor.read_bytes(path)
                same = entry.settings == settings.digest(STAGES[name].settings)
                if shard not in here and same and data is not None and hashlib.sha256(data).hexdigest() == entry.sha256:
                    own.write(path, data)
                    own.write_json(f"{area}/{name}/{shard}.json", asdict(entry))


# ---- what came out -----------------------------------------------------------------------------------------------------


def add_point(series: Series, store: Store, key: tuple[str, int], run: Run) -> None:
    """The evaluation of a finished run's last policy."""
    own, (name, seed) = folder(store, *key), key
    work = open_round(own, evaluation_run(run), "evals", run.rounds)
    answered = read_samples(work)
    shown = plain(figures(answered, run.evaluation.samples))
    series.points[seed] = {
        "objective": name,
        "seed": seed,
        "run": f"{name}-s{seed}",
        "accuracy": shown.pop("avg"),
        **shown,
        "verdicts": answered.verdicts,
        "rejected": answered.rejected,
        "engine": facts(work),
    }
    series.accuracy[seed] = per_problem(answered, "correct")
    series.length[seed] = per_problem(answered, "length")


def write(store: Store, found: dict[str, Series], against: str, settings: dict[str, Any], run: Run) -> dict[str, Any]:
    """compare.json of what is there so far."""
    document = {
        "points": [point for series in found.values() for _, point in sorted(series.points.items())],
        "objectives": [summary(name, series) for name, series in found.items() if series.points],
        "pairs": pairs(found, against),
        "settings": settings | {"problems": run.evaluation.problems},
    }
    store.write_json("compare.json", document)
    return document


def summary(name: str, series: Series) -> dict[str, Any]:
    """Means of one objective over its seeds, with intervals over seeds and problems."""
    found: dict[str, Any] = {"objective": name, "seeds": sorted(series.points)}
    for measure in MEASURES:
        value = over_seeds(np.stack([rows for _, rows in sorted(getattr(series, measure).items())]))
        found[measure] = {"value": value.value, "mean": value.value, "low": value.low, "high": value.high}
    return found


def pairs(found: dict[str, Series], against: str) -> list[dict[str, Any]]:
    """Differences to the baseline over the seeds that both have, and whether each is beyond noise."""
    result: list[dict[str, Any]] = []
    for measure in MEASURES:
        family: list[dict[str, Any]] = []
        for name, series in found.items():
            seeds = sorted(series.points.keys() & found[against].points.keys())
            if name != against and seeds:
                gaps = [getattr(series, measure)[s] - getattr(found[against], measure)[s] for s in seeds]
                tested: Tested = over_seeds(np.stack(gaps))
                family.append({"objective": name, "baseline": against, "measure": measure, "seeds": seeds, **asdict(tested)})
        known = [pair for pair in family if pair["p"] is not None]
        for pair, raised in zip(known, holm([pair["p"] for pair in known]), strict=True):
            pair["p_holm"] = raised
        for pair in family:
            pair["beyond_noise"] = pair["p_holm"] < 0.05 if "p_holm" in pair else None
        result += family
    return result


def describe(base: Run, recipe: str, sets: list[str], against: str, seeds: list[int]) -> dict[str, Any]:
    """What decided the figures."""
    ev = base.evaluation
    return {
        "recipe": recipe,
        "set": sets,
        "rounds": base.rounds,
        "seeds": seeds,
        "baseline": against,
        "test": TEST,
        "intervals": "points: 95 % bootstrap over problems; objectives and pairs: 95 %, over seeds and problems",
        "sampling": {name: getattr(ev, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "samples")},
        "source": ev.source.model_dump(mode="json"),
        "template_hash": tokenizer_hash(base),
        "model": base.model.path,
        "dtype": base.model.dtype,
        "versions": versions(),
    }


def show(out: Session, document: dict[str, Any], against: str) -> None:
    """The table: means over seeds, differences to the baseline, verdicts."""
    settings = document["settings"]
    title = f"{settings['problems']} held-out problems, {settings['rounds']} rounds; mean over seeds and 95 % interval"
    columns = ("objective", "seeds", "accuracy, %", f"- {against}", "", "length, tokens", f"- {against}", "")
    table = Table(
        Column(columns[0], no_wrap=True), *columns[1:], title=title, title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    changes = {(pair["objective"], pair["measure"]): pair for pair in document["pairs"]}
    for row in document["objectives"]:
        cells = [row["objective"], str(len(row["seeds"]))]
        for measure, scale in zip(MEASURES, (100.0, 1.0), strict=True):
            cells.append(_text(row[measure], scale))
            pair = changes.get((row["objective"], measure))
            cells += [_text(pair, scale, signed=True), verdict(pair)] if pair else ["", ""]
        table.add_row(*cells)
    out.console.print(table)
    out.say(f"{settings['test']}. Template {settings['template_hash']}, {settings['dtype']}, {settings['sampling']}.")


def verdict(pair: dict[str, Any]) -> str:
    """A difference in words."""
    if pair["beyond_noise"] is None:
        return "one seed: untested"
    return f"{'beyond noise' if pair['beyond_noise'] else 'not beyond noise'} (p {pair['p_holm']:.2g})"


def _text(found: dict[str, Any], scale: float, signed: bool = False) -> str:
    return Estimate(found["value"], found["low"], found["high"]).text(scale, signed=signed)
