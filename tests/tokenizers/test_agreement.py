"""Tokenizers of student and teacher: equal ids, ends and special tokens, or the first difference in words."""

import copy
import json
import shutil

import pytest

from pipeline.errors import ModelError
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.agreement import check_teachers, difference, shared_size
from pipeline.models.warmstart import build_tokenizer
from pipeline.overrides import resolve
from pipeline.recipes import demo

TINY = build_tokenizer()


def test_the_first_difference_is_told(chatml):
    assert difference(TINY, TINY) == ""
    assert shared_size(TINY) == 57
    assert difference(TINY, chatml).startswith("id 0 is '<pad>', and for the teacher '")
    more = copy.deepcopy(TINY)
    more.add_tokens(["zz"])
    assert difference(TINY, more) == "id 57 is nothing, and for the teacher 'zz'"
    other = copy.deepcopy(TINY)
    other.eos_token = "<pad>"
    assert difference(TINY, other) == "a response ends with id 2 '<eos>', and for the teacher with 0 '<pad>'"


def test_another_chat_template_is_no_difference():
    other = copy.deepcopy(TINY)
    other.chat_template = "{{ messages[0].content }}"
    assert difference(TINY, other) == ""


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_starts(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(asset_path(), folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    run = resolve(demo(), [f"teachers.big.model={folder}"])
    with pytest.raises(ModelError, match=r"teachers\.big, .*other: its tokenizer .*: id 11 is '7', and for the teacher '8'"):
        check_teachers(run)
    with pytest.raises(ModelError, match="there is no such folder"):
        check_teachers(resolve(demo(), ["teachers.big.model=/no/such/model"]))
