"""The gradient audit: which objective's gradient points where accuracy rises, measured on the stored traces of one round.

No engine is needed. pipeline/method/directions.py has the reference, the estimates and their correction for noise. Figures are
kept in evidence/audit-NNNN.json. The alignment of every token is kept in evidence/audit-NNNN.parquet, one row per trace. A
weighting, regime or decile then needs no gradient: its push is a weighted sum of that column, each block by its own traces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.audit import figures
from pipeline.audit.tokens import MADE, Tokens, read_tokens
from pipeline.config import Run
from pipeline.errors import SettingError, UserError, refuse_unread
from pipeline.evidence.comparison import variant
from pipeline.evidence.documents import DIGITS, plain
from pipeline.evidence.sweep import NOT_KEPT, first_step, is_kept, load_policy
from pipeline.fit import footprint
from pipeline.method import directions as maths
from pipeline.overrides import named, refuse_unread_objective, resolve
from pipeline.problems import worlds
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.training.alignment import Directions, Space
from pipeline.training.step import Trainer
from pipeline.training.student import student
from pipeline.training.student.head import Divergence

REFERENCE = "reinforce"
NAMED = ("objective.name", "objective.gate", "objective.control", "objective.entropy")
NAMES = "Write it in --objectives as NAME+GATE+CONTROL, such as egrsd+entropy+inverted, or student_entropy"
READS = "It reads the sections objective, train, profile and model. The gate of training has objective.gamma and objective.window"
ORACLES = ["oracle", "inverted_oracle"]  # the reference on the tokens that decide by their true class, and on all others
ALONE = ("regime", "decile")  # kinds of classes whose tokens' own gradients are measured, where they fit into memory
SHOWN = ("cosine", "batch_cosine", "batch_share", "averaged_cosine", "push")  # of these
MOST_BYTES = 2 << 30  # of the gradients of all blocks
LEAST_BLOCKS = 6
FURTHER = 3  # gradients of a block besides those of its weightings: of lengths, of the reference, and one while they are made


@dataclass(frozen=True)
class Plan:
    """How much is audited: blocks and problems at most, and by which parameters.

    space: None is all weights, where their gradients fit into memory, else the adapter. problems: 0 is all of the round's; else
    that many are drawn by the run's seed. alone: whether the reference is also measured on the tokens of each regime and decile
    alone. sample: traces whose gradients are taken; 0: of each block a minibatch at most.
    """

    blocks: int = 16
    space: Space | None = "weights"
    problems: int = 0
    alone: bool = True
    sample: int = 0


def objectives(run: Run, names: list[str], sets: Sequence[str] = ()) -> dict[str, Run | None]:
    """The run under the lines `sets` with each objective as `egrsd compare` names it, and None for a weighting of MADE.

    Raises SettingError for an objective that needs other scores, and for a setting that an audit does not read. Raises it too for
    a setting that the names of the objectives say.
    """
    if "no_reference" in names:
        raise SettingError("'no_reference' needs other scores", "--objectives", "Audit a run that was made so")
    changed = named(list(sets))
    refuse_unread("an audit does not read this setting", sorted(changed), _is_read, lambda _: READS)
    refuse_unread("the name of an objective says this", sorted(changed), lambda name: name not in NAMED, lambda _: NAMES)
    base = resolve(run, list(sets))
    asked = {name: None if name in MADE else variant(base, name, run.seed) for name in names}
    refuse_unread_objective(filter(None, asked.values()), list(sets))
    return asked


def _is_read(setting: str) -> bool:
    return setting.startswith(("objective.", "train.", "profile.", "model.")) or setting == "label.min_normaliser"


def measure(work: Round, asked: dict[str, Run | None], plan: Plan) -> tuple[dict[str, Any], pa.Table]:
    """The document and the table of a round's audit, of the objectives that are asked. The first of them is compared with.

    Raises UserError when its policy is not stored, or when too few problems have both right and wrong traces. Raises it too when
    the gradients do not fit into memory. No gradient is made before that is known.
    """
    run, clock = work.run, [time.perf_counter()]
    _check_policy(work)
    _check_problems(work, plan)
    space = _space(work, len(asked), plan)
    trainer = _trainer(work)
    tokens = read_tokens(work, trainer, asked, plan.problems)
    _check_verdicts(work, tokens)
    names = [REFERENCE, *asked, *_add_oracles(tokens)]
    audited = _Audited(Directions(trainer.student, space), tokens, trainer)
    into = figures.kinds(work, tokens)
    groups = _blocks(tokens, plan, audited.bytes_of(len(names)), work)
    split = _add_classes(audited, into if plan.alone else [], len(groups))
    clock.append(time.perf_counter())
    references = np.stack([audited.gradients(rows, tokens.weights[:1], {})[0] for rows in groups])
    alignment, pushed, towards = audited.alignment(groups, references)
    clock.append(time.perf_counter())
    parts = _parts(groups, run, plan.sample)
    in_part = len(parts) / sum(1 / len(rows) for rows in parts)  # noise of a block falls as one over its traces
    longer = np.repeat(maths.leave_one_out(tokens.lengths, tokens.problems), tokens.lengths).astype(np.float32)
    flows = np.stack([audited.gradients(rows, [*tokens.weights, longer], tokens.divergences) for rows in parts], axis=1)
    products = maths.Products.of_parts(flows[:-1], references, towards)
    lengths = maths.Products.of([flows[-1], *flows[:-1]])
    every = [*names, *(name for kind in split for name in kind.classes)]
    points = figures.points(every, products, (in_part, run.train.batch_traces), run.train.betas[0], lengths)
    points, alone = points[: len(names)], iter(points[len(names) :])
    each = {kind.name: [_shown(next(alone)) for _ in kind.classes] for kind in split}
    length = float(tokens.lengths.mean())  # these gradients are sums over tokens, and those of training are means
    figures.add_steps(points, flows[: len(names)], references, trainer.optimizer.defaults["eps"] * length)
    clock.append(time.perf_counter())
    document = _setting(work, asked, tokens) | {
        "space": space,
        "parameters": audited.space.size,
        "blocks": len(groups),
        "traces_in_block": float(np.mean([len(rows) for rows in groups])),
        "traces_in_part": in_part,
        "sample": sum(map(len, parts)),
        "points": points,
        "classes": figures.classes(work, tokens, into, names, pushed[: len(names)], each),
        "seconds": dict(zip(("read", "alignment", "gradients"), np.diff(clock).round(2).tolist(), strict=True)),
    }
    return plain(document, DIGITS), _table(tokens, alignment, groups)


# ---- what can be audited -----------------------------------------------------------------------------------------------


def _check_policy(work: Round) -> None:
    """Raise UserError when the policy that wrote the round is no longer stored."""
    if not is_kept(work):
        remedy = "Audit another round, such as the first, or the run that this one was made from"
        raise UserError(f"the policy that wrote this round was {NOT_KEPT}", work.area, remedy)


def _check_problems(work: Round, plan: Plan) -> None:
    """Raise UserError for fewer problems than the intervals need blocks, before anything is read."""
    need = f"problems are no {LEAST_BLOCKS} blocks, which the intervals need"
    if 0 < plan.problems < LEAST_BLOCKS:
        raise SettingError(f"{plan.problems} {need}", "--problems", f"Give {LEAST_BLOCKS} or more, or 0 for all")
    if (count := sum(map(len, work.shards.values()))) < LEAST_BLOCKS:
        raise UserError(f"{count} {need}", work.area, "Audit a larger round")


def _check_verdicts(work: Round, tokens: Tokens) -> None:
    """Raise UserError where the reference is 0 in nearly all problems, since gradients would tell nothing then."""
    reference, size = tokens.weights[0][np.cumsum(tokens.lengths) - 1], int(tokens.problems.max()) + 1
    if (told := len(np.unique(tokens.problems[reference != 0]))) < LEAST_BLOCKS:
        what = f"{told} of {size} problems have both right and wrong traces, and {LEAST_BLOCKS} are needed"
        raise UserError(what, work.area, "Audit a round of more problems, or of ones that are sometimes answered right")


def _space(work: Round, asked: int, plan: Plan) -> Space:
    """By which parameters so many objectives are audited. Of the model its configuration alone is read.

    Raises UserError where the gradients of LEAST_BLOCKS blocks do not fit into memory.
    """
    model, size, kind = work.run.model, footprint.measure(work.run.model), work.run.source.uri.partition(":")[0]
    further = FURTHER + len([REFERENCE, *(ORACLES if kind == worlds.KIND else ())])
    numbers: dict[Space, int] = {"weights": size.parameters, "adapter": max(1, size.lora_width * model.lora_rank)}
    most = {space: MOST_BYTES // (LEAST_BLOCKS * 4 * count) - further for space, count in numbers.items()}
    smallest: Space = "weights" if model.tuning == "full" else "adapter"
    space = plan.space or ("weights" if asked <= most["weights"] else smallest)
    if asked <= most[space]:
        return space
    least, names = (1, "objectives") if plan.space else (2, "gates with gamma 0")
    if most[smallest] < least:
        limit = MOST_BYTES / (LEAST_BLOCKS * 4 * (further + least)) / 1e6
        remedy = f"At most {limit:.3g} M are audited: use a run with a smaller model.lora_rank, or a smaller model"
    else:
        fewer = f"{most[smallest]} {names} at most" if most[smallest] < asked else ""
        remedy = f"Use {' and '.join(filter(None, ['--parameters adapter' if space != smallest else '', fewer]))}"
    what = (
        f"gradients of {numbers[space] / 1e6:.3g} M parameters for {asked} {names} do not fit into {MOST_BYTES / 2**30:.3g} GiB"
    )
    raise UserError(what, work.area, remedy)


def _trainer(work: Round) -> Trainer:
    """The trainer of a round's policy on this CPU."""
    run = work.run
    if run.train.threads:  # as in the trainer: on busy cores a second thread slows the work down many times
        torch.set_num_threads(run.train.threads * run.train.workers)
    model = student.build(run, torch.device("cpu"))
    load_policy(model, work)
    return Trainer(run, model, torch.device("cpu"))


