"""The project's engine with tensor parallelism over two processes of vLLM's CPU backend, one of which is killed in the end.

    python tests/actors/two_processes.py ADAPTER FILE

The process writes what it saw to FILE, as JSON. A vLLM of several processes that ends takes every other vLLM of
its process along, so it runs in a process of its own. Users need GPUs for it; `model_copy` does not check.
"""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil

from actors.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.errors import EngineError
from pipeline.models.warmstart import build_tokenizer

SAMPLING = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=24)
POOL = config.Pool(threads=1, kv_cache_gib=0.25).model_copy(update={"tensor_parallel": 2})
PROMPTS = [build_tokenizer().encode(f"<bos>{text}\n") for text in ("7+4-3+9", "1-9-9+2", "5+5-5+5", "8-1+6-7")]
REQUESTS = [Generate(PROMPTS[i % 4], seed=100 + i) for i in range(8)]


def workers(pid=None):
    """The ids of vLLM's processes below the process `pid`, or below this one. Some have a title of their own."""
    titles = {child.pid: " ".join(child.cmdline()) for child in psutil.Process(pid).children()}
    return {child for child, title in titles.items() if "spawn_main" in title or "Worker_TP" in title}


def main(adapter, path):
    """Ask the engine, kill one of its processes, and ask again."""
    engine = Engine(config.Model(), POOL, config.ScoreSettings(fallback=False))
    policies = [Policy(0), Policy(1, adapter)]

    def ask(policy):
        return engine.generate(REQUESTS, policy, SAMPLING)

    traces = [ask(policy) for policy in policies]
    with ThreadPoolExecutor(2) as threads:
        beside = list(threads.map(ask, policies))
    scores = [
        engine.score([Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(REQUESTS, part, strict=True)], policy)
        for part, policy in zip(traces, policies, strict=True)
    ]
    facts, errors, found = vars(engine.facts()), [], workers()
    os.kill(max(found), signal.SIGKILL)
    for policy in reversed(policies):  # the first request loads an adapter into a broken vLLM
        try:
            ask(policy)
        except EngineError as error:
            errors.append(str(error))
    engine.close()
    told = {"traces": traces, "beside": beside, "scores": scores}
    told = {name: [[row(answer) for answer in part] for part in parts] for name, parts in told.items()}
    with open(path, "w") as file:
        json.dump(told | {"facts": facts, "errors": errors, "processes": len(found)}, file)


def row(answer):
    """Tokens, log-probs and entropies of an answer as lists."""
    return [answer.tokens.tolist(), answer.logprobs.tolist(), answer.entropy.tolist()]


if __name__ == "__main__":
    main(*sys.argv[1:])
