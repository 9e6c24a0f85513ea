"""Objectives and their controls, trained from one base and evaluated on one set of problems.

    <out>/cl_egrsd-s0/   the run of one objective and seed: a run directory like any other
    <out>/compare.json   one point per run, means over seeds, paired differences to the baseline, and the settings behind them

All objectives of a seed run before the next seed begins, so that a comparison that is cut short stays balanced. The evaluation of
the base and the first round's traces and scores are the same under all objectives of a seed. They are made once and copied.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.config import Run
from pipeline.config.objective import CONTROLS as OF_GATE
from pipeline.config.objective import GATES, OBJECTIVES, Objective
from pipeline.errors import SettingError, StoreError, UserError, nearest
from pipeline.evidence.documents import plain
from pipeline.evidence.evaluation import engine_facts, figures, per_problem, read
from pipeline.evidence.intervals import holm, of_gaps, of_means, of_shares, over_seeds
from pipeline.fit.versions import versions
from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of
from pipeline.overrides import differences, load
from pipeline.recipes import descriptions
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.refused import refuse_mixed_control
from pipeline.rounds.round import evaluation_run, open_round
from pipeline.stages import EVALUATION, MEASURE, STAGES, chain_of
from pipeline.store.directory import Store, area
from pipeline.store.documents import Document, Text

# Each control changes one thing of the recipe's objective, which must have a gate.
CONTROLS: dict[str, dict[str, str]] = {
    "shuffled": {"control": "shuffled"},
    "uniform": {"control": "uniform"},
    "inverted": {"control": "inverted"},
    "no_reference": {},
    "student_entropy": {"entropy": "student"},
}
COMPARE = "compare.json"
MEASURES = ("accuracy", "length")
OTHER_PROBLEMS = "was evaluated on other problems than the runs before it, and only equal problems are paired"
REJECTED = "`reject_reason` in the shards of its evaluation says why. Correct the cause, then remove this run"
_Figure = Annotated[float, Field(allow_inf_nan=True)]
TEST = (
    "paired by seed and problem: t over seeds and problems, both random, degrees of freedom by Satterthwaite (S - 1 below five "
    "seeds). No interval is narrower than that over the means of problems. "
    "beyond noise: p < 0.05 after Holm's correction over the comparisons of one measure"
)


class Key(NamedTuple):
    """One run of a comparison: an objective, or a control, and a seed."""

    objective: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return f"{self.objective.replace(':', '')}-s{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison in their order, their common folder and settings, and the baseline objective."""

    store: Store
    base: Run
    runs: dict[Key, Run]
    baseline: str

    @classmethod
    def of(cls, store: Store, base: Run, objectives: list[str], seeds: list[int], baseline: str) -> Comparison:
        """Every objective with every seed.

        Raises SettingError for a baseline that is not compared, for too few problems, or for a run begun with other settings.
        """
        if baseline not in objectives:
            raise SettingError(f"'{baseline}' is not compared", "--baseline", f"Compared: {', '.join(objectives)}")
        if base.evaluation.problems < 2:
            what = f"{base.evaluation.problems} problems are too few for an interval"
            raise SettingError(what, "evaluation.problems", "2 at least are needed")
        refuse_lost_gate(base, objectives)
        keys = [Key(name, seed) for seed in seeds for name in objectives]
        compared = cls(store, base, {key: variant(base, *key) for key in keys}, baseline)
        for key, run in compared.runs.items():
            refuse_other_settings(compared.folder(key), run)
        return compared

    @property
    def objectives(self) -> list[str]:
        """The objectives in the order they were named."""
        return list(dict.fromkeys(key.objective for key in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds in the order they were named."""
        return list(dict.fromkeys(key.seed for key in self.runs))

    def folder(self, key: Key) -> Store:
        """The run directory of one objective and seed."""
        return Store(self.store.locate(key.name))

    def share(self, key: Key) -> None:
        """Copy to a run the shards that the other objectives of its seed have already made from the base."""
        for other in self.runs:
            if other.seed == key.seed and other != key:
                share(self.folder(other), self.folder(key), self.runs[key])

    def unnamed(self) -> str | None:
        """A sentence about the runs that compare.json has and that are not compared now: the file is written without them."""
        with contextlib.suppress(StoreError):  # a damaged file is written anew
            found = self.store.read_document(COMPARE, Compared)
            keys = [Key(one.objective, one.seed) for one in found.points if one.seed is not None] if found is not None else []
            if more := len(set(keys) - self.runs.keys()):
                names = ",".join(dict.fromkeys([*self.objectives, *(key.objective for key in keys)]))
                seeds = ",".join(map(str, sorted({*self.seeds, *(key.seed for key in keys)})))
                back = f"--objectives {names} --seeds {seeds} shows them again"
                return f"note: {COMPARE} has {more} more runs, which this command leaves out of it. {back}."
        return None

    def describe(self, recipe: str | None, sets: list[str]) -> dict[str, Any]:
        """The settings that decided the figures, as plain JSON. Raises ModelError when the tokenizer cannot be read.

        recipe: None where a file alone made the base. base: every setting, as recipe, file and `--set` made it.
        """
        base, ev = self.base, self.base.evaluation
        return {
            "recipe": recipe,
            "set": sets,
            "base": base.model_dump(mode="json"),
            "rounds": base.rounds,
            "seeds": self.seeds,
            "baseline": self.baseline,
            "test": TEST,
            "intervals": "points: 95 % over problems; objectives and pairs: 95 % over seeds and problems (one seed: problems)",
            "sampling": {name: getattr(ev, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "samples")},
            "source": ev.source.model_dump(mode="json"),
            "template_hash": template_hash(tokenizer_of(base.model)),
            "model": base.model.path,
            "dtype": base.model.dtype,
            "versions": versions(),
            "problems": ev.problems,
        }


def chosen_objectives(text: str, option: str = "--objectives") -> list[str]:
    """Objectives and controls of `grpo,cl_egrsd,shuffled,opd+entropy,fkl+cl_entropy+inverted`, each once.

    NAME+GATE is an objective under another gate, NAME+GATE+CONTROL a control of that. Raises SettingError for an unknown one.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        first, *factors = name.split("+")
        known = OBJECTIVES if factors else (*OBJECTIVES, *CONTROLS)
        if first not in known:
            hint = nearest(first, known, f"Objectives: {', '.join(OBJECTIVES)}; controls: {', '.join(CONTROLS)}")
            raise SettingError(f"unknown objective '{first}'", option, hint)
        try:
            Objective.model_validate({"control": "none"} | _factors(factors))
        except ValueError:
            gates = ", ".join(gate for gate in GATES if gate != "own")
            remedy = f"Write NAME+GATE or NAME+GATE+CONTROL. Gates: {gates}; controls: {', '.join(OF_GATE)}"
            raise SettingError(f"'{name}' has no such gate or control", option, remedy) from None
    return names


def _factors(parts: list[str]) -> dict[str, str]:
    """The gate and the control that are named behind an objective. Raises ValueError for more than these."""
    gate, control, *more = [*parts, *("own", "none")[len(parts) :]]
    if more or (parts and gate in {*OF_GATE, "own"}):
        raise ValueError(f"{'+'.join(parts)} is no gate with a control")
    return {"gate": gate, "control": control}


def variant(base: Run, name: str, seed: int) -> Run:
    """The settings of one objective, also with a gate and a control, or of one control of the recipe's objective.

    Raises SettingError for a control of an objective that has no gate, and for an objective without its columns.
    """
    data = base.model_dump(mode="json")
    first, *factors = name.split("+")
    if first in OBJECTIVES:
        data["objective"] |= {"name": first, "entropy": "teacher", **_factors(factors)}
    else:
        data["objective"] |= CONTROLS[name]
    if name == "no_reference":
        data["prompts"]["teacher"] = data["prompts"]["student"]
        data["prompts"]["teacher_thinking"] = data["prompts"]["student_thinking"]
    found = load(data | {"seed": seed})
    refuse_mixed_control(found.objective)
    return found


def refuse_lost_gate(base: Run, objectives: list[str]) -> None:
    """Raise SettingError when the base has a gate or a control that a compared objective, which has its own, would drop."""
    gate = base.objective
    if (gate.gate, gate.control) == ("own", "none"):
        return
    if lost := [name for name in objectives if name in OBJECTIVES]:
        asked = "+".join([lost[0], gate.gate_kind if gate.gate == "own" else gate.gate, *({gate.control} - {"none"})])
        what = f"'{lost[0]}' of --objectives is compared with its own gate, and objective.gate or objective.control is set"
        raise SettingError(what, "objective.gate", f"Write it as {asked}")


def refuse_other_settings(store: Store, run: Run) -> None:
    """Raise SettingError when the run in this folder was made with other settings."""
    old = store.load_run() if store.exists() else None
    if old is not None and (changed := differences(old, run)):
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:4])
        by_recipe = old.name != run.name and old.name in descriptions()
        remedy = f"Add --recipe {old.name}" if by_recipe else "Take the same settings"
        raise SettingError(f"this run was made with other settings: {listed}", store.uri, f"{remedy}, or use another --out")


