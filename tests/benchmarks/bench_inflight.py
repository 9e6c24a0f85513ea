"""What it gains that an engine holds several shards at once: `engines.inflight_shards` 4 against 1, on a real engine.

Every shard has one trace that runs to the cap among short ones: alone, an engine ends each shard with a batch of one. Both ways
in one run and on one engine, alternating; the callers are threads, as a rollout task has them. Idle is the time outside the
engine's steps, nearly idle that in steps of two requests at most.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median
from typing import Any

from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems.tiny import problem

SHARDS, ROWS, REPEATS, CAP = 12, 16, 5, 72
WAYS = {"alone": 1, "interleaved": 4}
NEARLY_IDLE = ROWS // 8  # requests: a step of so few takes about as long as a full one


def measure() -> dict[str, float]:
    """Wall seconds both ways and their ratio; share of the time without work, and with nearly none."""
    engine = Engine(config.Model(), config.Pool(threads=1), config.ScoreSettings())
    shards = _shards(engine)
    steps: list[tuple[float, float, int]] = []
    _watch(engine, steps)
    _answer(engine, shards, 4)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(REPEATS):
        for name, inflight in WAYS.items():
            steps.clear()
            begun = time.perf_counter()
            _answer(engine, shards, inflight)
            found[name].append(_shares(steps, begun, time.perf_counter()))
    engine.close()
    best = {name: min(run["wall_s"] for run in runs) for name, runs in found.items()}
    means = {f"{key}_{name}": mean(run[key] for run in runs) for name, runs in found.items() for key in runs[0]}
    ratios = [a["wall_s"] / b["wall_s"] for a, b in zip(found["alone"], found["interleaved"], strict=True)]
    return means | {"speedup": best["alone"] / best["interleaved"], "speedup_median": median(ratios)}


def _shards(engine: Engine) -> list[list[Generate]]:
    """Shards of short traces with one among them that runs to the cap: sorted out of what the model really writes."""
    encode, sampling = build_tokenizer().encode, Sampling(1.0, 1.0, 0, CAP)
    asked = [Generate(encode(f"<bos>{problem(i, 0, 'test')['problem']}\n"), i) for i in range(SHARDS * ROWS * 4)]
    answers: list[Any] = engine.generate(asked, Policy(0), sampling)
    by_length = sorted(zip(asked, answers, strict=True), key=lambda pair: len(pair[1].tokens))
    longest = [request for request, _ in by_length[-SHARDS:]]
    short = [request for request, _ in by_length[: SHARDS * (ROWS - 1)]]
    return [[longest[i], *short[i::SHARDS]] for i in range(SHARDS)]


def _watch(engine: Engine, steps: list[tuple[float, float, int]]) -> None:
    """Note (begin, end, requests in it) of every step of the engine's vLLM, through the method its thread calls."""
    taken_in = engine.vllm._take_in

    def noted(vllm: Any, waiting: dict[str, Any]) -> bool:
        going = taken_in(vllm, waiting)
        if not hasattr(vllm, "unwatched"):
            vllm.unwatched = vllm.step

            def step() -> Any:
                begun, held = time.perf_counter(), len(waiting)
                outputs = vllm.unwatched()
                steps.append((begun, time.perf_counter(), held))
                return outputs

            vllm.step = step
        return going

    engine.vllm._take_in = noted  # type: ignore[method-assign]


def _answer(engine: Engine, shards: list[list[Generate]], inflight: int) -> None:
    with ThreadPoolExecutor(inflight) as callers:
        list(callers.map(lambda shard: engine.generate(shard, Policy(0), Sampling(1.0, 1.0, 0, CAP)), shards))


def _shares(steps: list[tuple[float, float, int]], begun: float, ended: float) -> dict[str, float]:
    wall = ended - begun
    idle = wall - sum(end - begin for begin, end, _ in steps)
    nearly = sum(end - begin for begin, end, held in steps if held <= NEARLY_IDLE)
    requests = sum((end - begin) * held for begin, end, held in steps) / max(1e-9, wall - idle)
    return {"wall_s": wall, "idle_share": idle / wall, "nearly_idle_share": nearly / wall, "requests_in_it": requests}


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:<30} {value:8.3f}")
