"""The gradient audit: which objective's gradient points where accuracy rises, measured on the stored traces of one round.

No engine is needed. pipeline/method/directions.py has the reference, the estimates and their correction for noise. Figures are
kept in evidence/audit-NNNN.json. The alignment of every token is kept in evidence/audit-NNNN.parquet, one row per trace. A
weighting, regime or decile then needs no gradient: its push is a weighted sum of that column, each block by its own traces.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import Run
from pipeline.contract import Regime
from pipeline.errors import SettingError, UserError
from pipeline.evidence.audit_tokens import MADE, Tokens, first_step, made, read_tokens
from pipeline.evidence.comparison import variant
from pipeline.evidence.documents import DIGITS, plain
from pipeline.evidence.intervals import estimate, jackknife
from pipeline.evidence.sweep import load_policy
from pipeline.method import directions as maths
from pipeline.method import regimes
from pipeline.problems import worlds
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.training.alignment import Directions, Space
from pipeline.training.step import Trainer
from pipeline.training.student import student

REFERENCE = "reinforce"
STEP = "adamw"  # cosine of AdamW's step
LONGER = "longer"  # the gradient of the mean length, with the baseline of the reference
ORACLES = ["oracle", "inverted_oracle"]  # the reference on the tokens that decide by their true class, and on all others
FREE = (-np.inf, np.inf)
BOUNDS = dict.fromkeys(("cosine", "minibatch", "batch_cosine", "averaged_cosine", STEP, LONGER), (-1.0, 1.0))
BOUNDS |= dict.fromkeys(("share", "batch_share"), (0.0, 1.0))
DECILES = 10
MOST_BYTES = 2 << 30  # of the gradients of all blocks
LEAST_BLOCKS = 6


@dataclass(frozen=True)
class Plan:
    """What is audited: objectives as `egrsd compare` names them, or of audit_tokens.MADE; blocks and problems at most; by which
    parameters. The first objective is compared with.

    problems: 0 is all of the round's; else that many are drawn by the run's seed.
    """

    objectives: list[str]
    blocks: int = 16
    space: Space = "weights"
    problems: int = 0


def objectives(run: Run, names: list[str]) -> dict[str, Run]:
    """The run with each objective, but for those of MADE.

    Raises SettingError for one that learns from more than the log-probs of sampled tokens.
    """
    found = {}
    for name in (name for name in names if name not in MADE):
        if name == "no_reference":
            raise SettingError("'no_reference' needs other scores", "--objectives", "Audit a run that was made so")
        found[name] = variant(run, name, run.seed)
        if found[name].objective.is_distributional:
            what = f"'{name}' learns from the teacher's distribution, and the audit weighs sampled tokens"
            raise SettingError(what, "--objectives", "Leave it out; `egrsd sweep --set objective.name=...` compares its gradient")
    return found


def measure(work: Round, plan: Plan) -> tuple[dict[str, Any], pa.Table]:
    """The document and the table of a round's audit.

    Raises UserError when its policy is not stored, or when too few problems have both right and wrong traces.
    """
    run, clock = work.run, [time.perf_counter()]
    if not work.store.has_policy(work.policy_version):
        raise UserError("the policy that wrote this round is not stored", work.area, "Keep policies with train.keep_policies=0")
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    model = student.build(run, torch.device("cpu"))
    load_policy(model, work)
    named = objectives(run, plan.objectives)
    trainer = Trainer(run, model, torch.device("cpu"))
    tokens = read_tokens(work, trainer, named, plan.problems)
    names, trained = [REFERENCE, *plan.objectives], dict(zip(named, tokens.weights[1:], strict=True))
    tokens.weights[1:] = [trained[name] if name in trained else made(name, tokens) for name in plan.objectives]
    if tokens.classes is not None:
        decides = np.isin(tokens.classes, [worlds.CLASSES.index(name) for name in worlds.DECIDES])
        tokens.weights.extend([tokens.weights[0] * decides, tokens.weights[0] * ~decides])
        names += ORACLES
    longer = np.repeat(maths.leave_one_out(tokens.lengths, tokens.problems), tokens.lengths).astype(np.float32)
    audited = _Audited(Directions(model, plan.space), tokens, trainer)
    groups = _blocks(tokens, plan, (len(names) + 3) * audited.space.size * 4, work)
    clock.append(time.perf_counter())
    references = np.stack([audited.gradients(rows, tokens.weights[:1])[0] for rows in groups])
    alignment, towards = audited.alignment(groups, references)
    clock.append(time.perf_counter())
    parts = _parts(groups, run)
    in_part = float(np.mean([len(rows) for rows in parts]))
    flows = np.stack([audited.gradients(rows, [*tokens.weights, longer]) for rows in parts], axis=1)
    products = maths.Products.of_parts(flows[:-1], references, towards)
    lengths = maths.Products.of([flows[-1], *flows[:-1]])
    points = _figures(names, products, (in_part, run.train.batch_traces), run.train.betas[0], lengths)
    length = float(tokens.lengths.mean())  # these gradients are sums over tokens, and those of training are means
    _add_steps(points, flows[:-1], references, trainer.optimizer.defaults["eps"] * length)
    clock.append(time.perf_counter())
    document = {
        "run": run.name,
        "round": work.number,
        "policy": work.policy_version,
        "space": plan.space,
        "parameters": audited.space.size,
        "traces": len(tokens.rows),
        "tokens": int(tokens.lengths.sum()),
        "problems": int(tokens.problems.max()) + 1,
        "accuracy": float(tokens.correct.mean()),
        "blocks": len(groups),
        "traces_in_block": float(np.mean([len(rows) for rows in groups])),
        "traces_in_part": in_part,
        "step": first_step(work),
        "points": points,
        "classes": _classes(work, tokens, names, alignment),
        "seconds": dict(zip(("read", "alignment", "gradients"), np.diff(clock).round(2).tolist(), strict=True)),
    }
    return plain(document, DIGITS), _table(tokens, alignment, groups)


# ---- blocks and gradients ----------------------------------------------------------------------------------------------


def _blocks(tokens: Tokens, plan: Plan, bytes_each: int, work: Round) -> list[np.ndarray]:
    """Rows of each block: all problems in the order of a seed, shared out as evenly as they go, and as many blocks as fit.

    Raises UserError for fewer than LEAST_BLOCKS.
    """
    size = int(tokens.problems.max()) + 1
    fit = MOST_BYTES // bytes_each
    wanted = min(plan.blocks, size, fit)
    if wanted < LEAST_BLOCKS:
        why = f"{size} problems" if size < LEAST_BLOCKS else f"gradients of {bytes_each / 2**20:.0f} MiB a block"
        remedy = "Audit a larger round" if size < LEAST_BLOCKS else "Audit fewer objectives, or use --parameters adapter"
        raise UserError(f"{why} are no {LEAST_BLOCKS} blocks, which the intervals need", work.area, remedy)
    order = np.random.default_rng([work.run.seed, work.number, 1]).permutation(size)
    return [np.flatnonzero(np.isin(tokens.problems, part)) for part in np.array_split(order, wanted)]


def _parts(groups: list[np.ndarray], run: Run) -> list[np.ndarray]:
    """The traces of each block whose gradients are taken: all, but a minibatch of them at most, drawn at random.

    The norms of gradients are seen in those, and so is the cosine with the gradient of length. What points towards accuracy is
    seen in all traces.
    """
    most, rng = run.train.batch_traces, np.random.default_rng([run.seed, 2])
    return [np.sort(rng.choice(rows, most, replace=False)) if len(rows) > most else rows for rows in groups]


@dataclass(frozen=True)
class _Audited:
    """The tokens of a round, and the model whose gradients they have."""

    space: Directions
    tokens: Tokens
    trainer: Trainer

    def gradients(self, rows: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        """Gradients of some traces under each set of token weights, divided by the number of traces, float32 [K, P]."""
        ends = np.cumsum(self.tokens.lengths)
        moves = np.any([np.add.reduceat(weights != 0, ends - self.tokens.lengths) for weights in sets], axis=0)
        total = torch.zeros(len(sets), self.space.size)
        if (moving := rows[moves[rows]]).size:
            for micro, places in self.tokens.micros(moving, self.trainer):
                total += self.space.gradients(micro, [torch.from_numpy(weights[places]) for weights in sets])
        return (total / len(rows)).numpy()

    def alignment(self, groups: list[np.ndarray], references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d log p_t . r of every token, r: the mean reference of the blocks that the trace is not in, divided by
        the norm of the mean of all blocks.

        So no trace's own noise is in its direction, and all blocks have one scale. -> float32 [tokens], and the product of the
        undivided mean with every weighting's gradient of the block, [K, M].
        """
        found = np.zeros(int(self.tokens.lengths.sum()), np.float32)
        towards = np.zeros((len(self.tokens.weights), len(groups)))
        total = references.sum(0, dtype=np.float64)
        norm = max(float(np.linalg.norm(total)) / len(groups), 1e-30)
        for block, rows in enumerate(groups):
            direction = torch.from_numpy(((total - references[block]) / (len(groups) - 1) / norm).astype(np.float32))
            for micro, places in self.tokens.micros(rows, self.trainer):
                found[places] = self.space.alignments(micro, direction).detach().numpy()
            seen = self.tokens.places(rows)
            towards[:, block] = [weights[seen] @ found[seen].astype(np.float64) for weights in self.tokens.weights]
            towards[:, block] *= norm / len(rows)
        return found, towards


