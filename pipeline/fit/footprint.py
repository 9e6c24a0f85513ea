"""Bytes that a recipe's engines and ranks take, computed from the model's configuration. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import Model, Pool, Run, Train
from pipeline.errors import ModelError, SettingError
from pipeline.fit.machine import GIB, Facts, Line
from pipeline.models.blueprint import blueprint, settings_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
USABLE = 0.95  # of a card's memory that a rank may fill
START = "more at the start"  # name of a part of a rank's bytes
WHOLE = "Each card holds the whole model at the start: use larger cards or a smaller model (model.tuning lora takes less)"
COMMON = (24, 48, 80)  # GiB of cards that are shown where no GPU is here
CPU_LOGITS = 48 * 2**20  # bytes of logits that exist at one time in a rank on a CPU: more is not faster there
_ROWS = 1024  # positions whose logits vLLM's V2 runner computes at one time


@dataclass(frozen=True)
class Size:
    """Counts of a model, from which its bytes follow.

    parameters: of the model. per_layer: parameters of one layer. kv_per_token: numbers in the KV cache for one token. lora_width:
    in + out features of the layers that carry LoRA, so that lora_width x rank is LoRA's parameters. linear_width: in + out
    features of all linear layers but the head.
    """

    parameters: int
    per_layer: int
    layers: int
    hidden: int
    vocab: int
    kv_per_token: int
    lora_width: int
    linear_width: int


def measure(model: Model) -> Size:
    """Size of a model, counted on the meta device. Raises ModelError when `model.path` is no causal language model."""
    import torch

    config = settings_of(model)
    net, text = blueprint(model, config), config.get_text_config()
    layers, kept = text.num_hidden_layers, _cached(text)
    if not kept:
        raise ModelError("has no attention, and engines serve no such model with LoRA", model.path, "Use another model")
    linear = [
        (n.split(".")[-1], m.in_features + m.out_features) for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    inner = [(name, width) for name, width in linear if name != "lm_head"]
    return Size(
        sum(p.numel() for p in net.parameters()),
        sum(p.numel() for n, p in net.named_parameters() if ".layers.0." in n),
        layers,
        text.hidden_size,
        text.vocab_size,
        kept,
        sum(width for name, width in inner if name in model.lora_targets),
        sum(width for _, width in inner),
    )


def _cached(text: Any) -> int:
    """Numbers that all layers together cache for each token: keys and values. 0 for a model without attention."""
    try:
        return int(text.num_hidden_layers * _in_layer(text))
    except RuntimeError:  # how transformers says that its layers differ
        return sum(_in_layer(text.per_layer_config[layer]) for layer in range(text.num_hidden_layers))


def _in_layer(text: Any) -> int:
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * (getattr(text, "num_key_value_heads", None) or heads) * dim)


def check_cache(run: Run) -> None:
    """Raise SettingError when the KV cache of engines on CPU holds no trace of full length. Only the configuration is read."""
    student = [("rollout", run.engines.rollout), ("score", run.engines.score)]
    pools = [(f"engines.{name}", pool, run.model, "model") for name, pool in student if pool]
    for name, teacher in run.teachers.items():
        if run.has_pool(teacher) and not teacher.server:
            own = f"teachers.{name}"
            setting = f"{own}.engines" if teacher.engines else f"engines.{'score' if run.engines.score else 'rollout'}"
            pools.append((setting, run.pool_of(teacher), run.model_of(teacher), own if teacher.max_model_len else "model"))
    for setting, pool, model, section in pools:
        numbers = 0 if pool.placement.gpus > 0 else _cached(settings_of(model).get_text_config())
        trace = numbers * _BYTES[model.dtype] * model.max_model_len  # 0 without attention as vLLM caches it
        if pool.kv_cache_gib * GIB < trace:
            what = f"{pool.kv_cache_gib:g} GiB hold no trace of {model.max_model_len} tokens, which takes {trace / GIB:.4g} GiB"
            remedy = f"Set it to {trace / GIB:.4g} or more, or lower {section}.max_model_len"
            raise SettingError(f"{what} ({model.path})", f"{setting}.kv_cache_gib", remedy)


def head_chunk(train: Train, vocab: int) -> int:
    """Bytes of one chunk of the trainer's logits. In half precision a second copy exists beside the float32 logits.

    On a CPU a chunk has at most CPU_LOGITS bytes of float32 logits, or one row.
    """
    width, tokens = _BYTES[train.dtype], train.head_chunk_tokens
    if train.placement.gpus == 0:
        tokens = min(tokens, max(1, CPU_LOGITS // (4 * vocab)))
    return (4 if width == 4 else 4 + width) * tokens * vocab


def weight_bytes(size: Size, dtype: str) -> int:
    """Bytes of all weights in a dtype."""
    return size.parameters * _BYTES[dtype]


def trained(run: Run, size: Size) -> int:
    """Weights that a run trains: those of its adapter, or all."""
    return size.parameters if run.model.tuning == "full" else size.lora_width * run.model.lora_rank


def kv_bytes(model: Model, size: Size) -> int:
    """Bytes of keys and values of a trace that fills the window."""
    return size.kv_per_token * _BYTES[model.dtype] * model.max_model_len


def scoring_logits(model: Model, pool: Pool, size: Size) -> int:
    """Bytes of the logits that exist at one time while an engine scores. The head computes in float32.

    On a GPU, vLLM's V2 runner sends the positions of the response through the head in pieces, and keeps no log-probs of the
    whole vocabulary. On a CPU, V1 takes all positions of a response at one time, and makes log-probs beside the logits. A
    response may fill the window.
    """
    if pool.placement.gpus > 0:
        return 4 * min(_ROWS, pool.max_batched_tokens) * size.vocab
    return 8 * model.max_model_len * size.vocab


def rank_bytes(run: Run, size: Size) -> dict[str, int]:
    """Bytes of one rank by part. Activations are estimated as inputs and outputs of linear layers, or of checkpointed layers.

    The part START is there where loading takes more than a step: fsdp2 divides a model that each card holds whole at first.
    """
    train, width = run.train, _BYTES[run.train.dtype]
    shards = train.workers if train.strategy == "fsdp2" else 1
    gathered = size.parameters - (size.layers - 1) * size.per_layer if shards > 1 else 0
    tokens = max(train.micro_batch_tokens, run.model.max_model_len)  # a longer trace gets a pass of its own
    kept = size.layers * size.hidden + size.linear_width // size.layers if train.gradient_checkpointing else size.linear_width
    rest = {"logits": head_chunk(train, size.vocab), "activations (estimate)": tokens * kept * width}
    if run.model.tuning == "full":  # float32, and what autocast copies
        copy = size.parameters * width if width < 4 else 0
        whole = size.parameters * 4 + copy
        parts = {
            "weights": (size.parameters // shards + gathered) * 4 + copy,
            "gradients and AdamW": (size.parameters // shards * 3 + gathered) * 4 + 4 * size.vocab * size.hidden,
            **rest,
        }
    else:
        adapter = size.lora_width * run.model.lora_rank
        whole = size.parameters * width + adapter * 4
        parts = {
            "weights": (size.parameters // shards + gathered) * width,
            "LoRA and AdamW": adapter * 16 // shards,
            **rest,
        }
    more = whole - sum(parts.values())
    return parts | ({START: more} if more > 0 else {})


def engine_fit(model: Model, pool: Pool, size: Size, facts: Facts, name: str = "engines.rollout") -> Line:
    """Whether weights, the scoring logits and at least one trace of full length fit on the pool's GPU, or in its CPU memory."""
    tp = pool.tensor_parallel
    weights, trace = weight_bytes(size, model.dtype) // tp, kv_bytes(model, size) // tp
    logits = scoring_logits(model, pool, size)
    if pool.placement.gpus <= 0:
        budget = int(pool.kv_cache_gib * GIB)
        said = f"KV cache {gib(budget)} GiB, {budget // trace} traces of {model.max_model_len} tokens ({gib(trace)} GiB each)"
        level = "error" if budget < trace else "ok"
        return Line(level, name, said + (". Raise kv_cache_gib or lower model.max_model_len" if level == "error" else ""))
    need = f"weights {gib(weights)} + {gib(trace)} GiB KV for each trace of {model.max_model_len} tokens"
    if not facts.gpus:
        cards = ", ".join(f"{card} GiB {_traces(pool, weights, trace, card * GIB)}" for card in COMMON)
        text = f"{need}; no GPU here to hold it against. Run this with --address on the cluster. At once on a card of: {cards}"
        return Line("warning", name, text)
    card = min(facts.gpus)
    fit, spare = int(pool.memory_share * card - weights) // trace, (1 - pool.memory_share) * card
    said = f"{pool.memory_share:g} x {gib(card)} GiB holds {need}: {max(0, fit)} of {pool.max_num_seqs} at once"
    if fit < 1:
        return Line("error", name, f"{said}. Raise tensor_parallel or memory_share, or lower model.max_model_len")
    if logits > spare:
        remedy = "Lower memory_share or max_batched_tokens"
        return Line("error", name, f"{said}; scoring logits {gib(logits)} GiB exceed the spare {gib(spare)} GiB. {remedy}")
    return Line("ok", name, f"{said}; scoring logits {gib(logits)} of {gib(spare)} GiB spare")


