"""Whole weights for engines, where `model.tuning` is full: a running vLLM takes the weights of the policy that a request names.

vLLM reads them in place, which takes less than a second for a small model, and nothing is started again. On a CPU, vLLM's layers
keep a packed copy of their weight. vLLM does not renew the copy of a head that shares its weight with the embedding; here it is.

No answer counts before a probe has passed. The policy's probe.json has the trainer's log-probs of a fixed sequence. The gap to
them must be as small as the gap under the base was. That one says how far the numerics of engine and trainer are apart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.inference import adapters, vllm_scoring
from pipeline.errors import EngineError, ModelError
from pipeline.training.student import whole
from pipeline.training.student.whole import Probe

log = logging.getLogger(__name__)

# Mean gaps in nats. Under the base: the largest between engine and trainer, else one of them computes another model.
_NUMERICS = {"float32": 1e-2, "bfloat16": 0.3}
# Under a policy: what may come on top of three times the base's gap. In half precision the gap varies from policy to policy.
_ROOM = {"float32": 5e-5, "bfloat16": 3e-2}
_REMEDY = "This vLLM does not reload this model right: set model.tuning lora"
_KEPT = 3  # copies of a run's policies that stay on a machine: they are large


class Whole(NamedTuple):
    """The whole weights of one policy: its version, the local folder, a hash of the content, and what it must answer."""

    version: int
    folder: str
    content: str
    probe: Probe


def fetch(version: int, uri: str, hidden_size: int) -> Whole:
    """The weights at `uri`, copied to this machine when they lie elsewhere, and checked.

    Raises ModelError when they do not fit the model, and StoreError for a damaged file.
    """
    folder, content = adapters.fetch(uri, _KEPT)
    whole.check(Path(folder), uri, hidden_size)
    return Whole(version, folder, content, whole.read_probe(Path(folder)))


class _Said(NamedTuple):
    """What weights answered to the probe: a hash of them ("": the base), the trainer's log-probs and the engine's."""

    content: str
    expected: np.ndarray
    found: np.ndarray


class Reloader:
    """Puts weights into one vLLM. `path` is the base's folder. Call it in vLLM's thread, while vLLM holds no request."""

    def __init__(self, path: str, dtype: str) -> None:
        self._path, self._dtype = path, dtype
        self._base: dict[tuple[int, ...], np.ndarray] = {}  # the base's own log-probs of a sequence, measured before a reload
        self._last: _Said | None = None  # of the policy that is loaded; None: of the base

    def __call__(self, engine: Any, wanted: Whole | None, loaded: Whole | None) -> None:
        """Load the weights `wanted` in place of `loaded`; None stands for the base.

        Raises ModelError when the probe fails, which ends the run: a vLLM that reloads a model wrong does so on every engine.
        """
        from actors.inference.hooks import head  # imports torch

        started = time.monotonic()
        if loaded is None and wanted is not None and wanted.probe.tokens not in self._base:
            self._base[wanted.probe.tokens] = _measure(engine, wanted.probe.tokens)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": wanted.folder if wanted is not None else self._path})
        engine.apply_model(renew_packed_heads)
        engine.apply_model(head.forget)
        if not engine.reset_prefix_cache():
            raise EngineError("vLLM keeps keys and values of other weights", self._path, "Start it again")
        if wanted is not None:
            self._check_policy(engine, wanted)
        else:
            self._check_base(engine)
        version = wanted.version if wanted is not None else 0
        log.info("the weights of policy %d are loaded and proven in %.2f s", version, time.monotonic() - started)

    def _check_policy(self, engine: Any, wanted: Whole) -> None:
        probe, base = wanted.probe, self._base.get(wanted.probe.tokens)
        found, expected = _measure(engine, probe.tokens), np.asarray(probe.logprobs)
        numerics = _gap(base, np.asarray(probe.base_logprobs)) if base is not None else 0.0
        dtype = "bfloat16" if "bfloat16" in (self._dtype, probe.dtype) else self._dtype  # the coarser one counts
        if not numerics <= _NUMERICS[dtype]:
            what = f"engine and trainer compute another base: log-probs differ by {numerics:.2g} nat in the mean"
            raise ModelError(what, self._path, "Use another model, or another dtype")
        most = 3 * numerics + _ROOM[dtype]
        if not (gap := _gap(found, expected)) <= most:
            what = f"policy {wanted.version} was loaded and does not answer: {gap:.2g} nat from the trainer, at most {most:.2g}"
            raise ModelError(what, wanted.folder, _REMEDY)
        before = self._last
        if before is None and base is not None:
            before = _Said("", np.asarray(probe.base_logprobs), base)
        if before is not None and before.content != wanted.content and np.array_equal(before.found, found):
            change = _gap(expected, before.expected)
            if change > 2 * numerics:  # a smaller one may be hidden, above all in half precision
                what = f"policy {wanted.version} was loaded, and the answers are those from before, bit for bit"
                raise ModelError(f"{what}. The trainer's changed by {change:.2g} nat", wanted.folder, _REMEDY)
        self._last = _Said(wanted.content, expected, found)

    def _check_base(self, engine: Any) -> None:
        for tokens, before in self._base.items():
            if not (gap := _gap(_measure(engine, tokens), before)) <= _ROOM[self._dtype]:
                what = f"the base was loaded again and does not answer as before: log-probs differ by {gap:.2g} nat in the mean"
                raise ModelError(what, self._path, _REMEDY)
        self._last = None


def renew_packed_heads(model: Any) -> bool:
    """Pack the weight of every head again that keeps a packed copy, as vLLM's linear layers on a CPU do. Whether there is one."""
    heads = [module for module in model.modules() if hasattr(module, "cpu_linear") and hasattr(module, "org_vocab_size")]
    if heads:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for head in heads:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    return bool(heads)


def _measure(engine: Any, tokens: tuple[int, ...]) -> np.ndarray:
    """The engine's log-probs in nats of all but the first token, float64 [T - 1]. It must hold no other request."""
    # two numbers a token, as in every score: vLLM compiles a kernel for each other width
    params = vllm_scoring.sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    engine.add_request("probe", {"prompt_token_ids": list(tokens)}, params)
    while True:
        for answer in engine.step():
            found = vllm_scoring.read(answer, len(tokens) - 1)
            if found is None:
                raise ModelError("vLLM gave no log-probs for the probe", "engine", "Use another version of vLLM")
            return found.table[:, 0].astype(np.float64)


def _gap(one: np.ndarray, other: np.ndarray) -> float:
    """The mean distance of two sequences of log-probs in nats."""
    return float(np.abs(one - other).mean()) if len(one) == len(other) else float("inf")


Reload = Callable[[Any, Whole | None, Whole | None], None]
