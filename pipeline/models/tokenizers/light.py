"""A tokenizer without transformers: the Rust core that transformers itself calls, and the few facts that the project reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.models.tokenizers import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken


class LightTokenizer:
    """A tokenizer of transformers as the project uses it. Ids and texts are the same; the tests compare them.

    The attributes that `pipeline.models.tokenizers.read_tokenizer.facts_of` names are attributes here too.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        """`facts`: what `facts_of` tells of a tokenizer."""
        from tokenizers import Tokenizer  # a light installation, which only reads runs, does not have it

        self._facts, self._core = facts, Tokenizer.from_str(facts["core"])
        self._core.encode_special_tokens = facts["split_special_tokens"]
        self._core.no_truncation()
        self._core.no_padding()

    def __reduce__(self) -> tuple[type[LightTokenizer], tuple[dict[str, Any]]]:
        return LightTokenizer, (self._facts,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._facts:
            raise AttributeError(f"a LightTokenizer has no '{name}'")
        return self._facts[name]

    def __len__(self) -> int:
        return int(self._core.get_vocab_size())

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of a text, under `input_ids`."""
        return {"input_ids": self._core.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> list[str]:
        """The text of each sequence of ids. No spaces are cleaned up: such tokenizers have no light form."""
        if clean_up_tokenization_spaces:
            raise ValueError("a LightTokenizer cleans no spaces up")
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The entry of the vocabulary for each id; None for an id without one."""
        return [self._core.id_to_token(int(number)) for number in ids]

    def save_pretrained(self, folder: str) -> None:
        """Write the files of this tokenizer into a folder, as transformers does."""
        from transformers import AutoTokenizer

        revision = self._facts.get("revision")
        AutoTokenizer.from_pretrained(self.name_or_path, revision=revision, **read_tokenizer.OPTIONS).save_pretrained(folder)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, also the added ones."""
        return dict(self._core.get_vocab(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by their ids."""
        return dict(self._core.get_added_tokens_decoder())

    def get_chat_template(self) -> str:
        """The chat template; the default one where there are several. Raises ValueError when there is no default."""
        template = self.chat_template
        if not isinstance(template, dict):
            return str(template)
        if "default" not in template:
            raise ValueError(f"this model has no default among its chat templates {sorted(template)}")
        return str(template["default"])


def read_light(path: str, revision: str | None, offline: bool = False) -> LightTokenizer | None:
    """The tokenizer at a path or hub id, read in a process of its own. With `offline` the hub is not asked.

    None when it has no light form, or when it cannot be read: transformers in this process then tells why.
    """
    command = [sys.executable, "-P", read_tokenizer.__file__]
    asked = json.dumps({"path": path, "revision": revision})
    environment = os.environ | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, env=environment)
    try:
        facts = json.loads(done.stdout) if done.returncode == 0 else None
        return LightTokenizer(facts) if facts is not None else None
    except ValueError:
        return None
