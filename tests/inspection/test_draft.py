"""A settings file for somebody's own problems and model: what was found stands in it, and it is a whole configuration."""

import json

import pytest

from pipeline.errors import SettingError, SourceError
from pipeline.fit.machine import GIB, Facts
from pipeline.grader.verifier import reads_unmarked
from pipeline.inspection.draft import _why, check, draft
from pipeline.problems.sources import open_source

ROWS = [{"q": f"{i}+{i}", "work": f"{i} and {i} are {2 * i}", "target": 2 * i, "level": "easy"} for i in range(40)]
NAMED = ["source.problem=q", "source.solution=work", "source.answer=target"]


def facts(*gpus):
    return Facts("3.11", {}, 2, frozenset({"avx2"}), 16 * GIB, 100 * GIB, GIB, gpus, {}, cards=("NVIDIA H100",) * len(gpus))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_a_file_for_a_cpu_holds_out_rows_and_is_a_whole_configuration(source):
    made = draft("mine", "tiny-reasoner", source, NAMED, facts())
    text = made.text(["head"])
    run = check(text, "mine.yaml")
    assert (run.source.problem, run.source.solution, run.source.answer) == ("q", "work", "target")
    assert (run.source.size, run.evaluation.source.skip, run.evaluation.problems) == (32, 32, 8)
    train, held_out = open_source(run.source), open_source(run.evaluation.source)
    assert [row.problem for row in train.rows([0, 31])] == ["0+0", "31+31"]
    assert [row.problem for row in held_out.rows([0, 7])] == ["32+32", "39+39"]
    assert run.engines.rollout.placement.gpus == 0
    assert "{solution}" in run.prompts.teacher
    assert run.grade.verifier == "math"
    assert "# such as '0+0'" in text


@pytest.mark.parametrize(("size", "skip"), [(100_000, 0), (20, 0), (100_000, 10), (20, 10)])
def test_rows_that_are_held_out_are_never_trained_on(source, size, skip):
    """`--set source.size=20` trained on all held-out rows, and `source.skip=10` on those that it moved the training rows to."""
    made = draft("mine", "tiny-reasoner", source, [*NAMED, f"source.size={size}", f"source.skip={skip}"], facts())
    run = check(made.text([]), "mine.yaml")
    train, held_out = (
        {row.problem for row in rows.rows(range(len(rows)))} for rows in map(open_source, (run.source, run.evaluation.source))
    )
    assert not train & held_out
    assert train | held_out == {f"{i}+{i}" for i in range(skip, min(40, skip + size))}


@pytest.mark.parametrize(("asks", "fallback"), [(" Put it into \\boxed{}.", "off"), ("", "auto")])
def test_problems_that_ask_for_a_box_themselves_take_no_answer_without_one(tmp_path, asks, fallback):
    """The template was then `{problem}`, which asks for nothing, so `auto` took the last number of any response."""
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1?{asks}", "answer": str(i + 1)}) + "\n" for i in range(12)))
    run = check(draft("b", "tiny-reasoner", str(path), [], facts()).text([]), "b.yaml")
    assert (run.grade.fallback, reads_unmarked(run)) == (fallback, False)


def test_columns_that_are_not_clear_are_shown_with_an_example_each(source):
    with pytest.raises(SourceError, match="not clear") as refused:
        draft("mine", "tiny-reasoner", source, [], facts())
    for part in ("q ('0+0')", "target ('0')", "level ('easy')"):
        assert part in refused.value.what
    assert "--set source.problem=COLUMN" in refused.value.remedy


@pytest.mark.parametrize(
    ("sets", "what", "remedy"),
    [
        (["source.answer=target"], "which column holds the problem is not clear", "source.problem=COLUMN, and source.solution"),
        (["source.problem=q"], "which column holds the answer is not clear", "source.answer=COLUMN, and source.solution"),
        (["source.problem=q", "source.solution=work"], "which column holds the answer is not clear", "source.answer=COLUMN"),
        (["source.problem=qq"], "has no column 'qq'; there are: level, q, target, work", "Set source.problem"),
    ],
)
def test_only_the_column_that_is_not_clear_is_asked_for(source, sets, what, remedy):
    with pytest.raises(SourceError) as refused:
        draft("mine", "tiny-reasoner", source, sets, facts())
    assert refused.value.what.startswith(what)
    assert refused.value.remedy.removeprefix("Say it with --set ").startswith(remedy)


@pytest.mark.parametrize(("cards", "engines", "ranks", "shared"), [(1, 1, 1, True), (2, 1, 1, False), (8, 4, 4, False)])
def test_a_file_for_gpus_shares_them_between_engines_and_ranks(source, cards, engines, ranks, shared):
    made = draft("mine", "tiny-reasoner", source, NAMED, facts(*[80 * GIB] * cards))
    run = check(made.text([]), "mine.yaml")
    assert (run.engines.rollout.max, run.train.workers, run.engines.rollout.colocate) == (engines, ranks, shared)
    assert run.engines.rollout.start_timeout_s == 1800  # with graphs a first start takes longer than the default


def test_answers_alone_make_a_teacher_that_sees_the_answer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(12)))
    made = draft("a", "tiny-reasoner", str(path), [], facts())
    run = check(made.text([]), "a.yaml")
    assert run.source.solution == ""
    assert "{answer}" in run.prompts.teacher
    assert "{solution}" not in run.prompts.teacher


def unexplained(made, values=None, before=""):
    """The values of a draft that have no comment, nor has a section above them."""
    for name, value in (made.values if values is None else values).items():
        whole = f"{before}{name}"
        if isinstance(value, dict):
            yield from unexplained(made, value, f"{whole}.") if whole not in made.comments else ()
        elif whole not in made.comments:
            yield whole


@pytest.mark.parametrize("cards", [0, 1, 8])
def test_every_value_has_its_reason(source, cards):
    """A newcomer asked why bfloat16, why this learning rate, why 128 tokens where solutions have 17."""
    made = draft("mine", "tiny-reasoner", source, NAMED, facts(*[80 * GIB] * cards))
    assert {name for name in unexplained(made) if not name.startswith("evaluation.source.")} == {"name"}
    assert "tokens; at least 128, since a model writes longer" in made.comments["rollout.max_new_tokens"] or cards == 0
    assert "the last number counts (egrsd explain grade.fallback)" in made.comments["prompts.student"]


@pytest.mark.parametrize(
    ("new", "typical", "most", "said"),
    [(128, 17, 512, "at least 128"), (192, 96, 512, "twice that"), (512, 400, 512, "at most 512 on"), (64, 90, 512, "half of")],
)
def test_the_bound_that_made_the_longest_response_is_told(new, typical, most, said):
    assert _why(new, typical, most).startswith(said)


@pytest.mark.parametrize(
    ("uri", "sets", "setting"),
    [
        ("s3://KEY:SECRET@bucket/x.jsonl", [], "source.uri"),
        ("x.jsonl", ["source.size=0"], "source.size"),
        ("x.jsonl", ["model.lora_rank=0"], "model.lora_rank"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_setting(uri, sets, setting):
    """It ended in an internal error, which repeated the key."""
    with pytest.raises(SettingError) as refused:
        draft("mine", "tiny-reasoner", uri, sets, facts())
    assert refused.value.where == setting
    assert "SECRET" not in str(refused.value)


def test_what_is_set_decides(source):
    made = draft("mine", "tiny-reasoner", source, [*NAMED, "rounds=2", "rollout.max_new_tokens=17"], facts())
    run = check(made.text([]), "mine.yaml")
    assert (run.rounds, run.rollout.max_new_tokens) == (2, 17)
