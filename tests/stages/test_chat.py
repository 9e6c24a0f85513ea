"""Prompts through real tokenizers: the tiny reasoner's, and one with a ChatML template that knows `enable_thinking`."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from pipeline.config import Model
from pipeline.errors import ModelError, SettingError
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems import tiny
from pipeline.stages.chat import (
    context_prompt,
    controls,
    fill,
    fits,
    response_ids,
    splice,
    student_prompt,
    turn_ends,
    turn_stops,
    turns_before,
    unheard_end,
)

TEACHER = "{problem} || {solution}"


def teacher_prompt(tokenizer, problem, solution, template, system=None):
    return context_prompt(tokenizer, {"problem": problem, "solution": solution}, template, system)


def test_the_tiny_reasoners_prompts_are_what_its_warm_start_saw():
    tokenizer = build_tokenizer()
    ids = student_prompt(tokenizer, "7+4", tiny.STUDENT_PROMPT)
    assert tokenizer.decode(ids) == "<bos>7+4\n"
    assert all(type(token) is int for token in ids)
    privileged = teacher_prompt(tokenizer, "7+4", "7+4=11#11", tiny.TEACHER_PROMPT)
    assert tokenizer.decode(privileged) == "<bos>7+4|7+4=11#11\n"


def test_system_message_and_thinking_reach_the_template(chatml):
    plain = chatml.decode(student_prompt(chatml, "2+2?"))
    assert plain == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    briefed = chatml.decode(student_prompt(chatml, "2+2?", system="Be brief.", thinking=False))
    assert briefed.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?")
    assert briefed.endswith("assistant\n<think></think>")


def test_templates_that_cannot_work_are_named(chatml):
    with pytest.raises(SettingError, match=r"prompts\.student: lacks \{problem\}"):
        student_prompt(chatml, "x", "Answer.")
    with pytest.raises(SettingError, match=r"prompts\.student: holds \{solution\}"):
        student_prompt(chatml, "x", TEACHER)
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks \{solution\}"):
        teacher_prompt(chatml, "x", "y", "{problem}")
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks \{problem\}"):
        teacher_prompt(chatml, "x", "y", "{solution}")


def test_unusable_tokenizers_are_the_users_to_change():
    tokenizer = build_tokenizer()
    with pytest.raises(ModelError, match=r"leave prompts\.system empty"):
        student_prompt(tokenizer, "1+1", system="Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        student_prompt(tokenizer, "1+1")


@given(problem=st.text(), solution=st.text())
def test_filling_never_looks_into_what_it_filled_in(problem, solution):
    for text in (problem, f"{problem}{{solution}}", f"{{problem}}{problem}", "{} {0} {problem!r}"):
        assert fill("A {problem} B {solution} C {x} {{", text, solution).text == f"A {text} B {solution} C {{x}} {{{{"


@given(prompt=st.lists(st.integers(0, 10)), response=st.lists(st.integers(0, 10)))
def test_a_splice_keeps_both_parts(prompt, response):
    joined = splice(prompt, response)
    assert joined[: len(prompt)] == prompt
    assert joined[len(prompt) :] == response


def test_a_prompt_fits_up_to_the_last_token():
    assert fits(192, 64, 256)
    assert not fits(193, 64, 256)


def trained(kind):
    """A fast tokenizer of another kind than bytes, with control tokens and a template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    texts = ["<s> 1 + 2 </s> <|end|> eos < > | / s user end what is"] * 3
    model, trainer = {
        "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)),
        "metaspace": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=80, special_tokens=special)),
    }[kind]
    core = Tokenizer(model)
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace() if kind != "wordpiece" else pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.Metaspace() if kind != "wordpiece" else decoders.WordPiece()
    core.train_from_iterator(texts, trainer)
    template = "<s>{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<think>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.add_tokens(["<think>", "plain"])
    tokenizer.chat_template = template
    return tokenizer


def control_ids(tokenizer, ids):
    """The ids in order that stand for control tokens, without the one for unknown text."""
    texts = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    pattern = controls(tokenizer)
    return [texts[i] for i in ids if i in texts and pattern.fullmatch(texts[i]) and i != tokenizer.unk_token_id]


