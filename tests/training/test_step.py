"""The optimiser step: its gradient is the paper's, and micro-batches change nothing. What it refuses, it names."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import CONTROLS, CPU, engine_logprobs, gradient_of, same, trained, trainer
from training_rounds import make_round, tiny_run

from pipeline.errors import ModelError, SettingError, TrainingError
from pipeline.method import objective
from pipeline.training import batches
from pipeline.training.agreement import gap
from pipeline.training.student import student
from pipeline.training.student.head import Terms


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
    once, one = gradient_of(tiny_run(*settings, "train.micro_batch_tokens=100000"), data)
    many, other = gradient_of(tiny_run(*settings, f"train.micro_batch_tokens={budget}"), data)
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
            engine.append(
                made.student(micro.tokens, micro.sources, Terms(micro.targets, torch.zeros(len(micro.targets))))[1].tolist()
            )
    off = [[*engine[0][:-1], engine[0][-1] - 0.5], *engine[1:]]
    first, *others = made.train_round(make_round(student_logprobs=off))
    assert first["logprob_gap_max"] <= 0.5 + 1e-4
    assert first["logprob_gap"] * first["tokens"] < 0.51
    assert not any("logprob_gap" in row for row in others)
    exact, *_ = trainer(run).train_round(make_round(student_logprobs=engine))
    assert exact["logprob_gap_max"] < 2e-5


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


@pytest.mark.parametrize(
    ("policy", "tuning", "likely"),
    [
        (0, "lora", "max_model_len reaches past the window"),
        (3, "lora", "Take that layer out of model.lora_targets"),
        (0, "full", "max_model_len reaches past the window"),
        (3, "full", "does not load all weights of a policy as the trainer has them. Set model.tuning=lora"),
    ],
)
def test_the_likely_cause_of_a_gap_fits_what_is_trained(policy: int, tuning: str, likely: str) -> None:
    with pytest.raises(TrainingError, match=likely):
        gap.check(tiny_run(f"model.tuning={tuning}", *WATCHED), policy, 1.0, 5.0, "round 3, step 9")


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


def test_with_dropout_the_whole_first_minibatch_is_compared() -> None:
    """A wrong log-prob in any of its six traces ends the run, in whichever micro-batch. Once only the first was looked at."""
    run, found = tiny_run(*WATCHED, "model.lora_dropout=0.5"), []
    plain = trainer(run)
    plain.student.eval()
    known = engine_logprobs(plain, make_round())
    for place in range(12):
        wrong = [[*row[:-1], row[-1] - 0.5 * (place == other)] for other, row in enumerate(known)]
        with contextlib.suppress(TrainingError):
            next(trainer(run).train_round(make_round(student_logprobs=wrong)))
            continue
        found.append(place)
    [first, _] = batches.steps(12, run.train.batch_traces, run.seed, 0)
    assert found == sorted(first)


def test_the_tolerance_is_that_of_the_coarser_dtype() -> None:
    assert tiny_run(*WATCHED).accepted_gap == (1e-4, 1e-2)
    assert tiny_run(*WATCHED, "model.dtype=bfloat16").accepted_gap == (0.05, 2.5)
    assert tiny_run(*WATCHED, "train.dtype=bfloat16", "train.logprob_gap=1").accepted_gap == (1.0, 2.5)


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
