"""Run directories for the tests of the report: real shards, labels by the real stages, texts and tokens chosen by the test."""

from __future__ import annotations

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.fakes import most_likely
from pipeline import contract, recipes, stages
from pipeline.config import Run
from pipeline.contract import TOPK
from pipeline.overrides import resolve
from pipeline.rounds.round import evaluation_run
from pipeline.stages import STAGES
from pipeline.store.directory import Store, area
from pipeline.store.manifest import Origin

SCRIPT = "<script>document.title='owned'</script>"
END = "</script><img src=x onerror=alert(1)>"
RIGHT_TO_LEFT = "\u202eabc\u2066"
GROUP = 4


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, saved to `folder`: every id is one byte, so letters beyond ASCII are in pieces.

    A few hostile texts are ids of their own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    whole.add_tokens([AddedToken(text, normalized=False) for text in (SCRIPT, END, RIGHT_TO_LEFT)])
    whole.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    whole.save_pretrained(folder)
    return whole


def new_run(folder: Path, *sets: str) -> tuple[Store, Run]:
    """A run directory without a round."""
    store, run = Store(str(folder)), resolve(recipes.demo(), [f"rollout.group_size={GROUP}", "evaluation.problems=0", *sets])
    store.save_run(run, {"code": SCRIPT})
    return store, run


def add_round(
    store: Store,
    run: Run,
    number: int,
    responses: list[np.ndarray],
    texts: list[str],
    problems: list[str],
    rejected: dict[int, str] | None = None,
    fallback: str = "",
    keep: int = 0,
) -> None:
    """A round that is measured, labelled and trained on: G responses [T] for each problem, signals drawn by round number.

    `rejected` maps rows to what a grader said of them. `fallback` is why the entropies are bounds, where they are. `keep` tokens
    of the teacher are kept: the token itself and those after it.
    """
    rng, rows, where = np.random.default_rng(number), len(responses), area("rounds", number)
    lengths = np.array([len(r) for r in responses])
    size, reasons = int(lengths.sum()), [("verifier_error" if i in (rejected or {}) else None) for i in range(rows)]
    live = np.array([reason is None for reason in reasons])
    ragged = _lists(lengths)
    entropy = np.minimum(rng.gamma(0.3, 1.0, size) * (rng.random(size) < 0.4), 5.7).astype(np.float32)  # log 300 is the most
    teacher = -rng.exponential(0.4, size).astype(np.float32)
    student = np.minimum(teacher + rng.normal(0, 0.1, size).astype(np.float32), 0)
    ids = [f"{number:04d}{i:06d}{rng.integers(1 << 30):08x}" for i in range(rows)]
    verdicts = [str(v) for v in rng.choice(["correct", "wrong", "truncated"], rows, p=[0.5, 0.45, 0.05])]
    advantage = rng.normal(0, 1, rows).astype(np.float32)
    same = {"trace_id": ids, "reject_detail": [(rejected or {}).get(i) for i in range(rows)]}
    prompts = {
        "prompt_id": [f"p{number}-{i}" for i in range(len(problems))],
        "problem": problems,
        "solution": [f"solution of {p}" for p in problems],
        "answer": ["7"] * len(problems),
        "prompt_tokens": [[1, 2]] * len(problems),
        "teacher_prompt_tokens": [[1, 2, 3]] * len(problems),
    }
    rollout = {
        "trace_id": ids,
        "prompt_index": np.arange(rows) // GROUP,
        "sample_index": np.arange(rows) % GROUP,
        "trace_source": ["student"] * rows,
        "response_tokens": ragged(np.concatenate(responses).astype(np.int32)),
        "response_text": texts,
        "rollout_logprobs": ragged(student),
        "rollout_entropy": ragged(entropy),
        "rollout_entropy_error": [0.0] * rows,
        "finish_reason": ["stop"] * rows,
        "policy_version": [number] * rows,
        "policy_lag": [0] * rows,
        "seed": [0] * rows,
    }
    grade = same | {
        "reject_reason": reasons,
        "verdict": [v if ok else None for v, ok in zip(verdicts, live, strict=True)],
        "reward": pa.array([1.2 if v == "correct" else 0.0 for v in verdicts], mask=~live),
        "advantage": pa.array(advantage, mask=~live),
    }
    score = {
        "trace_id": ids,
        "student_logprobs": ragged(student),
        "teacher_logprobs": ragged(teacher),
        "teacher_entropy": ragged(entropy),
        "entropy_method": ["exact"] * rows,
        "entropy_error": [0.0] * rows,
        "student_logprob_source": ["rollout"] * rows,
        "student_logprob_gap": [None] * rows,
    }
    if keep:
        kept = most_likely(np.concatenate(responses), teacher, keep, 300)
        inner = pa.array(np.arange(size + 1, dtype=np.int32) * keep)
        score |= {name: ragged(pa.ListArray.from_arrays(inner, flat.ravel())) for name, flat in zip(TOPK, kept, strict=True)}
    store.write_json(f"{where}/plan.json", {"policy": number, "shards": {"0000": list(range(len(problems)))}, "source": ""})
    peak, vocabulary = float(entropy.max()), 300
    tables = {name: _table(name, columns) for name, columns in _named(prompts, rollout, grade, score).items()}
    tables["profile"] = stages.profile.profile(tables["score"], run, peak, vocabulary)
    tables["label"] = stages.label.label(tables["grade"], tables["score"], tables["profile"], run, peak, vocabulary)
    for name, table in tables.items():
        facts = {"entropy_max": peak, "vocab_size": vocabulary} if name == "score" else {}
        if name == "score" and fallback:
            facts |= {"entropy_method": "bounds", "fallback": fallback}
        origin = Origin(run.digest(STAGES[name].settings), seconds=0.5, facts=facts)
        store.commit(where, STAGES[name], "0000", table, origin)
    train = {"round": number, "step": number, "loss": 0.1, "traces": float(live.sum()), "tokens": int(lengths[live].sum())}
    store.write_metrics("train", number, [train | {"rejected": 0, "seconds": 1.0, "logprob_gap": 1e-6, "logprob_gap_max": 1e-5}])
    store.write_metrics("round", number, [{"round": number, "seconds_round": 3.0, "seconds_stage_rollout": 1.0}])


