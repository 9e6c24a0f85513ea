"""The terminal of a verb: a quiet console, a log file for all other output, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.errors import EgrsdError

if TYPE_CHECKING:
    from pipeline.store.directory import Store

# Ray reads some of these when it is imported, so no module that a verb imports at its top may import Ray.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
log = logging.getLogger("egrsd")


@dataclass
class Session:
    """The terminal of one verb. After `log_to`, all output that does not go through `console` goes to `log_path`."""

    console: Console
    debug: bool
    exits: contextlib.ExitStack
    log_path: Path | None = None
    log_uri: str | None = None  # the log's place in the run; an object store has it once the verb has ended
    _said: list[str] = field(default_factory=list)  # lines from before there was a log

    def say(self, text: str) -> None:
        """Print one line and log it. Markup and control characters, which data may hold, are shown and have no effect."""
        self.console.print(escape(_printable(text)), highlight=False, soft_wrap=True)
        if self.log_path is None:
            self._said.append(text)
        log.info(text)

    def log_to(self, store: Store) -> None:
        """Send the output of Ray, vLLM and logging to a new file in the run's logs/. An object store gets the file at the end."""
        if self.debug:
            return
        name = f"logs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        self.log_uri = store.locate(name)
        if store.local_root is None:
            self.log_path = Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="egrsd-"))) / "run.log"
            self.exits.callback(_upload, store, name, self.log_path)
        else:
            store.write(name, b"")
            self.log_path = store.local_root / name
        self.exits.enter_context(divert_output(self.log_path))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
        for text in self._said:  # the log tells what the person at the terminal read, from the first line on
            log.info(text)


@contextlib.contextmanager
def session(debug: bool) -> Iterator[Session]:
    """Run a verb. An error becomes one line and an exit code, which is 2 for the user's mistakes.

    With `debug` the terminal shows tracebacks, and the output of Ray and vLLM.
    """
    quiet = {"EGRSD_DEBUG": "1"} if debug else QUIET
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if debug:
        logging.basicConfig(level=logging.INFO, force=True)
    else:
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
    console = Console(file=os.fdopen(os.dup(1), "w", buffering=1), soft_wrap=True, emoji=False)
    with _closing(console, debug) as exits:
        out = Session(console, debug, exits)
        try:
            yield out
        except EgrsdError as error:
            _fail(out, str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(out, "Interrupted. The same command goes on where this one stopped", 130)
        except SystemExit:
            raise
        except BaseException as error:  # an error of our own: one line here, its traceback in the log
            _fail(out, f"Internal error ({type(error).__name__}): {error}. Run again with --debug", 1)


@contextlib.contextmanager
def _closing(console: Console, debug: bool) -> Iterator[contextlib.ExitStack]:
    """The exits of a verb, such as giving its lease back. An error in them is told like any other."""
    try:
        with contextlib.ExitStack() as exits:
            yield exits
    except EgrsdError as error:
        if debug:
            raise
        console.print(f"[red]error:[/red] {escape(_printable(' '.join(str(error).split())))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _fail(out: Session, message: str, code: int) -> None:
    """Print an error in one line and exit with `code`; with `debug`, raise the error again."""
    log.exception("the command failed")
    if out.debug:
        raise
    line = _printable(" ".join(message.split()))
    out.console.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
    if out.log_path is not None and code == 1:
        out.console.print(f"log: {escape(str(out.log_uri))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _upload(store: Store, name: str, log_path: Path) -> None:
    """Write the log file to the run directory on an object store."""
    store.write(name, log_path.read_bytes())


def _printable(text: str) -> str:
    """`text` with control characters and direction marks as escapes, so that data cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def divert_output(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to the file at `path`, which catches the output of child processes and C++ too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(ValueError, OSError):
                    stream.flush()
            for number, original in zip((1, 2), saved, strict=True):
                os.dup2(original, number)
                os.close(original)
