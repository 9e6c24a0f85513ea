"""Rewards and sequence advantages: length-shaped reward, weighted sums, group and running estimators. State in, state out.

Standard deviations are of the population (divide by n). GRPO implementations on torch.std divide by n - 1: the `sample` spread.
With four traces it is 1.155 times as large, so advantages are that much smaller. With n, one right and one wrong trace have
|A| = 1. A group of a single trace has A = 0 either way. The paper's running estimate is Welford's over all earlier rewards. With
so many rewards n and n - 1 are nearly equal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

GROUP_EPSILON = 1e-4  # of the group estimator (GRPO, RLSD)


def length_shaped_reward(correct: np.ndarray, num_tokens: np.ndarray, max_tokens: int, beta: float) -> np.ndarray:
    """r = 1[correct] (1 + beta (1 - T / L_max)) (2605.13255): 0, or in [1, 1 + beta].

    correct [N] bool, num_tokens [N] int at most max_tokens -> [N] float64. Raises ValueError on lengths beyond the cap.
    """
    correct, num_tokens = np.asarray(correct, bool), np.asarray(num_tokens)
    if correct.shape != num_tokens.shape:
        raise ValueError(f"num_tokens: shape {num_tokens.shape}, expected {correct.shape} as correct")
    if num_tokens.size and (num_tokens.min() < 0 or num_tokens.max() > max_tokens):
        raise ValueError(f"num_tokens: {num_tokens.min()} .. {num_tokens.max()}, expected 0 .. max_tokens = {max_tokens}")
    return np.where(correct, 1 + beta * (1 - num_tokens / max_tokens), 0.0)


def soft_overlong(num_tokens: np.ndarray, max_tokens: int, cache: int) -> np.ndarray:
    """DAPO's soft overlong punishment (2503.14476, Eq. 13): 0 up to max_tokens - cache, then linear, -1 from max_tokens on.

    num_tokens [N] int, cache at most max_tokens -> [N] float64 in [-1, 0]. Raises ValueError for another cache.
    """
    if not 1 <= cache <= max_tokens:
        raise ValueError(f"cache: {cache}, expected 1 .. max_tokens = {max_tokens}")
    return np.clip((max_tokens - cache - np.asarray(num_tokens, np.float64)) / cache, -1.0, 0.0)


def weighted_sum(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over rewards of weight x value, without the absent ones.

    values [R, N], NaN where a reward is absent; weights [R] -> [N] float64, NaN where every reward that counts is absent. One of
    weight 0 is stored only, and does not count.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 2 or weights.shape != values.shape[:1]:
        raise ValueError(f"weights: shape {weights.shape}, expected [R] for values of shape {values.shape}")
    known = np.isfinite(values)
    total = np.where(known, values * weights[:, None], 0.0).sum(0)
    return np.where(known[weights != 0].any(0), total, np.nan)


def group_advantage(rewards: np.ndarray, groups: int, std: str = "population") -> np.ndarray:
    """A = (r - mean_G) / (std_G + 1e-4) within each group (GRPO; RLSD 2604.03128).

    rewards [N], NaN for a row that was rejected: it stays NaN and counts in no statistic. groups: rows per group, which
    are neighbours -> [N] float64. A group whose rewards are all equal gets 0: no signal. std: "population" or "sample".
    """
    rewards = np.asarray(rewards, np.float64)
    index = _group_index(rewards, groups)
    known = np.isfinite(rewards)
    value = np.where(known, rewards, 0.0)
    count = np.maximum(np.bincount(index, known), 1)
    mean = (np.bincount(index, value) / count)[index]
    centred = np.where(known, value - mean, 0.0)
    centred[np.abs(centred) < 1e-12 * np.maximum(1, np.abs(value))] = 0  # equal rewards: rounding in the mean is no direction
    spread = np.sqrt(np.bincount(index, centred**2) / (np.maximum(count - 1, 1) if std == "sample" else count))
    return np.where(known, centred / (spread[index] + GROUP_EPSILON), np.nan)


def _group_index(rewards: np.ndarray, groups: int) -> np.ndarray:
    if rewards.ndim != 1:
        raise ValueError(f"rewards: shape {rewards.shape}, expected [N]")
    if groups < 1 or len(rewards) % groups:
        raise ValueError(f"groups: {len(rewards)} rows do not divide into groups of {groups}")
    return np.arange(len(rewards)) // groups


@dataclass(frozen=True)
class RunningBaseline:
    """Mean and spread of the rewards of all *earlier* steps (Welford), for one trace per prompt (2605.13255).

    count: rewards seen. mean: their mean. m2: sum of their squared deviations from it. steps: updates made so far.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    steps: int = 0

    @property
    def std(self) -> float:
        """Population standard deviation of the rewards seen; 0 before the first."""
        return float(np.sqrt(self.m2 / self.count)) if self.count else 0.0

    def advantage(self, rewards: np.ndarray, warmup_steps: int = 10) -> np.ndarray:
        """A = r - 0.5 in the first `warmup_steps` steps, then (r - mean) / std; rewards [N] (NaN stays NaN) -> [N] float64.

        Where every earlier reward was the same there is no scale: A = r - mean. Take the advantages of a step before `update`.
        """
        rewards = np.asarray(rewards, np.float64)
        if self.steps < warmup_steps or not self.count:
            return rewards - 0.5
        return (rewards - self.mean) / (self.std if self.std > 1e-8 else 1.0)

    def update(self, rewards: np.ndarray) -> RunningBaseline:
        """The state after a step with these rewards [N] (Chan's merge of two Welford states). A NaN reward is not counted.

        A step without any reward is counted as a step.
        """
        rewards = np.asarray(rewards, np.float64)
        new = rewards[np.isfinite(rewards)]
        if not new.size:
            return RunningBaseline(self.count, self.mean, self.m2, self.steps + 1)
        count, shift = self.count + new.size, float(new.mean()) - self.mean
        m2 = self.m2 + float(((new - new.mean()) ** 2).sum()) + shift**2 * self.count * new.size / count
        return RunningBaseline(count, self.mean + shift * new.size / count, m2, self.steps + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; `from_dict` restores them exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunningBaseline:
        """The state that `to_dict` wrote."""
        return cls(**data)
