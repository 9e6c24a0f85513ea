"""The step of every objective: its loss and its gradient are those of full logits, padded and packed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_round import shared_round
from steps import EVERY, ONE_STEP, gradient_of, same, trained, trainer
from training_rounds import make_round, tiny_run

from pipeline.config import Objective, Run
from pipeline.contract import TOPK
from pipeline.errors import TrainingError
from pipeline.method import objective
from pipeline.training import batches
from pipeline.training.batches import RoundTable
from pipeline.training.step import Trainer


def full_loss(made: Trainer, run: Run, data: RoundTable) -> torch.Tensor:
    """The loss of a whole minibatch from full logits: each term with autograd alone, in the plainest way.

    Slopes of ratios come from `surrogate`, which has tests of its own.
    """
    traces = batches.usable(data, 0, run.objective)
    micro = batches.micro_batch(traces, np.arange(len(traces.trace_ids)))
    rows = [row for row in data.table.to_pylist() if row["trace_id"] in set(micro.trace_ids)]
    whole, mask, constants = made.whole([micro]), micro.mask, run.objective
    signals = made._signals(micro, whole)
    weights, spread = objective.token_weights(signals, constants)[mask], objective.divergence_weights(signals, constants)
    lengths = mask.sum(1, keepdim=True).expand(mask.shape)[mask]
    size = {"token": len(weights), "sequence": len(rows) * lengths, "constant": len(rows) * run.rollout.max_new_tokens}
    logits = made.student.model(input_ids=micro.tokens, use_cache=False).logits.flatten(0, 1)[micro.sources]
    logprobs = logits.log_softmax(-1).gather(1, micro.targets[:, None])[:, 0]
    terms, trust = -weights * logprobs, torch.ones_like(weights)
    if constants.reads_logprobs:
        extra = {name: values[mask] for name, values in micro.extra.items() if name not in TOPK}
        stored = objective.Ratios(
            weights, micro.student_logprobs[mask], mask.nonzero()[:, 0], extra.get("rollout_logprobs"), extra.get("base_logprobs")
        )
        found = objective.surrogate(logprobs.detach(), stored, constants)
        trust, terms = found.trust, found.values + found.slopes * (logprobs - logprobs.detach())
    if spread is not None:
        ids, kept = (micro.extra[name][:, : constants.kept or None] for name in TOPK)
        student = logits.log_softmax(-1)
        tail = student.scatter(1, ids, -math.inf).logsumexp(1)
        measure = objective.measure_of(constants, ids.shape[1])
        values = objective.divergence(kept, student.gather(1, ids), tail, measure, constants.support).values
        terms = terms + spread[mask] * trust * values
    return (terms / size[constants.normalise]).sum()


@pytest.mark.parametrize("case", EVERY)
def test_every_objective_has_the_loss_and_the_gradient_of_full_logits(case: str) -> None:
    run = tiny_run(*EVERY[case], "train.batch_traces=12", "train.grad_clip=1e9", "train.micro_batch_tokens=90")
    data = make_round()
    made = trainer(run)
    expected_loss = full_loss(made, run, data)
    expected = torch.autograd.grad(expected_loss, list(made.parameters().values()))
    traces = batches.usable(data, 0, run.objective)
    share = batches.share(traces, np.arange(len(traces.trace_ids)), 0, 1, 90)
    assert len(share) > 1
    sums, _, broken = made._backward(share, made.whole(share))
    assert not broken
    assert float(sums[0]) == pytest.approx(expected_loss.item(), abs=1e-5, rel=1e-5)
    least = 1e-10 if case == "sequence" else 1e-5  # ratios of whole traces are tiny here: no engine measured these log-probs
    assert max(float(gradient.abs().max()) for gradient in expected) > least
    for (name, parameter), gradient in zip(made.parameters().items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_sft_learns_from_traces_of_others_alone() -> None:
    (metrics,) = trained(tiny_run(*EVERY["sft"], "train.batch_traces=12"), make_round())[0]
    assert metrics["traces"] == 6


def test_a_column_that_is_not_there_names_the_stage_to_redo() -> None:
    data = make_round()
    without = RoundTable(0, 0, data.table.drop_columns(list(TOPK)))
    with pytest.raises(TrainingError, match=r"no column teacher_topk_tokens.* Run `egrsd stage score --set score.keep_topk=16`"):
        trained(tiny_run(*EVERY["fkl"]), without)
    with pytest.raises(TrainingError, match=r"no column base_logprobs.* --set score.base_logprobs=true"):
        trained(tiny_run(*EVERY["kl"]), RoundTable(0, 0, data.table.drop_columns(["base_logprobs"])))


def test_a_token_of_the_teacher_that_the_student_does_not_know_is_refused() -> None:
    ids = make_round().table[TOPK[0]].to_pylist()
    ids[3][0][1] = 999
    with pytest.raises(TrainingError, match=r"trace r0-3: teacher_topk_tokens has id 999.* redo score of round 0"):
        trained(tiny_run(*EVERY["fkl"]), make_round(**{TOPK[0]: ids}))


def test_the_five_objectives_of_earlier_versions_train_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas of before are written out here. Weights are the same bit for bit, and so is all that comes of them."""

    def before(signals: objective.Signals, constants: Objective) -> torch.Tensor:
        """`token_weights` as it was: each objective with its gate inside."""
        delta, advantage = signals.teacher_logprobs - signals.student_logprobs, signals.advantage[:, None]
        factor = torch.exp(signals.advantage.sign()[:, None] * delta).clamp(1 - constants.epsilon, 1 + constants.epsilon)
        weights = advantage.expand(signals.mask.shape)
        if constants.name == "rlsd":
            weights = weights * ((1 - lam(signals)) + lam(signals) * factor)
        if constants.name == "position":
            weights = weights * factor * objective.position_weight(signals.mask, 0.25, 0.3, 0.1)
        if constants.name in ("egrsd", "cl_egrsd"):
            entropy = signals.teacher_entropy
            if constants.name == "cl_egrsd":
                entropy = objective.lookahead_min(entropy, signals.mask, constants.window)
            omega = (1 - constants.gamma * (entropy / signals.normaliser)).clamp(constants.floor, 1)
            weights = weights * factor * omega
        return weights.masked_fill(~signals.mask, 0)

    def lam(signals: objective.Signals) -> float:
        return 0.5 * max(0.0, 1 - signals.step / 50)

    names = ("grpo", "rlsd", "egrsd", "cl_egrsd", "position")
    now = {name: trained(tiny_run(f"objective.name={name}"), make_round()) for name in names}
    monkeypatch.setattr(objective, "token_weights", before)
    for name in names:
        metrics, weights = trained(tiny_run(f"objective.name={name}"), make_round())
        assert [row["loss"] for row in metrics] == [row["loss"] for row in now[name][0]]
        assert all(torch.equal(weights[key], now[name][1][key]) for key in weights), name


