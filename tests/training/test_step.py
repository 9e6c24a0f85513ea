"""The optimiser step: its gradient is the paper's, and ranks, strategies, micro-batches and padding change nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_round import shared_round
from torch import multiprocessing
from training_rounds import make_round, tiny_run

from pipeline.config import Objective, Run
from pipeline.config.objective import OBJECTIVES
from pipeline.contract import TOPK
from pipeline.errors import ModelError, SettingError, TrainingError
from pipeline.method import objective
from pipeline.training import batches, gap
from pipeline.training.batches import RoundTable
from pipeline.training.step import Trainer
from pipeline.training.student import student

CPU = torch.device("cpu")


def trainer(run: Run) -> Trainer:
    """A trainer whose adapter is not the identity, so that every gradient is alive."""
    model = student.build(run, CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return Trainer(run, model, CPU)


def trained(run: Run, data: RoundTable) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    made = trainer(run)
    return list(made.train_round(data)), {name: p.detach().clone() for name, p in made.parameters().items()}


def gradient(run: Run, data: RoundTable) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and clipped gradient of a round of one step, read back from Adam's first moment. Weights would not compare: Adam
    turns the rounding of a gradient near zero into a whole step."""
    made = trainer(run)
    (metrics,) = made.train_round(data)
    moments = {name: made.optimizer.state[p]["exp_avg"] / (1 - run.train.betas[0]) for name, p in made.parameters().items()}
    return metrics, moments


def same(metrics: dict[str, float], others: dict[str, float], tolerance: float) -> None:
    """All but the clock, and what was computed of padding."""
    assert metrics.keys() == others.keys()
    for name in metrics.keys() - {"seconds", "tokens_per_s", "padded_share", "shared_share"}:
        assert metrics[name] == pytest.approx(others[name], rel=tolerance, abs=tolerance), name


def left_padded_logprobs(model, rows: list[dict], width: int) -> torch.Tensor:
    """Log-probs [B, T] of the responses by a plain forward: padding on the left, attention mask, position ids, full logits."""
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = row["prompt_tokens"] + row["response_tokens"]
        tokens[i, -len(ids) :], mask[i, -len(ids) :] = torch.tensor(ids), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    each = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    lengths = [len(row["response_tokens"]) for row in rows]
    return torch.stack([torch.nn.functional.pad(each[i, -n:], (0, max(lengths) - n)) for i, n in enumerate(lengths)])


def padded(rows: list[dict], name: str) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True)


KINDS = [(name, "entropy") for name in ("grpo", "rlsd", "egrsd", "cl_egrsd", "position")]
CONTROLS = ("shuffled", "uniform", "inverted")
ONE_STEP = ("train.batch_traces=12", "train.micro_batch_tokens=90")


@pytest.mark.parametrize(("name", "gate"), KINDS + [("cl_egrsd", gate) for gate in CONTROLS])
def test_the_gradient_is_that_of_the_plain_loss(name: str, gate: str) -> None:
    run = tiny_run(
        f"objective.name={name}",
        f"objective.gate={gate}",
        "train.batch_traces=12",
        "train.grad_clip=1e9",
        "train.micro_batch_tokens=90",
    )
    data = make_round()
    made, rows = trainer(run), data.table.to_pylist()
    mask = padded(rows, "response_tokens") > 0
    entropy = padded(rows, "teacher_entropy")
    signals = objective.Signals(
        torch.tensor([row["advantage"] for row in rows]),
        padded(rows, "teacher_logprobs"),
        padded(rows, "student_logprobs"),
        entropy,
        mask,
        objective.normaliser(entropy, mask, run.objective),
        seeds=batches.trace_seeds(batches.micro_batch(batches.usable(data, 0), np.arange(12)), run.seed),
    )
    signals = replace(signals, mean_gate=objective.gate_sum(signals, run.objective) / mask.sum())
    weights = objective.token_weights(signals, run.objective)
    expected_loss = objective.loss(left_padded_logprobs(made.student.model, rows, width=64), weights, mask)
    expected = torch.autograd.grad(expected_loss, list(made.parameters().values()))

    share = batches.share(batches.usable(data, 0), np.arange(12), 0, 1, 90)
    assert len(share) > 2
    sums, _, broken = made._backward(share, made.whole(share))
    assert not broken
    assert float(sums[0]) == pytest.approx(expected_loss.item(), abs=1e-5)
    for (name, parameter), gradient in zip(made.parameters().items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("budget", "gate"), [(1, "entropy"), (60, "entropy"), (150, "entropy"), *((60, g) for g in CONTROLS)])
