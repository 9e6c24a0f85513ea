"""What log-prob and exact entropy of every token cost: `python -m tests.benchmarks.bench_engine [smollm2]`.

Ratios within one process on the tiny reasoner or on SmolLM2, repetitions alternating, the best of each (what a busy machine
disturbed least). Generation with log-prob and entropy against plain generation, scoring with entropy against prompt_logprobs=0,
scoring with 32 kept tokens against scoring without, adapter on against adapter off.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from actors.inference.engine import Engine, sampling_params
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems.tiny import problem
from pipeline.recipes import recipe

NUM_TRACES, NUM_TOKENS, REPEATS, KEPT = 128, 48, 9, 32
SMOL_PROMPT, SMOL_TOKENS, SMOL_TRACES, SMOL_REPEATS = 46, 32, 64, 5  # as in a round of the recipe


def measure(name: str = "") -> dict[str, float]:
    """Tokens per second and their ratios; __main__.py says what is required of which. name: "" or smollm2."""
    model, pool, sampling, repeats = config.Model(), config.Pool(threads=1), Sampling(1.0, 1.0, 0, NUM_TOKENS), REPEATS
    encode = build_tokenizer().encode
    requests = [Generate(encode(f"<bos>{problem(i, 0, 'test')['problem']}\n"), i) for i in range(NUM_TRACES)]
    if name:
        model, pool = recipe(name).model, recipe(name).engines.rollout
        requests = [Generate([100 + 7 * place + i for place in range(SMOL_PROMPT)], i) for i in range(SMOL_TRACES)]
        sampling, repeats = Sampling(1.0, 1.0, 0, SMOL_TOKENS), SMOL_REPEATS
    engine = Engine(model, pool, config.ScoreSettings())
    keeping = Engine(model, pool, config.ScoreSettings(keep_topk=KEPT), engine.vllm)
    base = Policy(0)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Policy(1, random_adapter(folder, model))
        traces = engine.generate(requests, base, sampling)
        sequences = [Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(requests, traces, strict=True)]
        speeds = alternate(
            {
                "generation": lambda: generated(engine.generate(requests, base, sampling)),
                "plain_generation": lambda: plain_generation(engine, requests, sampling),
                "adapter_generation": lambda: generated(engine.generate(requests, adapter, sampling)),
                "scoring": lambda: (engine.score(sequences, base), scored(sequences))[1],
                "kept_scoring": lambda: (keeping.score(sequences, base), scored(sequences))[1],
                "plain_scoring": lambda: plain_scoring(engine, sequences),
                "adapter_scoring": lambda: (engine.score(sequences, adapter), scored(sequences))[1],
            },
            repeats,
        )
    engine.close()
    best = {name: max(found) for name, found in speeds.items()}
    return {f"{name}_tokens_per_s": value for name, value in best.items()} | {
        "generation_ratio": best["generation"] / best["plain_generation"],
        "generation_ratio_of_medians": median(speeds["generation"]) / median(speeds["plain_generation"]),
        "scoring_ratio": best["scoring"] / best["plain_scoring"],
        "scoring_ratio_of_medians": median(speeds["scoring"]) / median(speeds["plain_scoring"]),
        "kept_scoring_ratio": best["kept_scoring"] / best["scoring"],
        "kept_scoring_ratio_of_medians": median(speeds["kept_scoring"]) / median(speeds["scoring"]),
        "adapter_generation_ratio": best["adapter_generation"] / best["generation"],
        "adapter_scoring_ratio": best["adapter_scoring"] / best["scoring"],
    }


def alternate(works: dict[str, Callable[[], int]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Tokens per second of every repetition of each work; they take turns, so that a busy machine hits all alike."""
    for work in works.values():
        work()
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            tokens = work()
            speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def plain_generation(engine: Engine, requests: list[Generate], sampling: Sampling) -> int:
    """The same traces from the same vLLM, tokens only."""
    prepared = []
    for request in requests:
        params = engine._sampling(request, sampling, sampling.max_new_tokens)
        params.logprobs = None
        prepared.append((request.prompt, params))
    return sum(len(answer.outputs[0].token_ids) for answer in engine._submit(prepared, None))


def plain_scoring(engine: Engine, sequences: list[Sequence]) -> int:
    """The same sequences with vLLM's cheapest log-probs: the token's alone."""
    params = sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine._submit([([*s.prompt, *s.response], params) for s in sequences], None)
    return scored(sequences)


def generated(traces: list[Any]) -> int:
    """Tokens written."""
    return sum(len(trace.tokens) for trace in traces)


def scored(sequences: list[Sequence]) -> int:
    """Tokens that went through the model."""
    return sum(len(s.prompt) + len(s.response) for s in sequences)


def random_adapter(folder: str, model: config.Model | None = None, std: float = 1e-3) -> str:
    """A random LoRA adapter for the tiny reasoner or another `model`, saved in `folder`. `std` is the spread of its B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline.models.resolve import open_model

    model = model or config.Model()
    lora = LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=list(model.lora_targets))
    base = open_model(AutoModelForCausalLM, model, "weights", dtype=getattr(torch, model.dtype))
    student = get_peft_model(base, lora)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    student.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:]), indent=1))
