"""Tokens without transformers are the tokens that transformers reads."""

import json

from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.models.tokenizers.vocabulary import Vocabulary, token_reader
from pipeline.recipes import demo
from pipeline.report.sampled.tokens import pieces


def test_the_shipped_vocabulary_reads_as_with_transformers():
    tokenizer = tokenizer_of(demo().model)
    plain, ids = Vocabulary(str(asset_path())), range(len(tokenizer) + 2)
    assert pieces(plain, ids) == pieces(tokenizer, ids)
    assert token_reader(demo().model) is tokenizer


def test_a_byte_level_vocabulary_gives_text_or_bytes(tmp_path):
    document = {
        "model": {"vocab": {"Ġa": 0, "Ã": 1, "Ã©": 2}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "added_tokens": [{"id": 3, "content": "<eos>", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    read = pieces(Vocabulary(str(tmp_path)), [0, 1, 2, 3, 4])
    assert [tuple(piece) for piece in read] == [
        (" a", "text"),
        ("C3", "bytes"),
        ("é", "text"),
        ("<eos>", "special"),
        ("id 4", "bytes"),
    ]


def test_a_folder_without_a_tokenizer_shows_numbers(tmp_path):
    assert pieces(Vocabulary(str(tmp_path)), [7])[0].text == "id 7"
