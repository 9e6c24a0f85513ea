"""The child process that compares answers by mathematics. It may be killed at any moment: a hostile answer may take for ever.

The product imports no sympy for it: `mathematics.py` is loaded in the child.
"""

from __future__ import annotations

import logging
import resource
from multiprocessing.connection import Connection
from types import ModuleType

from pipeline.grader.children import allow, done, note

CHILD_MEMORY_BYTES = 4 << 30  # an answer such as 9**9**9 must not take the memory of the machine
GOLD_READ = "gold read"


def serve(pipe: Connection) -> None:
    """The loop of a child: pairs (answer, reference, set_relations, processor seconds) come in, verdicts go out.

    A verdict is (word, detail): correct, wrong, unparsable, `unreadable` when the reference is not mathematics, or `failed`.
    """
    from pipeline.grader import mathematics  # loads sympy and math-verify before the first deadline runs

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    mathematics.read("1")  # the parser of math-verify loads more
    while True:
        try:
            answer, reference, set_relations, processor_s = pipe.recv()
        except (EOFError, OSError):
            return
        allow(processor_s)
        try:
            verdict = _judge(mathematics, pipe, answer, reference, set_relations, processor_s)
        except Exception as error:  # the reference alone failed
            verdict = ("failed", f"{type(error).__name__}: {error}"[:300])
        allow(0)
        done(pipe, verdict)


def _judge(
    maths: ModuleType, pipe: Connection, answer: str, reference: str, set_relations: bool, processor_s: float
) -> tuple[str, str]:
    gold = maths.read(reference)
    if not gold:
        return "unreadable", "the reference answer is not mathematics that can be read"
    note(pipe, GOLD_READ)
    allow(processor_s)
    try:
        given = maths.read(answer)
        if given is None:
            return "unparsable", ""
        return ("correct" if maths.same(gold, given, set_relations) else "wrong"), ""
    except Exception as error:  # sympy may raise anything on a hostile answer, and the reference alone is fine
        return "wrong", f"{type(error).__name__}: {error}"[:300]
