"""A tokenizer is loaded from a folder, and its hash sees template and vocabulary."""

from __future__ import annotations

import pytest

from pipeline.config import Model
from pipeline.errors import ModelError
from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of
from pipeline.models.warmstart import build_tokenizer
from pipeline.stages.chat import student_prompt


def test_loading_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    saved = build_tokenizer()
    saved.save_pretrained(tmp_path / "good")
    loaded = tokenizer_of(Model(path=str(tmp_path / "good")))
    assert student_prompt(loaded, "1+1") == student_prompt(saved, "1+1")
    assert template_hash(loaded) == template_hash(saved)
    with pytest.raises(ModelError, match="no such folder"):
        tokenizer_of(Model(path=str(tmp_path / "missing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        tokenizer_of(Model(path=str(tmp_path / "empty")))
    saved.chat_template = None
    saved.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer_of(Model(path=str(tmp_path / "bare")))


def test_the_hash_sees_template_and_vocabulary(chatml):
    base = build_tokenizer()
    other_template, other_vocabulary = build_tokenizer(), build_tokenizer()
    other_template.chat_template += " "
    other_vocabulary.add_tokens(["extra"])
    hashes = {template_hash(t) for t in (base, other_template, other_vocabulary, chatml)}
    assert len(hashes) == 4
    assert template_hash(build_tokenizer()) == template_hash(base)
