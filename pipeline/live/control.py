"""Questions to the driver of a live run, and its answers. Both pass through the run directory, on any store.

    control/<id>.ask.json       The question. The command that asks writes it.
    control/<id>.answer.json    The answer. The driver, which looks once a second, writes it.

The command that asked deletes both. The lease (pipeline.live.lease) says whether a driver lives.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.errors import EgrsdError, UserError, command, first_line, from_data, to_data
from pipeline.live.lease import is_dead, read_lease
from pipeline.store.directory import Store
from pipeline.store.documents import STRICT
from pipeline.store.names import ASK

log = logging.getLogger(__name__)

FOLDER = "control"
LOOK_S, ANSWER_S = 1.0, 30.0
OTHER = "Ask again with the version of the project that the run's driver has"
Document = dict[str, Any]
_QUESTION: TypeAdapter[Document] = TypeAdapter(Document)


class Answer(BaseModel):
    """The driver's answer: an error as `to_data` gives it, or else what was asked for, in keys of its own."""

    model_config = ConfigDict(**STRICT | {"extra": "allow"})
    error: Annotated[list[str], Field(min_length=4, max_length=4)] | None = None


def ask(store: Store, question: Document, patience_s: float = ANSWER_S) -> Document:
    """Ask the driver that works on the run, and return its answer.

    Raises UserError when no driver works on the run, or when it does not answer. Raises the error that the driver answers with.
    """
    lease = read_lease(store)
    if lease is None:
        raise UserError("no command works on this run", store.uri, f"Start it with {command('distill', '--run', store.uri)}")
    if is_dead(lease):
        raise UserError(f"{lease.holder} is dead", store.uri, "Run its command again: it goes on where it was")
    name = f"{FOLDER}/{uuid4().hex}"
    store.write_json(f"{name}.ask.json", question)
    try:
        deadline = time.monotonic() + patience_s
        while (answer := store.read_document(f"{name}.answer.json", Answer, OTHER)) is None:
            if time.monotonic() > deadline:
                remedy = "Engines are up while `egrsd distill` rolls out. It may be starting, or dead, or another verb"
                raise UserError(f"{lease.holder} does not answer", store.uri, remedy)
            time.sleep(LOOK_S / 4)
    finally:
        for kind in ("ask", "answer"):
            store.delete(f"{name}.{kind}.json")
    if answer.error is not None:
        raise from_data(answer.error)
    return answer.model_extra or {}


@contextlib.contextmanager
def answering(store: Store, answer: Callable[[Document], Document]) -> Iterator[None]:
    """Answer questions while a block runs. An error in answering one goes to its asker, and the driver goes on."""
    end = threading.Event()

    def look() -> None:
        """Look for questions until the block ends."""
        while not end.wait(LOOK_S):
            try:
                for name in store.named(FOLDER, ASK):
                    _reply(store, f"{FOLDER}/{name['id']}", answer)
            except EgrsdError as error:  # a disk that is full now may have space at the next look
                log.warning("Questions in %s are not heard: %s", FOLDER, error)

    store.delete(FOLDER)  # questions to an earlier driver that died
    thread = threading.Thread(target=look, name="egrsd-control", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(2 * LOOK_S)
        store.delete(FOLDER)


def _reply(store: Store, name: str, answer: Callable[[Document], Document]) -> None:
    try:
        question = store.read_document(f"{name}.ask.json", _QUESTION, OTHER)
        if question is None:  # its asker has given up
            return
        reply = answer(question)
    except EgrsdError as error:
        reply = {"error": to_data(error)}
    except Exception as error:  # for example a question of another version: its asker gets the error
        log.exception("A question could not be answered")
        reply = {"error": to_data(EgrsdError(f"the run's driver failed ({type(error).__name__}: {first_line(error)})"))}
    store.delete(f"{name}.ask.json")
    store.write_json(f"{name}.answer.json", reply)
