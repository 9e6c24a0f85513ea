"""From settings to a running vLLM: the environment, the checks before the start, vLLM's arguments, and errors in one line."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from actors.inference import hooks, phase, vllm_sleep
from pipeline import config
from pipeline.contract import EngineFacts
from pipeline.errors import EgrsdError, EngineError, whole_cause
from pipeline.fit.machine import GIB, vllm_for_gpus
from pipeline.models.blueprint import settings_of
from pipeline.models.fitness import check_window
from pipeline.models.stops import stop_ids

log = logging.getLogger(__name__)

EXACT_ENTROPY = "EGRSD_EXACT_ENTROPY"  # the hook of actors.inference.hooks.exact_entropy is installed only where this is "1"
DEBUG = "EGRSD_DEBUG"  # vLLM's own log is shown where this is set
LOGPROBS_MODE = "raw_logprobs"
MOST_LOGPROBS = 1 << 24  # numbers of a token that a request may ask for; -1 would be the size of the vocabulary
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the largest ranks that vLLM can allocate for
# Messages of vLLM 0.32 and torch, which are the only sign. The cause of a process that failed stands in the log alone.
_NO_CACHE = ("cache blocks", "cache is needed")
_NO_MEMORY = ("out of memory", "memory utilization", "less than the engine's budget")
_IN_CHILD = "exception in a background process"


def shows_log() -> bool:
    """Whether vLLM's own log is shown. A person may write 0 to say no."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def set_environment(pool: config.Pool, exact: bool) -> None:
    """Set the environment variables of this process that vLLM and torch read when they are imported.

    Call this function before anything imports vLLM or torch.
    """
    if pool.placement.gpus <= 0 and not vllm_for_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the cards of the machine visible to who asked for none
    os.environ["OMP_NUM_THREADS"] = str(num_threads(pool))
    os.environ[EXACT_ENTROPY] = str(int(exact))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # engine_args adds a position; inspect_model checks the window
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # Triton's default for float32 on a card, TF32, moves log-probs by up to .007 nat. Triton is then vLLM's only attention.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not shows_log():
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch)\b")


def num_threads(pool: config.Pool) -> int:
    """CPU threads of one engine: `threads`, or else the CPUs that Ray grants its actor."""
    return pool.threads or max(1, int(pool.placement.cpus))


def inspect_model(model: config.Model) -> tuple[list[int], int]:
    """(ids of the tokens that end a trace, hidden size) of a model, read from its configuration files and its tokenizer.

    Raises ModelError that names the path when the model is missing or its window is below `max_model_len`.
    """
    settings = settings_of(model)
    check_window(model, settings)
    return stop_ids(model, settings), settings.get_text_config().hidden_size


def start_vllm(model: config.Model, pool: config.Pool, path: str, adapters: bool = True) -> Any:
    """Start a vLLM LLMEngine in this process, after `set_environment`. Without `adapters` it takes none.

    Raises EngineError for log-probs of another mode.
    """
    import torch

    set_num_threads = torch.set_num_threads
    set_num_threads(num_threads(pool))
    try:
        phase.enter(phase.IMPORTS)
        from vllm import EngineArgs, LLMEngine

        from actors.inference.hooks import exact_entropy, prefix_cache

        if not torch.cuda.is_available():
            _look_at_classes_here()
        exact_entropy.install()
        hooks.install()
        arguments = engine_args(model, pool, path, torch.cuda.is_available(), exact_entropy.on_gpu_runner())
        arguments = arguments if adapters else {key: value for key, value in arguments.items() if "lora" not in key}
        arguments["enable_sleep_mode"] = pool.colocate and vllm_sleep.available()
        arguments |= _prefix_cache(EngineArgs(**arguments), prefix_cache.install())
        phase.enter(phase.WEIGHTS)
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        exact_entropy.check_origin()
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it with a function that does nothing
    if engine.model_config.logprobs_mode != LOGPROBS_MODE:
        raise EngineError(f"log-probs come as {engine.model_config.logprobs_mode}, not {LOGPROBS_MODE}", path)
    return engine


def _prefix_cache(engine_args: Any, capped: bool) -> dict[str, Any]:
    """vLLM's arguments for its prefix cache, which is off where hits are not `capped` (hooks/prefix_cache.py)."""
    if not capped:
        return {"enable_prefix_caching": False}
    if engine_args.enable_chunked_prefill:  # with a GPU, or the V2 runner
        return {"enable_prefix_caching": True}
    if engine_args.create_model_config().is_hybrid:  # vLLM keeps states in its cache only where it prefills in chunks
        return {"enable_prefix_caching": False}
    # Only whole blocks are shared, and vLLM's 128 tokens are more than most prompts. Its CPU kernels want multiples of 32.
    return {"enable_prefix_caching": True, "block_size": 32}