# ---- figures -----------------------------------------------------------------------------------------------------------


def _figures(
    names: list[str], products: maths.Products, sizes: tuple[float, int], beta: float, lengths: maths.Products
) -> list[dict[str, Any]]:
    """Figures of each weighting with 95 % intervals over blocks, and their differences from the first audited objective.

    averaged_cosine: of the first moment of AdamW. With `beta` it has the noise of (1 + beta) / (1 - beta) minibatches' mean.
    push: along the gradient of accuracy, as a multiple of the reference's. A weighting without a direction of its own has one.
    longer: cosine with the gradient of the mean length. `lengths` are the products with that gradient, its own first.
    """
    taken = maths.all_but_one(products.own.shape[1])
    drawn = maths.estimates(products, taken)
    in_block, batch = sizes
    share = maths.in_minibatch(drawn.share, in_block, batch)
    shown = {"cosine": drawn.cosine, "minibatch": drawn.minibatch, "share": drawn.share}
    averaged = maths.in_minibatch(drawn.share, in_block, batch * (1 + beta) / (1 - beta))
    shown |= {"batch_share": share, "batch_cosine": drawn.cosine * np.sqrt(share)}
    shown |= {"averaged_cosine": drawn.cosine * np.sqrt(averaged), "push": drawn.push}
    shown |= {LONGER: maths.estimates(lengths, taken).cosine[:, 1:]}
    found = []
    for place, name in enumerate(names):
        figures = {key: jackknife(values[0, place], values[1:, place], BOUNDS.get(key, FREE)) for key, values in shown.items()}
        gaps = {key: values[:, place] - values[:, 1] for key, values in shown.items()} if place > 1 else {}
        differences = {key: jackknife(values[0], values[1:]) for key, values in gaps.items()}
        found.append({"name": name, **figures, "difference": differences})
    return found


