"""Rounds and runs that the training tests share. Also imported by the processes they spawn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from actors.fakes import UNWATCHED
from pipeline import contract
from pipeline.config import Run
from pipeline.contract import TOPK
from pipeline.overrides import resolve
from pipeline.stages import PLAN
from pipeline.store.directory import Store, area
from pipeline.store.manifest import Origin
from pipeline.training.batches import RoundTable

TINY = resolve(Run(name="test", seed=3), list(UNWATCHED))


def tiny_run(*overrides: str) -> Run:
    """The tiny reasoner, four traces a step, an adapter of rank 4 that moves visibly in a few steps."""
    settings = (
        "model.lora_rank=4",
        "train.batch_traces=6",
        "train.micro_batch_tokens=96",
        "train.learning_rate=0.01",
        "rounds=2",
    )
    return resolve(TINY, [*settings, *overrides])


def make_round(number: int = 0, num_traces: int = 12, seed: int = 0, **columns: list) -> RoundTable:
    """A committed round with ragged prompts, responses and signals; `columns` replace what was drawn."""
    rng = np.random.default_rng([seed, number])
    prompts = [rng.integers(4, 57, rng.integers(3, 12)).tolist() for _ in range(num_traces)]
    responses = [rng.integers(4, 57, rng.integers(1, 30)).tolist() for _ in range(num_traces)]
    student = [(-rng.exponential(0.5, len(r))).tolist() for r in responses]
    drawn = {
        "trace_id": [f"r{number}-{i}" for i in range(num_traces)],
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "student_logprobs": student,
        "teacher_logprobs": [(np.array(s) + rng.normal(0, 0.2, len(s))).clip(max=0).tolist() for s in student],
        "teacher_entropy": [rng.exponential(0.7, len(r)).tolist() for r in responses],
        "advantage": rng.normal(0, 1, num_traces).tolist(),
        "policy_version": [number] * num_traces,
        "reject_reason": [None] * num_traces,
        **columns,
    }
    drawn |= _further(drawn) | columns
    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {"prompt_tokens": ids, "response_tokens": ids, "advantage": pa.float32(), "policy_version": pa.int32()}
    types |= dict.fromkeys(("student_logprobs", "teacher_logprobs", "teacher_entropy", *FURTHER), floats)
    types |= {TOPK[0]: pa.list_(ids), TOPK[1]: pa.list_(floats)}
    table = pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in drawn.items()})
    return RoundTable(number, number, table)


FURTHER = ("rollout_entropy", "rollout_logprobs", "base_logprobs")
NUM_KEPT = 20


def _further(drawn: dict[str, list]) -> dict[str, list]:
    """Columns that only some objectives read, drawn from a generator of their own: the others stay as they were."""
    rng = np.random.default_rng(9)
    lengths = [len(response or ()) for response in drawn["response_tokens"]]
    student = [values or () for values in drawn["student_logprobs"]]
    near, base = ([(np.array(s) + rng.normal(0, 0.2, len(s))).clip(max=0).tolist() for s in student] for _ in range(2))
    shares = [np.sort(rng.dirichlet(np.full(57, 0.3), n), axis=1)[:, ::-1][:, :NUM_KEPT].clip(1e-12) for n in lengths]
    return {
        "rollout_entropy": [rng.exponential(0.7, n).tolist() for n in lengths],
        "rollout_logprobs": near,
        "base_logprobs": base,
        TOPK[0]: [np.array([rng.permutation(57)[:NUM_KEPT] for _ in range(n)]).tolist() for n in lengths],
        TOPK[1]: [np.log(part).tolist() for part in shares],
        "trace_source": ["teacher" if i % 2 else "student" for i in range(len(lengths))],
    }


def commit_round(store: Store, data: RoundTable, optional: tuple[str, ...] = ()) -> None:
    """Commit a round as one shard of a real run directory; columns that training does not read hold fillers.

    Of the optional columns only those that are named are there.
    """
    fillers = {"string": "-", "float": 0.0, "int32": 0, "int64": 0}
    texts = {"trace_source": "student", "verdict": "correct", "student_logprob_source": "rollout"}
    same = {
        "rollout_logprobs": "student_logprobs",
        "rollout_entropy": "teacher_entropy",
        "teacher_prompt_tokens": "prompt_tokens",
    }
    where, rows, hashes = area("rounds", data.number), data.table.num_rows, {}
    for stage in [s for s in PLAN if s.name in ("prompts", "rollout", "grade", "score")]:
        columns = {"prompt_id": data.table["trace_id"], "prompt_index": pa.array(range(rows))}
        schema = contract.schema(stage, optional)
        for field in schema:
            name = same.get(field.name, field.name)
            if field.name not in columns and name in data.table.column_names:
                columns[field.name] = data.table[name]
            elif field.name not in columns:
                filler = None if "reject" in field.name else texts.get(field.name, fillers.get(str(field.type)))
                columns[field.name] = pa.array([filler] * rows)
        table = pa.table({f.name: columns[f.name].cast(f.type) for f in schema}, schema)
        hashes[stage.name] = store.commit(where, stage, "0000", table, Origin()).sha256
    store.write_json(f"{where}/ready.json", {"policy": data.policy_version, "shards": {"0000": hashes}})
