"""Plans of training rounds whose problems are chosen by pass rate, or that are filled in place of groups without signal.

A plan is a function of the seed, the round and stored verdicts. Plan and further prompts are written before anything is asked, so
a resume after a kill asks the same. With the settings at their defaults nothing is read, and plans are those of `plan_round`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.choice import rates
from pipeline.choice.choose import Candidates, PassRates, num_further
from pipeline.config import Run
from pipeline.digest import digest
from pipeline.errors import SettingError, command
from pipeline.problems.sources import ProblemSet
from pipeline.rounds.plan import Chosen, Filling, Plan, cut, read_plan, write_plan
from pipeline.rounds.refused import refuse_unusable
from pipeline.rounds.round import Round, plan_round, set_plan
from pipeline.rounds.rows import signals
from pipeline.store.directory import Store, area


def prepare(store: Store, run: Run, source: ProblemSet, numbers: list[int], write: bool = True) -> list[str]:
    """Read the pass rates of other runs, and check the first of the rounds `numbers` before anything is paid.

    Returns what the person who starts the run should know. write: whether the run keeps the pass rates.

    Raises SettingError when a run that is named tells nothing, or when no problem fits. Raises UserError when no prompt of that
    round can be asked.
    """
    if not run.source.chooses or not numbers:
        return []
    notes = rates.keep(store, run, source, write)
    refuse_unusable(source, Planner(store, run, source).first(numbers[0]), run, f"round {numbers[0]}")
    return notes


@dataclass
class Planner:
    """Plans the rounds of one run, in order. The verdicts of each earlier round are read once.

    source: the open problems. `rates.keep` has kept their pass rates from other runs.
    """

    store: Store
    run: Run
    source: ProblemSet
    _known: PassRates | None = field(init=False, default=None)
    _folded: int = field(init=False, default=0)

    def plan(self, number: int, policy: int) -> Round:
        """Round `number`, which `policy` answers, with the prompts that it asks first. Its plan is stored.

        Raises SettingError when no problem has a pass rate within the bounds.
        """
        if not self._decides(number):
            return plan_round(self.store, self.run, "rounds", number, policy, self.source)
        old, filling = read_plan(self.store, "rounds", number), self._filling()
        if old is not None and old.policy == policy and self._is_made_so(old):
            plan = replace(old.before(0), filling=filling)
        else:
            plan = self._first(number, policy)
        work = set_plan(self.store, self.run, "rounds", number, plan)
        stored = read_plan(self.store, "rounds", number) if filling is not None else None
        return work if stored is None else replace(work, shards=stored.before(0).shards)

    def first(self, number: int) -> list[int]:
        """The problems that round `number` would ask first, when it has no plan yet. Raises SettingError as `plan`."""
        return self._first(number, 0).problems

    def extended(self, work: Round) -> Round | None:
        """A round with further prompts behind its own, in place of groups without signal. None when it is full.

        All shards of `work` must be graded. The longer plan, or that the round is full, is stored. A longer plan that is stored
        already is gone on with when it says the same, and replaced when verdicts have changed since.
        """
        stored, most = read_plan(self.store, "rounds", work.number), self.run.rollout.fill_groups
        if stored is None or stored.filling is None or not most:
            return None
        place = next(n for n in range(len(stored.further) + 1) if stored.before(n).shards.keys() == work.shards.keys())
        now = stored.before(place)
        indices, end = self._further(work, now)
        if not indices:
            full = replace(now, filling=Filling(most, now.further, full=True))
            write_plan(self.store, "rounds", work.number, full)
            return None
        longer = stored.before(place + 1)
        if place == len(stored.further) or longer.problems != now.problems + indices:
            shards = cut(indices, self.run.rollout.prompts_per_shard, len(now.shards), _width(now))
            longer = now.with_further(shards, end)
            write_plan(self.store, "rounds", work.number, longer)
        return replace(work, shards=longer.shards)

    def _decides(self, number: int) -> bool:
        """Whether a round is not planned as with the default settings."""
        before = read_plan(self.store, "rounds", number - 1) if number else None
        if self.run.source.chooses or self._filling() is not None:
            return True
        count = self.run.rollout.prompts_per_round
        if before is None or (_end(before) is None and before.asked in (None, count)):
            return False
        here = read_plan(self.store, "rounds", number)  # before 2026-11-30 every plan began at its number times the prompts
        return here is None or _end(here) is not None or not here.is_for(count, self.source.fingerprint)

    def _filling(self) -> Filling | None:
        most = self.run.rollout.fill_groups
        return Filling(most, [], full=False) if most else None

    def _is_made_so(self, plan: Plan) -> bool:
        """Whether a stored plan was chosen by the settings of now. Then it stays, whatever verdicts say now."""
        same = plan.is_for(self.run.rollout.prompts_per_round, self.source.fingerprint) and self.run.source.chooses
        return same and plan.chosen is not None and plan.chosen.settings == self._settings()

    def _settings(self) -> str:
        source = self.run.source
        choice = [source.pass_rate, source.unmeasured, source.sampling, rates.settings_of(self.run, self.source)]
        return digest([*choice, self.run.seed])

    def _first(self, number: int, policy: int) -> Plan:
        """The plan of a round without further prompts."""
        count, known = self.run.rollout.prompts_per_round, self._candidates(number)
        if not known.fits.any():
            raise SettingError(_nothing(self.run, known), "source.pass_rate", NOTHING)
        indices, end = known.first(self.run.seed, number, self._start(number), count)
        width = len(str(count + self.run.rollout.fill_groups)) if self.run.rollout.fill_groups else 0
        shards = cut(indices, self.run.rollout.prompts_per_shard, width=max(4, width))
        return Plan(policy, shards, self.source.fingerprint, count, self._chosen(known), self._filling(), end)

    def _chosen(self, known: Candidates) -> Chosen | None:
        source = self.run.source
        if not source.chooses:
            return None
        low, high = source.pass_rate
        counts = (len(self.source), known.below, known.above, known.unmeasured)
        return Chosen(self._settings(), low, high, *counts, source.unmeasured == "kept")

    def _start(self, number: int) -> int:
        """The place in the endless order behind the problems of the earlier rounds."""
        before = read_plan(self.store, "rounds", number - 1) if number else None
        end = _end(before) if before is not None else None
        asked = before.asked if before is not None else None  # another number, where rollout.prompts_per_round has changed
        return number * (asked or self.run.rollout.prompts_per_round) if end is None else end

    def _further(self, work: Round, plan: Plan) -> tuple[list[int], int | None]:
        """Further problems that a graded round asks now, and the place behind them. None when it is full."""
        found = signals(work)
        wanted, asked = self.run.rollout.prompts_per_round, sum(map(len, found.values()))
        with_signal = int(sum(signal.sum() for signal in found.values()))
        count = num_further(with_signal, asked, wanted, self.run.rollout.fill_groups)
        count = min(count, 10 ** _width(plan) - len(plan.shards))  # more shards would need longer names than the first have
        start = _end(plan)
        if start is None:  # it was planned before rounds were filled
            start = (work.number + 1) * wanted
        return self._candidates(work.number).further(self.run.seed, work.number, start, count, plan.problems)

    def _candidates(self, number: int) -> Candidates:
        """The problems that a round may take, by what other runs and the rounds before it have told."""
        if not self.run.source.chooses:
            return Candidates.of(self.run.source, PassRates.none(len(self.source)))
        if self._known is None or self._folded > number:
            self._known, self._folded = rates.of_others(self.store, self.run, self.source), 0
        for earlier in range(self._folded, number):
            self._known = self._known.updated(rates.of_round(self.store, earlier, self.source))
        self._folded = number
        return Candidates.of(self.run.source, self._known)


MEASURE_THEM = "measure problems: `egrsd evaluate --run R --policy 0 --source FILE -k 8`"
NOTHING = f"Widen the bounds, set source.unmeasured to kept, or {MEASURE_THEM}"


def _nothing(run: Run, known: Candidates) -> str:
    low, high = run.source.pass_rate
    rest = f"{known.unmeasured} have no known pass rate"
    return f"none of {len(known.fits)} problems is in [{low:g}, {high:g}]: {known.below} are below, {known.above} above, {rest}"


def _width(plan: Plan) -> int:
    """Digits of the names of a plan's shards."""
    return len(next(iter(plan.shards)))


