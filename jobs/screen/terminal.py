"""The terminal of a verb: a quiet console, a log file for all other output, and errors as one line with an exit code.

Results go to standard output and errors to standard error. With `--json` standard output gets one JSON document and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape

from jobs.screen import envelope, keeper
from pipeline import notices
from pipeline.errors import GONE, LAST_WORD, EgrsdError, StoreError

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
# A command in a message: with a run or a folder, and on a cluster.
_OFFERED = re.compile(r"(`egrsd (?:distill|stage|train|evaluate|compare|ask|doctor) [^`]*--(?:run|out) (?:(?!--address)[^`])*)`")
log = logging.getLogger("egrsd")


class Interrupted(KeyboardInterrupt):
    """The command was asked to end by the signal `number`: Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class OutputError(Exception):
    """Standard output cannot be written to. The exit code is that of SIGPIPE when its reader has gone, as after `| head`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write standard output ({error.strerror})")
        self.exit_code = 128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1


class Output(io.TextIOWrapper):
    """Standard output, or error. Once it cannot be written to, the main thread gets OutputError once; the rest goes nowhere."""

    def __init__(self, number: int = 1) -> None:
        super().__init__(io.FileIO(os.dup(number), "w"), encoding="utf-8", errors="backslashreplace", write_through=True)
        self._loss: OutputError | None = None
        self._raised = False

    def write(self, text: str) -> int:
        """Write text at once. Raises OutputError."""
        if self._loss is None:
            try:
                return super().write(text)
            except OSError as error:
                self._loss = OutputError(error)
        if not self._raised and threading.current_thread() is threading.main_thread():
            self._raised = True
            raise self._loss
        return len(text)

    def flush(self) -> None:
        """Do nothing, since nothing is kept back."""


@dataclass
class Session:
    """The terminal of one verb. After `log_to`, all output that does not go through `console` goes to `log_path`."""

    console: Console
    debug: bool
    exits: contextlib.ExitStack
    log_path: Path | None = None
    log_uri: str | None = None  # the log's place in the run; an object store has it once the verb has ended
    asked: int | None = None  # the signal that asked the verb to end
    held: list[Store] = field(default_factory=list)  # folders whose lease the verb has
    errors: Console = field(default_factory=lambda: _console(2))  # standard error, also while that goes to the log
    told: envelope.Told = field(default_factory=envelope.Told)  # what the JSON document will hold
    _lost: EgrsdError | None = None
    _said: list[str] = field(default_factory=list)  # lines from before there was a log

    def say(self, text: str) -> None:
        """Print one line and log it. Markup and control characters, which data may hold, are shown and have no effect.

        A command that the line offers gets the `--address` of this one.
        """
        text = with_address(text)
        self.told.messages.append(text)
        self.console.print(escape(printable(text)), highlight=False, soft_wrap=True)
        if self.log_path is None:
            self._said.append(text)
        log.info(text)

    def log_to(self, store: Store) -> None:
        """Send the output of Ray, vLLM and logging to a new file in the run's logs/. An object store gets the file at the end."""
        if self.debug:
            return
        name = f"logs/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.log"
        self.log_uri = store.locate(name)
        if store.local_root is None:
            self.log_path = Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="egrsd-"))) / "run.log"
            self.exits.callback(_upload, store, name, self.log_path)
        else:
            store.write(name, b"")
            self.log_path = store.local_root / name
        self.told.log = self.log_uri
        keeper.tell(log=str(self.log_path), at=self.log_uri)
        self.exits.enter_context(divert_output(self.log_path))
        line = "%(asctime)s %(levelname)s %(name)s %(message)s"
        logging.basicConfig(filename=self.log_path, level=logging.INFO, format=line, force=True)
        for text in self._said:  # the log tells what the person at the terminal read, from the first line on
            log.info(text)

    def listen(self) -> None:
        """Let the signals that end a command raise Interrupted. Ray takes SIGTERM for itself: call this after its start too."""
        if threading.current_thread() is threading.main_thread():
            for number in keeper.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._on_signal)

    def heed(self) -> None:
        """Raise Interrupted when a signal has asked the verb to end. Ray's start, for one, catches what the signal raised."""
        if self.asked is not None:
            raise Interrupted(signal.Signals(self.asked))

    def end(self, error: EgrsdError) -> None:
        """End the verb with an error that a thread has found. What works may hang, so a keeper ends it from outside."""
        log.error("%s", error)
        if keeper.is_kept():
            code = 128 + self.asked if self.asked is not None else error.exit_code
            keeper.tell(lost=_with_command(str(error)), code=code)
        elif signal.getsignal(signal.SIGTERM) == self._on_signal:
            self._lost = error
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, _: Any) -> None:
        """Raise once. A keeper counts the signals, and ends the verb at the second one; without it the next one does."""
        if self._lost is not None:
            error, self._lost = self._lost, None
            raise error
        if self.asked is None:
            self.asked = number
            if not keeper.is_kept():
                signal.signal(number, signal.SIG_DFL)
            raise Interrupted(signal.Signals(number))


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
    if keeper.is_kept():
        with contextlib.suppress(OSError):  # a folder that takes no files is named later
            keeper.tell(folder=util.get_temp_dir())  # of Python itself, with the socket of the verifier's children
    before = {number: signal.getsignal(number) for number in keeper.SIGNALS}
    with _as_document() as told, _closing(told, debug) as out:
        out.exits.callback(_unlisten, before)
        out.listen()
        try:
            yield out
            keeper.tell(told=0)
        except SystemExit:
            raise
        except BaseException as error:
            _fail(out, error)


