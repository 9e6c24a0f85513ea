"""A chat template, which comes with a model and is a program, writes its text within bounds of time, memory and length.

jinja2's sandbox keeps a template from Python's attributes. It bounds neither loops nor memory. So a child process renders: the
kernel ends it after MOST_CPU_S of processor time, and lets it grow by MOST_BYTES. The limits touch no other process.
"""

from __future__ import annotations

import atexit
import resource
import threading
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, first_line
from pipeline.grader.children import OVERRAN, Children, allow, done

MOST_CPU_S = 10.0
MOST_BYTES = 512 * 2**20
MOST_CHARACTERS = 4_000_000  # of a rendered prompt
_REMEDY = "Check prompts.system and the model's chat_template.jinja"
# Of templates that ask for today's date: Llama's own where they cannot ask. With the real one a resumed run has other prompts.
_DATE = datetime(2024, 7, 26)
_ASKING = threading.Lock()  # the child answers one question at a time
_KNOWN = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def get_ready() -> None:
    """Start the child that renders, which takes a second, while this process goes on with other work."""

    def ask() -> None:
        """Render a text without a field."""
        with _ASKING:
            _child().ask([("", [], {}, MOST_CPU_S, MOST_BYTES)])

    threading.Thread(target=ask, name="egrsd-template", daemon=True).start()


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The text that the tokenizer's chat template makes of the messages. `options` go to the template.

    Raises ModelError for a template that fails, refuses the messages, or needs more time, memory or room than is allowed.
    """
    where = str(getattr(tokenizer, "name_or_path", ""))
    variables = {**tokenizer.special_tokens_map, **options}
    with _ASKING:
        question = (tokenizer.get_chat_template(), messages, variables, MOST_CPU_S, MOST_BYTES)
        outcome = _child().ask([question])[0]
    if outcome.ended == OVERRAN:
        raise ModelError(f"its chat template needs more than {MOST_CPU_S:g} s for one prompt", where, _REMEDY)
    if outcome.ended:
        raise ModelError(f"the process of its chat template {outcome.ended}, twice", where, _REMEDY)
    text, why = outcome.reply
    if why:
        raise ModelError(f"its chat template {why}", where, _REMEDY)
    return str(text)


def serve(pipe: Connection) -> None:
    """The loop of the child: it renders what it reads from the pipe, and answers with the text, or with why there is none."""
    from transformers.utils.chat_template_utils import render_jinja_template  # before the limits count

    while True:
        try:
            template, messages, variables, cpu_s, size = pipe.recv()
        except EOFError:
            return
        allow(cpu_s)
        with_limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + size
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = with_limit if hard == resource.RLIM_INFINITY else min(with_limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        answer = _rendered(render_jinja_template, template, messages, variables, size)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        done(pipe, answer)
        allow(0)


def _rendered(rendering: Any, template: str, messages: list[dict[str, str]], variables: dict[str, Any], size: int) -> Any:
    """(text, "") of a template, or ("", why it has none)."""
    from jinja2 import TemplateError

    try:
        text = rendering(conversations=[messages], chat_template=template, strftime_now=_DATE.strftime, **variables)[0][0]
    except MemoryError:
        return "", f"needs more than {size >> 20} MiB for one prompt"
    except TemplateError as error:
        return "", f"refuses the prompt: {first_line(error)}"
    except _KNOWN as error:
        return "", f"fails ({type(error).__name__}: {first_line(error)[:200]})"
    if len(text) > MOST_CHARACTERS:
        return "", f"makes {len(text)} characters of one prompt"
    return text, ""


@lru_cache(maxsize=1)
def _child() -> Children:
    child = Children(serve, 1, ["transformers.utils.chat_template_utils"])
    atexit.register(child.abandon)
    return child
