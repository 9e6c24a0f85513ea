"""Rounds and evaluations of a run: how they are planned, and how they are opened again. No Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from pipeline.config import Run
from pipeline.contract import Engines, Scope
from pipeline.digest import digest
from pipeline.errors import StoreError, UserError, command
from pipeline.grader.code import Code, codes_of
from pipeline.method.rewards import RunningBaseline
from pipeline.models.tokenizers.light import LightTokenizer
from pipeline.problems.sources import Problem, ProblemSet, epoch_indices
from pipeline.rounds.baseline import baseline_at, baselines
from pipeline.rounds.plan import Filling, Plan, cut, read_plan, write_plan
from pipeline.store.directory import Store, area
from pipeline.store.documents import RESTORE

_LATER = ("messages", "imported", "extra", "teacher")
TRACES_PER_SHARD = 32  # of an evaluation: few enough that every engine works, and that a kill loses little


@dataclass(frozen=True)
class Round:
    """One round or evaluation of a run, as all its stages see it. Picklable.

    kind: "rounds", or the folder of an evaluation.
    shards: indices of the problems in their source, by shard.
    baseline: running reward state at the start of the round. None with the group estimator.
    engines: the pool that answers, by stage.
    scope: Inventory.scope, handed to tasks so that none of them reads all scores again.
    codes: the code of each reward by its name. A task on another machine runs it, and reads no file of its own.
    tokenizer: of the run's model, handed to tasks so that they need not load it.
    """

    store: Store
    run: Run
    kind: str
    number: int
    policy_version: int
    shards: dict[str, list[int]]
    baseline: RunningBaseline | None
    engines: dict[str, Engines]
    scope: Scope | None = None
    codes: dict[str, Code] = field(default_factory=dict)
    tokenizer: LightTokenizer | None = None

    @property
    def area(self) -> str:
        """Folder of the round."""
        return area(self.kind, self.number)

    @property
    def lag(self) -> int:
        """Rounds by which the policy that answers is behind an on-policy one. 0 for an evaluation."""
        return self.number - self.policy_version if self.kind == "rounds" else 0


def plan_round(store: Store, run: Run, kind: str, number: int, policy_version: int, source: ProblemSet) -> Round:
    """A round whose plan is made and stored in plan.json, so that a rerun has the same shards.

    Rounds take the problems in shuffled epochs of the source, without a gap. An evaluation takes the first problems in order.
    An earlier plan for the same problems keeps its cut into shards.
    """
    count = run.rollout.prompts_per_round
    if kind == "rounds":
        indices = epoch_indices(len(source), run.seed, number * count, count).tolist()
    else:
        indices = list(range(min(count, len(source))))
    return set_plan(
        store, run, kind, number, Plan(policy_version, cut(indices, run.rollout.prompts_per_shard), source.fingerprint, count)
    )


def set_plan(store: Store, run: Run, kind: str, number: int, plan: Plan) -> Round:
    """A round with this plan, which is stored. An earlier plan for the same problems keeps its cut and its further prompts.

    Nothing more is asked where the new plan has no filling.
    """
    old = read_plan(store, kind, number)
    if old is not None and old.asks_the_same(plan):
        plan = replace(plan, shards=old.shards, filling=_going_on(old.filling, plan.filling))
    write_plan(store, kind, number, plan)
    state = baseline_at(store, run, kind, number, keep=True)
    return _with_codes(Round(store, run, kind, number, plan.policy, plan.shards, state, {}))


def _going_on(old: Filling | None, new: Filling | None) -> Filling | None:
    if old is None:
        return new
    return Filling(old.most, old.further, full=True) if new is None else Filling(new.most, old.further, old.full)


def open_round(store: Store, run: Run, kind: str, number: int, baseline: RunningBaseline | None = None) -> Round:
    """A round that was planned earlier. With `baseline` the running reward state is not folded again.

    Raises UserError when the round does not exist.
    """
    plan = read_plan(store, kind, number)
    if plan is None:
        known = store.numbers(kind)
        here = f"Here: {known[0]} to {known[-1]}" if known else f"Start the run with {command('distill', '--run', store.uri)}"
        raise UserError(f"no {kind.removesuffix('s')} {number}", store.uri, here)
    state = baseline or baseline_at(store, run, kind, number)
    return _with_codes(Round(store, run, kind, number, plan.policy, plan.shards, state, {}))


def _with_codes(work: Round) -> Round:
    return replace(work, codes=reward_codes(work.store, work.run)) if work.run.grade.rewards else work


def reward_codes(store: Store, run: Run) -> dict[str, Code]:
    """The code of every reward of a run, as it is on this machine now. Code in the run's folder is refused when it is used."""
    return codes_of(run, None if store.local_root is None else str(store.local_root))