def _traces(pool: Pool, weights: int, trace: int, card: int) -> int:
    """Traces that a card holds at once beside the weights. All sizes in bytes."""
    return min(pool.max_num_seqs, max(0, int(pool.memory_share * card - weights) // trace))


def fit(run: Run, size: Size, facts: Facts) -> list[Line]:
    """Lines about engines and ranks, and about this machine's memory when some of them run on CPU. Each shows its arithmetic."""
    pools = [("rollout", run.engines.rollout), ("score", run.engines.score)]
    there = [(f"engines.{name}", pool) for name, pool in pools if pool is not None]
    lines = [engine_fit(run.model, pool, size, facts, name) for name, pool in there]
    if run.score.keep_topk:
        lines.append(kept_line(run, size))
    parts = rank_bytes(run, size)
    rank = sum(parts.values())
    lines.append(_rank_line(run, parts, facts))
    engines = [_host_bytes(run.model, pool, size) for _, pool in there]
    teachers = (teacher for teacher in run.teachers.values() if run.has_pool(teacher) and not teacher.server)
    models = ((run.model_of(teacher), run.pool_of(teacher)) for teacher in teachers)
    engines += [
        _host_bytes(model, pool, measure(model)) for model, pool in models if pool.placement.gpus <= 0
    ]  # measured only then
    ranks = run.train.workers * rank if run.train.placement.gpus <= 0 else 0
    if sum(engines) or ranks:
        total = sum(engines) + ranks
        said = f"engines {gib(sum(engines))} + ranks {gib(ranks)} = {gib(total)} of {gib(facts.memory)} GiB free"
        short = total > facts.memory
        remedy = ". Lower kv_cache_gib, micro_batch_tokens or the numbers of engines and workers" if short else ""
        lines.append(Line("error" if short else "ok", "fit in memory", said + remedy))
    return lines


def _host_bytes(model: Model, pool: Pool, size: Size) -> int:
    """Memory of this machine that the least number of a pool's engines take. 0 for engines on GPUs."""
    if pool.placement.gpus > 0:
        return 0
    cache = int(pool.kv_cache_gib * GIB)
    wide = 4 * size.vocab * size.hidden if _BYTES[model.dtype] < 4 else 0  # the head's weight in float32
    return max(1, pool.min) * (weight_bytes(size, model.dtype) + wide + cache + scoring_logits(model, pool, size))


def summed(parts: dict[str, int]) -> str:
    """Parts in bytes and their sum, in words."""
    return f"{' + '.join(f'{name} {gib(value)}' for name, value in parts.items())} = {gib(sum(parts.values()))} GiB"


def kept_line(run: Run, size: Size) -> Line:
    """What `score.keep_topk` adds to the run directory at most: an id and a log-prob of 4 bytes for each kept token.

    Raises SettingError when it asks for more tokens than there are.
    """
    keep, rollout = run.score.keep_topk, run.rollout
    run.score.check_vocabulary(size.vocab)
    tokens = rollout.prompts_per_round * rollout.group_size * rollout.max_new_tokens
    a_round = f"{rollout.prompts_per_round * rollout.group_size} traces x {rollout.max_new_tokens} tokens x {keep} x 8 bytes"
    text = f"{a_round} = {gib(8 * keep * tokens)} GiB a round, {gib(8 * keep * tokens * run.rounds)} GiB in {run.rounds} rounds"
    return Line("ok", "score.keep_topk", f"at most {text}, before compression")


def _rank_line(run: Run, parts: dict[str, int], facts: Facts) -> Line:
    rank, said = sum(parts.values()), summed(parts)
    if run.train.placement.gpus <= 0:
        return Line("ok", "train", said)
    if not facts.gpus:
        cards = ", ".join(f"{card} GiB {'no' if rank > USABLE * card * GIB else 'yes'}" for card in COMMON)
        text = f"{said} a rank; no GPU here to hold it against. Run this with --address on the cluster. Fits a card of: {cards}"
        return Line("warning", "train", text)
    card = min(facts.gpus)
    short = rank > USABLE * card
    lower = WHOLE if START in parts else "Lower micro_batch_tokens or head_chunk_tokens, or use fsdp2"
    return Line("error" if short else "ok", "train", f"{said} of {gib(card)} GiB a card{f'. {lower}' if short else ''}")


def gib(size: float) -> str:
    """A size in GiB, with two digits after the point."""
    return f"{size / GIB:.2f}"
