"""Stage `rollout`: an engine writes G traces for each prompt, with log-probs and entropies. Or the source brings the traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import (
    ENGINE_SETTINGS,
    TEACHER_PROMPTS,
    Engines,
    Failure,
    Generate,
    Generation,
    Place,
    Policy,
    Reject,
    Sampling,
    Seat,
    ShardInputs,
    ShardResult,
    Stage,
)
from pipeline.digest import digest
from pipeline.errors import EngineError
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.stages.chat import response_ids, turn_stops
from pipeline.stages.signals import broken, refuse_many
from pipeline.stages.tables import Draft, clean
from pipeline.stages.teachers import PROBLEM, prompts_before

WRITERS = tuple(f"teachers.*.{name}" for name in ("model", "revision", "dtype", "prompt", "template", "policy", "server"))


def rollout(
    prompts: pa.Table, run: Run, engines: Engines, policy: Policy, place: Place, seats: Mapping[str, Seat] | None = None
) -> pa.Table:
    """G traces per prompt, next to each other. A trace depends only on its seed, prompt and policy.

    Trace ids and seeds depend on the round and the prompt's place in it. They do not depend on how the round is cut into shards.
    `seats`: where the teachers that the run names answer; without them the teacher is the base on the student's engines.

    Raises EngineError when an answer names another policy, or when the numbers of most answers are impossible.
    """
    size, source_of = run.rollout.group_size, run.writers
    imports = _Imports(prompts, run) if "import" in source_of else None
    draft = Draft(STAGE, [""] * (prompts.num_rows * size))
    writers = {"student": Seat(engines, policy), "teacher": Seat(engines, Policy(0))}
    writers |= {f"teacher {name}": seat for name, seat in (seats or {}).items()}
    rows: dict[str, list[int]] = {name: [] for name in writers}
    requests: dict[str, list[Generate]] = {name: [] for name in writers}
    ids = {"student": prompts["prompt_tokens"].to_pylist(), "teacher": prompts["teacher_prompt_tokens"].to_pylist()}
    taught = prompts_before(run, prompts) if run.teachers and "teacher" in source_of else []
    carried = prompts.select(["prompt_id", "reject_reason", "reject_detail"]).to_pylist()
    for i, prompt in enumerate(carried):
        for sample, source in enumerate(source_of):
            row = i * size + sample
            name = f"{run.seed}/{place.where}/{prompt['prompt_id']}/{place.first + i}/{sample}"
            seed = int(digest(f"seed/{name}"), 16) & 0x7FFFFFFF
            draft.keys[row] = digest(name)
            if prompt["reject_reason"]:
                draft.reject(row, prompt["reject_reason"], prompt["reject_detail"])
                draft.values[row] = {"prompt_index": i}
                continue
            if source == "import":
                assert imports is not None
                imports.take(draft, row, i, sample)
                continue
            draft.values[row] = {"prompt_index": i, "sample_index": sample, "trace_source": source, "seed": seed}
            writer, prompt_ids = source, ids[source][i]
            if source == "teacher" and taught and (own := taught[i]) is not None:
                writer, prompt_ids = f"teacher {own[0]}", own[1]
            rows[writer].append(row)
            requests[writer].append(Generate(prompt_ids, seed))
    sampling = Sampling(run.rollout.temperature, run.rollout.top_p, run.rollout.top_k, run.rollout.max_new_tokens)
    for writer, (those, who) in writers.items():
        vocab_size = those.facts().vocab_size if requests[writer] else 0
        if requests[writer]:
            for row, answer in zip(rows[writer], those.generate(requests[writer], who, sampling), strict=True):
                _take_generation(draft, row, answer, who, place.lag, vocab_size)
    refuse_many(draft, [row for asked in rows.values() for row in asked], f"{place.where}, stage rollout")
    return draft.table()


def imported(prompts: pa.Table, run: Run, place: Place) -> pa.Table:
    """The traces that the source brings (`source.response`) as the rows of a rollout. No engine is asked.

    Each prompt has as many rows as `rollout.import_share` says, which are all G unless it is set. They are turned into ids once.
    Nobody knows the writer's log-probs and entropies, so these are null. A trace is rejected when it is missing, empty, has a
    text that the tokenizer does not know, or is longer than `rollout.max_new_tokens`.
    """
    samples = [sample for sample, writer in enumerate(run.writers) if writer == "import"]
    draft, imports = Draft(STAGE, [""] * (prompts.num_rows * len(samples))), _Imports(prompts, run)
    for i, prompt in enumerate(prompts.select(["prompt_id", "reject_reason", "reject_detail"]).to_pylist()):
        for j, sample in enumerate(samples):
            row = i * len(samples) + j
            draft.keys[row] = digest(f"{run.seed}/{place.where}/{prompt['prompt_id']}/{place.first + i}/{sample}")
            if prompt["reject_reason"]:
                draft.reject(row, prompt["reject_reason"], prompt["reject_detail"])
                draft.values[row] = {"prompt_index": i}
                continue
            imports.take(draft, row, i, sample)
    return draft.table()


class _Imports:
    """The traces that the source brings with each prompt, and how they become rows."""

    def __init__(self, prompts: pa.Table, run: Run) -> None:
        self._texts = prompts["imported"].to_pylist() if "imported" in prompts.column_names else [None] * prompts.num_rows
        self._first, self._most = run.writers.index("import"), run.rollout.max_new_tokens
        self._column, self._tokenizer = run.source.response, tokenizer_of(run.model)
        self._stops = turn_stops(run.model)

    def take(self, draft: Draft, row: int, prompt: int, sample: int) -> None:
        """Put the trace that is sample number `sample` of a prompt's group into a row, or reject the row."""
        draft.values[row] = {"prompt_index": prompt, "sample_index": sample, "trace_source": "import"}
        texts, place = self._texts[prompt] or [], sample - self._first
        ids = response_ids(self._tokenizer, texts[place] if place < len(texts) else "", self._stops)
        if not ids:
            draft.reject(row, Reject.EMPTY_RESPONSE, f"column '{self._column}' holds no such trace")
        elif len(ids) > self._most:
            detail = f"{len(ids)} tokens with the end of sequence > rollout.max_new_tokens {self._most}"
            draft.reject(row, Reject.RESPONSE_TOO_LONG, detail)
        elif self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in ids:
            draft.reject(row, Reject.UNKNOWN_TOKENS, "the tokenizer does not know a part of the trace")
        else:
            draft.values[row] |= {"response_tokens": np.array(ids, np.int32), "finish_reason": "stop"}


