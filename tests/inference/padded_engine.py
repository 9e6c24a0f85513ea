"""A teacher of another model with a padded vocabulary, in a process of its own: prints its scores and those of transformers.

python tests/inference/padded_engine.py FOLDER
"""

import json
import sys

import numpy as np

from actors.inference.teacher import TeacherEngine
from pipeline import config
from pipeline.contract import Policy, Sequence

PROMPT, RESPONSE = [1, 11, 14, 8, 30], [11, 14, 8, 20, 15, 2]


def main(folder: str) -> None:
    """Score one response with the engine, and with transformers over the ids that have a token."""
    engine = TeacherEngine(config.Model(path=folder), config.Pool(threads=1, kv_cache_gib=0.25), config.ScoreSettings())
    [score] = engine.score([Sequence(PROMPT, RESPONSE)], Policy(0))
    facts = engine.facts()
    engine.close()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + RESPONSE])).logits[0, len(PROMPT) - 1 : -1].double()
    told = {"vocab_size": facts.vocab_size, "entropy_method": facts.entropy_method, "fallback": facts.fallback}
    told |= {"logprobs": score.logprobs.tolist(), "entropy": score.entropy.tolist()}
    for name, table in (("shared", logits[:, :57].log_softmax(-1)), ("padded", logits.log_softmax(-1))):
        told[name] = [table[np.arange(len(RESPONSE)), RESPONSE].tolist(), (-(table.exp() * table).sum(-1)).tolist()]
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
