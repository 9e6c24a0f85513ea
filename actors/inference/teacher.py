"""The engine of a teacher that is another model than the student.

It takes no adapters. Models of one family pad the vocabulary to different sizes. Ids beyond those of the tokenizer have no token.
Their logits are cut off, so that log-probs and entropies are over the vocabulary that student and teacher share. The student's
numbers stay as they are, with its own padding, since its trainer has these rows too. A trained model gives such rows next to no
mass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from actors.inference.engine import Engine
from actors.pool.member import EngineClass
from actors.served import Served
from pipeline import config
from pipeline.contract import EngineFacts
from pipeline.errors import EngineError
from pipeline.models.tokenizers.agreement import shared_size
from pipeline.models.tokenizers.tokenizer import tokenizer_of


def teacher_engine(name: str, teacher: config.Teacher, engine_class: EngineClass | None = None) -> EngineClass:
    """What makes an engine of a teacher: the client of its server, one of another model, or one of the student's.

    `engine_class` answers instead of vLLM in tests.
    """
    if teacher.server:
        return partial(Served, name, teacher)
    return engine_class or (TeacherEngine if teacher.model else Engine)


class TeacherEngine(Engine):
    """A vLLM engine of another model, over the ids of its tokenizer."""

    takes_adapters = False

    def _start(self) -> tuple[Any, EngineFacts]:
        engine, facts = super()._start()
        shared = shared_size(tokenizer_of(self._model))
        if shared > facts.vocab_size:
            what = f"its tokenizer has {shared} ids, and the model has {facts.vocab_size}"
            raise EngineError(what, self._path, "Take the tokenizer that belongs to the model")
        if shared < facts.vocab_size and not all(engine.apply_model(partial(_cut_logits, shared))):
            raise EngineError(f"its {facts.vocab_size - shared} padded ids cannot be cut off", self._path, "Take another vLLM")
        return engine, replace(facts, vocab_size=shared)


def _cut_logits(size: int, model: Any) -> bool:
    """Have vLLM cut the logits of a model behind the first `size` ids. Whether the model has a place that does so."""
    found = [module for module in model.modules() if hasattr(module, "org_vocab_size") and hasattr(module, "soft_cap")]
    for module in found:
        module.org_vocab_size = size
    return bool(found)
