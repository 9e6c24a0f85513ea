"""The content of a model is known by its files, wherever they lie. Each part of it that a run reads changes a hash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from pipeline.config import Model
from pipeline.models import content
from pipeline.models.content import Content, content_of, sampled_hash
from pipeline.models.resolve import asset_path


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped reasoner."""
    return Path(shutil.copytree(asset_path(), tmp_path / "base"))


def seen(path: object) -> Content:
    found = content_of(Model(path=str(path)))
    assert found is not None
    return found


def test_the_same_files_at_another_place_and_time_are_the_same_content(folder, tmp_path):
    before = seen("tiny-reasoner")
    assert before == seen(folder)
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= before.files.keys()
    assert before.weights.keys() == {"model.safetensors"}
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "README.md").write_text("says nothing to a model")
    (tmp_path / "link").symlink_to(folder.rename(tmp_path / "elsewhere"))
    assert seen(tmp_path / "link") == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_an_edited_small_file_is_another_content(folder, name):
    before = seen(folder)
    (folder / name).write_text((folder / name).read_text() + " ")
    after = seen(folder)
    assert {file for file in before.files if before.files[file] != after.files[file]} == {name}
    assert after.weights == before.weights


def test_every_tensor_is_looked_at_so_a_fine_tuned_one_of_many_is_seen(tmp_path):
    """Three samples of a file would pass by what lies between them."""
    file = tmp_path / "model.safetensors"
    tensors = {f"layers.{i}.weight": np.full((64, 512), i, np.float32) for i in range(40)}
    save_file(tensors, file)
    before = sampled_hash(file)
    for name in ("layers.7.weight", "layers.31.weight"):
        save_file(tensors | {name: tensors[name] + 0.001}, file)
        assert sampled_hash(file) != before
    save_file(tensors, file)
    assert sampled_hash(file) == before
    assert sampled_hash(file, most=4) != before  # fewer pieces of a model with very many files


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"version https://git-lfs.github.com/spec/v1\n",
        (9).to_bytes(8, "little") + b'{"a": [1]',
        *(
            (len(text)).to_bytes(8, "little") + text
            for text in (b"[1]", b'{"a": {"data_offsets": [1e999, -1e300]}}', b"{" * 5000)
        ),
        *(
            (len(text)).to_bytes(8, "little") + text
            for text in (b'{"a": {"data_offsets": [-9, -9]}}', b'{"a": {"data_offsets": 5}}')
        ),
    ],
)
def test_a_file_that_is_no_safetensors_has_a_hash_all_the_same(tmp_path, data):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    first = sampled_hash(file)
    file.write_bytes(data + b"more")
    assert sampled_hash(file) != first


def test_a_hubs_model_is_known_by_the_commit_of_its_local_copy(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Model(path="someone/reasoner")
    assert content_of(model) is None
    copy = tmp_path / "hub" / "models--someone--reasoner"
    (copy / "refs").mkdir(parents=True)
    commit = "a" * 40
    (copy / "refs" / "main").write_text(commit)
    shutil.copytree(folder, copy / "snapshots" / commit)
    found = content_of(model)
    assert found == Content(commit, seen(folder).files, seen(folder).weights)
    assert content_of(model.model_copy(update={"revision": commit})) == found
    assert content_of(model.model_copy(update={"revision": "other"})) is None


def test_what_cannot_be_read_is_not_known(folder, monkeypatch):
    def fail(*_):
        raise PermissionError("no")

    monkeypatch.setattr(content, "sampled_hash", fail)
    assert content_of(Model(path=str(folder))) is None
    weightless = content_of(Model(path=str(folder)), weights=False)
    assert weightless is not None
    assert weightless.weights == {}


def test_no_large_package_is_imported_for_a_folder():
    code = "import sys; from pipeline.config import Model; from pipeline.models.content import content_of; content_of(Model())\n"
    code += "print(sorted({'torch', 'transformers', 'ray', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == []
