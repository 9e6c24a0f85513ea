"""What of a run is stale, one sentence for each kind, and the one command that mends it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.config import Run
from pipeline.errors import command
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import evaluation_run, open_round, open_rounds
from pipeline.stages import EVALUATION, PLAN, chain_of
from pipeline.store.directory import Store, area
from pipeline.store.folders import is_dropped


@dataclass
class Staleness:
    """What is stale: the rounds and shards of each stage by reason, policies that were trained on other shards, evaluations.

    begun: rounds that are being made. Shards which they lack are not stale.
    """

    store: Store
    run: Run
    shards: dict[tuple[str, str], dict[int, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    policies: list[int] = field(default_factory=list)
    evaluations: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    begun: dict[int, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stale."""
        return not (self.shards or self.policies or self.evaluations)

    def add(self, inventory: Inventory) -> bool:
        """Note what is stale in a round. Whether anything is."""
        work, found = inventory.work, False
        live = not work.store.has_policy(work.number + 1)
        for name in chain_of(work.run, (stage.name for stage in PLAN)):
            for reason, count in inventory.begun_and_stale(name).items():
                if reason == "missing" and live:
                    self.begun[work.number] = name
                    continue
                self.shards[name, reason][work.number] = (count, len(work.shards))
                found = True
        if inventory.as_committed is False and not live:
            self.policies.append(work.number + 1)
            found = True
        return found

    def lines(self) -> list[str]:
        """A sentence for each kind, the commands that mend them, and a word on rounds that are being made."""
        lines = []
        for (name, reason), rounds in self.shards.items():
            count, total = (sum(pair[place] for pair in rounds.values()) for place in (0, 1))
            lines.append(f"stale: {name} of {among(rounds, 'round')}, {count} of {total} shards ({reason})")
        if self.policies:
            lines.append(f"stale: {among(self.policies, 'policy', 'policies')}: trained on other shards than those of now")
        lines += [f"stale: evaluation of {among(n, 'policy', 'policies')} ({why})" for why, n in self.evaluations.items()]
        lines += [f"mend: {one}" for one in self.remedies()]
        lines += [f"round {number} is being made: stage {name}" for number, name in self.begun.items()]
        return lines

    def remedies(self) -> list[str]:
        """The commands that mend what is stale, in their order: one for all stages, one for policies, one for evaluations."""
        uri, commands = self.store.uri, []
        if self.shards:
            stale = {name for name, _ in self.shards}
            stages = ",".join(stage.name for stage in PLAN if stage.name in stale)
            rounds = sorted({number for found in self.shards.values() for number in found})
            commands.append(command("stage", stages, "--run", uri, "--round", ranges(rounds)))
        if self.policies:
            commands.append(command("train", "--run", uri, "--from-round", self.policies[0] - 1, "--replace"))
        if any(can_answer(self.store, self.run, number) for numbers in self.evaluations.values() for number in numbers):
            commands.append(command("distill", "--run", uri))
        return commands


def look(store: Store, run: Run, inventories: Iterable[Inventory] | None = None) -> Staleness:
    """What is stale in a run. No shard is read."""
    found = Staleness(store, run)
    for inventory in (Inventory(work) for work in open_rounds(store, run)) if inventories is None else inventories:
        found.add(inventory)
    for number, reasons in stale_evaluations(store, run).items():
        for reason in reasons:
            found.evaluations[reason].append(number)
    return found


def stale_evaluations(store: Store, run: Run) -> dict[int, list[str]]:
    """Why stored evaluations are stale, by policy. One that lacks shards may be at work while its policy is the latest."""
    found: dict[int, list[str]] = {}
    for number in store.numbers("evals") if run.evaluation.problems else []:
        if read_plan(store, "evals", number) is None:  # an empty folder
            continue
        seen = Inventory(open_round(store, evaluation_run(run), "evals", number))
        reasons = {why for name in chain_of(seen.work.run, EVALUATION) for why in seen.begun_and_stale(name)}
        if reasons := {why for why in reasons if why != "missing" or store.latest_policy() > number}:
            found[number] = sorted(reasons)
    return found


def can_answer(store: Store, run: Run, version: int) -> bool:
    """Whether the weights of a policy are there, or will be once the run is trained to its end."""
    if version == 0 or store.latest_policy() < version <= run.rounds:
        return True
    return store.has_policy(version) and not is_dropped(store, area("policy", version))


def tell_stale(store: Store, run: Run, say: Callable[[str], None]) -> None:
    """Say what a command has left stale, and the command that mends it."""
    for line in look(store, run).lines():
        say(f"now {line}" if line.startswith("stale: ") else line)


def among(numbers: Iterable[int], one: str, several: str = "") -> str:
    """Numbers in words: `round 3`, `rounds 0 to 15`, `rounds 0, 2 to 4`."""
    listed = sorted(numbers)
    text = ranges(listed).replace("..", " to ").replace(",", ", ")
    return f"{one if len(listed) == 1 else several or f'{one}s'} {text}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as `--round` takes them: `0,2..4`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}..{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