def evaluated(store: Store, version: int, verdicts: list[str | None], length: int = 3) -> None:
    """An evaluation of policy `version`: one answer to each problem, with these verdicts. None: its row was rejected."""
    rows, where, run = len(verdicts), area("evals", version), evaluation_run(store.load_run())
    ids = [f"e{version}-{row}" for row in range(rows)]
    problems = [f"held {row}" for row in range(rows)]
    entropy = _lists(np.full(rows, length))(np.zeros(length * rows, np.float32))
    tables = {
        "prompts": {
            "prompt_id": [f"h{row}" for row in range(rows)],
            "problem": problems,
            "answer": ["7"] * rows,
            "prompt_tokens": [[1, 2]] * rows,
        },
        "rollout": {
            "trace_id": ids,
            "prompt_index": np.arange(rows),
            "sample_index": [0] * rows,
            "trace_source": ["student"] * rows,
            "response_tokens": [[1] * length] * rows,
            "response_text": [f"so {problem} is {verdict}" for problem, verdict in zip(problems, verdicts, strict=True)],
            "rollout_logprobs": entropy,
            "rollout_entropy": entropy,
            "rollout_entropy_error": [0.0] * rows,
            "finish_reason": ["stop"] * rows,
            "policy_version": [version] * rows,
            "policy_lag": [0] * rows,
            "seed": [0] * rows,
        },
        "grade": {
            "trace_id": ids,
            "verdict": verdicts,
            "reward": [0.0] * rows,
            "advantage": [0.0] * rows,
            "reject_reason": [None if verdict else "verifier_error" for verdict in verdicts],
        },
    }
    store.write_json(f"{where}/plan.json", {"policy": version, "shards": {"0000": list(range(rows))}, "source": ""})
    for name, columns in tables.items():
        origin = Origin(settings=run.digest(STAGES[name].settings), seconds=0.5)
        store.commit(where, STAGES[name], "0000", _table(name, columns), origin)


