"""Runs stages over a few shards in threads of this process. No Ray.

A task of Ray Data costs a process that imports for seconds before its first row. A thread that waits for an engine costs nothing.
Stages that compute on the CPU take turns, since they share an interpreter, and since one grader serves one thread at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue

from pipeline.problems.sources import ProblemSet
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.rounds.running.shard import Item, bring_item
from pipeline.stages import STAGES

_TURN = threading.Lock()  # of the stages that compute on the CPU of this process


def stream(
    work: Round, chain: Sequence[str], source: ProblemSet | None, items: Sequence[Item], force: bool, threads: int
) -> Iterator[Item]:
    """Each item after it went through the chain, as soon as it is done. At most `threads` of them are under way at one time.

    The threads end with this process: one that waits for an engine must not keep a command from ending. When the caller stops
    early, no thread begins another stage.

    Raises the error of a stage that is not one of the project's own. The project's own errors travel in their items.
    """
    inside = replace(work, shards={})
    waiting, done, ended = deque(items), SimpleQueue[Item | BaseException](), threading.Event()

    def through(item: Item) -> Item:
        """One item after all stages of the chain, or after the last one that was begun."""
        for name in chain:
            if item["error"] or ended.is_set():
                break
            stage = STAGES[name]
            with _TURN if stage.where == "CPU" else contextlib.nullcontext():
                item = bring_item(Inventory(inside, whole=False), name, None if stage.reads else source, force, item)
        return item

    def work_off() -> None:
        """Take items until none waits."""
        while not ended.is_set():
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                done.put(through(item))
            except BaseException as error:  # the caller's thread raises it
                done.put(error)

    for number in range(min(threads, len(items))):
        threading.Thread(target=work_off, name=f"egrsd-shards-{number}", daemon=True).start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        ended.set()