def test_accumulation_equals_one_batch(budget: int, gate: str) -> None:
    data, settings = make_round(), ("train.batch_traces=12", f"objective.gate={gate}")
    once, one = gradient(tiny_run(*settings, "train.micro_batch_tokens=100000"), data)
    many, other = gradient(tiny_run(*settings, f"train.micro_batch_tokens={budget}"), data)
    same(once, many, 1e-5)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_controls_move_the_weights_elsewhere() -> None:
    data = make_round()
    losses = {gate: trained(tiny_run(f"objective.gate={gate}"), data)[0][0]["loss"] for gate in ("entropy", *CONTROLS)}
    assert len(set(losses.values())) == 4


def test_the_students_own_entropy_gates_where_the_teachers_did() -> None:
    """The control reads another column and is the same from there on."""
    data = make_round()
    own = [[abs(2.5 - value) for value in row] for row in data.table["teacher_entropy"].to_pylist()]
    told = make_round(rollout_entropy=own)
    control, _ = trained(tiny_run("objective.entropy=student"), told)
    plain, _ = trained(tiny_run(), make_round(teacher_entropy=own))
    assert [row["loss"] for row in control] == [row["loss"] for row in plain]
    assert control[0]["loss"] != trained(tiny_run(), told)[0][0]["loss"]


def test_gradient_checkpointing_changes_nothing() -> None:
    data = make_round()
    (plain, one), (again, other) = (trained(tiny_run(f"train.gradient_checkpointing={flag}"), data) for flag in ("false", "true"))
    for a, b in zip(plain, again, strict=True):
        same(a, b, 1e-6)
    torch.testing.assert_close(one, other)


def test_a_row_that_is_not_finite_leaves_loss_and_denominator() -> None:
    whole = make_round(num_traces=9)
    entropy = [*whole.table["teacher_entropy"].to_pylist(), [math.nan, 50.0]]
    rows = {name: [*whole.table[name].to_pylist(), whole.table[name][0].as_py()] for name in whole.table.column_names}
    rows |= {"trace_id": [*rows["trace_id"][:-1], "broken"], "teacher_entropy": entropy}
    for name in ("response_tokens", "student_logprobs", "teacher_logprobs"):
        rows[name][-1] = rows[name][-1][:2] + [5] * (2 - len(rows[name][-1]))
    with_it, a = trained(tiny_run(), make_round(num_traces=10, **rows))
    without, b = trained(tiny_run(), whole)
    assert [row["rejected"] for row in with_it] == [1, 1]
    assert [row["loss"] for row in with_it] == [row["loss"] for row in without]
    assert [row["tokens"] for row in with_it] == [row["tokens"] for row in without]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_names_round_step_and_traces_and_updates_nothing() -> None:
    made = trainer(tiny_run())
    name, parameter = next(iter(made.parameters().items()))
    with torch.no_grad():
        parameter[0, 0] = math.inf
    before = {n: p.detach().clone() for n, p in made.parameters().items() if n != name}
    with pytest.raises(TrainingError, match=r"round 2, step 0: loss nan.*traces r2-\d+"):
        list(made.train_round(make_round(2)))
    assert all(torch.equal(before[n], made.parameters()[n]) for n in before)


