"""Which shards of a round exist, and which of them are fresh or stale. Every verb asks here, and nowhere else. No Ray.

A shard is fresh when it was made with the current settings of its stage and from the current inputs. Both are compared by hash.
Computing an input again to the same bytes therefore makes nothing stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from pipeline.contract import REWARD_PREFIX, TEACHER_PROMPTS, Reject, Scope, Stage
from pipeline.digest import digest
from pipeline.errors import StoreError, command
from pipeline.grader.code import identity
from pipeline.rounds import seats
from pipeline.rounds.round import Round, same_problems
from pipeline.stages import MEASURE, STAGES
from pipeline.stages.prompts import UNTAUGHT
from pipeline.stages.rollout import WRITERS
from pipeline.stages.score import bounds_instead
from pipeline.store.directory import Entry, Ready, Store, area
from pipeline.store.documents import RESTORE

POLICY_CHANGED = ("policy changed", "teacher_policy changed")  # reasons that leave stored traces usable without engines


class Inventory:
    """The shards of a round as they are now. Every entry, setting and policy is read at most once.

    `whole` reads all entries of a stage together, for a driver. Without it each entry is read when it is needed, for a task that
    works on few shards. An inventory does not see later changes: make a new one for them.
    """

    def __init__(self, work: Round, whole: bool = True) -> None:
        self.work, self._whole = work, whole
        self._stages: dict[str, dict[str, Entry]] = {}
        self._single: dict[tuple[str, str], Entry | None] = {}
        self._settings: dict[str, str] = {}

    def entries(self, name: str) -> dict[str, Entry]:
        """Entries of a stage by shard. Shards that the round's plan does not name are left out: an earlier plan had them."""
        if name not in self._stages:
            entries = self.work.store.entries(self.work.area, name)
            self._stages[name] = {shard: entry for shard, entry in entries.items() if shard in self.work.shards}
            for entry in self._stages[name].values():
                self._check_counts(entry)
        return self._stages[name]

    def entry(self, name: str, shard: str) -> Entry | None:
        """Entry of one shard, or None when it does not exist."""
        if self._whole:
            return self.entries(name).get(shard)
        if (name, shard) not in self._single:
            self._single[name, shard] = self.work.store.entry(self.work.area, name, shard)
        return self._single[name, shard]

    def _check_counts(self, entry: Entry) -> None:
        """Raise StoreError when an entry cannot have been made from the inputs that it names, by their numbers of rows."""
        for name in entry.inputs.keys() & STAGES.keys():
            made = self.entry(name, entry.shard)
            if made is None or made.sha256 != entry.inputs[name]:
                continue  # stale, which `why_stale` says
            fits = entry.rows % max(1, made.rows) == 0 if name == "prompts" else entry.rows == made.rows
            if not fits or (name != "prompts" and sum(entry.rejected.values()) < sum(made.rejected.values())):
                where = self.work.store.locate(f"{entry.area}/{entry.stage}/{entry.shard}.json")
                raise StoreError(f"rows, rejected: do not follow from those of {name}", where, RESTORE)

    def expected_inputs(self, stage: Stage, shard: str, problems: str | None = None) -> dict[str, str] | None:
        """The inputs of a fresh shard of `stage`, as name to hash. None while one of them does not exist.

        `problems` is the digest of the shard's source rows. Without it the rows count as unchanged.
        """
        inputs: dict[str, str] = {}
        for name in stage.read_by(self.work.run).inputs:
            entry = self.entry(name, shard)
            if entry is None:
                return None
            inputs[name] = entry.sha256
        if stage.after_round and self.scope is None:
            return None
        of_round = {name: self._of_round(name, problems) for name in stage.round_inputs(self.work.run)}
        return inputs | {name: value for name, value in of_round.items() if value is not None}

    def why_stale(self, stage: Stage, shard: str, problems: str | None = None) -> str | None:
        """Why a shard must be computed: "missing", "settings", or the input that changed. None when the shard is fresh.

        A stage that the run does not have is never stale.
        """
        if not stage.in_run(self.work.run):
            return None
        entry = self.entry(stage.name, shard)
        if entry is None:
            return "missing"
        if entry.settings != self.settings(stage) or self._left_out_for_a_teacher(entry):
            return "settings"
        expected = self.expected_inputs(stage, shard, problems)
        if expected is None:
            return "input missing"
        # a shard is stale that has an input which is no more: a policy where the base answers now, a reward, the stage of rewards
        gone = entry.inputs.keys() & {"policy", "teacher_policy", "reward"}
        untold = {"teacher_prompts"} - entry.inputs.keys()  # shards from before 2026-11-30 do not tell it
        named = (expected.keys() | gone | self._gone(entry)) - untold
        changed = [name for name in sorted(named) if entry.inputs.get(name) != expected.get(name)]
        if "problems" in changed and same_problems(entry.inputs.get("problems"), expected.get("problems")):
            changed.remove("problems")
        return f"{changed[0]} changed" if changed else None

    def _left_out_for_a_teacher(self, entry: Entry) -> bool:
        """Whether an evaluation from before 2026-11-30 may lack problems because a teacher's prompt had no room.

        Nobody would have read that prompt. Evaluations of now have these problems, and would not pair with it.
        """
        is_old = entry.stage == "prompts" and self.work.kind != "rounds" and UNTAUGHT not in entry.facts
        return is_old and Reject.PROMPT_TOO_LONG in entry.rejected

    def reasons(self, name: str, problems: Mapping[str, str] | None = None) -> Counter[str]:
        """How many shards of a stage must be computed, by reason. `problems` has the digest of each shard's source rows."""
        reasons = (self.why_stale(STAGES[name], shard, (problems or {}).get(shard)) for shard in self.work.shards)
        return Counter(reason for reason in reasons if reason is not None)

    def stale_input(self, stage: Stage, shard: str) -> str | None:
        """The first input of a shard that is stale, with the reason. None when all inputs are fresh.

        A stage that only reads stored traces (grade, profile, label) may also read traces whose policy was trained again since.
        """
        for name in stage.read_by(self.work.run).inputs:
            reason = self.why_stale(STAGES[name], shard)
            if reason and not (reason in POLICY_CHANGED and stage.where == "CPU"):
                return f"{name} ({reason})"
        return None

    def _gone(self, entry: Entry) -> set[str]:
        """The rewards that a shard was made with and that the run has no more."""
        now = {f"{REWARD_PREFIX}{reward.name}" for reward in self.work.run.grade.rewards}
        return {name for name in entry.inputs if name.startswith(REWARD_PREFIX) and name not in now}

    def settings(self, stage: Stage) -> str:
        """Hash of the run's settings that a stage reads."""
        if stage.name not in self._settings:
            self._settings[stage.name] = self.work.run.digest(stage.settings)
        return self._settings[stage.name]

    def rejected(self, name: str) -> Counter[str]:
        """Rejected rows of a stage by reason, with those that an earlier stage rejected."""
        total: Counter[str] = Counter()
        for entry in self.entries(name).values():
            total.update(entry.rejected)
        return total

    def rejected_first(self, name: str) -> Counter[str]:
        """Rows by reason that a stage after `rollout` rejected itself, without those that came rejected from `rollout`."""
        return self.rejected(name) - self.rejected("rollout")

    def all_rejected(self) -> Counter[str]:
        """Rejected rows of the round by reason. Traces are counted, or prompts while there are no traces."""
        rejected = self.rejected("rollout" if self.entries("rollout") else "prompts")
        return rejected + self.rejected_first("grade") + self.rejected_first("score")

    def begun_and_stale(self, name: str) -> Counter[str]:
        """The same as `reasons`, but empty for a stage that has no shard at all."""
        return self.reasons(name) if self.entries(name) else Counter()

    def fallbacks(self) -> list[str | None]:
        """Why entropies are bounds although the run asks for exact ones: a cause, or None, for each such shard."""
        if self.work.run.score.entropy == "bounds":
            return []
        scored = self.entries("score").values()
        fell_back = [entry.facts.get("fallback") for entry in scored if entry.facts.get("entropy_method") == "bounds"]
        for entry in scored:
            named: dict[str, dict[str, str]] = entry.facts.get("teachers", {})  # type: ignore[assignment]
            fell_back += list({facts["fallback"] for facts in named.values() if facts.get("fallback")})[:1]
        return fell_back

    def warning(self) -> str | None:
        """The sentences that tell of scored shards with bounds although the run asks for exact entropies, or None."""
        return warning_over([self])

    @cached_property
    def as_committed(self) -> bool | None:
        """Whether the round was committed to the trainer with exactly the shards of now. None while it is not committed."""
        ready = self.work.store.ready(self.work.number)
        return None if ready is None else ready.shards == self.hashes(MEASURE)

    def is_whole(self, *names: str) -> bool:
        """Whether every shard of these stages exists, fresh or stale."""
        return all(self.work.shards.keys() <= self.entries(name).keys() for name in names)

    def is_fresh(self, *names: str, problems: Mapping[str, str] | None = None) -> bool:
        """Whether every shard of these stages exists and is fresh. `problems` has the digest of each shard's source rows."""
        return not any(self.reasons(name, problems) for name in names)

    def hashes(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """sha256 of the existing shards of these stages, by shard and then by stage."""
        stages = {name: self.entries(name) for name in names}
        return {shard: {name: e[shard].sha256 for name, e in stages.items() if shard in e} for shard in self.work.shards}

    @cached_property
    def measured(self) -> str:
        """One hash of all shards that training reads. Evidence keeps it: a trace_id stays when its trace is written again."""
        return digest(self.hashes(MEASURE))

    @cached_property
    def scope(self) -> Scope | None:
        """The round's largest teacher entropy and the size of its vocabulary. None while a shard is not scored."""
        if self.work.scope is not None:
            return self.work.scope
        entries = self.entries("score")
        if not entries or self.work.shards.keys() - entries.keys():
            return None
        sizes = {entry.fact("vocab_size") for entry in entries.values()}
        if len(sizes) > 1:
            again = command("stage", "score", "--run", self.work.store.uri, "--round", self.work.number, "--force")
            what = f"facts.vocab_size differs between shards: {', '.join(map(str, sorted(sizes)))}"
            raise StoreError(
                what,
                self.work.store.locate(f"{self.work.area}/score"),
                f"{again} makes them anew",
            )
        return Scope(max(entry.fact("entropy_max") for entry in entries.values()), *sizes)

    def _of_round(self, name: str, problems: str | None) -> str | None:
        """The hash of a value of the whole round. None when the round does not have it, or it cannot be known here."""
        if name.startswith(REWARD_PREFIX):
            reward = next(one for one in self.work.run.grade.rewards if f"{REWARD_PREFIX}{one.name}" == name)
            return identity(reward, self.work.codes[reward.name])
        match name:
            case "problems":
                return problems
            case "policy":
                return self._policy
            case "teacher_policy":
                return seats.digest_of_policies(self.work)
            case "teacher_prompts":
                return self.work.run.digest(TEACHER_PROMPTS)
            case "writers":
                return self.work.run.digest(WRITERS)
            case "baseline":
                return self._baseline
            case "peak":
                return None if self.scope is None else repr(self.scope.peak)
        raise AssertionError(name)

    @cached_property
    def _policy(self) -> str | None:
        return self.work.store.content(self.work.policy_version)

    @cached_property
    def _baseline(self) -> str | None:
        return None if self.work.baseline is None else digest(self.work.baseline.to_dict())


def commit_round(work: Round, left_out: dict[str, list[int]] | None = None) -> None:
    """Hand a round to the trainer. Its ready.json names exactly the shards that the trainer may read.

    left_out: prompts whose traces are not trained on, as `pipeline.rounds.rows.left_out` gives them.

    Raises StoreError when a shard is missing.
    """
    shards = Inventory(work).hashes(MEASURE)
    if short := [shard for shard, hashes in shards.items() if len(hashes) < len(MEASURE)]:
        raise StoreError("a round is committed with a shard missing", f"{work.area}, shard {short[0]}")
    ready = Ready(policy=work.policy_version, shards=shards, left_out=left_out or {})
    if work.store.ready(work.number) != ready:
        work.store.write_json(f"{work.area}/ready.json", ready.model_dump(exclude_defaults=True))


def withdraw_rounds(store: Store, numbers: Iterable[int]) -> None:
    """Take committed rounds back from the trainer. Numbers of rounds that do not exist are ignored."""
    for number in sorted(set(numbers) & set(store.numbers("rounds"))):
        store.delete(f"{area('rounds', number)}/ready.json")


def warning_over(inventories: Iterable[Inventory]) -> str | None:
    """One warning for all rounds that have bounds although the run asks for exact entropies, or None."""
    fell_back = [(seen, found) for seen in inventories if (found := seen.fallbacks())]
    if not fell_back:
        return None
    areas = [seen.work.area for seen, _ in fell_back]
    where = areas[0] if len(areas) == 1 else f"{areas[0]} to {areas[-1]}"
    causes = sorted({cause or "the self-check of their engine failed" for _, found in fell_back for cause in found})
    scored = sum(len(seen.entries("score")) for seen, _ in fell_back)
    count = sum(len(found) for _, found in fell_back)
    return f"{where}, {count} of {scored} shards: {bounds_instead('; '.join(causes))}"
