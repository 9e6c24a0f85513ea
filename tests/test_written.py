"""Settings as they are written: for every setting of every type, text arrives as that value or is refused."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline import recipes
from pipeline.config import Pool, Run
from pipeline.errors import SettingError
from pipeline.overrides import load, named, resolve
from pipeline.written import read_document, read_override

BASE = Run(name="t")


def bare(kind: Any) -> Any:
    """A type without constraints and without None."""
    if get_origin(kind) is Annotated:
        return bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return bare(next(part for part in get_args(kind) if part is not type(None)))
    return kind


def settings(model: type[BaseModel] = Run, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, type) of every setting, with a free name below each section whose names are free."""
    found = []
    for name, field in model.model_fields.items():
        kind = bare(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += settings(kind, f"{prefix}{name}.")
        elif get_origin(kind) is dict:
            value = get_args(kind)[1]
            section = isinstance(value, type) and issubclass(value, BaseModel)
            found += settings(value, f"{prefix}{name}.mine.") if section else [(f"{prefix}{name}.mine", value)]
        else:
            found.append((prefix + name, field.annotation))
    return found


SETTINGS = settings()
SURPRISES = (
    *("#### (.+)", "Solve {problem} end with #### x", "={problem}", "Question: {problem}", "None", "null", "Null", "~", ""),
    *("010", "1:30", "190:20:30", "0x10", "0o17", "0b1", "1_000", "1_0", "yes", "no", "on", "off", "y", "N", "true", "False"),
    *("1e-4", "1e3", ".5", "5.", "+3", "-0", "1.0", "8.5", ".inf", "-.inf", "inf", ".nan", "NaN", "1e999", "9" * 50, "٣"),
    *("2026-11-28", "<<", "=", "*a", "&a x", "!!str 3", "!x", "@x", "`x`", "%x", "- a", "? a", "a: b", "|", ">"),
    *('"quoted"', "'q'", '""', "''", '"', "[a", "[a, b]", "{a: 1}", "{a", "a,b", "a, b", "a,,b", " a ", "a\tb", "a\nb", "a\\nb"),
    *("\u2028x", "\u0085", "\ufeffx", "\x00", "\x1b[31m", "é", "😀", "\ud800", "a #b", "a# b", "#", "---", "...", "%YAML 1.1"),
)
written = st.one_of(
    st.sampled_from(SURPRISES),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
    st.text("0123456789_.:xeE+-", max_size=8),
)


def value_at(name: str, data: Any) -> Any:
    """The value at a dotted name in nested dicts."""
    for key in name.split("."):
        data = data[key]
    return data


def meant(kind: Any, text: str) -> list[Any]:
    """The values that a person can mean by a text in a setting of this type."""
    inner, nullable = bare(kind), kind is Any or type(None) in get_args(kind)
    if nullable and text in ("null", "~"):
        return [None]
    if inner is str or get_origin(inner) is Literal:
        return ["" if text in ('""', "''") else text]
    if inner is bool:
        return [text.strip().lower() in {"true", "yes", "on"}]
    if inner in (int, float):
        return [float(text) if inner is float else int(Fraction(text))]
    if get_origin(inner) is tuple:
        parts = yaml.load(text, yaml.BaseLoader) if text.lstrip().startswith("[") else text.split(",") if text.strip() else []
        items = [meant(get_args(inner)[0], part.strip())[0] for part in parts]
        return [items]
    if text[:1] in ("[", "{"):
        return [{"[a, b]": ["a", "b"], "{a: 1}": {"a": 1}}.get(text, yaml.load(text, yaml.BaseLoader))]
    try:
        return [text, json.loads(text)]
    except ValueError:
        return [text, ""] if text in ('""', "''") else [text]


def in_set(name: str, text: str) -> Any:
    """The value that `--set name=text` gives, or None when it is refused."""
    return value_at(name, read_override(Run, f"{name}={text}"))


def in_yaml(name: str, scalar: str) -> Any:
    """The value that a file gives whose last line is `key: scalar`."""
    *parents, last = name.split(".")
    lines = [f"{'  ' * depth}{key}:\n" for depth, key in enumerate(parents)]
    return value_at(name, read_document(Run, f"{''.join(lines)}{'  ' * len(parents)}{last}: {scalar}\n", "mine.yaml"))


def outcome(read: Any, *arguments: str) -> tuple[str, Any]:
    """("is", value), or ("refused", "") for a SettingError. Anything else is a defect."""
    try:
        return "is", read(*arguments)
    except SettingError:
        return "refused", ""


def test_the_walk_meets_every_setting_and_every_type():
    names = {name for name, _ in SETTINGS}
    assert {"rounds", "grade.answer_pattern", "engines.score.placement.labels.mine", "train.betas", "metrics.sinks"} <= names
    kinds = {get_origin(bare(kind)) or bare(kind) for _, kind in SETTINGS}
    assert kinds == {str, int, float, bool, tuple, Literal, Any}


@pytest.mark.parametrize("text", SURPRISES)
def test_every_setting_reads_a_surprising_text_as_it_is_or_refuses_it(text):
    assert [wrong for name, kind in SETTINGS for wrong in misread(name, kind, text)] == []


@given(st.sampled_from(SETTINGS), written)
@example(("rounds", int), "010")
def test_text_arrives_in_every_setting_or_is_refused(setting, text):
    assert list(misread(*setting, text)) == []


def misread(name: str, kind: Any, text: str) -> Iterator[tuple[Any, ...]]:
    """Where a text is neither the value that was meant nor refused: by `--set`, as a plain YAML scalar, or as a quoted one."""
    by_set, plain = outcome(in_set, name, text), outcome(in_yaml, name, text)
    if by_set[0] == "is" and not same(by_set[1], meant(kind, text)):
        yield "--set", name, text, by_set
    if plain[0] == by_set[0] == "is" and yaml_text(text) and not same(plain[1], [by_set[1]]):
        yield "plain", name, text, plain, by_set
    if bare(kind) is str and text.isprintable():
        quoted = outcome(in_yaml, name, json.dumps(text, ensure_ascii=False))
        if quoted != ("is", text):
            yield "quoted", name, text, quoted


def yaml_text(text: str) -> bool:
    """Whether YAML's own syntax takes a text as one plain scalar, and leaves its blanks and letters as they are."""
    try:
        node = yaml.compose(f"a: {text}\n", yaml.BaseLoader)
    except yaml.YAMLError:
        return False
    return isinstance(node, yaml.MappingNode) and len(node.value) == 1 and getattr(node.value[0][1], "value", None) == text


def same(value: Any, choices: list[Any]) -> bool:
    """Whether a value is one of the choices, in type too."""
    return any(repr(value) == repr(choice) or (value == choice and type(value) is type(choice)) for choice in choices)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("grade.answer_pattern=#### (.+)", "grade.answer_pattern", "#### (.+)"),
        ("grade.answer_pattern=null", "grade.answer_pattern", None),
        ("prompts.student=Solve {problem} and end with ####", "prompts.student", "Solve {problem} and end with ####"),
        ("prompts.student=={problem}", "prompts.student", "={problem}"),
        ("prompts.student=Question: {problem}", "prompts.student", "Question: {problem}"),
        ("prompts.system=None", "prompts.system", "None"),
        ("model.revision=010", "model.revision", "010"),
        ("model.revision=1234567", "model.revision", "1234567"),
        ("source.split=1:30", "source.split", "1:30"),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.batch_traces=16_384", "train.batch_traces", 16384),
        ("source.size=1e6", "source.size", 1_000_000),
        ("model.lora_targets=q_proj, v_proj", "model.lora_targets", ["q_proj", "v_proj"]),
        ("model.lora_targets=[q_proj, v_proj]", "model.lora_targets", ["q_proj", "v_proj"]),
        ("train.betas=.9,0.95", "train.betas", [0.9, 0.95]),
        ("train.gradient_checkpointing=yes", "train.gradient_checkpointing", True),
        ("engines.rollout.placement.labels={zone: no}", "engines.rollout.placement.labels", {"zone": "no"}),
        ("source.options.name=yes", "source.options.name", "yes"),
        ("source.options.revision=010", "source.options.revision", "010"),
        ('source.options.revision="10"', "source.options.revision", "10"),
        ("source.options.min_terms=3", "source.options.min_terms", 3),
        ("source.options={min_terms: 3, operators: [+, '-']}", "source.options", {"min_terms": 3, "operators": ["+", "-"]}),
    ],
)
def test_a_value_is_read_by_the_type_of_its_setting(override, name, value):
    data = resolve(BASE, [override]).model_dump(mode="json")
    assert repr(value_at(name, data)) == repr(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=010", r"rounds: Input should be a valid integer \(got '010'\)"),
        ("seed=1:30", r"seed: Input should be a valid integer"),
        ("rounds=true", "rounds: Input should be a valid integer"),
        ("rounds=0x10", "rounds: Input should be a valid integer"),
        ("rounds=8.5", "rounds: Input should be a valid integer"),
        ("rounds=null", "rounds: cannot be null"),
        ("train.learning_rate=1:30", "train.learning_rate: Input should be a valid number"),
        ("train.learning_rate=1e999", "finite number"),
        ("train.gradient_checkpointing=2", "Input should be true or false"),
        ("prompts.system=", "prompts.system: is empty. .*null for none"),
        ('grade.answer_pattern="#### (.+)"', "stands in quotes"),
        ("model.lora_targets=q_proj,,v_proj", "has an item that is empty"),
        ("model.lora_targets=[q_proj] # mine", "text stands behind the brackets"),
        ("source.uri=null", "source.uri: cannot be null"),
        ("source.uri=caf\udce9.jsonl", r"source.uri: is no UTF-8 text \(got 'caf"),
        ("source.options.a=caf\udce9", "source.options.a: is no UTF-8 text"),
        ("rounds.=3", "an override is written name.part=value"),
        ("source.options.=3", "an override is written name.part=value"),
    ],
)
def test_what_could_mean_two_things_is_refused(override, message):
    with pytest.raises(SettingError, match=message):
        resolve(BASE, [override])


