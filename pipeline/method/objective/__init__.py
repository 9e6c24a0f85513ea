"""Objectives on padded minibatches, in torch: what each token weighs, and what the loss and its gradient are made of.

    Signals -> token_weights, divergence_weights -> coefficients -> the chunked head (training/student/head.py)

signals.py has what was stored, and gates.py the factor of every token. sampled.py has the objectives on sampled tokens,
divergence.py those on the teacher's most likely tokens. ratio.py has clips and corrections. weights.py joins all into a loss.

Shapes: `B` traces, `T` response tokens (padded), `N` response tokens without padding, `K` kept tokens of the teacher, `V`
vocabulary; masks are True on response tokens. Entropies and log-probabilities are in nats at temperature 1, over the full
vocabulary. Constants arrive as the record that holds them, `config.Objective`, so a new constant changes no signature.
../README.md lists the traps that are named by number.
"""

from pipeline.method.objective.divergence import (
    Kept,
    clamped_forward_kl,
    divergence,
    forward_kl,
    head_gradient_,
    jensen_shannon,
    log_tail,
    measure_of,
    reverse_kl,
)
from pipeline.method.objective.gates import (
    confidence,
    gate,
    gate_sum,
    lookahead_min,
    normaliser,
    readings,
    shift_left,
    shuffle,
    threshold,
)
from pipeline.method.objective.ratio import Ratios, Surrogate, surrogate
from pipeline.method.objective.sampled import (
    delta,
    gated,
    grpo,
    iw_opd,
    magnitude,
    minillm,
    opd,
    position,
    position_weight,
    reward_opd,
    rlsd,
    sdar,
    sft,
)
from pipeline.method.objective.signals import Signals
from pipeline.method.objective.weights import (
    coefficients,
    denominators,
    divergence_weights,
    loss,
    token_weights,
    weighted_sum,
)

__all__ = [
    "Kept",
    "Ratios",
    "Signals",
    "Surrogate",
    "clamped_forward_kl",
    "coefficients",
    "confidence",
    "delta",
    "denominators",
    "divergence",
    "divergence_weights",
    "forward_kl",
    "gate",
    "gate_sum",
    "gated",
    "grpo",
    "head_gradient_",
    "iw_opd",
    "jensen_shannon",
    "log_tail",
    "lookahead_min",
    "loss",
    "magnitude",
    "measure_of",
    "minillm",
    "normaliser",
    "opd",
    "position",
    "position_weight",
    "readings",
    "reverse_kl",
    "reward_opd",
    "rlsd",
    "sdar",
    "sft",
    "shift_left",
    "shuffle",
    "surrogate",
    "threshold",
    "token_weights",
    "weighted_sum",
]
