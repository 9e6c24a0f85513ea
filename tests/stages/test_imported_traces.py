"""Traces that a source brings: rows of a rollout without engines, scored like others, alone or in groups with others."""

import copy

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from odd_engine import PLACE, POLICY, Odd
from transformers import GenerationConfig, LlamaConfig

from actors.fakes import token_evidence
from pipeline import stages
from pipeline.config import Model
from pipeline.contract import Failure, Policy, Reject
from pipeline.errors import ContractError
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.problem import Problem
from pipeline.recipes import demo
from pipeline.stages import STAGES
from pipeline.store.shards import check_table, count_rejected

IMPORTED = [
    Problem(0, "7+4-3+9", "7+4=11;11-3=8;8+9=17#17", "17", imported=("7+4=11;11-3=8;8+9=17#17<eos>", " ")),
    Problem(1, "1+1+1+1", "1+1=2;2+1=3;3+1=4#4", "4", imported=("1+1=2#" + "4" * 60, "1+1=2 \N{SNOWMAN}")),
    Problem(2, None, "x", "1", Reject.MISSING_PROBLEM, "column 'problem' is empty"),
    Problem(3, "2+2+2+2", "2+2=4;4+2=6;6+2=8#8", "8", imported=("#8",)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(Model(path=str(asset_path())))


@pytest.fixture(scope="module")
def importing():
    sets = ("group_size=2", "max_new_tokens=64")
    return resolve(demo(), [*(f"rollout.{text}" for text in sets), "source.uri=x.jsonl", "source.response=trace"])


def test_imported_traces_are_the_rows_of_a_rollout_without_engines(importing, tokenizer):
    prompts = stages.prompts.prompts(IMPORTED, importing, tokenizer)
    check_table(STAGES["prompts"], prompts)
    made = stages.rollout.decode(stages.rollout.imported(prompts, importing, PLACE), tokenizer)
    check_table(STAGES["rollout"], made)
    assert made["response_text"].to_pylist() == ["7+4=11;11-3=8;8+9=17#17", *[None] * 5, "#8", None]
    assert made["response_tokens"][0].as_py()[-1] == tokenizer.eos_token_id
    assert count_rejected(made) == {"empty_response": 2, "response_too_long": 1, "unknown_tokens": 1, "missing_problem": 2}
    assert made["reject_detail"][2].as_py() == "67 tokens with the end of sequence > rollout.max_new_tokens 64"
    assert made["trace_source"].to_pylist()[:2] == ["import", "import"]
    for name in ("rollout_logprobs", "rollout_entropy", "rollout_entropy_error", "policy_version", "policy_lag", "seed"):
        assert made[name].null_count == made.num_rows
    ids = stages.rollout.rollout(prompts, importing, Odd(importing.model), POLICY, PLACE)["trace_id"]
    assert made["trace_id"].equals(ids)


def test_an_imported_trace_ends_with_the_stop_of_the_model_s_files(tmp_path, importing, chatml):
    """Its tokenizer's end of sequence is another one, as with Gemma, Phi 3 and GLM 4."""
    own = copy.deepcopy(chatml)
    own.add_special_tokens({"eos_token": "<eos>"})
    own.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=own.get_vocab()["<|im_end|>"]).save_pretrained(tmp_path)
    run = resolve(importing, [f"model.path={tmp_path}", "model.max_model_len=512"])
    made = stages.rollout.imported(stages.prompts.prompts(IMPORTED, run, tokenizer_of(run.model)), run, PLACE)
    assert own.convert_ids_to_tokens(made["response_tokens"][6].as_py()) == ["#", "8", "<|im_end|>"]


def test_imported_traces_are_scored_by_student_and_teacher(importing, tokenizer):
    prompts = stages.prompts.prompts(IMPORTED, importing, tokenizer)
    made = stages.rollout.decode(stages.rollout.imported(prompts, importing, PLACE), tokenizer)
    engine = Odd(importing.model)
    scored = stages.score.score(prompts, made, importing, engine, POLICY)
    check_table(STAGES["score"], scored)
    assert engine.calls == [("score", Policy(0), 2), ("score", POLICY, 2)]
    assert pc.drop_null(scored["student_logprob_source"]).to_pylist() == ["score", "score"]
    tokens = np.array(made["response_tokens"][0].as_py())
    logprobs, _ = token_evidence(tokens, POLICY.version, len(prompts["prompt_tokens"][0].as_py()), 57)
    np.testing.assert_array_equal(scored["student_logprobs"][0].as_py(), logprobs)
    failed = Odd(importing.model, spoil_score={1: lambda _: Failure("boom")})
    lost = stages.score.score(prompts, made, importing, failed, POLICY)
    assert failed.calls[1] == ("score", POLICY, 1)  # a row that the teacher could not score is not asked again
    assert count_rejected(lost)["engine_error"] == 1


def test_a_group_mixes_the_traces_of_student_teacher_and_source(importing, tokenizer):
    """Of 4 traces the student writes the first, the teacher the second, and the source brings two: its first and second."""
    run = resolve(importing, ["rollout.group_size=4", "rollout.import_share=0.5", "rollout.teacher_share=0.25"])
    prompts, engine = stages.prompts.prompts(IMPORTED, run, tokenizer), Odd(run.model)
    made = stages.rollout.decode(stages.rollout.rollout(prompts, run, engine, POLICY, PLACE), tokenizer)
    check_table(STAGES["rollout"], made)
    assert made["trace_source"].to_pylist()[:4] == ["student", "teacher", "import", "import"]
    assert engine.calls == [("generate", POLICY, 3), ("generate", Policy(0), 3)]  # a row without a problem is asked of nobody
    assert made["response_text"].to_pylist()[2] == "7+4=11;11-3=8;8+9=17#17"
    assert made["reject_reason"].to_pylist()[2:4] == [None, "empty_response"]
    assert [value is None for value in made["rollout_logprobs"].to_pylist()[:4]] == [False, False, True, True]
    alone = stages.rollout.imported(prompts, run, PLACE)
    assert alone["trace_id"].to_pylist() == [one for i, one in enumerate(made["trace_id"].to_pylist()) if i % 4 >= 2]
    scored = stages.score.score(prompts, made, run, engine, POLICY)
    check_table(STAGES["score"], scored)
    assert engine.calls[2:] == [("score", Policy(0), 5), ("score", POLICY, 5)]  # two imports, and three traces of the other one


def test_a_value_of_an_imported_trace_that_cannot_be_known_is_refused(importing, tokenizer):
    prompts = stages.prompts.prompts(IMPORTED, importing, tokenizer)
    made = stages.rollout.decode(stages.rollout.imported(prompts, importing, PLACE), tokenizer)
    known = made.set_column(made.schema.get_field_index("seed"), "seed", pa.array([1] * made.num_rows, pa.int64()))
    with pytest.raises(ContractError, match="null in other rows than those of trace_source import"):
        check_table(STAGES["rollout"], known)
    writer = pa.array(["student" if source else None for source in made["trace_source"].to_pylist()])
    claimed = made.set_column(made.schema.get_field_index("trace_source"), "trace_source", writer)
    with pytest.raises(ContractError, match="null in a row that was not rejected"):
        check_table(STAGES["rollout"], claimed)
