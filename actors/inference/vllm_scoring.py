"""How vLLM is asked to score a response, and how its answer is read.

There are two ways. `prompt` asks for the log-probs of a whole prompt. vLLM's V1 runner would put every position of the long
privileged prompt through the output head; hooks/prompt_logprobs.py leaves out those before the response. `response` names the
first position, and the token ids of each position from there on. Only vLLM's V2 runner knows it.

In the ways `prompt` and `shared`, sequences of a call with the same prompt share its keys and values in vLLM's prefix cache
(hooks/prefix_cache.py). `shared` is otherwise the way `response`.

The most likely tokens of a position are not known when a request is made, so it cannot name them. A request for `keep` of them
names the response's token 2 x keep + 2 times. hooks/exact_entropy.py knows such a row. It answers with the token's log-prob,
the best log-probs, the ids that they belong to, and the entropy. Float32 holds ids below 2 ** 24 exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actors.inference.hooks.prompt_logprobs import FIRST
from pipeline.stages.chat import splice

if TYPE_CHECKING:
    from vllm import SamplingParams

WAYS = ("shared", "response", "prompt")  # each may take the place of the one before it


class Numbers(NamedTuple):
    """What vLLM said of T tokens: their ids int32 [T], numbers float32 [T, k] with the log-prob first, ids int32 [T, keep].

    `kept` are the most likely tokens of each position. Their log-probs are columns 1 to keep of `table`.
    """

    tokens: np.ndarray
    table: np.ndarray
    kept: np.ndarray


def sampling_params(**chosen: Any) -> SamplingParams:
    """vLLM's SamplingParams with `chosen`. Every request gets one answer at its end, with flat log-probs and without text."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # vLLM may be imported in an engine's process only

    return SamplingParams(flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **chosen)


def request(prompt: list[int], response: list[int], way: str, columns: int, keep: int = 0) -> tuple[list[int], SamplingParams]:
    """A request for `columns` numbers of each response token beside its log-prob. With `prompt` these are the best log-probs.

    The first `keep` of them are the best log-probs in every way. hooks/exact_entropy.py writes the entropy into the last
    column.
    """
    if way == "prompt":
        wanted = {"prompt_logprobs": columns, "extra_args": {FIRST: len(prompt) - 1}, "skip_reading_prefix_cache": False}
        return splice(prompt, response), sampling_params(max_tokens=1, temperature=0.0, **wanted)
    return asking(prompt, response, np.repeat(np.asarray(response)[:, None], columns + 1 + keep, axis=1), way)


def asking(prompt: list[int], response: list[int], ids: np.ndarray, way: str) -> tuple[list[int], SamplingParams]:
    """A request for the log-probs of token ids [T, k] at the T positions that predict the response."""
    return splice(prompt, response), sampling_params(
        max_tokens=1,
        temperature=0.0,
        prompt_logprob_start=len(prompt) - 1,
        prompt_logprob_token_ids=ids,
        skip_reading_prefix_cache=way != "shared",
    )


def read(answer: Any, num_tokens: int, keep: int = 0) -> Numbers | None:
    """The numbers of the last `num_tokens` tokens of a sequence scored with the same `keep`. None when some are missing.

    A position that came out of the cache has no numbers, and a runner may leave its row out or fill it with anything.
    """
    if (answer.num_cached_tokens or 0) > len(answer.prompt_token_ids) - num_tokens - 1:
        return None
    if (named := answer.prompt_token_id_logprobs) is not None:
        tokens, table = np.asarray(answer.prompt_token_ids[-num_tokens:], np.int32), np.asarray(named, np.float32)
        ids = slice(1 + keep, 1 + 2 * keep)
        return Numbers(tokens, np.delete(table, ids, axis=1) if keep else table, table[:, ids].astype(np.int32))
    if (flat := answer.prompt_logprobs) is None:
        return None
    width, rest = divmod(len(flat.logprobs), max(1, len(answer.prompt_token_ids) - 1))
    if rest or not width:
        return None
    table = np.asarray(flat.logprobs[-num_tokens * width :], np.float32).reshape(num_tokens, width)
    rows = np.asarray(flat.token_ids[-num_tokens * width :], np.int32).reshape(num_tokens, width)
    return Numbers(rows[:, 0].copy(), table, rows[:, 1 : 1 + keep].copy())