@pytest.fixture(params=["tiny", "chatml", "unigram", "wordpiece", "metaspace"])
def tokenizer(request, chatml):
    return build_tokenizer() if request.param == "tiny" else chatml if request.param == "chatml" else trained(request.param)


def test_control_tokens_in_a_problem_or_a_solution_are_text(tokenizer):
    own = control_ids(tokenizer, student_prompt(tokenizer, "1+2"))
    texts = {token.content for token in tokenizer.added_tokens_decoder.values()} - {"plain"}
    assert {text for text in texts if controls(tokenizer).fullmatch(text)} == texts
    for token in sorted(texts):
        for problem in (f"1+2{token}-1", token, f"{token}{token}1", f"{token[:3]}{token}"):
            ids = student_prompt(tokenizer, problem)
            assert control_ids(tokenizer, ids) == own, problem
            ids = teacher_prompt(tokenizer, "1", problem, "{problem}|{solution}")
            assert control_ids(tokenizer, ids) == own, problem


def test_a_problem_and_a_template_cannot_spell_a_control_token_together(tokenizer):
    own = control_ids(tokenizer, student_prompt(tokenizer, "1"))
    tokens = {"<eos>", "<|im_end|>", "</s>"} & set(tokenizer.get_vocab())
    assert tokens
    for text in tokens:
        assert control_ids(tokenizer, student_prompt(tokenizer, text[1:-1], "<{problem}>")) == own


def test_a_prompt_template_of_the_settings_may_write_control_tokens(chatml):
    ids = student_prompt(chatml, "2<|im_end|>", "{problem}<|im_end|>\n<|im_start|>user\nagain")
    assert control_ids(chatml, ids).count("<|im_end|>") == 2  # the template's, and the chat template's
    assert chatml.decode(ids).startswith("<|im_start|>user\n2<|im_end|><|im_end|>\n<|im_start|>user\nagain<|im_end|>")


def test_prompts_without_control_tokens_keep_their_ids(tokenizer):
    for problem in ("1+2", "what is <eo s>", ""):
        messages = [{"role": "user", "content": f"{problem}?"}]
        asked = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": True}
        assert student_prompt(tokenizer, problem, "{problem}?") == tokenizer.apply_chat_template(messages, **asked)


def test_an_added_token_of_white_space_is_text():
    """Gemma has an id for each number of line ends. Every template writes one, so those of a problem were spelled otherwise."""
    tokenizer = trained("metaspace")
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "\n<|end|>")
    ids = student_prompt(tokenizer, "1 + 2\n\nwhat is")
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids if "\n" in tokenizer.convert_ids_to_tokens(i)] == ["\n\n", "\n"]
    assert control_ids(tokenizer, student_prompt(tokenizer, "1 <think> 2")) == control_ids(tokenizer, ids)


TOLD = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Sure?"},
]


def test_a_conversation_goes_through_the_template_as_a_whole(chatml):
    before = turns_before(json.dumps(TOLD), "Be brief.")
    asked = chatml.apply_chat_template(TOLD, add_generation_prompt=True, tokenize=False)
    assert chatml.decode(student_prompt(chatml, "Sure?", "{problem}", before)) == asked
    privileged = chatml.decode(teacher_prompt(chatml, "Sure?", "It is 2.", TEACHER, before))
    assert privileged == asked.replace("Sure?", "Sure? || It is 2.")


def test_the_settings_system_turn_stands_before_a_conversation_without_one():
    assert [turn.role for turn in turns_before(json.dumps(TOLD[1:]), "Be brief.")] == ["system", "user", "assistant"]
    assert [turn.role for turn in turns_before(json.dumps(TOLD[1:]), None)] == ["user", "assistant"]
    assert [turn.role for turn in turns_before(json.dumps(TOLD), "Be brief.")] == ["system", "user", "assistant"]
    assert turns_before(None, None) == []


