"""An engine whose policies are whole weights, in a process of its own: vLLM keeps much that a second engine would find.

    python tests/inference/whole_engine.py MODEL DTYPE FILE POLICY POLICY ...

It scores a sequence under each policy folder and under the base, in several orders and from many threads at once, and writes the
log-probs by version to FILE, or the error.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.errors import EgrsdError

ONE = Sequence(list(range(4, 20)), list(range(20, 40)))


def main() -> None:
    """Start the engine, ask it, write what it said."""
    path, dtype, file, *folders = sys.argv[1:]
    model = config.Model(path=path, dtype=dtype, max_model_len=96, tuning="full")
    engine = Engine(model, config.Pool(threads=1, kv_cache_gib=0.25), config.ScoreSettings())
    policies = [Policy(0), *(Policy(number, folder) for number, folder in enumerate(folders, 1))]

    def scored(policy: Policy) -> list[float]:
        """Log-probs of the sequence under a policy."""
        return engine.score([ONE], policy)[0].logprobs.tolist()

    told: dict = {"orders": []}
    try:
        for order in (policies, policies[::-1], policies):
            told["orders"].append({policy.version: scored(policy) for policy in order})
        with ThreadPoolExecutor(8) as pool:
            asked = [policies[place % len(policies)] for place in range(16)]
            told["together"] = [(policy.version, found) for policy, found in zip(asked, pool.map(scored, asked), strict=True)]
        sampling = Sampling(1.0, 1.0, 0, 8)
        written = engine.generate([Generate(ONE.prompt, 7)], policies[-1], sampling)[0]
        told["written"] = (written.tokens.tolist(), written.logprobs.tolist(), written.policy_version)
    except EgrsdError as error:
        told["error"] = str(error)
    engine.close()
    Path(file).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