def share(donor: Store, own: Store, run: Run) -> None:
    """Copy the evaluation of the base and the first round from a run of the same seed under another objective.

    A shard is copied only when it is fresh under this run's settings and its bytes have the hash of its entry. The inventory of
    this run judges the copies again: a score under another teacher's prompt, for example, is stale here.
    """
    for kind, stages, settings in (("rounds", MEASURE, run), ("evals", EVALUATION, evaluation_run(run))):
        if read_plan(donor, kind, 0) is None:
            continue
        where, seen = area(kind, 0), Inventory(open_round(donor, settings, kind, 0))
        for name in chain_of(settings, stages):
            here = own.entries(where, name)
            for shard, entry in seen.entries(name).items():
                if shard in here or seen.why_stale(STAGES[name], shard) is not None:
                    continue
                path = f"{where}/{name}/{entry.data}"
                data = donor.read_bytes(path)
                if data is not None and hashlib.sha256(data).hexdigest() == entry.sha256:
                    own.write(path, data)
                    own.write_json(f"{where}/{name}/{shard}.json", asdict(entry))


# ---- results -----------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """The results of one objective, by seed: points as in compare.json, and accuracy and length of each problem [N].

    keys: what the problems are, in one order for all objectives and seeds. samples: of each problem.
    """

    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    accuracy: dict[int, np.ndarray] = field(default_factory=dict)
    length: dict[int, np.ndarray] = field(default_factory=dict)
    samples: int = 1
    keys: list[tuple[str, int]] = field(default_factory=list)


class Interval(Document):
    """A figure with its 95 % interval. Early versions wrote NaN for a figure without a value."""

    value: _Figure
    low: _Figure
    high: _Figure


class ComparedPoint(Document):
    """The evaluation of one run, or the mean of one objective, which has no seed of its own."""

    objective: Text
    seed: int | None = None
    seeds: list[int] | None = None
    accuracy: Interval
    length: Interval


class Difference(Interval):
    """The difference of one objective from the baseline in one measure. p is None for one seed, which is not judged."""

    objective: Text
    baseline: Text
    measure: Text
    seeds: list[int]
    p: _Figure | None = None
    p_holm: _Figure | None = None
    beyond_noise: bool | None = None


class Compared(Document):
    """compare.json, as far as the page shows it."""

    points: list[ComparedPoint]
    objectives: list[ComparedPoint]
    pairs: list[Difference]


def keep_point(compared: Comparison, found: dict[str, Series], key: Key, settings: dict[str, Any]) -> dict[str, Any]:
    """Add the point of a finished run to the results `found`, and write compare.json of all results so far.

    Returns that document. Raises UserError when fewer than two problems were answered.
    """
    folder = compared.folder(key)
    try:
        add_point(found[key.objective], folder, key, compared.runs[key])
        _check_equal(found, key)
        document = {
            "points": [point for series in found.values() for _, point in sorted(series.points.items())],
            "objectives": [summary(name, series) for name, series in found.items() if series.points],
            "pairs": pairs(found, compared.baseline),
            "settings": settings | {"problems": len(found[key.objective].keys)},  # a source may have fewer than are asked for
        }
    except ValueError as error:
        raise UserError(str(error), folder.locate("evals"), REJECTED) from error
    compared.store.write_json(COMPARE, document)
    return document


def add_point(series: Series, folder: Store, key: Key, run: Run) -> None:
    """Add to `series` the evaluation of a finished run's last policy. `folder` is the run directory."""
    work = open_round(folder, evaluation_run(run), "evals", run.rounds)
    answered = read(work)
    shown = plain(figures(answered, run.evaluation.samples))
    series.points[key.seed] = {
        "objective": key.objective,
        "seed": key.seed,
        "run": key.name,
        "accuracy": shown.pop("avg"),
        **shown,
        "verdicts": answered.verdicts,
        "rejected": answered.rejected,
        "engine": engine_facts(work),
    }
    order = sorted(range(len(answered)), key=answered.keys.__getitem__)
    keys = [answered.keys[place] for place in order]
    if series.keys and series.keys != keys:
        raise ValueError(OTHER_PROBLEMS)
    series.keys, series.samples = keys, answered.correct.shape[1]
    series.accuracy[key.seed] = per_problem(answered, "correct")[order]
    series.length[key.seed] = per_problem(answered, "length")[order]


