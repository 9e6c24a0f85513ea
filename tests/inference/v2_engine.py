"""The project's engine on vLLM's V2 runner, the one of GPUs, without a GPU: Triton's interpreter runs its kernels.

    VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 python tests/inference/v2_engine.py ADAPTER FILE

The process writes what the engine answered to FILE, as JSON. vLLM and Triton read the environment when they are imported, so V1
and V2 need a process each. Prompts are prefilled in chunks, and blocks of the prefix cache are small, so that short prompts reach
both.
"""

import json
import sys
import threading
from itertools import chain
from types import SimpleNamespace

from actors.inference import startup
from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Failure, Generate, Policy, Sampling, Sequence
from pipeline.models.warmstart import build_tokenizer

POOL = config.Pool(threads=1, kv_cache_gib=0.25, max_num_seqs=8, max_batched_tokens=24)
BLOCK = 32  # tokens
KEPT = 32  # most likely tokens of a position
SAMPLING = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=16)
TEXTS = ("7+4-3+9", "1-9-9+2", "5+5-5+5")
PRIVILEGED = "7+4=11;11-3=8;8+9=17#17"


def main(adapter, path):
    """Ask the engine, and write its answers."""
    as_on_a_gpu()
    engine = Engine(config.Model(), POOL, config.ScoreSettings())
    encode = build_tokenizer().encode
    prompts = [encode(f"<bos>{text}\n") for text in TEXTS]
    policies = [Policy(0), Policy(1, adapter)]
    requests = [Generate(prompt, seed=100 + i) for i, prompt in enumerate(prompts)]
    traces = together([lambda p=policy: engine.generate(requests, p, SAMPLING) for policy in policies])
    alone = [engine.generate([request], policies[1], SAMPLING)[0] for request in requests[:2]]
    teacher = encode(f"<bos>{TEXTS[0]}\n{PRIVILEGED}\n")
    written = [trace.tokens.tolist() for trace in traces[0]]
    responses = [[*chain(*written[i:], *written[:i])] for i in range(3)]  # long enough for a second block
    sequences = [Sequence(teacher, response) for response in responses]
    seen = watch(engine)
    scores = together([lambda p=policy: engine.score(sequences, p) for policy in policies])
    head, cached = seen()
    seen = watch(engine)
    again = engine.score([sequences[0], sequences[0]], policies[0])
    _, cached_again = seen()
    seen = watch(engine)
    group = engine.generate([Generate(teacher, seed) for seed in range(3)], policies[1], SAMPLING)
    _, cached_group = seen()
    whole = on_the_other_way(engine, sequences[:2])
    keeping = Engine(config.Model(), POOL, config.ScoreSettings(keep_topk=KEPT), engine.vllm)
    scored = [*together([lambda p=policy: keeping.score(sequences, p) for policy in policies])]
    kept = [*scored, on_the_other_way(keeping, sequences[:2])]
    answers = {
        "float32": sys.modules["triton"].knobs.language.fp32_default,
        "keeping": vars(keeping.facts()),
        "kept": [[[*row(score), score.topk_tokens.tolist(), score.topk_logprobs.tolist()] for score in part] for part in kept],
        "facts": vars(engine.facts()),
        "prompts": prompts,
        "teacher": teacher,
        "traces": [[row(trace) for trace in part] for part in traces],
        "alone": [row(trace) for trace in alone],
        "scores": [[row(score) for score in part] for part in scores],
        "again": [row(score) for score in again],
        "whole": [row(score) for score in whole],
        "head": head,
        "cached": cached,
        "cached_again": cached_again,
        "group": [row(trace) for trace in group],
        "cached_group": cached_group,
    }
    engine.close()
    with open(path, "w") as file:
        json.dump(answers, file)


def as_on_a_gpu():
    """Let vLLM take its runner and LoRA wrapper of GPUs, and leave out a kernel that the interpreter cannot run."""
    startup.set_environment(POOL, exact=True)
    import triton
    import triton.backends

    active = SimpleNamespace(is_active=lambda: True)  # vLLM asks for a backend that reports itself active
    triton.backends.backends["cpu"] = SimpleNamespace(driver=active, compiler=None)
    import vllm.v1.sample.ops.topk_topp_sampler as sampler
    from vllm.platforms import current_platform

    sampler.HAS_TRITON = False
    type(current_platform).get_punica_wrapper = classmethod(lambda _: "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU")
    arguments = startup.engine_args
    startup.engine_args = lambda *args: arguments(*args) | {"block_size": BLOCK}


def together(calls):
    """The answers of calls that are made at one time, in order."""
    answers = [None] * len(calls)

    def ask(place):
        answers[place] = calls[place]()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def watch(engine):
    """Count from now on. The function that comes back gives the rows in the head, and each request's tokens from the cache."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    rows, cached = [0], []
    forward, submit = LogitsProcessor.forward, engine.vllm.submit

    def counting_forward(self, lm_head, hidden_states, *args, **kwargs):
        rows[0] += len(hidden_states)
        return forward(self, lm_head, hidden_states, *args, **kwargs)

    def counting_submit(*args):
        answers = submit(*args)
        cached.extend(answer.num_cached_tokens for answer in answers)
        return answers

    LogitsProcessor.forward, engine.vllm.submit = counting_forward, counting_submit

    def stop():
        LogitsProcessor.forward, engine.vllm.submit = forward, submit
        return rows[0], list(cached)

    return stop


def on_the_other_way(engine, sequences):
    """The scores of the way that lets every position of the prompt through the head."""
    facts = engine._facts
    engine._facts = type(facts)(**{**vars(facts), "scoring": "prompt"})
    scores = engine.score(sequences, Policy(0))
    engine._facts = facts
    return scores


def row(answer):
    """Tokens, log-probs and entropies of an answer as lists. A row that failed says why."""
    if isinstance(answer, Failure):
        return [answer.cause]
    return [answer.tokens.tolist(), answer.logprobs.tolist(), answer.entropy.tolist()]


if __name__ == "__main__":
    main(*sys.argv[1:])