def hostile_run(folder: Path) -> tuple[Store, list[str]]:
    """A run whose model is out to break the page: markup, marks of direction, pieces of letters, a trace of 100 000 tokens."""
    tokenizer = byte_tokenizer(folder / "model")
    store, run = new_run(folder / "run", f"model.path={folder / 'model'}")
    texts = [
        f"{SCRIPT} x",
        f"{END}\n\tnext",
        f"{RIGHT_TO_LEFT} left",
        "né 😀 日本",
        "a" * 100_000,
        "ok<eos>",
        "\x1b[31m\x00",
        "b",
    ]
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    problems = [f"problem {SCRIPT}{RIGHT_TO_LEFT}", f"{END} two"]
    add_round(store, run, 0, ids, texts, problems, {7: f"died on {SCRIPT}"}, f"not so {SCRIPT}", keep=3)
    return store, texts


def large_run(folder: Path, num_traces: int, per_round: int = 1000) -> Store:
    """A run of many traces of about 60 tokens."""
    byte_tokenizer(folder / "model")
    store, run = new_run(folder / "run", f"model.path={folder / 'model'}", f"rounds={math.ceil(num_traces / per_round)}")
    for number in range(num_traces // per_round):
        rng = np.random.default_rng(number)
        lengths = rng.integers(20, 100, per_round)
        responses = np.split(rng.integers(0, 256, int(lengths.sum())), np.cumsum(lengths)[:-1])
        problems = [f"{a}+{b}" for a, b in rng.integers(0, 99, (per_round // GROUP, 2)).tolist()]
        add_round(store, run, number, responses, [f"response of {n} tokens" for n in lengths], problems)
    return store


def traces_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The traces of a sample as the page opens them: index, texts and arrays together."""
    names, opened = list(sample["traces"]), [unpack(block) for block in sample["blocks"]]
    found = []
    for values in zip(*sample["traces"].values(), strict=True):
        row = dict(zip(names, values, strict=True))
        head, numbers = opened[row["block"]]
        row |= head["traces"][row["place"]]
        own = slice(row["start"], row["start"] + row["size"])
        row |= {name: values[own] for name, values in numbers.items() if not name.startswith(("kept", "prompts"))}
        kept = slice(row.get("kept_start", 0), row.get("kept_start", 0) + row.get("kept", 0) * row["size"])
        found.append(row | {name: numbers[name][kept] for name in ("kept_tokens", "kept_probs") if name in numbers})
    return found


def _lists(lengths: np.ndarray) -> Any:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return lambda values: pa.ListArray.from_arrays(offsets, pa.array(values))


def _named(prompts: Any, rollout: Any, grade: Any, score: Any) -> dict[str, dict[str, Any]]:
    return {"prompts": prompts, "rollout": rollout, "grade": grade, "score": score}


def _table(name: str, columns: dict[str, Any]) -> pa.Table:
    """A shard, nulls where a column was left out."""
    schema, rows = contract.schema(STAGES[name], columns), len(columns[STAGES[name].key])
    return pa.table({f.name: pa.array([None] * rows, f.type) if f.name not in columns else columns[f.name] for f in schema}).cast(
        schema
    )


def unpack(block: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The head and the sections of a block, as the page opens it."""
    whole = gzip.decompress(base64.b64decode(block))
    start = 4 + int.from_bytes(whole[:4], "little")
    head, found = json.loads(whole[4:start]), {}
    for name, kind, size in head.pop("sections"):
        width = np.dtype(f"<{kind}").itemsize
        planes = np.frombuffer(whole, np.uint8, size * width, start).reshape(width, size)
        found[name] = np.ascontiguousarray(planes.T).view(f"<{kind}").ravel()
        start += size * width
    return head, found
