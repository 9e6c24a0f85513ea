"""What came of a policy's answers to the run's held-out problems, in one line: the share of right ones, and what is not wrong."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import Verdict
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round
from pipeline.rounds.rows import are_of_now
from pipeline.store.directory import Store, area

_EXAMPLES, _WIDEST = 2, 200  # answers that are shown, and characters of each
_FEW = 0.02  # share of right answers below which nearly every group has none


@dataclass(frozen=True)
class Tally:
    """The graded answers of one policy. verdicts: how many have each verdict. rejected: rows that a stage rejected.

    A rejected row is no answer, also where it got a verdict before its reward failed.
    """

    policy: int
    verdicts: dict[str, int]
    rejected: int

    @property
    def answers(self) -> int:
        """Answers that have a verdict."""
        return sum(self.verdicts.values())

    @property
    def accuracy(self) -> float:
        """Share of right answers among those with a verdict; 0 without one."""
        return self.verdicts.get(Verdict.CORRECT, 0) / max(1, self.answers)

    def line(self) -> str:
        """A line such as `policy 0: 0.0 % of 20 (13 truncated, 5 unparsable)`. Verdicts that are right or wrong are left out."""
        plain = (Verdict.CORRECT, Verdict.WRONG)
        others = Counter({str(verdict): count for verdict, count in self.verdicts.items() if verdict not in plain})
        others["rejected"] = self.rejected
        parts = ", ".join(f"{count} {name}" for name, count in others.most_common() if count)
        return f"policy {self.policy}: {100 * self.accuracy:.1f} % of {self.answers}" + (f" ({parts})" if parts else "")

    def warning(self, running: bool = False) -> str | None:
        """What to change when no answer, or nearly none, is right. None when enough are. running: as `grade.advantage` says."""
        if self.accuracy >= _FEW:
            return None
        right = self.verdicts.get(Verdict.CORRECT, 0)
        few = f"{right} of {self.answers} answers of policy {self.policy} {'is' if right == 1 else 'are'} right"
        means = (
            "A wrong answer lowers the chance of its tokens" if running else "A group without a right answer carries no signal"
        )
        return (
            f"warning: {few}. {means}. "
            "Look at the answer format that prompts.student asks for, and at what grade.answer_pattern and grade.fallback find. "
            "Or raise rollout.max_new_tokens and evaluation.max_new_tokens, or choose an easier source."
        )


def tally(work: Round) -> Tally | None:
    """The tally of an evaluation. None while a shard of it is not graded. Raises StoreError for a damaged shard."""
    seen = Inventory(work)
    if not seen.is_whole("grade"):
        return None
    verdicts: Counter[str] = Counter()
    for entry in seen.entries("grade").values():
        table = work.store.read(entry, ["verdict", "reject_reason"])
        verdicts.update(table.filter(pc.is_null(table["reject_reason"]))["verdict"].to_pylist())
    return Tally(work.policy_version, dict(verdicts), seen.rejected("grade").total())


def examples(work: Round) -> Iterator[str]:
    """The first answers of a graded evaluation that are not right, each with its verdict, in a line."""
    seen = Inventory(work)
    shard = min(work.shards)
    texts = work.store.read(seen.entries("rollout")[shard], ["response_text"])["response_text"].to_pylist()
    graded = work.store.read(seen.entries("grade")[shard], ["verdict", "reject_reason"]).to_pylist()
    found = [(text, row["verdict"]) for text, row in zip(texts, graded, strict=True) if row["reject_reason"] is None]
    for text, verdict in [one for one in found if one[1] != Verdict.CORRECT][:_EXAMPLES]:
        yield f"    {verdict}: {textwrap.shorten(text, _WIDEST, placeholder=' ...')!r}"


def told(work: Round, teaches: bool) -> Iterator[str]:
    """The line of an evaluation that is whole, and where a run learns from right answers (`teaches`) its warning with answers."""
    if (found := tally(work)) is not None:
        yield found.line()
        if teaches and (text := found.warning(work.run.grade.advantage == "running")) is not None:
            yield text
            yield from examples(work)


def tally_of(store: Store, run: Run, version: int) -> Tally | None:
    """The tally of a policy on the run's own held-out problems.

    None when that evaluation is missing or not whole, or when the policy was trained again since.
    """
    if read_plan(store, "evals", version) is None:
        return None
    if not are_of_now(store, version, store.entries(area("evals", version), "rollout").values()):
        return None
    return tally(open_round(store, evaluation_run(run), "evals", version))


def tallies(store: Store, run: Run) -> Iterator[Tally]:
    """The tally of every policy whose evaluation is whole, in the order of the policies."""
    for version in store.numbers("evals"):
        if (found := tally_of(store, run, version)) is not None:
            yield found
