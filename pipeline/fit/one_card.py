"""Memory of one card that an engine and a trainer share: what it holds in each of their turns. Computed, and never measured.

While the engine answers, the card holds the engine's share, the logits of scoring, and what the trainer leaves there. While the
trainer steps, it holds all of the trainer and what a sleeping engine keeps.
"""

from __future__ import annotations

from pipeline.config import Pool, Run
from pipeline.fit.footprint import COMMON, USABLE, Size, gib, kv_bytes, rank_bytes, scoring_logits, trained, weight_bytes
from pipeline.fit.machine import GIB, Facts, Line

TOPIC = "one card"
_CONTEXT = GIB // 2  # CUDA's own memory for one process; assumed
_GRAPHS = GIB  # recorded CUDA graphs, which stay on the card while an engine sleeps; assumed


def shares_a_card(run: Run) -> bool:
    """Whether engine and trainer of a run take turns on one GPU."""
    return run.engines.rollout.colocate and run.engines.rollout.placement.gpus > 0


def at_rest(run: Run, size: Size) -> int:
    """Bytes that the trainer keeps on the card while the engine answers. Its gradients and activations are gone by then."""
    adapter, base = trained(run, size), 0 if run.model.tuning == "full" else weight_bytes(size, run.train.dtype)
    kept = {
        "none": base + 12 * adapter,  # what is trained and two moments of AdamW, in float32
        "optimizer": base + 4 * adapter,
        "all": 0,
    }
    return kept[run.train.offload] + _CONTEXT


def moved(run: Run, size: Size) -> int:
    """Bytes that go between the card and the machine's memory in a round: the engine's weights, and what the trainer offloads."""
    adapter, base = trained(run, size), 0 if run.model.tuning == "full" else weight_bytes(size, run.train.dtype)
    offloaded = {"none": 0, "optimizer": 8 * adapter, "all": base + 12 * adapter}
    return 2 * (weight_bytes(size, run.model.dtype) + offloaded[run.train.offload])


def asleep(pool: Pool) -> int:
    """Bytes that a sleeping engine keeps on the card."""
    return _CONTEXT + (0 if pool.enforce_eager else _GRAPHS)


def judge(run: Run, size: Size, facts: Facts) -> list[Line]:
    """A line for each common card, and for the smallest card of a machine, which is an error when the run does not fit."""
    if not shares_a_card(run):
        return []
    lines = [Line("ok", TOPIC, _said(run, size, card * GIB)[1]) for card in COMMON]
    if facts.gpus:
        fits, said = _said(run, size, min(facts.gpus))
        remedy = "" if fits else f". {remedy_of(run)}"
        lines.append(Line("ok" if fits else "error", f"{TOPIC}, here", said + remedy))
    return lines


def remedy_of(run: Run) -> str:
    """The settings that make each turn smaller."""
    pool, train = run.engines.rollout, run.train
    off = "" if train.offload == "all" else f", set train.offload all (now {train.offload})"
    return (
        f"Lower engines.rollout.memory_share (now {pool.memory_share:g}) for the engine's turn{off}; "
        f"lower train.micro_batch_tokens (now {train.micro_batch_tokens}), train.head_chunk_tokens or model.max_model_len "
        "for the trainer's"
    )


def _said(run: Run, size: Size, card: int) -> tuple[bool, str]:
    """Whether both turns fit a card of so many bytes, and their arithmetic in GiB."""
    pool, window = run.engines.rollout, run.model.max_model_len
    share, weights = int(pool.memory_share * card), weight_bytes(size, run.model.dtype)
    traces = max(0, share - weights) // kv_bytes(run.model, size)
    logits, rest = scoring_logits(run.model, pool, size), at_rest(run, size)
    answering = share + logits + rest
    step, sleeping = sum(rank_bytes(run, size).values()), asleep(pool)
    training = step + _CONTEXT + sleeping
    fits = traces > 0 and answering <= card and training <= USABLE * card
    inside = f"weights {gib(weights)}, cache for {traces} traces of {window} tokens"
    budget = f"{pool.memory_share:g} x {gib(card)} = {gib(share)} ({inside})"
    said = (
        f"{gib(card)} GiB: while the engine answers, {budget} + scoring logits {gib(logits)} + trainer at rest {gib(rest)} = "
        f"{gib(answering)}; while the trainer steps, {gib(step + _CONTEXT)} + sleeping engine {gib(sleeping)} (assumed) = "
        f"{gib(training)}: {'fits' if fits else 'too small'}"
    )
    return fits, said