# ---- packing -------------------------------------------------------------------------------------------------------


PACKED = ("egrsd", "eopd", "gspo", "kl", "norm sequence", "fkl shuffled", "top inverted")


@pytest.mark.parametrize("budget", [60, 100_000])
@pytest.mark.parametrize("case", PACKED)
def test_a_packed_step_has_the_gradient_of_a_padded_one(case: str, budget: int) -> None:
    settings = (*EVERY[case], *ONE_STEP, f"train.micro_batch_tokens={budget}")
    padded, one = gradient_of(tiny_run(*settings, "train.packing=padded"), shared_round())
    packed, other = gradient_of(tiny_run(*settings, "train.packing=packed"), shared_round())
    same(padded, packed, 1e-4)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=2e-3)
    assert padded["padded_share"] > packed["padded_share"] == padded["shared_share"] == 0.0 < packed["shared_share"]


def test_short_traces_are_padded_and_long_shared_prompts_are_not() -> None:
    run = tiny_run(*ONE_STEP, "train.micro_batch_tokens=600")
    (short,), (long,) = (trained(run, shared_round(prompt=prompt))[0] for prompt in ((3, 14), (80, 90)))
    assert (short["shared_share"], long["padded_share"]) == (0.0, 0.0)
    assert long["shared_share"] > 0.4


@pytest.mark.parametrize(
    "sets",
    [
        ("objective.name=egrsd",),
        ("objective.name=egrsd", "objective.normalise=sequence"),
        ("objective.name=rlsd", "objective.normalise=constant", "objective.clip=ppo"),
        ("objective.name=grpo", "objective.clip=gspo"),
        ("objective.name=egrsd", "objective.correction=token"),
        EVERY["kl"],
    ],
)
def test_the_weights_that_an_audit_reads_are_those_of_the_gradient_that_trains(sets: tuple[str, ...]) -> None:
    """They once were the token weights alone: another norm, a clip, a correction or a KL changed nothing in an audit."""
    run = tiny_run(*sets, *ONE_STEP)
    made = trainer(run)
    traces = batches.usable(make_round(), 0, run.objective)
    micro = batches.micro_batch(traces, np.arange(len(traces.trace_ids)))
    logits = made.student.model(input_ids=micro.tokens, use_cache=False).logits.flatten(0, 1)[micro.sources]
    logprobs = logits.log_softmax(-1).gather(1, micro.targets[:, None])[:, 0]
    scored = torch.zeros_like(micro.student_logprobs).masked_scatter(micro.mask, logprobs.detach())
    micro = replace(micro, student_logprobs=scored)  # the policy that scored is the one that trains
    [weights] = made.weights([micro])
    flow = torch.autograd.grad(-(weights * logprobs).sum() / len(weights), list(made.parameters().values()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(flow, made.parameters().values(), strict=True)]
    torch.testing.assert_close(torch.cat([part.flatten() for part in parts]), made.gradient([micro]), atol=2e-6, rtol=2e-4)
    if sets == ("objective.name=egrsd",):
        plain = objective.token_weights(made._signals(micro, made.whole([micro])), run.objective)[micro.mask]
        torch.testing.assert_close(weights, plain)