def test_a_later_layer_has_the_last_word():
    assert resolve(BASE, ["rounds=3", "seed=1", "rounds=4"]).rounds == 4
    assert resolve(BASE, ["label={gamma: 1, floor: 0}", "label.gamma=2"]).label.gamma == 2


def test_a_label_may_have_dots_in_its_name():
    run = resolve(BASE, ["engines.rollout.placement.labels.ray.io/accelerator-type=A100"])
    assert run.engines.rollout.placement.labels == {"ray.io/accelerator-type": "A100"}


def test_one_setting_of_an_entry_of_a_list_is_changed_also_when_the_list_is_new():
    rewards = "grade.rewards=[{name: a, function: accuracy}, {name: b, function: format, settings: {pattern: x}}]"
    run = resolve(BASE, [rewards, "grade.rewards.a.weight=2", "grade.rewards.b.settings.whole=no"])
    assert [reward.weight for reward in run.grade.rewards] == [2.0, 1.0]
    assert run.grade.rewards[1].settings == {"pattern": "x", "whole": "no"}
    with pytest.raises(SettingError, match=r"grade\.rewards\.c: unknown setting"):
        resolve(BASE, [rewards, "grade.rewards.c.weight=2"])
    with pytest.raises(SettingError, match=r"grade\.rewards\.a\.wait: unknown setting"):
        resolve(BASE, [rewards, "grade.rewards.a.wait=2"])