def _end(plan: Plan) -> int | None:
    """The place behind all problems of a plan in the endless order, or None where the number of the round tells it."""
    return plan.further[-1].end if plan.further else plan.end


# ---- what a person is told ---------------------------------------------------------------------------------------------


def told(store: Store, run: Run) -> list[str]:
    """Sentences on what choice and filling left out in the rounds of a run, and why. Plans and ready.json are read."""
    numbers = store.numbers("rounds")
    last = read_plan(store, "rounds", numbers[-1]) if numbers else None
    if last is None or not (run.source.chooses or run.rollout.fill_groups or last.chosen or last.filling):
        return []
    plans = {number: plan for number in numbers if (plan := read_plan(store, "rounds", number)) is not None}
    chosen = [number for number, plan in plans.items() if plan.chosen is not None]
    filled = {number: plan for number, plan in plans.items() if plan.filling is not None}
    return [*([_told_choice(chosen[-1], plans[chosen[-1]])] if chosen else []), *_told_filling(store, filled)]


def _told_choice(number: int, plan: Plan) -> str:
    one = plan.chosen
    assert one is not None
    parts = [f"{one.below} below", f"{one.above} above", f"{one.unmeasured} without a known pass rate"]
    if one.kept:
        parts[-1:] = []
    kept = f"; {one.unmeasured} without a known pass rate are kept" if one.kept else ""
    return (
        f"{area('rounds', number)} could take {one.problems - one.left_out} of {one.problems} problems by pass rate "
        f"[{one.low:g}, {one.high:g}]. Left out: {', '.join(parts)}{kept} (source.pass_rate)."
    )


def _told_filling(store: Store, plans: dict[int, Plan]) -> Iterator[str]:
    """Sentences on filled rounds: sums over all, and the rounds that lack groups or are not full yet."""
    further = sum(part.prompts for plan in plans.values() for part in plan.further)
    ready = {number: found for number in plans if (found := store.ready(number)) is not None}
    left = sum(len(places) for found in ready.values() for places in found.left_out.values())
    if plans:
        yield (
            f"{len(plans)} rounds are filled: {further} further prompts were asked. {left} groups are not trained on, since they "
            "have no signal or their round had enough (rollout.fill_groups)."
        )
    for number, plan in plans.items():
        assert plan.filling is not None
        if not plan.filling.full:
            yield f"{area('rounds', number)} is still being filled: {command('distill', '--run', store.uri)} goes on."
        elif number in ready and (lacking := _lacking(plan, ready[number].left_out)) > 0:
            yield f"{area('rounds', number)} has {lacking} groups with a signal fewer than the {plan.asked} that it asks for."


def _lacking(plan: Plan, left_out: dict[str, list[int]]) -> int:
    """Groups that a committed round has less than it asks for."""
    return (plan.asked or 0) - (len(plan.problems) - sum(map(len, left_out.values())))