def _add_oracles(tokens: Tokens) -> list[str]:
    """Add the weights of both oracles where the true class of a token is known. Their names."""
    if tokens.classes is None:
        return []
    decides = np.isin(tokens.classes, [worlds.CLASSES.index(name) for name in worlds.DECIDES])
    tokens.weights.extend([tokens.weights[0] * decides, tokens.weights[0] * ~decides])
    return ORACLES


def _add_classes(audited: _Audited, into: list[figures.Kind], blocks: int) -> list[figures.Kind]:
    """Add the reference's weights on the tokens of each class alone. The kinds of these classes; none where memory lacks."""
    weights, split = audited.tokens.weights, [kind for kind in into if kind.name in ALONE]
    more = [weights[0] * (kind.codes == place) for kind in split for place in range(len(kind.classes))]
    if blocks * audited.bytes_of(len(weights) + len(more)) > MOST_BYTES:
        return []
    weights.extend(more)
    return split


def _setting(work: Round, asked: dict[str, Run | None], tokens: Tokens) -> dict[str, Any]:
    """What was audited: the round, how its traces were written, what objectives read, and how large it is."""
    return {
        "run": work.run.name,
        "round": work.number,
        "policy": work.policy_version,
        "measured": Inventory(work).measured,
        "step": first_step(work),
        "sampling": {name: getattr(work.run.rollout, name) for name in ("temperature", "top_p", "top_k")},
        "advantage": {name: getattr(work.run.grade, name) for name in ("advantage", "beta_length")},
        "settings": {name: _read(one) for name, one in asked.items() if one is not None},
        "traces": len(tokens.rows),
        "tokens": int(tokens.lengths.sum()),
        "problems": int(tokens.problems.max()) + 1,
        "accuracy": float(tokens.correct.mean()),
    }


