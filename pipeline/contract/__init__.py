"""The contract between stages: columns, stages, and what stages and engines exchange."""

from pipeline.contract.columns import COLUMNS, REWARD_PREFIX, TOPK, Column, Regime, Reject, Verdict, reward_columns
from pipeline.contract.engines import (
    EngineFacts,
    Engines,
    Failure,
    Generate,
    Generation,
    Policy,
    PooledEngines,
    Sampling,
    Score,
    Sequence,
    Usage,
)
from pipeline.contract.stage import ENGINE_SETTINGS, TEACHER_PROMPTS, Place, Scope, Seat, ShardInputs, ShardResult, Stage, schema

__all__ = [
    "COLUMNS",
    "ENGINE_SETTINGS",
    "REWARD_PREFIX",
    "TEACHER_PROMPTS",
    "TOPK",
    "Column",
    "EngineFacts",
    "Engines",
    "Failure",
    "Generate",
    "Generation",
    "Place",
    "Policy",
    "PooledEngines",
    "Regime",
    "Reject",
    "Sampling",
    "Scope",
    "Score",
    "Seat",
    "Sequence",
    "ShardInputs",
    "ShardResult",
    "Stage",
    "Usage",
    "Verdict",
    "reward_columns",
    "schema",
]
