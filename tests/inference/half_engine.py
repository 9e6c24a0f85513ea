"""The project's engine in bfloat16 on a model with large logits, beside a head in double precision on the same hidden states.

    python tests/inference/half_engine.py FOLDER FILE

The process makes the model in FOLDER: the tiny reasoner with a larger last norm. It writes to FILE, as JSON, the largest logits
and how far the engine's log-probs and entropies are from those of the double-precision head. vLLM runs once in a process.
"""

import json
import sys

import numpy as np

from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.models.resolve import asset_path
from pipeline.models.warmstart import build_tokenizer

SCALE = 1.5  # of the last norm, so that the largest logits are near 22


def main(folder, path):
    """Ask the engine for a trace and its score, and compare both."""
    seen = []
    pool = config.Pool(threads=1, kv_cache_gib=0.25)
    engine = Engine(config.Model(path=enlarged(folder), dtype="bfloat16"), pool, config.ScoreSettings())
    watch(seen)
    prompt = build_tokenizer().encode("<bos>7+4-3+9\n")
    [trace] = engine.generate([Generate(prompt, seed=1)], Policy(0), Sampling(1.5, 1.0, 0, 48))
    written = reference(seen, trace.tokens)
    seen.clear()
    [score] = engine.score([Sequence(prompt, trace.tokens.tolist())], Policy(0))
    scored = reference([max(seen, key=lambda pair: len(pair[0]))], trace.tokens)
    told = {
        "entropy_method": engine.facts().entropy_method,
        "largest": float(np.median(written[0])),
        "logprobs": worst((trace.logprobs, written[1]), (score.logprobs, scored[1])),
        "entropy": worst((trace.entropy, written[2]), (score.entropy, scored[2])),
    }
    engine.close()
    with open(path, "w") as file:
        json.dump(told, file)


def enlarged(folder):
    """The tiny reasoner with a larger last norm, saved in half precision."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32)
    model.model.norm.weight.data *= SCALE
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset_path()).save_pretrained(folder)
    return folder


def watch(seen):
    """Let vLLM note the hidden states [n, H] of every call of its head, with the weight [V, H]."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    forward = LogitsProcessor.forward

    def noting(self, lm_head, hidden_states, *args, **kwargs):
        seen.append((hidden_states.clone(), lm_head.weight))
        return forward(self, lm_head, hidden_states, *args, **kwargs)

    LogitsProcessor.forward = noting


def reference(seen, tokens):
    """Largest logits, log-probs and entropies, each [T], of the last T hidden states in double precision."""
    import torch

    hidden, weight = torch.cat([states for states, _ in seen])[-len(tokens) :], seen[0][1]
    logits = hidden.double() @ weight.double().T[:, :57]
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, torch.as_tensor(tokens).long()[:, None])[:, 0]
    return logits.max(1).values.numpy(), picked.numpy(), -(logprobs.exp() * logprobs).sum(1).numpy()


def worst(*pairs):
    """The largest distance between the arrays of any pair."""
    return float(max(np.abs(one - other).max() for one, other in pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