@contextlib.contextmanager
def _as_document() -> Iterator[envelope.Told]:
    """What the verb tells within a block, which is printed as JSON at its end where that is wanted."""
    told, code = envelope.Told(), 1
    try:
        yield told
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        if envelope.asked.get().json:
            keeper.tell(printed=True)
            print(envelope.document(told, code), flush=True)  # noqa: T201 (the one thing on standard output)


def _console(number: int, quiet: bool = False) -> Console:
    """A console on standard output or error. Colours need a terminal; rich leaves them out where NO_COLOR is set."""
    return Console(file=Output(number), soft_wrap=True, emoji=False, quiet=quiet)


def _main_console() -> Console:
    """The console of results. With `--json` a verb that works shows its progress on standard error; others show nothing."""
    wanted = envelope.asked.get().json
    return _console(2 if wanted else 1, quiet=wanted and not (keeper.is_kept() and os.isatty(2)))


@contextlib.contextmanager
def _closing(told: envelope.Told, debug: bool) -> Iterator[Session]:
    """A session with its exits, such as giving its lease back. An error in them is told like any other."""
    out = None
    try:
        with contextlib.ExitStack() as exits:
            out = Session(_main_console(), debug, exits, told=told)
            exits.enter_context(notices.shown(out.say))  # until the end: leaving a run may wait too
            yield out
    except (EgrsdError, OutputError, KeyboardInterrupt) as error:
        if out is None:
            raise
        _fail(out, error)
    except SystemExit as ended:
        keeper.tell(told=ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise


def _unlisten(before: dict[signal.Signals, Any]) -> None:
    """Handle signals as before a session."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(out: Session, error: BaseException) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt) or (out.asked is not None and not isinstance(error, OutputError)):
        # A library may raise its own error in the place of ours: Ray a bare KeyboardInterrupt, and Arrow a TypeError, for which
        # a reader may take the file for damaged
        number = error.number if isinstance(error, Interrupted) else signal.Signals(out.asked or signal.SIGINT)
        name = f"Interrupted ({number.name})"
        return _with_command(name) if keeper.is_kept() else name, 128 + number
    if isinstance(error, OutputError):
        return str(error), error.exit_code
    if (lost := _known_loss(out, error)) is not None:
        return _with_command(str(lost)), lost.exit_code
    if isinstance(error, EgrsdError):
        return str(error), error.exit_code
    if (line := envelope.lacking(error)) is not None:
        return line, 2
    # an error of our own: one line here, its traceback in the log
    return f"Internal error ({type(error).__name__}): {error}. Run again with --debug", 1


def _known_loss(out: Session, error: BaseException) -> EgrsdError | None:
    """What was lost, when that explains the error: the run's folder, the space of a folder, the cluster, or memory."""
    for store in out.held:
        if store.is_gone():
            return StoreError(GONE, store.uri, "Bring it back")
    if "ray" in sys.modules and not isinstance(error, EgrsdError):
        from actors.watch import explain

        return explain(error)
    return None


def _with_command(text: str) -> str:
    """A text with the command that goes on after the error it tells."""
    return f"{text.rstrip('.')}. {keeper.again()}"


def _fail(out: Session, error: BaseException) -> NoReturn:
    """Print an error in one line and exit with its code; with `debug`, raise it again."""
    line, code = _ended(out, error)
    log.error("the command failed", exc_info=error)
    keeper.tell(told=code)
    if out.debug and not isinstance(error, KeyboardInterrupt):
        raise error
    text = with_address(printable(" ".join(line.split())))
    log.error(LAST_WORD, code, text)
    out.told.error = envelope.error_of(type(error).__name__, *(error.args if isinstance(error, EgrsdError) else (text,)))
    if not (isinstance(error, OutputError) and code != 1):  # a reader that has gone, as after `| head`, is told nothing
        with contextlib.suppress(OutputError):
            out.errors.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
            if out.log_path is not None and code != 2:
                out.errors.print(f"log: {escape(str(out.log_uri))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def with_address(text: str) -> str:
    """A text in which every command that works on a cluster has the `--address` that this command was given."""
    address = envelope.asked.get().address
    if address is None:
        return text
    return _OFFERED.sub(lambda found: f"{found[1]} --address {shlex.quote(address)}`", text)


def _upload(store: Store, name: str, log_path: Path) -> None:
    """Write the log file to the run directory on an object store, unless nothing was logged."""
    if data := log_path.read_bytes():
        store.write(name, data)


def printable(text: str) -> str:
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