def test_the_gap_to_the_engine_is_measured_on_the_first_step_of_a_round() -> None:
    run = tiny_run()
    made, data = trainer(run), make_round()
    traces = batches.usable(data, 0)
    engine = []
    for row in range(12):  # one trace at a time: batch size changes nothing either
        micro = batches.micro_batch(traces, np.array([row]))
        with torch.no_grad():
            engine.append(made.student(micro.tokens, micro.sources, micro.targets, torch.zeros(len(micro.targets)))[1].tolist())
    off = [[*engine[0][:-1], engine[0][-1] - 0.5], *engine[1:]]
    first, *others = made.train_round(make_round(student_logprobs=off))
    assert first["logprob_gap_max"] <= 0.5 + 1e-4
    assert first["logprob_gap"] * first["tokens"] < 0.51
    assert not any("logprob_gap" in row for row in others)
    exact, *_ = trainer(run).train_round(make_round(student_logprobs=engine))
    assert exact["logprob_gap_max"] < 2e-5


def engine_logprobs(made: Trainer, data: RoundTable) -> list[list[float]]:
    """What an engine with the trainer's weights would store."""
    traces, found = batches.usable(data, 0), []
    for row in range(len(traces.trace_ids)):
        micro = batches.micro_batch(traces, np.array([row]))
        with torch.no_grad():
            found.append(made.student(micro.tokens, micro.sources, micro.targets, torch.zeros(len(micro.targets)))[1].tolist())
    return found


WATCHED = ("train.logprob_gap=null", "train.logprob_gap_max=null")


def test_a_gap_above_the_tolerance_ends_the_run_with_likely_causes_and_changes_no_weight() -> None:
    run = tiny_run(*WATCHED)
    made, known = trainer(run), engine_logprobs(trainer(run), make_round())
    wrong = [[*known[0][:-1], known[0][-1] - 0.5], *known[1:]]
    before = {name: p.detach().clone() for name, p in made.parameters().items()}
    with pytest.raises(
        TrainingError, match=r"round 0, step 0: trainer and engine disagree about policy 0: .* by 0\.5 at most.*r0-"
    ):
        list(made.train_round(make_round(student_logprobs=wrong)))
    assert all(torch.equal(before[name], p) for name, p in made.parameters().items())
    later = make_round(1)
    with pytest.raises(TrainingError, match=r"policy 1.*Take that layer out of model\.lora_targets"):
        list(trainer(run).train_round(later))
    another = replace(later, comparable=False)  # earlier rounds were trained again: nobody has the weights of these log-probs
    assert not any("logprob_gap" in row for row in trainer(run).train_round(another))
    accepted = tiny_run("train.logprob_gap=0.6", "train.logprob_gap_max=0.6")
    assert len(list(trainer(accepted).train_round(make_round(student_logprobs=wrong)))) == 2


@pytest.mark.parametrize("settings", [(), ("model.lora_dropout=0.5",)])
def test_a_stale_round_is_compared_under_the_policy_that_answered(settings: tuple[str, ...]) -> None:
    run = tiny_run(*WATCHED, "max_staleness=1", *settings)
    made, data = trainer(run), make_round()
    made.student.eval()
    known = engine_logprobs(made, data)
    made.student.train()
    answered = {name.replace(".default.", "."): p.detach().clone() for name, p in made.parameters().items()}
    list(made.train_round(make_round(student_logprobs=known)))
    own = {name: p.detach().clone() for name, p in made.parameters().items()}
    stale = replace(make_round(student_logprobs=known), number=1, policy_version=0)
    with pytest.raises(TrainingError, match="disagree about policy 0"):
        list(made.train_round(replace(stale, answered={})))  # policy 0 as it would be without training: another one
    assert all(torch.equal(own[name], p) for name, p in made.parameters().items())
    first, *others = made.train_round(replace(stale, answered=answered))
    assert first["logprob_gap_max"] < 2e-5
    assert not any("logprob_gap" in row for row in others)