def test_control_tokens_that_any_turn_spells_are_read_as_text(chatml):
    told = [TOLD[1] | {"content": "1<|im_end|>1?"}, TOLD[2] | {"content": "<|im_start|>2"}, TOLD[3]]
    ids = student_prompt(chatml, "Sure<|im_end|>?", "{problem}", turns_before(json.dumps(told), None))
    assert ids.count(chatml.convert_tokens_to_ids("<|im_end|>")) == 3
    assert ids.count(chatml.convert_tokens_to_ids("<|im_start|>")) == 4
    assert "1<|im_end|>1?" in chatml.decode(ids)


def test_an_imported_trace_ends_once_and_keeps_the_tokens_that_a_model_writes(chatml):
    end = chatml.eos_token_id
    plain = response_ids(chatml, "It is 2.")
    assert plain == [*chatml("It is 2.", add_special_tokens=False)["input_ids"], end]
    assert response_ids(chatml, f"It is 2.{chatml.eos_token}\n") == plain
    assert response_ids(chatml, " \n") == response_ids(chatml, chatml.eos_token) == []
    spelled = response_ids(chatml, f"a{chatml.eos_token}b")
    assert spelled.count(end) == 1
    assert chatml.decode(spelled[:-1]) == f"a{chatml.eos_token}b"


GEMMA = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{# <|user|> <|assistant|> #}"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
)
LLAMA_2 = "{% for m in messages %}{{ m.content }} {{ eos_token if m.role == 'assistant' }}{% endfor %}"


def speaking(chatml, template, *tokens):
    """A copy of the ChatML tokenizer with another template, with control tokens of its own, and <eos> for an end of sequence."""
    made = copy.deepcopy(chatml)
    made.add_special_tokens({"additional_special_tokens": list(tokens), "eos_token": "<eos>"})
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "tokens", "ends"),
    [
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)),
        (GLM, ("<|user|>", "<|assistant|>"), ("<|user|>",)),  # a turn ends with the role of the next one
        (HARMONY, ("<|start|>", "<|message|>", "<|return|>", "<|end|>"), ("<|return|>", "<|end|>")),
        (LLAMA_2, (), ("<eos>",)),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", (), ()),
        ("{{ raise_exception('one turn only') if messages | length > 1 }}{{ messages[0].content }}", (), ()),
    ],
)
def test_an_imported_trace_ends_as_the_model_ends_a_turn(chatml, tmp_path, template, tokens, ends):
    """Gemma's tokenizer says <eos>, and the model writes <end_of_turn>: each trace taught an end that it never wrote."""
    made = speaking(chatml, template, *tokens)
    made.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    vocab, model = made.get_vocab(), Model(path=str(tmp_path))
    assert turn_ends(made) == ends
    assert turn_stops(model) == {vocab[end]: end for end in ends if end == "<eos>"}
    assert (unheard_end(model) is not None) == (bool(ends) and ends[0] != "<eos>")
    GenerationConfig(eos_token_id=[vocab[end] for end in ends] or None).save_pretrained(tmp_path)
    assert list(turn_stops(model).values()) == list(ends)
    assert unheard_end(model) is None
    plain, last = made("It is 2.", add_special_tokens=False)["input_ids"], (*ends, "<eos>")[0]
    for text in ("It is 2.", f"It is 2.{last}\n", "It is 2.<eos>"):
        assert response_ids(made, text, turn_stops(model)) == [*plain, vocab[last]]
        assert response_ids(made, text) == [*plain, vocab["<eos>"]]
    assert response_ids(made, last, turn_stops(model)) == []


def test_a_turn_s_end_that_no_file_names_is_told(chatml, tmp_path):
    """Base models of Qwen have a ChatML template, and all their files say <|endoftext|>: traces ran on past <|im_end|>."""
    speaking(chatml, chatml.chat_template).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    note = unheard_end(Model(path=str(tmp_path))) or ""
    assert note.startswith(f"note: {tmp_path}: its chat template ends a turn with <|im_end|>, and neither tokenizer nor model")
    assert unheard_end(Model()) is None


def test_a_trace_that_nothing_ends_is_refused(chatml):
    made = speaking(chatml, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    made.eos_token = None
    with pytest.raises(ModelError, match="neither its chat template nor its tokenizer names a token that ends a trace"):
        response_ids(made, "It is 2.")
