"""A trial: one real engine is started to see which entropies it gives on this machine."""

from __future__ import annotations

from pathlib import Path

from actors.engine import Engine
from pipeline import config
from pipeline.fit.machine import Line
from pipeline.models.resolve import resolve_model


def judge_entropy(run: config.Run, num_gpus: int) -> Line:
    """Start an engine, of the run's model where that can be here (else of the tiny one), and tell what its self-check allowed.

    Raises ModelError or EngineError when the engine does not start.
    """
    pool, model = run.engines.rollout, run.model
    if not Path(resolve_model(model.path)).is_dir() or pool.placement.gpus > num_gpus:
        model, pool = config.Model(), config.Pool(threads=1, kv_cache_gib=0.25)
    engine = Engine(model, pool, config.ScoreSettings())
    said = engine.facts()
    engine.close()
    text = f"{said.entropy_method}, by the self-check of {said.engine} with {model.path}"
    if said.entropy_method == "exact":
        return Line("ok", "exact entropy", text)
    return Line("warning", "exact entropy", f"{text}. Install a vLLM in the supported window for exact entropies")