def _shown(point: dict[str, Any]) -> dict[str, Any]:
    return {name: point[name] for name in SHOWN}


def _read(run: Run) -> dict[str, Any]:
    """The settings that an objective reads."""
    return {name: value for name, value in run.objective.model_dump(mode="json").items() if run.objective.reads(name)}


# ---- blocks and gradients ----------------------------------------------------------------------------------------------


def _blocks(tokens: Tokens, plan: Plan, bytes_each: int, work: Round) -> list[np.ndarray]:
    """Rows of each block: all problems in the order of a seed, shared out as evenly as they go, and as many blocks as fit."""
    size = int(tokens.problems.max()) + 1
    wanted = min(plan.blocks, size, max(LEAST_BLOCKS, MOST_BYTES // bytes_each))
    order = np.random.default_rng([work.run.seed, work.number, 1]).permutation(size)
    return [np.flatnonzero(np.isin(tokens.problems, part)) for part in np.array_split(order, wanted)]


def _parts(groups: list[np.ndarray], run: Run, sample: int) -> list[np.ndarray]:
    """The traces of each block whose gradients are taken: all, but a minibatch of them at most, drawn at random.

    With a `sample` each block gives its share of it instead. Cosines and signals are seen in these traces alone. The push and
    its shares are seen in all traces.
    """
    rng, traces = np.random.default_rng([run.seed, 2]), sum(map(len, groups))
    sizes = [-(-len(rows) * sample // traces) if sample else run.train.batch_traces for rows in groups]
    pairs = zip(groups, sizes, strict=True)
    return [np.sort(rng.choice(rows, size, replace=False)) if len(rows) > size else rows for rows, size in pairs]


@dataclass(frozen=True)
class _Audited:
    """The tokens of a round, and the model whose gradients they have."""

    space: Directions
    tokens: Tokens
    trainer: Trainer

    def bytes_of(self, weightings: int) -> int:
        """Bytes of a block's gradients."""
        return (weightings + FURTHER) * self.space.size * 4

    def gradients(self, rows: np.ndarray, sets: list[np.ndarray], divergences: dict[int, Divergence]) -> np.ndarray:
        """Gradients of some traces under each set of token weights, divided by the number of traces, float32 [K, P].

        divergences: those that a set descends too, by its place.
        """
        ends = np.cumsum(self.tokens.lengths)
        every = [*sets, *(found.kept.weights.numpy() for found in divergences.values())]
        moves = np.any([np.add.reduceat(weights != 0, ends - self.tokens.lengths) for weights in every], axis=0)
        total = torch.zeros(len(sets), self.space.size)
        if (moving := rows[moves[rows]]).size:
            for micro, places in self.tokens.micros(moving, self.trainer):
                parts = {place: found.at(torch.from_numpy(places)) for place, found in divergences.items()}
                total += self.space.gradients(micro, [torch.from_numpy(weights[places]) for weights in sets], parts)
        return (total / len(rows)).numpy()

    def alignment(self, groups: list[np.ndarray], references: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """d log p_t . r of every token, r: the mean reference of the blocks that the trace is not in, divided by
        the norm of the mean of all blocks.

        So no trace's own noise is in its direction, and all blocks have one scale. -> float32 [tokens]; what each token adds to
        each weighting's product with r, K x [tokens]; and the product of the undivided mean with every weighting's gradient of
        the block, [K, M].
        """
        found, divergences = np.zeros(int(self.tokens.lengths.sum()), np.float32), self.tokens.divergences
        further = {place: np.zeros_like(found) for place in divergences}
        total = references.sum(0, dtype=np.float64)
        norm = max(float(np.linalg.norm(total)) / len(groups), 1e-30)
        for block, rows in enumerate(groups):
            direction = torch.from_numpy(((total - references[block]) / (len(groups) - 1) / norm).astype(np.float32))
            for micro, places in self.tokens.micros(rows, self.trainer):
                descended = [divergence.at(torch.from_numpy(places)) for divergence in divergences.values()]
                aligned, falls = self.space.alignments(micro, direction, descended)
                found[places] = aligned.numpy()
                for values, fall in zip(further.values(), falls, strict=True):
                    values[places] = fall.numpy()
        pushed = [weights * found for weights in self.tokens.weights]
        for place, values in further.items():
            pushed[place] += values
        seen = [(self.tokens.places(rows), len(rows)) for rows in groups]
        towards = [[values[places].sum(dtype=np.float64) / traces for places, traces in seen] for values in pushed]
        return found, pushed, norm * np.array(towards)


def _table(tokens: Tokens, alignment: np.ndarray, groups: list[np.ndarray]) -> pa.Table:
    block = np.zeros(len(tokens.rows), np.int16)
    for number, rows in enumerate(groups):
        block[rows] = number
    offsets = pa.array(np.concatenate([[0], np.cumsum(tokens.lengths)]).astype(np.int32))
    columns = {} if tokens.classes is None else {"token_class": pa.ListArray.from_arrays(offsets, pa.array(tokens.classes))}
    return pa.table(
        columns
        | {
            "trace_id": pa.array(tokens.traces.trace_ids[tokens.rows]),
            "block": pa.array(block),
            "correct": pa.array(tokens.correct),
            "advantage_of_verdict": pa.array(tokens.weights[0][np.cumsum(tokens.lengths) - 1], pa.float32()),
            "alignment": pa.ListArray.from_arrays(offsets, pa.array(alignment, pa.float32())),
        }
    )
