"""Do the engines of a teacher with weights of its own compute the model that transformers computes? Asked before round 0.

The first rank loads such a teacher once, on its CPU, writes what it answers to a fixed sequence, and drops it. The driver has the
teacher's engines score the same. A teacher that does not fit into half of the free memory, or that transformers cannot load, is
left out with a line. So are servers, whose weights are elsewhere. base_model.py asks the same of the student's model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from pipeline.config import Model, Run
from pipeline.contract import Engines, Failure, Policy, Sequence
from pipeline.errors import EngineError, ModelError, TrainingError, first_line
from pipeline.fit import footprint
from pipeline.fit.machine import GIB, free_memory
from pipeline.models.blueprint import settings_of
from pipeline.models.resolve import MODEL_NAME, open_model
from pipeline.notices import NOTICE_S, late
from pipeline.store.directory import Store
from pipeline.store.documents import Document, Text
from pipeline.training.agreement.base_model import ROOM, awaited
from pipeline.training.student.whole import Logprobs, Tokens, sequence

log = logging.getLogger(__name__)

FILE = "train/teachers.json"
# What transformers and torch raise for weights that only an engine computes with.
_NOT_HERE = (ModelError, RuntimeError, ValueError, ImportError, AttributeError, KeyError, TypeError)


class Answer(Document):
    """Ids of a sequence, and a teacher's log-probs in nats of all but the first. Or why the teacher was not asked."""

    tokens: Tokens = ()
    logprobs: Logprobs = ()
    left_out: Text = ""


class Answered(Document):
    """train/teachers.json: an answer for each teacher of `asked`, by the teacher's name."""

    answers: dict[str, Answer]


def asked(run: Run) -> dict[str, Model]:
    """The teachers with other weights than the student's base and engines of their own, by name. The model that ships is right.

    Empty where trainer and engine take turns on one card: the trainer starts after a round there.
    """
    if run.engines.rollout.colocate:
        return {}
    models = {name: run.model_of(teacher) for name, teacher in run.teachers.items() if not teacher.server}
    known = (run.model.path, run.model.revision)
    return {name: model for name, model in models.items() if model.path != MODEL_NAME and (model.path, model.revision) != known}


def tell(run: Run, store: Store) -> None:
    """Write what each teacher of `asked` answers on this CPU. One rank calls this."""
    if models := asked(run):
        store.write_json(FILE, {"answers": {name: _answer(model) for name, model in models.items()}})


def _answer(model: Model) -> dict[str, object]:
    """The fields of an Answer."""
    import torch  # the driver imports this module, and takes seconds to import torch. A light install lacks all three
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from pipeline.training.student.student import attention_for

    try:
        need, free = footprint.weight_bytes(footprint.measure(model), model.dtype), free_memory()
        if need > free / 2:
            return {"left_out": f"{need / GIB:.3g} GiB of weights are more than half of the {free / GIB:.3g} GiB that are free"}
        more = attention_for(settings_of(model))
        net = open_model(AutoModelForCausalLM, model, "weights", dtype=getattr(torch, model.dtype), **more).eval()
        tokens = sequence(net.get_input_embeddings().num_embeddings, model.max_model_len)
        ids = torch.tensor(tokens)
        with torch.inference_mode():
            logprobs = net(ids[None]).logits[0, :-1].float().log_softmax(-1)
        if not logprobs.isfinite().all():
            return {"left_out": f"its log-probs on this CPU are not finite in {model.dtype}"}
        return {"tokens": tokens, "logprobs": logprobs.gather(1, ids[1:, None])[:, 0].tolist()}
    except (*_NOT_HERE, SafetensorError) as error:
        return {"left_out": f"transformers cannot compute it on this CPU ({first_line(error)[:300]})"}


def compare(store: Store, run: Run, engines: Mapping[str, Engines], look: Callable[[], None]) -> Iterator[str]:
    """Wait for the first rank's answers, and compare each with that of the teacher's engines. Yields a line for each left out.

    `look` raises when the trainer ended. Raises TrainingError when an engine answers otherwise than transformers, and EngineError
    when it cannot score the sequence. A fake engine is not asked.
    """
    if not (models := asked(run)):
        return
    with late("teachers", f"the trainer loads the teachers, to compare their engines: the run has waited {NOTICE_S:g} s."):
        told = awaited(store, FILE, Answered, look)
    for name, model in models.items():
        pool, answer = engines.get(f"teachers.{name}"), told.answers.get(name)
        if pool is None or answer is None or pool.facts().engine == "fake":
            continue
        if answer.left_out:
            yield f"teachers.{name} is not compared with transformers: {answer.left_out}"
            continue
        _check(run.model_copy(update={"model": model}), name, pool, answer)


def _check(run: Run, name: str, pool: Engines, expected: Answer) -> None:
    """Raise TrainingError when a teacher's engines are further from `expected` than ten times the gap that its dtype may have."""
    [found] = pool.score([Sequence(list(expected.tokens[:1]), list(expected.tokens[1:]))], Policy(0))
    if isinstance(found, Failure):
        raise EngineError(f"cannot score a sequence ({found.cause})", f"teachers.{name}", "Look at its log")
    gaps, most = np.abs(found.logprobs.astype(np.float64) - np.asarray(expected.logprobs)), ROOM * run.accepted_gap[0]
    log.info("teachers.%s: engines and transformers differ by %.2g nat on average (accepted: %.2g)", name, gaps.mean(), most)
    if not gaps.mean() <= most:
        what = (
            f"engines and transformers compute another teacher: their log-probs of {run.model.path} differ by "
            f"{gaps.mean():.2g} nat on average (accepted: {most:.2g}) and by {gaps.max():.2g} at most"
        )
        remedy = "Use another model for this teacher, or another teachers.NAME.dtype. train.logprob_gap sets what is accepted"
        raise TrainingError(what, f"teachers.{name}", remedy)