def _check_equal(found: dict[str, Series], key: Key) -> None:
    """Raise ValueError when the objective of `key` was evaluated on other problems than another one."""
    if any(series.keys and series.keys != found[key.objective].keys for series in found.values()):
        raise ValueError(OTHER_PROBLEMS)


def summary(name: str, series: Series) -> dict[str, Any]:
    """Means of one objective over its seeds, with intervals over seeds and problems."""
    found: dict[str, Any] = {"objective": name, "seeds": sorted(series.points)}
    for measure in MEASURES:
        rows = np.stack([rows for _, rows in sorted(getattr(series, measure).items())])
        value = over_seeds(rows, of_shares if measure == "accuracy" else of_means, series.samples)
        found[measure] = {"value": value.value, "mean": value.value, "low": value.low, "high": value.high}
    return found


def pairs(found: dict[str, Series], against: str) -> list[dict[str, Any]]:
    """Differences to the baseline `against`, over the seeds that both objectives have, and whether each is beyond noise."""
    return [pair for measure in MEASURES for pair in _family(found, against, measure)]


def _family(found: dict[str, Series], against: str, measure: str) -> list[dict[str, Any]]:
    """The differences in one measure, with p-values corrected together. A difference over one seed has no p and is not judged."""
    family: list[dict[str, Any]] = []
    for name, series in found.items():
        seeds = sorted(series.points.keys() & found[against].points.keys())
        if name != against and seeds:
            gaps = [getattr(series, measure)[s] - getattr(found[against], measure)[s] for s in seeds]
            tested = over_seeds(np.stack(gaps), of_gaps if measure == "accuracy" else of_means)
            family.append({"objective": name, "baseline": against, "measure": measure, "seeds": seeds, **asdict(tested)})
    known = [pair for pair in family if pair["p"] is not None]
    for pair, raised in zip(known, holm([pair["p"] for pair in known]), strict=True):
        pair["p_holm"] = raised
    for pair in family:
        pair["beyond_noise"] = pair["p_holm"] < 0.05 if "p_holm" in pair else None
    return family
