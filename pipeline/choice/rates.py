"""Pass rates from stored verdicts: those of this run's earlier rounds, and those of other runs, kept in pass_rates.json.

A problem of another run is the same problem when its text and its answer are the same. Another run is read once. The run keeps
what it told. A resume therefore chooses by the same pass rates, even when the other run has grown or gone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.choice.choose import PassRates
from pipeline.config import Run
from pipeline.contract import COLUMNS, Reject, Verdict
from pipeline.digest import digest
from pipeline.errors import SettingError, StoreError
from pipeline.notices import NOTICE_S, late
from pipeline.overrides import differences
from pipeline.problems.sources import Problem, ProblemSet
from pipeline.problems.survey import is_generated, normal
from pipeline.rounds.plan import read_plan
from pipeline.store.directory import Entry, Store, area
from pipeline.store.documents import RESTORE, Count, Digest, Document, Text
from pipeline.store.names import EVALUATION_FOLDER, PASS_RATES

_GRADE = COLUMNS["verdict"].writer
_AT_ONCE = 4096  # rows of a source that are compared at one time
_PLACE = re.compile(r"(?P<run>.*?)(/+(?P<kind>rounds|evals(/[^/]+)?)(/+(?P<number>\d{4,9}))?)?/*")
_MEASURED_AS = (  # settings that decide a pass rate
    *("model.path", "model.revision", "prompts.student", "prompts.system", "prompts.student_thinking"),
    *(
        "rollout.temperature",
        "rollout.top_p",
        "rollout.top_k",
        "rollout.max_new_tokens",
        "grade.verifier",
        "grade.answer_pattern",
    ),
)
ANEW = "Delete it, and run the same command again, which reads the verdicts anew"


class Kept(Document):
    """pass_rates.json: the verdicts of other runs on the problems of the source.

    settings: hash of `source.pass_rates` and of the source's rows. places: what was read.
    indices, correct, graded: for each problem with verdicts its index, the correct verdicts, and all of them.
    others: problems of these runs that the source does not have.
    """

    settings: Digest
    places: list[Text]
    indices: list[Count]
    correct: list[Count]
    graded: list[Annotated[Count, Field(ge=1)]]
    others: Count = 0

    @model_validator(mode="after")
    def _counts(self) -> Kept:
        if not len(self.indices) == len(self.correct) == len(self.graded):
            raise ValueError("indices, correct and graded have different lengths")
        if any(b <= a for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise ValueError("indices do not rise")
        if any(c > n for c, n in zip(self.correct, self.graded, strict=True)):
            raise ValueError("correct is above graded")
        return self

    def rates(self, size: int, where: str) -> PassRates:
        """The pass rates of a source of `size` problems. Raises StoreError for an index beyond it."""
        if self.indices and self.indices[-1] >= size:
            raise StoreError(f"indices: {self.indices[-1]} is beyond the {size} problems of the source", where, ANEW)
        rates = PassRates.none(size)
        rates.correct[self.indices], rates.graded[self.indices] = self.correct, self.graded
        return rates

    def said(self) -> str:
        """A sentence about what the runs told."""
        more = f"; {self.others} of their problems are not in it" if self.others else ""
        told = f"pass rates of {len(self.indices)} problems of the source, {sum(self.graded)} verdicts"
        return f"{', '.join(self.places)}: {told}{more}"


def settings_of(run: Run, source: ProblemSet) -> str:
    """The hash `Kept.settings` that belongs to a run and its open source."""
    return digest([list(run.source.pass_rates), source.fingerprint])


def read_kept(store: Store) -> Kept | None:
    """The content of pass_rates.json, or None where there is none. Raises StoreError for a damaged file."""
    return store.read_document(PASS_RATES, Kept, ANEW)


def of_others(store: Store, run: Run, source: ProblemSet) -> PassRates:
    """The pass rates that other runs told when this run began. Before `keep` has kept them, those that they tell now."""
    if not run.source.pass_rates:
        return PassRates.none(len(source))
    return _kept(store, run, source)[0].rates(len(source), store.locate(PASS_RATES))


def keep(store: Store, run: Run, source: ProblemSet, write: bool = True) -> list[str]:
    """Read the runs that `source.pass_rates` names, unless that was done before. Returns what the person should know.

    write: whether what they tell is kept in the run.

    Raises SettingError for a place that is no run or has no verdict, and StoreError for damaged files of another run.
    """
    if not run.source.pass_rates:
        return []
    kept, told = _kept(store, run, source)
    if told is None:
        return [f"note: {kept.said()}, as they were read when the run began (source.pass_rates)."]
    if write:
        store.write_json(PASS_RATES, kept.model_dump())
    return [f"note: {kept.said()} (source.pass_rates).", *(note for place in told.places for note in place.notes(run))]


def _kept(store: Store, run: Run, source: ProblemSet) -> tuple[Kept, _Found | None]:
    """What pass_rates.json has of these runs and problems. Else what the runs tell now, of which the file has nothing yet."""
    kept, settings = read_kept(store), settings_of(run, source)
    if kept is not None and kept.settings == settings:
        return kept, None
    told = _read_places(tuple(dict.fromkeys(run.source.pass_rates)), source)
    return _counted(settings, told, source), told


# ---- verdicts of other runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Told:
    """Verdicts of one place: (correct, graded, index in that run's source) by the key of the problem; its settings."""

    place: str
    run: Run
    verdicts: dict[str, tuple[int, int, int]]

    def notes(self, run: Run) -> list[str]:
        """A sentence when these verdicts were made with other settings than those of `run`."""
        other = [f"{name} was {was!r}, here {now!r}" for name, was, now in differences(self.run, run) if name in _MEASURED_AS]
        return [f"note: {self.place} was made with other settings: {', '.join(other[:4])}."] if other else []


class _Found(NamedTuple):
    """What all places told of the problems of a source, and how many of their problems the source does not have."""

    places: list[_Told]
    rates: PassRates
    others: int


def key_of(problem: str | None, answer: str | None) -> str:
    """What makes two problems of different runs the same: a hash of text and answer. Blanks and letter case do not count."""
    return digest(f"{normal(problem or '')}\n{answer}")


def _read_place(place: str) -> _Told:
    """The verdicts of a run, or of its rounds or evaluations below `place`."""
    found = _PLACE.fullmatch(place)
    assert found is not None  # every text matches
    store, kind, number = Store(place), None, None
    if not store.exists():
        store, kind, number = Store(found["run"]), found["kind"], found["number"]
    if not store.exists():
        raise SettingError(f"no run at {place}: run.json is missing", "source.pass_rates", "Name a run, or RUN/evals/NAME")
    verdicts: dict[str, tuple[int, int, int]] = {}
    with late(f"pass rates {place}", f"the verdicts of {place} have been read for {NOTICE_S:g} s so far."):
        for one in [kind] if kind else _kinds(store):
            for at in store.numbers(one) if number is None else [int(number)]:
                for key, right, graded, index in _read_area(store, one, at):
                    before = verdicts.get(key, (0, 0, index))
                    verdicts[key] = (before[0] + right, before[1] + graded, before[2])
    if not verdicts:
        remedy = "Measure the problems first, as `egrsd evaluate --run R --policy 0 --source FILE -k 8` does"
        raise SettingError(f"no graded traces at {place}", "source.pass_rates", remedy)
    return _Told(place, store.load_run(), verdicts)


def _kinds(store: Store) -> list[str]:
    return ["rounds", "evals", *(f"evals/{name[0]}" for name in store.named("evals", EVALUATION_FOLDER))]


def _read_area(store: Store, kind: str, number: int) -> Iterator[tuple[str, int, int, int]]:
    """(key, correct, graded, index) of each problem of a round or an evaluation. Shards that are not graded are left out."""
    plan, where = read_plan(store, kind, number), area(kind, number)
    prompts, grades = store.entries(where, "prompts"), store.entries(where, _GRADE)
    for shard, indices in plan.shards.items() if plan is not None else ():
        if shard not in prompts or shard not in grades or grades[shard].inputs.get("prompts") != prompts[shard].sha256:
            continue
        asked = store.read(prompts[shard], ["problem", "answer"])
        if asked.num_rows != len(indices):
            what = f"{asked.num_rows} rows, and the plan has {len(indices)} problems"
            raise StoreError(what, store.locate(prompts[shard].path), "`egrsd verify` says more; leave this run out")
        right, graded = _verdicts(store, grades[shard], len(indices))
        rows = zip(asked["problem"].to_pylist(), asked["answer"].to_pylist(), right, graded, indices, strict=True)
        for problem, answer, c, n, index in rows:
            if problem is not None and n:
                yield key_of(problem, answer), int(c), int(n), index


def _verdicts(store: Store, entry: Entry, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Correct and graded traces of each prompt of a shard, int64 [prompts] each. Traces of a prompt are neighbours."""
    table = store.read(entry, ["verdict", "reject_reason"])
    verdict, is_live = table["verdict"], pc.is_null(table["reject_reason"])  # a verifier or a reward that failed says nothing
    if len(verdict) % prompts:
        raise StoreError(f"{len(verdict)} rows are not groups of {prompts} prompts", store.locate(entry.path), "Grade it again")
    right = pc.and_(is_live, pc.fill_null(pc.equal(verdict, pa.scalar(str(Verdict.CORRECT))), False)).to_numpy()
    known = pc.and_(is_live, pc.is_valid(verdict)).to_numpy()
    return tuple(values.reshape(prompts, -1).sum(axis=1, dtype=np.int64) for values in (right, known))  # type: ignore[return-value]


@lru_cache(maxsize=1)  # the runs of a comparison share a source
def _read_places(names: tuple[str, ...], source: ProblemSet) -> _Found:
    """The verdicts of all places on the problems of a source. Verdicts on the same problem are added up."""
    places = [_read_place(name) for name in names]
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for place in places:
        for key, (right, graded, _) in place.verdicts.items():
            total[key][0] += right
            total[key][1] += graded
    rates, met = PassRates.none(len(source)), set()
    for row in _rows(source, places):
        key = key_of(row.problem, row.answer)
        if key in total and row.answer is not None and row.reject in (None, Reject.MISSING_SOLUTION):  # not all runs read those
            rates.correct[row.index], rates.graded[row.index] = total[key]
            met.add(key)
    return _Found(places, rates, len(total.keys() - met))


def _rows(source: ProblemSet, places: list[_Told]) -> Iterator[Problem]:
    """The rows that may be problems of other runs: all rows of a file. A task may generate without end: the same indices."""
    if is_generated(source):
        hinted = sorted({index for place in places for _, _, index in place.verdicts.values() if index < len(source)})
    else:
        hinted = list(range(len(source)))
    with late("pass rates", f"the problems of {source.source.uri} have been compared for {NOTICE_S:g} s so far."):
        for start in range(0, len(hinted), _AT_ONCE):
            yield from source.rows(hinted[start : start + _AT_ONCE])


def _counted(settings: str, found: _Found, source: ProblemSet) -> Kept:
    names, indices = [place.place for place in found.places], np.flatnonzero(found.rates.known)
    if not len(indices):
        what = f"none of the {found.others} problems of {', '.join(names)} is a problem of {source.source.uri}"
        raise SettingError(what, "source.pass_rates", "Measure the problems of this source, with the same columns")
    correct, graded = found.rates.correct[indices].tolist(), found.rates.graded[indices].tolist()
    return Kept(settings=settings, places=names, indices=indices.tolist(), correct=correct, graded=graded, others=found.others)


# ---- verdicts of this run ----------------------------------------------------------------------------------------------


def of_round(store: Store, number: int, source: ProblemSet) -> PassRates:
    """The verdicts of a round of this run on the problems of its source. Nothing is known from a round of other problems."""
    rates, plan = PassRates.none(len(source)), read_plan(store, "rounds", number)
    if plan is None or plan.source not in (None, source.fingerprint):
        return rates
    grades = store.entries(area("rounds", number), _GRADE)
    for shard, indices in plan.shards.items():
        if max(indices) >= len(source):
            where = store.locate(f"{area('rounds', number)}/plan.json")
            raise StoreError(f"shards.{shard}: {max(indices)} is beyond the {len(source)} problems of the source", where, RESTORE)
        if shard in grades:
            right, graded = _verdicts(store, grades[shard], len(indices))
            np.add.at(rates.correct, indices, right)
            np.add.at(rates.graded, indices, graded)
    return rates
