"""Which values a column may hold: ids of the vocabulary, log-probs of at most 0, entropies between 0 and log V, and so on.

Stages check an engine's answers with it, and every shard is checked before it is committed and when it is read.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from pipeline.contract import COLUMNS, TOPK, Column, Regime, Reject, Verdict

SLACK = 1e-3  # nats, or a share: what rounding may add to the greatest possible value or take from the least
WIDEST = 2**31  # the vocabulary that is supposed where its size is not known

HOLDS = {
    **dict.fromkeys(("prompt_tokens", "teacher_prompt_tokens", "teacher_context_tokens", "response_tokens", TOPK[0]), "id"),
    **dict.fromkeys(("rollout_logprobs", "student_logprobs", "teacher_logprobs", "base_logprobs", TOPK[1]), "logprob"),
    **dict.fromkeys(("rollout_entropy", "teacher_entropy", "lookahead_entropy"), "entropy"),
    **dict.fromkeys(("entropy_mean", "entropy_p50", "entropy_p90", "entropy_max"), "entropy"),
    **dict.fromkeys((*(f"share_{name}" for name in Regime.NAMES), "gate"), "share"),
    **dict.fromkeys(("prompt_index", "sample_index", "policy_version", "policy_lag", "seed"), "count"),
    **dict.fromkeys(("rollout_entropy_error", "entropy_error", "student_logprob_gap", "teacher_logprob_gap"), "count"),
    "regime": "regime",
}
CHOICES = {
    "trace_source": ("student", "teacher", "import"),
    "student_logprob_source": ("rollout", "score"),
    "teacher_context": ("privileged", "plain", "sibling", "feedback"),
    "verdict": tuple(map(str, Verdict)),
    "judged_verdict": tuple(map(str, Verdict)),
    "reject_reason": tuple(map(str, Reject)),
}


def limits(holds: str, vocab_size: int | None = None) -> tuple[float, float]:
    """Least and greatest value of what a column holds. Without `vocab_size` the vocabulary may be as large as WIDEST."""
    size = vocab_size or WIDEST
    return {
        "id": (0.0, size - 1.0),
        "logprob": (-math.inf, SLACK),
        "entropy": (-SLACK, math.log(size) + SLACK),
        "share": (-SLACK, 1 + SLACK),
        "count": (0.0, math.inf),
        "regime": (0.0, len(Regime.NAMES) - 1.0),
    }[holds]


def topk_fault(name: str, rows: np.ndarray) -> str | None:
    """Why `rows` [N, K] of a column of kept tokens cannot be a distribution's most likely ones. None when they can.

    Ids are those of K different tokens. Log-probs descend, and their probabilities add up to at most 1.
    """
    if name == TOPK[0]:
        ids = np.sort(rows, axis=1)
        return "names a token twice at one position" if (ids[:, 1:] == ids[:, :-1]).any() else None
    if (rows[:, 1:] > rows[:, :-1]).any():
        return "log-probs do not descend"
    most = float(np.exp(rows, dtype=np.float64).sum(1).max(initial=0.0))
    return f"probabilities of one position add up to {most:g}" if most > 1 + SLACK else None


def unlike_topk(tokens: np.ndarray, logprobs: np.ndarray, ids: np.ndarray, kept: np.ndarray) -> str | None:
    """Why tokens [N] with log-probs [N] do not fit the kept ids and log-probs [N, K] of their positions. None when they do.

    A token that is among the kept ones has the same log-prob there. Any other is at most as likely as the last of them.
    """
    here = ids == tokens[:, None]
    off = np.where(here.any(1), np.abs(logprobs - (kept * here).sum(1)), logprobs - kept[:, -1])
    return f"a token's log-prob is {off.max():g} nat off that of the kept tokens" if off.max(initial=0.0) > SLACK else None


def columns_of(writer: str) -> list[Column]:
    """The columns that the stage `writer` writes."""
    return [column for column in COLUMNS.values() if column.writer == writer]


def key_of(writer: str) -> str:
    """The column that names the rows of the stage `writer`."""
    return "prompt_id" if writer == "prompts" else "trace_id"


def types_of(writer: str) -> dict[str, pa.DataType]:
    """The type of every column in a shard of the stage `writer`."""
    types = {column.name: column.type for column in columns_of(writer)}
    return types | dict.fromkeys((key_of(writer), "reject_reason", "reject_detail"), pa.string())
