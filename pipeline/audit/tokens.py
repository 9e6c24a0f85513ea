"""The tokens of an audit: the traces of one round, what they weigh under each objective, and their true classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import Run
from pipeline.contract import Verdict
from pipeline.errors import UserError
from pipeline.evidence.evaluation import CONTENT, content_of
from pipeline.evidence.sweep import first_step, read_round
from pipeline.method import directions as maths
from pipeline.method.objective import Kept
from pipeline.problems import worlds
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.rounds.rows import read_shard
from pipeline.training import batches
from pipeline.training.batches import MicroBatch, Traces
from pipeline.training.step import Trainer
from pipeline.training.student.head import Divergence


@dataclass(frozen=True, eq=False)
class Tokens:
    """The response tokens of N traces, one trace after the other. problems [N] from 0; weights of each weighting [K][tokens].
    correct [N] bool. `rows` are the places of these traces in `traces`. divergences at all tokens, of the weightings that have
    one, by their place. classes [tokens]: the true class of every token, where the source knows it (problems/worlds.py).
    """

    traces: Traces
    rows: np.ndarray
    problems: np.ndarray
    correct: np.ndarray
    weights: list[np.ndarray]
    classes: np.ndarray | None = None
    divergences: dict[int, Divergence] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Response tokens of every trace, [N]."""
        return self.traces.response_tokens.lengths[self.rows]

    @property
    def log_ratio(self) -> np.ndarray:
        """log p_T - log p_S of every token, nats."""
        teacher, student = (part.take(self.rows) for part in (self.traces.teacher_logprobs, self.traces.student_logprobs))
        return np.asarray(teacher - student)

    def places(self, chosen: np.ndarray) -> np.ndarray:
        """Places of the tokens of some traces, in their order."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.concatenate([np.arange(starts[row], starts[row] + self.lengths[row]) for row in chosen])

    def micros(self, chosen: np.ndarray, trainer: Trainer) -> Iterator[tuple[MicroBatch, np.ndarray]]:
        """Some traces in the micro-batches of a trainer, packed where it packs, each with the places of its tokens."""
        rows = self.rows[chosen]
        for micro in batches.share(
            self.traces, rows, 0, 1, trainer.run.train.micro_batch_tokens, trainer.packs(self.traces, rows)
        ):
            yield micro, self.places(np.array([self._row_of[trace] for trace in micro.trace_ids]))

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {trace: row for row, trace in enumerate(self.traces.ids(self.rows))}


MADE = ("linear", "clipped", "uncertain", "certain")  # weightings that no run trains


def made(name: str, tokens: Tokens) -> np.ndarray:
    """A weighting of MADE, of the stored advantage A, the teacher's entropy H and delta = log p_T - log p_S: float32 [tokens].

    linear: A + |A| delta, which A times the teacher's ratio is to first order. clipped: A times that ratio within .05 and 3.
    uncertain and certain: A where H is above half of its maximum, and where it is at most a tenth.
    """
    advantage = np.repeat(tokens.traces.advantage[tokens.rows], tokens.lengths)
    entropy = tokens.traces.teacher_entropy.take(tokens.rows)
    match name:
        case "linear":
            found = advantage + np.abs(advantage) * tokens.log_ratio
        case "clipped":
            found = advantage * np.exp(np.sign(advantage) * tokens.log_ratio).clip(0.05, 3)
        case "uncertain":
            found = advantage * (entropy > 0.5 * entropy.max())
        case _:
            found = advantage * (entropy <= 0.1 * entropy.max())
    return found.astype(np.float32)


def read_tokens(work: Round, trainer: Trainer, asked: dict[str, Run | None], most: int) -> Tokens:
    """The traces that every objective may learn from, of `most` problems (0: all), with their weights under each of `asked`.

    Traces of other writers are left out: what raises their reward does not raise the student's accuracy. That of a
    distributional objective has a divergence, too. M of the gate is the largest entropy of these traces, as if they were one
    minibatch. Their step is the round's first.
    """
    named = {name: run for name, run in asked.items() if run is not None}
    columns = tuple(dict.fromkeys(name for run in named.values() for name in run.objective.columns))
    data = read_round(work, columns)
    usable = [batches.usable(data, work.number), *(batches.usable(data, work.number, run.objective) for run in named.values())]
    facts = _facts(work)
    if not facts:
        what = "the student wrote no graded trace of this round"
        raise UserError(what, work.area, "Audit a round of its own traces, without rollout.import_share=1")
    common = [trace for trace in reduce(np.intersect1d, [traces.trace_ids for traces in usable]) if trace in facts]
    questions = sorted({facts[trace].problem for trace in common})  # those alone of which traces are left
    if most and most < len(questions):
        drawn = np.random.default_rng([work.run.seed, work.number, 3]).choice(len(questions), most, replace=False)
        kept = {questions[place] for place in drawn}
        common = [trace for trace in common if facts[trace].problem in kept]
    places = [dict(zip(traces.trace_ids, range(len(traces.trace_ids)), strict=True)) for traces in usable]
    common = sorted(common, key=lambda trace: places[0][trace])
    if not common:
        raise UserError("no trace is there from which all these objectives may learn", work.area, "Audit fewer objectives")
    rows = [np.array([place[trace] for trace in common]) for place in places]
    correct = np.array([facts[trace].correct for trace in common])
    _, problems = np.unique([facts[trace].problem for trace in common], return_inverse=True)
    classes = _true_classes(work, [facts[trace] for trace in common], usable[0].response_tokens.lengths[rows[0]])
    found = Tokens(usable[0], rows[0], problems, correct, [], classes)
    reference = maths.leave_one_out(correct, problems)
    found.weights.append(np.repeat(reference, found.lengths).astype(np.float32))
    trainer.step = first_step(work)
    groups = batches.pack(usable[0].lengths[rows[0]], work.run.train.micro_batch_tokens)
    order = torch.from_numpy(np.argsort(np.concatenate([found.places(group) for group in groups])))
    read = dict(zip(named, zip(usable[1:], rows[1:], strict=True), strict=True))
    for name, run in asked.items():
        if run is None:
            found.weights.append(made(name, found))
            continue
        traces, chosen = read[name]
        trainer.run = run
        micros = [batches.micro_batch(traces, chosen[group]) for group in groups]
        if spread := trainer.divergences(micros):
            whole = Kept(*map(torch.cat, zip(*(one.kept for one in spread), strict=True)))
            found.divergences[len(found.weights)] = spread[0]._replace(kept=whole).at(order)
        found.weights.append(torch.cat(trainer.weights(micros))[order].numpy())
    return found


class Fact(NamedTuple):
    """Of a graded trace: which problem it answers, whether it is right, and both texts.

    problem: shard and place of the first prompt with its text and its answer. A round may ask a problem of a small file again.
    """

    problem: str
    correct: bool
    asked: str
    response: str


def _facts(work: Round) -> dict[str, Fact]:
    """The facts of every trace of the student with a verdict, by its id."""
    seen, found = Inventory(work), {}
    first: dict[str, str] = {}  # place of the first prompt of each problem, by its content
    written = ["trace_id", "prompt_index", "response_text", "trace_source"]
    columns = {"prompts": list(CONTENT), "rollout": written, "grade": ["verdict"]}
    entries = {stage: seen.entries(stage) for stage in columns}
    for shard in sorted(work.shards):
        tables = read_shard(work.store, {stage: shards[shard] for stage, shards in entries.items()}, columns)
        asked, verdicts = tables["prompts"].to_pylist(), tables["grade"]["verdict"].to_pylist()
        problems = [first.setdefault(content_of(row), f"{shard}/{prompt}") for prompt, row in enumerate(asked)]
        for row, verdict in zip(tables["rollout"].to_pylist(), verdicts, strict=True):
            if verdict is not None and row.get("trace_source", "student") == "student":
                prompt = row["prompt_index"]
                right = verdict == Verdict.CORRECT
                text = asked[prompt]["problem"] or ""
                found[row["trace_id"]] = Fact(problems[prompt], right, text, row["response_text"] or "")
    return found


def _true_classes(work: Round, facts: list[Fact], lengths: np.ndarray) -> np.ndarray | None:
    """The true class of every token, int8 [tokens], or None where the source does not know it. One character is one token.

    The end of a trace is filler. A trace whose tokens are not its characters is of class `other`.
    """
    kind, _, dials = work.run.source.uri.partition(":")
    if kind != worlds.KIND:
        return None
    world, found = worlds.read_world(dials), []
    for fact, length in zip(facts, lengths, strict=True):
        classes = worlds.token_classes(fact.asked, fact.response, world)
        if length - len(classes) == 1:
            classes.append(worlds.CLASSES.index("filler"))
        found.append(classes if len(classes) == length else [worlds.CLASSES.index("other")] * int(length))
    return np.concatenate(found).astype(np.int8)