def _look_at_classes_here() -> None:
    """Let vLLM read the facts of a model's class in this process.

    By itself vLLM starts another process for a class that this machine has not met, so that CUDA stays unused in this one. That
    process imports vLLM once more, which takes about 9 s.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda fn: fn()


def engine_args(model: config.Model, pool: config.Pool, path: str, gpu: bool, gpu_runner: bool) -> dict[str, Any]:
    """vLLM's EngineArgs for one engine, as keyword arguments.

    gpu: whether the engine has a GPU. gpu_runner: whether vLLM's V2 runner is expected, which a test also runs without a GPU.
    """
    # Scoring makes vLLM sample one token, which we throw away. A sequence that fills the window needs a position for it.
    window = model.max_model_len + 1
    return {
        "model": path,
        "revision": model.revision,
        "dtype": model.dtype,
        # In half precision a logit near 22 is rounded to eighths, so the head computes in float32.
        "hf_overrides": {} if model.dtype == "float32" else {"head_dtype": "float32"},
        "trust_remote_code": model.trust_remote_code,
        "max_model_len": window,
        "skip_tokenizer_init": True,  # requests and answers hold token ids
        "generation_config": "vllm",  # no sampling default comes from the model's folder; the request says all
        "seed": 0,
        "logprobs_mode": LOGPROBS_MODE,
        "max_logprobs": MOST_LOGPROBS,
        # A seeded request crashes the CPU runner when its prompt is split over two steps.
        "enable_chunked_prefill": gpu_runner,
        "max_num_batched_tokens": pool.max_batched_tokens if gpu_runner else max(pool.max_batched_tokens, window),
        "max_num_seqs": pool.max_num_seqs,
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 4,  # vLLM keeps earlier policies in memory, so that a switch back reads no file
        # Without this list vLLM also wraps the output head. Its LoRA path fails on the many rows of prompt log-probs.
        "lora_target_modules": list(model.lora_targets),
        "max_lora_rank": next((rank for rank in _LORA_RANKS if rank >= model.lora_rank), _LORA_RANKS[-1]),
        "tensor_parallel_size": pool.tensor_parallel,
        "distributed_executor_backend": "mp" if pool.tensor_parallel > 1 else None,  # the engine's GPUs are all on its node
        "gpu_memory_utilization": pool.memory_share,
        "kv_cache_memory_bytes": None if gpu else int(pool.kv_cache_gib * 2**30),
        "enforce_eager": pool.enforce_eager,
        "disable_log_stats": True,
        "use_tqdm_on_load": shows_log(),
    }


def facts(engine: Any, model: config.Model) -> EngineFacts:
    """What the numbers of a started engine mean. Entropy method and way to score are the best until the self-check."""
    import vllm

    reads_cache = engine.vllm_config.cache_config.enable_prefix_caching
    way = "prompt" if not engine.vllm_config.use_v2_model_runner else "shared" if reads_cache else "response"
    return EngineFacts(
        entropy_method="exact",
        logprobs_mode=LOGPROBS_MODE,
        dtype=str(engine.model_config.dtype).removeprefix("torch."),
        engine=f"vllm {vllm.__version__}",
        max_model_len=model.max_model_len,
        vocab_size=engine.model_config.get_vocab_size(),
        scoring=way,
    )


def start_error(error: BaseException, path: str, pool: config.Pool | None = None, verb: str = "start") -> EgrsdError:
    """The error that tells what vLLM did not do, start or wake up, in one line with a remedy."""
    if isinstance(error, EgrsdError):
        return error
    if isinstance(error, ImportError):
        log.error("vLLM cannot be imported", exc_info=error)
        return EngineError(f"vLLM cannot be imported ({whole_cause(error)})", path, "Install the extra 'cpu' or 'gpu'")
    remedy = memory_remedy(error, pool) or f"{DEBUG}=1 shows vLLM's log"
    log.error("vLLM did not %s", verb, exc_info=error)
    return EngineError(f"vLLM did not {verb} ({whole_cause(error)})", path, remedy)


def memory_remedy(error: BaseException, pool: config.Pool | None) -> str:
    """The settings to change after an error about memory, and what the engine asks of its card. "" for another error."""
    text = str(error).lower()
    lacks_cache, in_child = any(words in text for words in _NO_CACHE), _IN_CHILD in text
    if not (lacks_cache or in_child or isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)):
        return ""
    if pool is not None and pool.placement.gpus <= 0 and not in_child:
        cache = f"these engines' kv_cache_gib ({pool.kv_cache_gib:g})"
        return f"Set {cache} to what `egrsd doctor` finds room for: at least one trace of max_model_len tokens must fit"
    turns = pool is not None and pool.colocate  # one card, which the trainer shares
    more = ", or set train.offload all" if turns else ", or raise tensor_parallel"
    if lacks_cache:  # the share of the card leaves too little beside the weights
        remedy = f"Raise memory_share{'' if turns else ' or tensor_parallel'}, or lower max_batched_tokens or model.max_model_len"
    elif in_child:
        remedy = f"The log has the cause in that process. If it is memory: lower memory_share or max_batched_tokens{more}"
    else:
        remedy = f"Lower memory_share, max_num_seqs, max_batched_tokens or model.max_model_len{more}"
    return remedy if pool is None else remedy + _card_said(pool)


def _card_said(pool: config.Pool) -> str:
    """What an engine asks of its card and what is free there, in words. "" without a card."""
    import torch

    if not torch.cuda.is_available():
        return ""
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    return f": memory_share {pool.memory_share:g} x {total:.2f} = {pool.memory_share * total:.2f} GiB, and {free:.2f} are free"
