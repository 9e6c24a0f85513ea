"""A chat template, which comes with a model and is a program, writes its text within bounds of time, memory and length.

jinja2's sandbox keeps a template from Python's attributes. It bounds neither loops nor memory, so that is done here:

- time: a second thread raises an error in the rendering thread once that has used MOST_CPU_S of processor time. Waiting on a busy
  machine costs none of it. One call in C cannot be interrupted, so `**`, whose calls may last for ever, is refused beforehand.
- memory: the process may grow by MOST_BYTES meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols

from pipeline.errors import ModelError, first_line

MOST_CPU_S = 10.0
MOST_BYTES = 512 * 2**20
MOST_CHARACTERS = 4_000_000  # of a rendered prompt
_LOOK_S = 0.25
_REMEDY = "Check prompts.system and the model's chat_template.jinja"
_RENDERING = threading.Lock()  # the bound of memory belongs to the process


class _TooLong(BaseException):
    """Raised in the rendering thread. No template can catch it, and `Exception` does not cover it."""


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The text that the tokenizer's chat template makes of the messages. `options` go to the template.

    Raises ModelError for a template that fails, refuses the messages, or needs more time, memory or room than is allowed.
    """
    where = str(getattr(tokenizer, "name_or_path", ""))
    try:
        _refuse_powers(str(tokenizer.chat_template))
        with _RENDERING, _little_memory(), _little_time():
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except _TooLong:
        raise ModelError(f"its chat template needs more than {MOST_CPU_S:g} s for one prompt", where, _REMEDY) from None
    except MemoryError:
        raise ModelError(f"its chat template needs more than {MOST_BYTES >> 20} MiB for one prompt", where, _REMEDY) from None
    except TemplateError as error:
        raise ModelError(f"its chat template refuses the prompt: {first_line(error)}", where, _REMEDY) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        what = f"its chat template fails ({type(error).__name__}: {first_line(error)[:200]})"
        raise ModelError(what, where, _REMEDY) from error
    if len(text) > MOST_CHARACTERS:
        raise ModelError(f"its chat template makes {len(text)} characters of one prompt", where, _REMEDY)
    return text


@lru_cache(maxsize=8)
def _refuse_powers(template: str) -> None:
    """Raise TemplateSyntaxError for a template with the operator `**`. Other syntax errors are left to transformers."""
    if "**" not in template:
        return
    without_generation = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers
    with contextlib.suppress(TemplateSyntaxError):
        tree = Environment(extensions=[loopcontrols], autoescape=False).parse(without_generation)
        if found := next(tree.find_all(nodes.Pow), None):
            raise TemplateError(f"line {found.lineno} uses the operator **")


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Let this process map at most MOST_BYTES more than now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(limit for limit in (now + MOST_BYTES, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _little_time() -> Iterator[None]:
    """Raise _TooLong in this thread once it has used MOST_CPU_S of processor time inside the block."""
    thread, begun, done, ending = threading.get_ident(), time.thread_time(), threading.Event(), threading.Lock()
    clock = time.pthread_getcpuclockid(thread)

    def watch() -> None:
        while not done.wait(_LOOK_S):
            with ending:
                if not done.is_set() and time.clock_gettime(clock) - begun > MOST_CPU_S:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))
                    return

    watcher = threading.Thread(target=watch, daemon=True, name="egrsd-template")
    watcher.start()
    try:
        yield
    finally:
        with ending:
            done.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