def _add_steps(found: list[dict[str, Any]], flows: np.ndarray, references: np.ndarray, eps: float) -> None:
    """Add the cosine of AdamW's step to the figures of each weighting, and its difference from the first audited objective."""
    values, without = maths.adamw(flows, references, eps)
    for place, (point, value, left) in enumerate(zip(found, values, without, strict=True)):
        point[STEP] = jackknife(value, left, BOUNDS[STEP])
        if place > 1:
            point["difference"][STEP] = jackknife(value - values[1], left - without[1])


def _classes(work: Round, tokens: Tokens, names: list[str], alignment: np.ndarray) -> dict[str, Any]:
    """Where the push comes from: shares of weight x alignment by regime and by decile of teacher entropy, for each weighting."""
    entropy = tokens.traces.teacher_entropy.take(tokens.rows)
    problems = np.repeat(tokens.problems, tokens.lengths)
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
    regime = _regimes(work, entropy, offsets)
    edges = np.quantile(entropy, np.linspace(0, 1, DECILES + 1)[1:-1])
    decile = np.searchsorted(edges, entropy, side="right")
    found: dict[str, Any] = {"regimes": list(Regime.NAMES)}
    kinds = [("regime", regime, len(Regime.NAMES)), ("decile", decile, DECILES)]
    if tokens.classes is not None:
        kinds.append(("class", tokens.classes, len(worlds.CLASSES)))
        found |= {"names": list(worlds.CLASSES), "labels": _labels(work, tokens, regime, entropy, offsets)}
    for kind, classes, count in kinds:
        found[kind] = {"tokens": np.bincount(classes[classes >= 0], minlength=count) / len(classes)}
        for name, weights in zip(names, tokens.weights, strict=True):
            drawn = maths.shares_by_class(weights * alignment, classes, problems, count)
            found[kind][name] = [estimate(drawn[:, place]) for place in range(count)]
    return found


def _labels(work: Round, tokens: Tokens, regime: np.ndarray, entropy: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Whether the dials and the regimes do what they say, by true class.

    Per class: teacher entropy and its least value within the window ahead, log p_T - log p_S and its absolute value (delta), all
    means in nats. Per regime: precision and recall for the class it names.
    """
    assert tokens.classes is not None
    ahead = regimes.lookahead_min(entropy, offsets, work.run.profile.window)
    signals = {"entropy": entropy, "lookahead": ahead, "log_ratio": tokens.log_ratio, "delta": np.abs(tokens.log_ratio)}
    by_class, scored = {}, {}
    for code, name in enumerate(worlds.CLASSES):
        here = tokens.classes == code
        by_class[name] = {"tokens": int(here.sum()), **{key: _mean(values[here]) for key, values in signals.items()}}
    for label, name in (("fork", "fork"), ("pivot", "pivot"), ("lock", "filler")):
        scored[label] = {"class": name, **worlds.scores(regime, tokens.classes, Regime.NAMES.index(label), name)}
    return {"by_class": by_class, "regimes": scored}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _regimes(work: Round, entropy: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Regime of every token under the run's settings, int8 [N]; -1 when the round has no common scale."""
    scope, settings = Inventory(work).scope, work.run.profile
    if scope is None:
        return np.full(len(entropy), -1, np.int8)
    scale = regimes.threshold_scale(scope.peak, scope.vocab_size, settings, work.run.label)
    return regimes.regimes(entropy, regimes.lookahead_min(entropy, offsets, settings.window), offsets, scale, settings)


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