def test_the_tolerance_is_that_of_the_coarser_dtype() -> None:
    assert gap.tolerance(tiny_run(*WATCHED)) == gap.TOLERANCES["float32"]
    assert gap.tolerance(tiny_run(*WATCHED, "model.dtype=bfloat16")) == gap.TOLERANCES["bfloat16"]
    assert gap.tolerance(tiny_run(*WATCHED, "train.dtype=bfloat16", "train.logprob_gap=1")) == (1.0, 2.5)


def test_a_round_without_signal_moves_nothing_and_says_so() -> None:
    metrics, after = trained(tiny_run(), make_round(advantage=[0.0] * 12))
    assert [row["loss"] for row in metrics] == [0.0, 0.0]
    assert [row["positive_share"] for row in metrics] == [0.0, 0.0]
    before = trainer(tiny_run()).parameters()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_the_learning_rate_warms_up_linearly() -> None:
    metrics, _ = trained(tiny_run("train.warmup_steps=4", "train.batch_traces=2"), make_round())
    assert [row["lr"] for row in metrics] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_adapter_starts_as_the_identity_and_the_same_for_a_seed() -> None:
    one, two, three = (student.build(tiny_run(f"seed={seed}"), CPU).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert not any(tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_the_adapter_is_float32_beside_a_bfloat16_base() -> None:
    made = trainer(tiny_run("train.dtype=bfloat16"))
    assert {p.dtype for p in made.parameters().values()} == {torch.float32}
    assert {p.dtype for p in made.student.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(math.isfinite(row["grad_norm"]) for row in made.train_round(make_round()))


def test_bad_models_and_settings_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: there is no such folder"):
        student.build(tiny_run(f"model.path={tmp_path}/nowhere"), CPU)
    with pytest.raises(SettingError, match=r"model\.lora_targets: does not fit tiny-reasoner"):
        student.build(tiny_run("model.lora_targets=[c_attn]"), CPU)
    with pytest.raises(SettingError, match=r"train\.dtype: float16"):
        student.build(tiny_run("train.dtype=float16"), CPU)


def test_a_head_that_scales_its_logits_is_refused() -> None:
    made = student.build(tiny_run(), CPU)
    head = made.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with pytest.raises(ModelError, match="not a plain linear one"):
        student._check_head(made, tiny_run(), CPU)


# ---- every objective -----------------------------------------------------------------------------------------------

KEPT = "score.keep_topk=20"
EVERY = {name: (f"objective.name={name}", KEPT) for name in OBJECTIVES if name != "sft"}
EVERY["sft"] = ("objective.name=sft", "rollout.teacher_share=0.5")
EVERY |= {
    f"gkd {beta} {s}": (*EVERY["gkd"], f"objective.gkd_beta={beta}", f"objective.support={s}")
    for beta, s in ((0, "truncated"), (1, "renormalised"))
}
EVERY |= {f"opd {gate}": ("objective.name=opd", f"objective.gate={gate}") for gate in ("entropy", "top_entropy:0.3")}
EVERY |= {f"fkl {c}": (*EVERY["fkl"], "objective.gate=cl_entropy", f"objective.control={c}") for c in ("shuffled", "uniform")}
EVERY["top inverted"] = ("objective.name=grpo", "objective.gate=top_entropy:0.4", "objective.control=inverted")
EVERY |= {clip: ("objective.name=egrsd", f"objective.clip={clip}") for clip in ("ppo", "gspo", "cispo")}
EVERY |= {c: (*EVERY["fkl"], f"objective.correction={c}") for c in ("token", "sequence")}
EVERY["kl"] = ("objective.kl=0.3", "score.base_logprobs=true")
EVERY |= {f"norm {norm}": (*EVERY["eopd"], f"objective.normalise={norm}") for norm in ("sequence", "constant")}


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
    padded, one = gradient(tiny_run(*settings, "train.packing=padded"), shared_round())
    packed, other = gradient(tiny_run(*settings, "train.packing=packed"), shared_round())
    same(padded, packed, 1e-4)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=2e-3)
    assert padded["padded_share"] > packed["padded_share"] == padded["shared_share"] == 0.0 < packed["shared_share"]


def test_short_traces_are_padded_and_long_shared_prompts_are_not() -> None:
    run = tiny_run(*ONE_STEP, "train.micro_batch_tokens=600")
    (short,), (long,) = (trained(run, shared_round(prompt=prompt))[0] for prompt in ((3, 14), (80, 90)))
    assert (short["shared_share"], long["padded_share"]) == (0.0, 0.0)
    assert long["shared_share"] > 0.4


# ---- ranks ---------------------------------------------------------------------------------------------------------


RANKED = {case: EVERY[case] for case in (*OBJECTIVES, "opd top_entropy:0.3", "norm sequence", "gspo", "kl")}
RANKED |= {control: (f"objective.control={control}",) for control in CONTROLS}
RANKED |= {f"packed {s}": ("train.packing=packed", f"train.strategy={s}") for s in ("ddp", "fsdp2")}


def rank_main(rank: int, ranks: int, folder: str) -> None:
    """Train one round with DDP and one with FSDP2 and leave what came out in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    from pipeline.training import checkpoint

    for strategy in ("ddp", "fsdp2"):
        for dtype in ("float32", "bfloat16"):
            made = trainer(tiny_run("train.batch_traces=13", f"train.strategy={strategy}", f"train.dtype={dtype}"))
            metrics = list(made.train_round(make_round(num_traces=13)))
            checkpoint.save(made, 1, checkpoint.gather(made), Path(folder, strategy, dtype))
            metrics += made.train_round(make_round(1, num_traces=13))
            if rank == 0:
                torch.save(metrics, Path(folder, strategy, dtype, "metrics.pt"))
    for case, settings in RANKED.items():
        data = shared_round() if "packed" in case else make_round(num_traces=13)
        metrics = list(trainer(tiny_run("train.batch_traces=13", *settings)).train_round(data))
        if rank == 0:
            torch.save(metrics, Path(folder, f"{case}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_main, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(two_ranks: Path, strategy: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from pipeline.training import checkpoint

    alone = trainer(tiny_run("train.batch_traces=13"))
    metrics = list(alone.train_round(make_round(num_traces=13)))
    checkpoint.save(alone, 1, checkpoint.gather(alone), tmp_path)
    metrics += alone.train_round(make_round(1, num_traces=13))
    for a, b in zip(metrics, torch.load(two_ranks / strategy / "float32" / "metrics.pt"), strict=True):
        same(a, b, 1e-3)
    one, two = (load_file(folder / checkpoint.OPTIMIZER) for folder in (tmp_path, two_ranks / strategy / "float32"))
    assert one.keys() == two.keys()
    for name in [name for name in one if name.endswith("exp_avg")]:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-3)
    adapters = [load_file(folder / checkpoint.ADAPTER) for folder in (tmp_path, two_ranks / strategy / "float32")]
    assert {n: t.shape for n, t in adapters[0].items()} == {n: t.shape for n, t in adapters[1].items()}


@pytest.mark.parametrize("case", RANKED)
def test_objectives_and_controls_are_the_same_on_two_ranks(two_ranks: Path, case: str) -> None:
    data = shared_round() if "packed" in case else make_round(num_traces=13)
    alone, _ = trained(tiny_run("train.batch_traces=13", *RANKED[case]), data)
    together = torch.load(two_ranks / f"{case}.pt")
    assert len(alone) == len(together) > 0
    for a, b in zip(alone, together, strict=True):
        same(a, b, 1e-3)


def test_a_bfloat16_base_trains_sharded_as_replicated(two_ranks: Path) -> None:
    ddp, sharded = (torch.load(two_ranks / strategy / "bfloat16" / "metrics.pt") for strategy in ("ddp", "fsdp2"))
    for a, b in zip(ddp, sharded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05, abs=0.05)