def test_aliases_repeat_parts_and_never_without_end():
    lines = ["a0: &a0 [1, 2]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 6))]
    document = "source: {options: {" + ", ".join(lines) + "}}\nlabel: {gamma: &g 1}\nobjective: {gamma: *g}\n"
    assert read_document(Run, document, "mine.yaml")["source"]["options"]["a1"] == [[1, 2], [1, 2]]
    lines += [f"b{i}: &b{i} [{', '.join(9 * ['*a5' if i == 0 else f'*b{i - 1}'])}]" for i in range(9)]
    with pytest.raises(SettingError, match="has more than 100000 parts"):
        read_document(Run, "source: {options: {" + ", ".join(lines) + "}}\n", "mine.yaml")
    with pytest.raises(SettingError, match="has more than 100000 parts"):
        read_override(Run, "source.options={" + ", ".join(lines) + "}")


def test_settings_in_whole_sections_are_named():
    assert named(["evaluation={samples: 4, source: {split: test}}", "seed=1"]) == {
        "evaluation.samples",
        "evaluation.source.split",
        "seed",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: 3\nseed: 1\nrounds: 4\n", r"mine.yaml:3, rounds: is given twice, first in line 1"),
        ("label:\n  gamma: 1\n  gamma: 2\n", r"mine.yaml:3, label.gamma: is given twice, first in line 2"),
        ("label: {gamma: 1}\nlabel: {floor: 0}\n", r"mine.yaml:2, label: is given twice, first in line 1"),
        ("source:\n  options: {a: 1, a: 2}\n", r"mine.yaml:2, source.options.a: is given twice"),
        ("label:\n  gama: 1\n", r"mine.yaml:2, label.gama: unknown setting. Did you mean 'label.gamma'"),
        ("rounds: 010\n", "mine.yaml:1, rounds: Input should be a valid integer"),
        ("label:\n", "mine.yaml:1, label: has no value"),
        ("label:\n- 1\n", "mine.yaml:2, label: holds several settings"),
        ("grade:\n  answer_pattern: #### (.+)\n", "mine.yaml:2, grade.answer_pattern: has no value; in a file what follows #"),
        ("prompts:\n  student: Solve {problem} end with #### x\n", "mine.yaml:2, prompts.student: what follows the text"),
        ("seed: !!int '3'\n", "mine.yaml:1, seed: has the YAML tag"),
        ("rounds: 3\n---\nrounds: 4\n", "is not YAML"),
        ("rounds: [3\n", "is not YAML"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("? [a]\n: 1\n", "has a name that is not text"),
        ("source: {options: {a: &a [*a]}}\n", "nested too deeply"),
        ('source: {uri: "a\\ud800b"}\n', "mine.yaml:1, source.uri: is no UTF-8 text"),
        ('source: {options: {"\\ud800": 1}}\n', "mine.yaml:1, source.options: is no UTF-8 text"),
        ("rounds:\n  x: 3\n", "rounds: is one value, not a list or a section"),
    ],
)
def test_a_files_mistake_is_named_with_its_line(text, message):
    with pytest.raises(SettingError, match=message):
        read_document(Run, text, "mine.yaml")


def test_a_file_reads_comments_and_every_way_to_write_a_text():
    text = """
# mine
rounds: 3  # three
label: {gamma: 1e-1, lookahead: no}
prompts:
  student: |-
    Question: {problem}
    #### at the end
  system: "be # brief"
  teacher: ={problem} {solution}
model: {revision: 010, lora_targets: [q_proj, v_proj]}
engines: {score: {max: 2}}
grade: {answer_pattern: '#### (.+)'}
evaluation: {source: {split: null_split, solution: ""}}
"""
    run = resolve(BASE, [], read_document(Run, text, "mine.yaml"))
    assert (run.rounds, run.label.gamma, run.label.lookahead) == (3, 0.1, False)
    assert run.prompts.student == "Question: {problem}\n#### at the end"
    assert (run.prompts.system, run.prompts.teacher) == ("be # brief", "={problem} {solution}")
    assert (run.model.revision, run.model.lora_targets) == ("010", ("q_proj", "v_proj"))
    assert (run.engines.score, run.grade.answer_pattern) == (Pool(max=2), "#### (.+)")
    assert (run.evaluation.source.split, run.evaluation.source.solution) == ("null_split", "")


odd_texts = st.one_of(st.sampled_from(SURPRISES), st.text(max_size=20)).map(lambda text: text.encode("utf-8", "replace").decode())


@given(odd_texts, odd_texts, st.dictionaries(odd_texts, odd_texts, max_size=3), st.floats(1e-12, 1e12))
def test_what_a_run_prints_is_read_as_the_same_run(system, pattern, options, rate):
    changed = {
        "prompts": {"student": "{problem}" + system, "system": system},
        "grade": {"answer_pattern": pattern},
        "train": {"learning_rate": rate},
        "source": {"options": options},
    }
    run = load(BASE.model_dump(mode="json") | changed)
    shown = run.to_yaml()
    assert load(read_document(Run, shown, "shown.yaml")) == run
    assert load(yaml.safe_load(shown)) == run
    assert resolve(recipes.demo(), [], read_document(Run, shown, "shown.yaml")).prompts.student == run.prompts.student


def test_every_recipe_prints_what_a_file_reads():
    for name in recipes.descriptions():
        run = recipes.recipe(name)
        assert load(read_document(Run, run.to_yaml(), "shown.yaml")) == run
        assert math.isclose(run.train.learning_rate, yaml.safe_load(run.to_yaml())["train"]["learning_rate"])