def _take_generation(draft: Draft, row: int, answer: Generation | Failure, policy: Policy, lag: int, vocab_size: int) -> None:
    if isinstance(answer, Failure):
        draft.reject(row, Reject.ENGINE_ERROR, answer.cause)
        return
    if answer.policy_version != policy.version:
        raise EngineError(f"policy {answer.policy_version} answered a request for policy {policy.version}", "rollout")
    if len(answer.tokens) == 0:
        draft.reject(row, Reject.EMPTY_RESPONSE, "no token was generated")
        return
    if (found := broken(answer, vocab_size)) is not None:
        draft.reject(row, found[0], f"rollout: {found[1]}")
        return
    draft.values[row] |= {
        "response_tokens": answer.tokens,
        "rollout_logprobs": answer.logprobs,
        "rollout_entropy": answer.entropy,
        "rollout_entropy_error": answer.entropy_error,
        "finish_reason": answer.finish_reason,
        "policy_version": answer.policy_version,
        "policy_lag": lag,
    }


def decode(table: pa.Table, tokenizer: Any) -> pa.Table:
    """Fill `response_text` of a rollout shard from its ids."""
    live = pc.is_null(table["reject_reason"])
    texts = iter(tokenizer.batch_decode(table.filter(live)["response_tokens"].to_pylist(), skip_special_tokens=True))
    column = pa.array([clean(next(texts)) if ok else None for ok in live.to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index("response_text"), "response_text", column)


def _compute(shard: ShardInputs) -> ShardResult:
    run, prompts = shard.run, shard.tables["prompts"]
    if run.only_imports:
        return ShardResult(decode(imported(prompts, run, shard.place), tokenizer_of(run.model)), {"trace_source": "import"})
    engines, policy = shard.on_engines()
    table = rollout(prompts, run, engines, policy, shard.place, shard.teachers)
    return ShardResult(decode(table, tokenizer_of(run.model)), asdict(engines.facts()))


def _writers(run: Run) -> tuple[str, ...]:
    """The values of the round that make traces stale where named teachers write some."""
    return ("teacher_policy", "teacher_prompts", "writers") if run.teachers and "teacher" in run.writers else ()


STAGE = Stage(
    "rollout",
    "engines",
    "trace_id",
    reads=("prompt_tokens", "teacher_prompt_tokens", "imported"),
    settings=(
        "seed",
        *ENGINE_SETTINGS,
        *(f"rollout.{name}" for name in ("group_size", "temperature", "top_p", "top_k", "max_new_tokens")),
        "rollout.teacher_share",
        "rollout.import_share",
        "score.entropy",
        "score.top_k",
        "source.response",
    ),
    compute=_compute,
    round_inputs=lambda run: () if run.only_imports else ("policy", *_writers(run)),
    by_round=TEACHER_PROMPTS,
    asks=lambda run: not run.only_imports,
    more_reads=lambda run: PROBLEM if _writers(run) else (),
)
