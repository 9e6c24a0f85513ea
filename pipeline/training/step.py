"""The optimiser step: global normaliser and token count, token weights, chunked forward and backward, clip, update.

    share of the minibatch -> Whole, over ranks -> token weights -> coefficients -> forward, backward -> clip -> AdamW

The step runs in one process without a process group, or over ranks with DDP or FSDP2. The result is the same up to rounding.
../method/README.md lists the traps that are named by number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from pipeline.config import Run
from pipeline.config.objective import SCALES_ADVANTAGE
from pipeline.contract import TOPK
from pipeline.errors import TrainingError
from pipeline.method import objective
from pipeline.training import batches
from pipeline.training.agreement import gap
from pipeline.training.batches import MicroBatch, RoundTable, Traces
from pipeline.training.packing import layout
from pipeline.training.stored import StoredRound, stored
from pipeline.training.student import student
from pipeline.training.student.head import Divergence, Terms

# Each rank adds these up over its share of the minibatch. The sums of all ranks together make the metrics of the step.
SUMS = ("loss", "traces", "advantage", "positive", "weight", "weighted", "delta", "gap", "divergence")


@dataclass(frozen=True)
class Whole:
    """Figures of the global minibatch, over ranks and micro-batches, which every token weight may need (trap 2).

    normaliser: M of Eq. 5, nats. num_tokens: response tokens. num_traces: traces. threshold: of the gate `top_entropy`, nats.
    mean_gate: for the control `uniform`.
    """

    normaliser: float
    num_tokens: int
    num_traces: int
    threshold: Tensor | None = None
    mean_gate: float | None = None


class Trainer:
    """Student, optimiser and step count of one rank.

    `student` is the model, and `module` the same model wrapped for DDP or FSDP2, which runs the forward pass. To resume,
    pipeline.training.checkpoint restores the adapter before the trainer is made, and the optimiser after.
    """

    def __init__(self, run: Run, model: student.Student, device: torch.device) -> None:
        self.run, self.device, self.student = run, device, model
        self.module = student.spread(model, run.train.strategy, device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            self.parameters().values(), lr=run.train.learning_rate, betas=run.train.betas, weight_decay=run.train.weight_decay
        )

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by their names in the peft model. Under FSDP2 they are sharded (DTensor)."""
        return {name: p for name, p in self.student.model.named_parameters() if p.requires_grad}

    def train_round(self, data: RoundTable | StoredRound) -> Iterator[dict[str, float]]:
        """Train the steps of a round, and yield the metrics of each step.

        Dropout draws from a generator seeded by (seed, round, rank), so a resumed round needs no stored random state. Raises
        TrainingError for stale or malformed traces, or a loss or gradient that is not finite.
        """
        traces = self._traces(data)
        torch.manual_seed(int(np.random.SeedSequence((self.run.seed, data.number, self.rank)).generate_state(1)[0]))
        parts = batches.steps(len(traces.advantage), self.run.train.batch_traces, self.run.seed, data.number)
        for index, rows in enumerate(parts):
            share = self._share(traces, rows)
            where, watched = f"round {data.number}, step {self.step}", index == 0 and data.comparable
            aside = watched and (data.policy_version != data.number or self.run.model.lora_dropout > 0)
            found = self._probe(share if data.policy_version == data.number else share[:1], data, where) if aside else {}
            data = replace(data, answered=None)  # whole weights of another policy, which nobody reads any more
            metrics = self.train_step(share, where, data.policy_version if watched and not aside else None)
            yield {"round": data.number, "rejected": traces.num_rejected, **metrics, **found}

    def _traces(self, data: RoundTable | StoredRound) -> Traces:
        """The usable traces of a round, whose ids the model knows."""
        run = self.run
        if isinstance(data, StoredRound):
            return stored(data, run.max_staleness, run.objective, self.student.vocab_size)
        traces = batches.usable(data, run.max_staleness, run.objective)
        batches.check_ids(traces, self.student.vocab_size)
        return traces

    def _share(self, traces: Traces, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's micro-batches of the minibatch `rows`. Silent traces have some of their own, at the end."""
        silent = batches.silent(traces, rows, self.run.objective, self.student.layer_weights)
        found: list[MicroBatch] = []
        for part, is_silent in ((rows[~silent], False), (rows[silent], True)):
            if len(part):
                budget, packed = self.run.train.micro_batch_tokens, self.packs(traces, part)
                made = batches.share(traces, part, self.rank, self.ranks, budget, packed)
                found += [replace(micro, is_silent=is_silent) for micro in made]
        return found

    def packs(self, traces: Traces, rows: np.ndarray) -> bool:
        """Whether the minibatch `rows` is packed. All ranks get the same answer."""
        train = self.run.train
        if train.packing != "auto" or not self.student.packs:
            return self.student.packs
        budget = train.micro_batch_tokens
        limit = layout.most(traces, rows, self.ranks, budget)
        return layout.pays(traces, rows, batches.pack(traces.lengths[rows], budget), limit, self.student.layer_weights)

    def train_step(self, share: list[MicroBatch], where: str, policy: int | None = None) -> dict[str, float]:
        """One optimiser step on this rank's `share` of a minibatch; returns metrics of the whole minibatch.

        `policy` is a version whose log-probs are stored and whose weights are trained now. The metric logprob_gap (nats) then
        measures how far engine and trainer are apart (trap 3). Raises TrainingError, with `where` and the traces, when loss or
        gradient norm is not finite, or when that gap is too large. The weights then stay unchanged.
        """
        started = time.perf_counter()
        share = [micro.to(self.device) for micro in share]
        whole = self.whole(share)
        num_tokens = whole.num_tokens
        sums, worst, broken = self._backward(share, whole, compares=policy is not None)
        norm = self._clip()
        total = dict(zip(SUMS, reduce_(sums, dist.ReduceOp.SUM).tolist(), strict=True))
        self._check_finite(total["loss"], norm, where, broken, share)
        compared = {} if policy is None else self._compared(total["gap"], num_tokens, worst, policy, where)
        metrics = {
            "step": self.step,
            "loss": total["loss"],
            "grad_norm": norm,
            "lr": self._update(),
            "traces": total["traces"],
            "tokens": num_tokens,
            "advantage": total["advantage"] / total["traces"],
            "positive_share": total["positive"] / total["traces"],
            "peak_entropy": whole.normaliser,
            "weight": total["weight"] / max(1.0, total["weighted"]),
            "delta": total["delta"] / num_tokens,
        }
        if self.run.objective.is_distributional:
            metrics["divergence"] = total["divergence"] / num_tokens
        metrics |= self._passes([micro for micro in share if policy is not None or not micro.is_silent])
        seconds = time.perf_counter() - started
        return metrics | compared | {"seconds": seconds, "tokens_per_s": num_tokens / seconds}

    def _probe(self, share: list[MicroBatch], data: RoundTable | StoredRound, where: str) -> dict[str, float]:
        """The gap to the engine over some micro-batches of every rank, by a forward pass of its own. Raises as `train_step`.

        The pass has the weights of the policy that answered, and no dropout.
        """
        sums, worst = torch.zeros(2, dtype=torch.float64, device=self.device), gap.Worst(torch.zeros((), device=self.device), "")
        with gap.as_answered(self.module, self.parameters(), data.answered):
            for micro in (micro.to(self.device) for micro in share):
                gaps, largest = gap.gaps(micro, self._logprobs(micro))
                worst = max(worst, largest, key=lambda one: float(one.gap))
                sums += torch.stack([gaps.double().sum(), gaps.new_tensor(len(gaps)).double()])
        total, count = reduce_(sums, dist.ReduceOp.SUM).tolist()
        return self._compared(total, int(count), worst, data.policy_version, where)

    @torch.no_grad()
    def _logprobs(self, micro: MicroBatch) -> Tensor:
        """Log-probs of the response tokens of a micro-batch, [N] nats, by a pass that nobody learns from."""
        terms = Terms(micro.targets, torch.zeros(len(micro.targets), device=self.device))
        logprobs: Tensor = self.module(micro.tokens, micro.sources, terms, layout=micro.layout)[1]
        return logprobs

    def _compared(self, total: float, num_tokens: int, worst: gap.Worst, policy: int, where: str) -> dict[str, float]:
        """The metrics of the gap to the engine, after they were judged. `worst` is this rank's largest gap, with its trace."""
        largest = float(reduce_(worst.gap.clone(), dist.ReduceOp.MAX))
        mean = total / max(1, num_tokens)
        gap.check(self.run, policy, mean, largest, where, worst.trace if float(worst.gap) == largest else "")
        return {"logprob_gap": mean, "logprob_gap_max": largest}

    def _passes(self, share: list[MicroBatch]) -> dict[str, float]:
        """The padding of a step's forward passes over all ranks, and what shared prompts saved."""
        counts = [(0, 0, 0), *((micro.tokens.numel(), micro.num_tokens, micro.num_shared) for micro in share)]
        passed, real, shared = reduce_(torch.tensor(counts, device=self.device).sum(0), dist.ReduceOp.SUM).tolist()
        return {"padded_share": 1 - real / passed if passed else 0.0, "shared_share": shared / max(1, real + shared)}

    def gradient(self, share: list[MicroBatch]) -> Tensor:
        """Gradient of the loss of one minibatch by all trained parameters, flat [P]. No weight changes. For one process."""
        self._backward(share, self.whole(share))
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters().values()]
        )
        self.optimizer.zero_grad()
        return flat

    def weights(self, share: list[MicroBatch]) -> list[Tensor]:
        """-dL / d log p of every response token of one minibatch, times its tokens: one [N] for each micro-batch.

        L is the loss that trains, with its norm, clip, correction and KL, at the stored log-probs. With `normalise: token` and
        none of these three it is the token weight. For one process.
        """
        whole, found = self.whole(share), []
        for micro in share:
            _, terms = self._terms(micro, whole)
            slopes = terms.coefficients
            if terms.surrogate is not None:
                slopes = slopes * terms.surrogate(micro.student_logprobs[micro.mask]).slopes
            found.append(-slopes * whole.num_tokens)
        return found

    def divergences(self, share: list[MicroBatch]) -> list[Divergence]:
        """The divergence at every response token of one minibatch, times its tokens: one for each micro-batch.

        Empty for an objective on sampled tokens alone. `weights` has the rest of the loss. For one process.
        """
        whole, found = self.whole(share), []
        for micro in share:
            _, terms = self._terms(micro, whole)
            if (spread := terms.divergence) is not None:
                kept = spread.kept._replace(weights=spread.kept.weights * whole.num_tokens)
                found.append(spread._replace(kept=kept))
        return found

    def strengths(self, share: list[MicroBatch]) -> Tensor:
        """|token weight| of every response token of one minibatch, plus the weight of its divergence, [N]. For one process."""
        whole, found = self.whole(share), []
        for micro in share:
            signals = self._signals(micro, whole)
            spread = objective.divergence_weights(signals, self.run.objective)
            weights = objective.token_weights(signals, self.run.objective).abs()
            found.append((weights if spread is None else weights + spread)[micro.mask])
        return torch.cat(found)

    def _backward(self, share: list[MicroBatch], whole: Whole, compares: bool = False) -> tuple[Tensor, gap.Worst, list[str]]:
        """Gradients of the loss over the global minibatch. Silent micro-batches have a forward pass only if it `compares`.

        Returns this rank's SUMS, its largest log-prob gap, and the ids of its traces whose log-probs are not finite.
        """
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        worst = gap.Worst(torch.zeros((), device=self.device), "")
        broken: list[str] = []
        learned = sum(not micro.is_silent for micro in share)
        if not learned:  # AdamW leaves a parameter without a gradient as it is, and its moments too
            for parameter in self.parameters().values():
                parameter.grad = torch.zeros_like(parameter)
        for index, micro in enumerate(share):
            weights, terms = self._terms(micro, whole)
            loss, values = torch.zeros((), device=self.device), []
            if not micro.is_silent:
                with student.accumulate(self.module, last=index == learned - 1):
                    loss, logprobs, *values = self.module(micro.tokens, micro.sources, terms, layout=micro.layout)
                    (loss * self.ranks).backward()  # both strategies average over ranks; the mean is already global
            elif compares:
                logprobs = self._logprobs(micro)
                student.rest(self.module)
            else:
                logprobs = micro.student_logprobs[micro.mask]
            gaps, found = gap.gaps(micro, logprobs)
            sums += _sums(micro, weights, gaps, (loss.detach(), *(value.sum() for value in values)), self._scales_advantage())
            worst = found if found.gap > worst.gap else worst
            broken += _broken(micro, logprobs)
        return sums, worst, broken

    def _terms(self, micro: MicroBatch, whole: Whole) -> tuple[Tensor, Terms]:
        """Token weights [B, T] of a micro-batch, and the terms of its loss."""
        run, mask = self.run, micro.mask
        signals, constants = self._signals(micro, whole), run.objective
        weights = objective.token_weights(signals, constants)
        denominators = objective.denominators(
            mask, whole.num_tokens, whole.num_traces, run.rollout.max_new_tokens, constants.normalise
        )
        divergence = self._divergence(micro, objective.divergence_weights(signals, constants), denominators)
        if not constants.reads_logprobs:
            coefficients = objective.coefficients(weights[mask], denominators)
            return weights, Terms(micro.targets, coefficients, divergence)
        optional = {name: values[mask] for name, values in micro.extra.items() if name not in TOPK}
        stored = objective.Ratios(
            weights[mask],
            micro.student_logprobs[mask],
            mask.nonzero()[:, 0],
            optional.get("rollout_logprobs"),
            optional.get("base_logprobs"),
        )
        surrogate = partial(objective.surrogate, stored=stored, constants=constants)
        return weights, Terms(micro.targets, torch.ones_like(stored.weights) / denominators, divergence, surrogate)

    def _divergence(self, micro: MicroBatch, weights: Tensor | None, denominators: float | Tensor) -> Divergence | None:
        """The divergence from the teacher's most likely tokens, for an objective that learns from them."""
        if weights is None:
            return None
        constants = self.run.objective
        ids, logprobs = (micro.extra[name][:, : constants.kept or None] for name in TOPK)
        kept = objective.Kept(ids, logprobs, weights[micro.mask] / denominators)
        return Divergence(kept, objective.measure_of(constants, ids.shape[1]), constants.support)

    def _scales_advantage(self) -> bool:
        return self.run.objective.name in SCALES_ADVANTAGE

    def whole(self, share: list[MicroBatch]) -> Whole:
        """The figures of the global minibatch. They cover all ranks before the first weight is made (trap 2)."""
        constants = self.run.objective
        parts = [objective.normaliser(micro.teacher_entropy, micro.mask, constants) for micro in share]
        normaliser = float(reduce_(torch.stack(parts).max(), dist.ReduceOp.MAX))
        counts = torch.tensor([sum(len(m.targets) for m in share), sum(len(m.trace_ids) for m in share)], device=self.device)
        num_tokens, num_traces = (int(count) for count in reduce_(counts, dist.ReduceOp.SUM))
        found = Whole(normaliser, num_tokens, num_traces)
        if constants.gate_kind == "top_entropy":
            read = torch.cat([objective.readings(self._signals(micro, found), constants) for micro in share])
            found = replace(found, threshold=objective.threshold(gather_(read), constants.gate_share))
        if constants.control == "uniform":
            sums = [objective.gate_sum(self._signals(micro, found), constants) for micro in share]
            found = replace(found, mean_gate=float(reduce_(torch.stack(sums).sum(), dist.ReduceOp.SUM)) / num_tokens)
        return found

    def _signals(self, micro: MicroBatch, whole: Whole) -> objective.Signals:
        return objective.Signals(
            micro.advantage,
            micro.teacher_logprobs,
            micro.student_logprobs,
            micro.teacher_entropy,
            micro.mask,
            whole.normaliser,
            step=self.step,
            seeds=batches.trace_seeds(micro, self.run.seed) if self.run.objective.control == "shuffled" else None,
            mean_gate=whole.mean_gate,
            rollout_logprobs=micro.extra.get("rollout_logprobs"),
            student_entropy=micro.extra.get("rollout_entropy"),
            threshold=whole.threshold,
        )

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters().values(), self.run.train.grad_clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _check_finite(self, loss: float, norm: float, where: str, broken: list[str], share: list[MicroBatch]) -> None:
        if torch.isfinite(torch.tensor([loss, norm])).all():
            return
        ids = broken or [trace for micro in share for trace in micro.trace_ids]
        raise TrainingError(
            f"loss {loss} and gradient norm {norm} must be finite; traces {', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''}",
            where,
            "Look at these traces, lower train.learning_rate, or train in float32; the last published policy is intact",
        )

    def _update(self) -> float:
        """Apply the gradient at the warmed-up learning rate, then clear the gradient. Returns the learning rate."""
        rate = self.run.train.learning_rate * min(1.0, (self.step + 1) / max(1, self.run.train.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return rate


def reduce_(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """`value`, reduced over all ranks in place. A single rank gets its own value back."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op)
    return value


def gather_(values: Tensor) -> Tensor:
    """The values [n] of all ranks, one after the other -> [N]. Ranks may hold different numbers of them."""
    if not dist.is_initialized():
        return values
    most = int(reduce_(torch.tensor(len(values), device=values.device), dist.ReduceOp.MAX))
    filled = torch.cat([values, values.new_full((most - len(values),), torch.nan)])
    parts = [torch.empty_like(filled) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, filled)
    found = torch.cat(parts)
    return found[~found.isnan()]


def _sums(micro: MicroBatch, weights: Tensor, gaps: Tensor, terms: tuple[Tensor, ...], scales: bool) -> Tensor:
    """The SUMS of one micro-batch, float64 [9].

    weights [B, T]: token weights. gaps [N] nats: |trainer's - engine's log-prob|. terms: its part of the loss, and with a
    divergence the sum of it. scales: whether the objective multiplies the advantage, by a factor whose mean is then shown.
    """
    signal = micro.mask & (micro.advantage[:, None] != 0) if scales else micro.mask
    factors = (weights / micro.advantage[:, None] if scales else weights)[signal]
    delta = (micro.teacher_logprobs - micro.student_logprobs).abs()
    loss, *divergence = terms
    traces = loss.new_tensor(len(micro.trace_ids))
    positive = (micro.advantage > 0).sum()
    parts = (loss, traces, micro.advantage.sum(), positive, factors.sum(), signal.sum(), delta.sum(), gaps.sum())
    return torch.stack([part.double() for part in (*parts, *(divergence or (loss.new_zeros(()),)))])


def _broken(micro: MicroBatch, logprobs: Tensor) -> list[str]:
    """Ids of the traces of which a log-prob [N] is not finite."""
    rows = micro.mask.nonzero()[:, 0][~torch.isfinite(logprobs)]
    return [micro.trace_ids[row] for row in rows.unique().tolist()]