def planned(store: Store, run: Run, kind: str, number: int, source: ProblemSet | None = None) -> Round | None:
    """The round, or None when it has no plan, or a plan for another number of prompts.

    With `source`, the open problems, a plan for other problems counts as none too.
    """
    plan = read_plan(store, kind, number)
    fingerprint = None if source is None else source.fingerprint
    return open_round(store, run, kind, number) if plan and plan.is_for(run.rollout.prompts_per_round, fingerprint) else None


def is_of_others(store: Store, kind: str, number: int, source: ProblemSet) -> bool:
    """Whether a round or an evaluation was planned for other problems than those of the open source.

    False for plans of early versions, which do not tell.
    """
    plan = read_plan(store, kind, number)
    return plan is not None and plan.source not in (None, source.fingerprint)


def open_rounds(store: Store, run: Run) -> Iterator[Round]:
    """All planned rounds in order. The running reward state is folded only once for all of them."""
    states = baselines(store, run)
    for number in store.numbers("rounds"):
        if (plan := read_plan(store, "rounds", number)) is not None:
            ready = store.ready(number)
            if ready is not None and ready.shards.keys() != plan.shards.keys():
                where = store.locate(f"{area('rounds', number)}/plan.json")
                raise StoreError("shards: are not those with which the round was committed (ready.json)", where, RESTORE)
            yield open_round(store, run, "rounds", number, next(states, None))


def with_engines(work: Round, engines: Mapping[str, Engines]) -> Round:
    """The same round with the engines that answer."""
    return replace(work, engines=dict(engines))


def problems_digest(problems: list[Problem]) -> str:
    """Hash of rows of a source: `ROWS`, or `ROWS+OTHERS` where they have other columns, with the hash of these.

    What later versions added to a row counts in ROWS only where it is there.
    """
    rows = [{name: part for name, part in asdict(p).items() if name not in _LATER or part is not None} for p in problems]
    for row in rows:
        del row["others"]  # of the source, and not of the row
    others = [(row.pop("extra", None), row.pop("left_out")) for row in rows]
    return digest(rows) + (f"+{digest(others)}" if any(extra or left_out for extra, left_out in others) else "")


def same_problems(before: str | None, now: str | None) -> bool:
    """Whether two hashes of rows are the same. Early versions hashed no other columns: what they made stays fresh."""
    return before == now or (before is not None and now is not None and before == now.partition("+")[0])


def evaluation_run(run: Run) -> Run:
    """A run whose rounds are the evaluations of `run`. It has the held-out source and sampling, and grades the same way.

    Of its rewards it has only the one that decides the verdict, because nothing trains on the others.
    """
    ev = run.evaluation
    rollout = run.rollout.model_copy(
        update={
            "prompts_per_round": ev.problems,
            "prompts_per_shard": max(1, TRACES_PER_SHARD // ev.samples),
            "group_size": ev.samples,
            "temperature": ev.temperature,
            "top_p": ev.top_p,
            "top_k": ev.top_k,
            "max_new_tokens": ev.max_new_tokens,
            "teacher_share": 0.0,
            "import_share": 1.0,
            "fill_groups": 0,
        }
    )
    # one sample per problem is allowed, since nothing trains on these advantages
    judge = tuple(reward for reward in run.grade.rewards if reward.name == run.grade.verdict_reward)
    grade = run.grade.model_copy(update={"advantage": "running", "std": "population", "rewards": judge})
    return run.model_copy(update={"source": ev.source, "rollout": rollout, "grade": grade, "teachers": {}})
