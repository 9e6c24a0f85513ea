"""Functions of other projects on given inputs, for tests/method/test_peers.py. It runs in the environment of `make peers`.

    .peers/bin/python tests/method/peers.py swift|trl|verl INPUTS OUTPUTS

Both files are safetensors. An output is named after its case: `NAME` is the peer's value, `NAME gradient` its gradient with
respect to the student's log-probs or logits. Nothing of the product is imported here.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

BETAS = {"forward": 0.0, "mixed": 0.3, "reverse": 1.0}


def main(peer, inputs, path):
    """Compute every case of one peer."""
    found = {"swift": swift, "trl": trl, "verl": verl}[peer](SimpleNamespace(**load_file(inputs)))
    save_file({name: value.detach().double().contiguous() for name, value in found.items()}, path)


def graded(name, values, given):
    """The values of a function of one tensor, and the gradient of their sum."""
    tensor = given.clone().requires_grad_()
    found = values(tensor)
    found.sum().backward()
    return {name: found, f"{name} gradient": tensor.grad}


def kept_of(logits, given):
    """The student's log-probs [N, K] at the kept tokens."""
    return logits.log_softmax(-1).gather(-1, given.kept_ids)


def swift(given):
    """ms-swift: `swift.rl_core.advantage` and `swift.rlhf_trainers.gkd_loss`."""
    from swift.rl_core import advantage
    from swift.rlhf_trainers.gkd_loss import jsd_loss

    mask, teacher, student = given.mask, given.teacher, given.student
    base = advantage.compute_advantages(given.rewards[:, None], torch.ones(1), int(given.group))[0]
    found = {
        "swift logratio": advantage.compute_teacher_logratio(teacher, student, mask),
        "swift rlsd": advantage.apply_rlsd_reweight(given.advantage, mask, teacher, student, 0.5, 0.2),
        "swift advantages": base,
        "swift reward_opd": advantage.expand_advantage_to_per_token(given.advantage, mask, teacher, student, 0.3) * mask,
    }
    found |= graded("swift sdar", lambda s: advantage.compute_sdar_loss(s, teacher, mask, 5.0)[0], student)
    for name, beta in BETAS.items():
        found |= graded(f"swift jsd {name}", lambda s, b=beta: jsd_loss(s, given.teacher_logits, b), given.student_logits)

        def renormalised(logits, beta=beta):
            return jsd_loss(logits.gather(-1, given.kept_ids), given.kept_logprobs, beta)

        found |= graded(f"swift renormalised {name}", renormalised, given.student_logits)
    return found


def trl(given):
    """TRL: `sdpo.loss_utils`, `_jsd_divergence` of async distillation, IW-OPD, and DAPO's overlong punishment."""
    from trl.experimental.async_distillation.async_distillation_trainer import _jsd_divergence
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.sdpo import loss_utils
    from trl.rewards.other_rewards import get_soft_overlong_punishment

    teacher, everything = loss_utils.add_tail_bucket(given.kept_logprobs), torch.ones_like(given.kept_ids, dtype=torch.bool)
    found = {}
    for name, beta in BETAS.items():

        def tail(logits, beta=beta):
            return loss_utils.compute_divergence(loss_utils.add_tail_bucket(kept_of(logits, given)), teacher, beta)

        def truncated(logits, beta=beta):
            return _jsd_divergence(kept_of(logits, given), given.kept_logprobs, beta, everything).sum(-1)

        found |= graded(f"trl tail {name}", tail, given.student_logits)
        found |= graded(f"trl truncated {name}", truncated, given.student_logits)
    sampled = loss_utils.compute_sampled_token_self_distillation_loss
    found |= graded(
        "trl opd",
        lambda s: sampled(s, given.teacher_logits, given.targets, distillation_alpha=1.0),
        given.student_logits,
    )
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.5,
        iw_opd_epsilon=1e-12,
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(metrics),
    )
    labels = torch.where(given.mask > 0, given.tokens, -100)
    found |= graded(
        "trl iw_opd",
        lambda s: IWOPDTrainer._compute_iw_opd_loss(trainer, s, given.tokens, labels, given.teacher, given.student),
        given.response_logits,
    )
    ids = [[1] * length for length in given.mask.sum(1).long().tolist()]
    found["trl overlong"] = torch.tensor(get_soft_overlong_punishment(12, 8)(ids))
    return found


def metrics():
    """Lists by name, as the trainer keeps its metrics."""
    return defaultdict(list)


def verl(given):
    """verl: `core_algos`, `rollout_corr_helper`, and the forward KL of `distillation.fsdp.losses`."""
    import numpy as np
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    mask, tokens = given.mask, int(given.mask.sum())
    plain = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
    nested = [torch.nested.nested_tensor([part], layout=torch.jagged) for part in (given.kept_logprobs, given.kept_ids)]

    def forward_kl(logits):
        return compute_forward_kl_topk(logits[None], *nested, plain, "bshd")["distillation_losses"][0]

    found = graded("verl truncated forward", forward_kl, given.student_logits)
    for name, mode, more in (
        ("token", "token-mean", {}),
        ("sequence", "seq-mean-token-mean", {}),
        ("constant", "seq-mean-token-sum-norm", {"loss_scale_factor": 20}),
    ):
        found |= graded(f"verl agg {name}", lambda s, m=mode, k=more: core_algos.agg_loss(s, mask, m, **k), given.student)
    for name in ("vanilla", "gspo", "cispo"):
        found |= graded(f"verl {name}", lambda s, n=name: policy_loss(core_algos, n, s, given) * tokens, given.student)
    ratio = given.student - given.teacher
    found["verl correction token"] = compute_rollout_correction_weights(ratio, mask, "token", 2.0)[0]
    found["verl correction sequence"] = compute_rollout_correction_weights(ratio, mask, "sequence", "1e-12_3.0")[0]
    found["verl k3"] = core_algos.kl_penalty_forward(given.student, given.teacher, "k3") * mask
    groups = np.arange(len(mask)) // int(given.group)
    rewards = torch.zeros_like(mask)
    rewards[:, 0] = given.rewards
    grpo = core_algos.compute_grpo_outcome_advantage(rewards, mask, groups, epsilon=1e-4)[0]
    found["verl advantages"] = grpo[:, 0]
    return found


def policy_loss(core_algos, name, logprobs, given):
    """A policy loss with the bounds .8 and 1.3. The third bound of the vanilla loss, for A < 0, is out of reach."""
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=1e9
    )
    function = getattr(core_algos, f"compute_policy_loss_{name}")
    return function(given.teacher, logprobs, given.weights, given.mask, "token-mean", config)[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
