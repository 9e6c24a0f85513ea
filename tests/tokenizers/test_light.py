"""A light tokenizer gives the very ids, texts and facts of the tokenizer of transformers that it was made from."""

import base64
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Model
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.light import LightTokenizer, read_light
from pipeline.models.tokenizers.read_tokenizer import facts_of
from pipeline.models.tokenizers.tokenizer import _of_transformers, template_hash, tokenizer_of
from pipeline.models.warmstart import build_tokenizer
from pipeline.report.sampled.tokens import pieces
from pipeline.stages.chat import controls, response_ids, student_prompt


def llama():
    """A SentencePiece vocabulary with bytes, as Llama 2 has it."""
    from transformers import LlamaTokenizer

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(params=["tiny", "chatml", "llama"])
def whole(request, chatml):
    """A tokenizer of transformers."""
    return {"tiny": build_tokenizer, "chatml": lambda: chatml, "llama": llama}[request.param]()


def light_of(whole):
    return LightTokenizer(json.loads(json.dumps(facts_of(whole))))


def test_ids_texts_and_facts_are_the_same(whole):
    light = light_of(whole)
    ids = range(len(whole))
    for text in ("7+4-3", "ab \u2581 <s> a</s>", "<|im_end|> x", "", " ", "\u00e9\n\t\U0001f600 .", "a , b ."):
        for special in (True, False):
            want = whole(text, add_special_tokens=special)["input_ids"]
            assert light(text, add_special_tokens=special)["input_ids"] == want
            assert light.decode(want, skip_special_tokens=special) == whole.decode(want, skip_special_tokens=special)
        assert response_ids(light, text) == response_ids(whole, text)
    each = [[number] for number in ids]
    assert light.batch_decode(each, skip_special_tokens=True) == whole.batch_decode(each, skip_special_tokens=True)
    assert pieces(light, ids) == pieces(whole, ids)
    assert light.convert_ids_to_tokens([0, 10**6]) == whole.convert_ids_to_tokens([0, 10**6])
    assert light.get_vocab() == whole.get_vocab()
    assert len(light) == len(whole)
    assert template_hash(light) == template_hash(whole)
    assert controls(light) == controls(whole)
    assert student_prompt(light, "a<s>b") == student_prompt(whole, "a<s>b")
    for name in (
        "eos_token",
        "eos_token_id",
        "pad_token_id",
        "bos_token",
        "unk_token_id",
        "all_special_ids",
        "special_tokens_map",
    ):
        assert getattr(light, name) == getattr(whole, name), name


@given(text=st.text())
def test_any_text_has_the_same_ids_and_comes_back_the_same(text, chatml):
    light = light_of(chatml)
    ids = chatml(text, add_special_tokens=False)["input_ids"]
    assert light(text, add_special_tokens=False)["input_ids"] == ids
    assert light.decode(ids, skip_special_tokens=True) == chatml.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_with_ways_of_its_own_has_no_light_form(chatml):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Own(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    assert facts_of(Own(tokenizer_object=chatml.backend_tokenizer)) is None
    cleaning = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), clean_up_tokenization_spaces=True)
    assert facts_of(cleaning) is None


def test_the_default_of_several_templates_is_taken(chatml):
    facts = facts_of(chatml)
    assert LightTokenizer({**facts, "chat_template": {"default": "x", "tool_use": "y"}}).get_chat_template() == "x"
    with pytest.raises(ValueError, match=r"no default among its chat templates \['tool_use'\]"):
        LightTokenizer({**facts, "chat_template": {"tool_use": "y"}}).get_chat_template()


def test_what_cannot_be_read_has_no_light_form(tmp_path):
    assert read_light(str(tmp_path), None) is None


def test_a_process_that_needs_a_tokenizer_imports_neither_transformers_nor_torch():
    code = "import sys\nfrom pipeline.config import Model\n"
    code += "from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of\n"
    code += "print(template_hash(tokenizer_of(Model())), sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [template_hash(tokenizer_of(Model())), "[]"]
    assert template_hash(read_light(str(asset_path()), None)) == template_hash(build_tokenizer())


def test_its_files_are_those_of_transformers(tmp_path):
    tokenizer_of(Model()).save_pretrained(str(tmp_path))
    assert template_hash(read_light(str(tmp_path), None)) == template_hash(tokenizer_of(Model()))


def test_mistrals_own_file_beside_the_tokenizer_hides_no_chat_template(tmp_path, chatml):
    """Transformers takes tekken.json where it is, and Mistral's tokenizer has no chat template: the model was refused for it."""
    from transformers import MistralConfig

    MistralConfig().save_pretrained(tmp_path)
    chatml.save_pretrained(tmp_path)
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode(), "token_str": None} for rank in range(256)]
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 300, "default_num_special_tokens": 44, "version": "v3"}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"pattern": ".", **sizes}, "vocab": vocab}))
    model = Model(path=str(tmp_path))
    for found in (read_light(str(tmp_path), None), _of_transformers(model)):
        assert template_hash(found) == template_hash(chatml)
    tokenizer_of(model).save_pretrained(str(tmp_path / "out"))
    assert template_hash(read_light(str(tmp_path / "out"), None)) == template_hash(chatml)
