"""`egrsd submit`: a verb as a Ray job on a cluster that answers over HTTP, started once, followed to its end.

The verb and its arguments make the submission id, so the same command finds its job again: it follows the one that runs and
starts another only when that one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.terminal import Session, session
from pipeline.errors import EgrsdError, SettingError, UserError, first_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ANSWER_S, POLL_S, START_S = 10.0, 1.0, 15.0
STOP_S = 60  # Ray kills after 3 s by default; engines and a commit under way need longer to end well
# Patterns of .gitignore, on top of the folder's own .gitignore. A later one wins, so what is named after a secret comes first
# and gives way to tokenizers and to source code.
SECRETS = [
    *("*token*", "*secret*", "*password*", "*credential*", "!*tokeniz*", "!*.py", ".env", ".env.*", "*.env", ".envrc"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.tfstate*", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(f"*{word}{plural}.py" for word in ("secret", "password", "credential") for plural in ("", "s")),
    *("*secret*tokeniz*", ".pgpass", ".my.cnf", ".git-credentials"),
    *(".netrc", "_netrc", ".npmrc", ".pypirc", ".htpasswd", "kubeconfig*", "service?account*.json"),
    *(".aws", ".azure", ".config", ".docker", ".gnupg", ".kube", ".ray", ".ssh"),
]
BULK = ["runs", "assets-cache", ".venv", "venv", ".git", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"]


@dataclass(frozen=True)
class Placement:
    """What the driver of a job takes of its node: CPUs, NAME=AMOUNT resources, KEY=VALUE labels."""

    cpus: float | None = None
    resources: Sequence[str] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """What is asked: a verb with its arguments, the job's id (None: made of the verb), its driver's place, its working directory,
    and whether to follow it."""

    verb: list[str]
    submission_id: str | None
    placement: Placement
    folder: str
    wait: bool


def submit(context: Any, job: Job, address: str | None, debug: bool) -> None:
    """Run `egrsd VERB ...` on the cluster at `address`; end with the job's exit code.

    Raises click's usage errors for a verb that `context`, Typer's of the whole command line, cannot parse, before anything is
    sent.
    """
    parsed = parse_verb(context, job.verb)
    with session(debug) as out:
        _check_paths(parsed)
        options = {"runtime_env": runtime_env(job.folder), **_placement(job.placement)}
        entrypoint = shlex.join(["python", "-m", "jobs", *job.verb])
        client = open_client(address)
        if not debug:
            _quiet_ray()
        name, started = start_once(client, job.submission_id or default_id(job.verb), entrypoint, options)
        out.say(f"job {name}: submitted." if started else f"job {name} is running already, with the code of its submission.")
        if not job.wait:
            out.say(f"The same command without --no-wait follows it; `egrsd submit --stop {name}` ends it.")
            return
        _say_if_waiting(client, name, out)
        sys.exit(_conclude(follow(client, name, out), out))


def stop(submission_id: str, address: str | None, wait: bool, debug: bool) -> None:
    """Ask a job to end, as Ctrl-C would, and wait until it has."""
    with session(debug) as out:
        client = open_client(address)
        found = _jobs(client).get(submission_id)
        if found is None:
            raise SettingError("the cluster knows no such job", "--stop", "`egrsd submit` prints the id of each job it starts")
        if found.status.is_terminal():
            out.say(f"job {submission_id} had ended already: {found.status}.")
            return
        with _reaching(submission_id):
            client.stop_job(submission_id)
        if found.status == "PENDING":
            out.say(
                f"job {submission_id} has not started yet: it ends when it does, or when Ray gives up waiting for its resources."
            )
            return
        while wait and not (found := _info(client, submission_id)).status.is_terminal():
            time.sleep(POLL_S)
        out.say(f"job {submission_id}: {found.status if wait else 'asked to stop'}.")


# ---- what is sent ------------------------------------------------------------------------------------------------------


def parse_verb(context: Any, verb: list[str]) -> dict[str, Any]:
    """The verb's parameters as its own command would read them; nothing runs. Raises click's usage errors."""
    name, command, rest = context.command.resolve_command(context, verb)
    if name == "submit":
        context.fail("A job cannot submit itself: give another verb.")
    parsed: dict[str, Any] = command.make_context(name, list(rest), parent=context).params
    return parsed


def _check_paths(parsed: dict[str, Any]) -> None:
    for name in ("run", "out"):
        path = parsed.get(name)
        if path is not None and "://" not in path and not os.path.isabs(path):
            raise SettingError(
                f"{path!r} would lie in the job's working directory, which Ray deletes",
                f"--{name}",
                "Give a URI, or an absolute path that every node reaches",
            )


def default_id(verb: list[str]) -> str:
    """Submission id of a verb with its arguments. Code is left out: two jobs on one run would harm, whatever code they hold."""
    return f"egrsd-{verb[0]}-{hashlib.sha256(shlex.join(verb).encode()).hexdigest()[:12]}"


def excludes() -> list[str]:
    """What never leaves this machine, for Ray's packaging: secrets in any letter case, runs, environments, caches."""
    any_case = ["".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in pattern) for pattern in SECRETS]
    return any_case + BULK


def runtime_env(folder: str) -> dict[str, Any]:
    """The job's environment: `folder` less `excludes()`, and how it ends and prints. No secret of this shell goes along.

    Raises SettingError for a folder that is not there, or that holds the user's home.
    """
    path = Path(folder).resolve()
    if not path.is_dir():
        raise SettingError("no such folder", folder, "Check --working-dir")
    if Path.home().is_relative_to(path):
        raise SettingError("holds your home directory", str(path), "Submit from the project's folder, or pass --working-dir")
    columns = shutil.get_terminal_size((120, 24)).columns
    variables = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "COLUMNS": str(columns)}
    return {"working_dir": str(path), "excludes": excludes(), "env_vars": variables}


def _placement(placement: Placement) -> dict[str, Any]:
    """Where the job's driver runs, by the names of Ray's job client."""
    amounts = _pairs(placement.resources, "--entrypoint-resources")
    try:
        numbers = {name: float(amount) for name, amount in amounts.items()}
    except ValueError as error:
        raise SettingError(f"{error}", "--entrypoint-resources", "Write NAME=AMOUNT") from error
    chosen = {
        "entrypoint_num_cpus": placement.cpus,
        "entrypoint_resources": numbers,
        "entrypoint_label_selector": _pairs(placement.labels, "--entrypoint-label"),
    }
    return {name: value for name, value in chosen.items() if value}


def _pairs(items: Sequence[str], option: str) -> dict[str, str]:
    for item in items:
        if not all(item.partition("=")):
            raise SettingError(
                f"{item!r} is not NAME=VALUE", option, "Write one name, '=', one value; repeat the option for more"
            )
    return dict(item.split("=", 1) for item in items)


# ---- the cluster -------------------------------------------------------------------------------------------------------


def open_client(address: str | None) -> JobSubmissionClient:
    """Ray's job client for `address`, else for RAY_API_SERVER_ADDRESS or RAY_ADDRESS; it has answered once.

    Raises SettingError for what is no HTTP address, UserError where no job server answers or the token does not fit.
    """
    url = _url(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray's client prefers the environment to its argument
    _offer_token()
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        requests.get(f"{url}/api/version", timeout=ANSWER_S)  # Ray's own requests have no deadline
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        remedy = "Put the cluster's token into RAY_AUTH_TOKEN, a file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
        raise UserError(first_line(error)[:200], url, remedy) from error
    except (requests.RequestException, ConnectionError, RuntimeError, KeyError) as error:
        remedy = "Check --address: the head's dashboard, http://HEAD:8265, reachable from here"
        raise UserError("no Ray job server answers", url, remedy) from error


def _url(address: str | None) -> str:
    where = "--address"
    if address is None:
        where = next((name for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ), where)
        address = os.environ.get(where, "")
    remedy = "Give the head's dashboard: http://HEAD:8265"
    if "@" in address or "?" in address:  # not repeated: it may hold a password
        raise SettingError("may hold no password or token", where, remedy)
    if urlsplit(address).scheme not in ("http", "https"):
        raise SettingError(f"{address!r} is no HTTP address", where, remedy)
    return address.rstrip("/")


def _offer_token() -> None:
    """Turn token mode on where there is a token; only then does Ray's client send it. Before the first import of Ray."""
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _quiet_ray() -> None:
    """Leave Ray its warnings (a large file, say); each step of its packaging is of no use to anybody."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)


def _jobs(client: JobSubmissionClient) -> dict[str, JobDetails]:
    with _reaching("its jobs"):
        return {job.submission_id: job for job in client.list_jobs() if job.submission_id is not None}


def _info(client: JobSubmissionClient, name: str) -> JobDetails:
    with _reaching(name):
        return client.get_job_info(name)


@contextlib.contextmanager
def _reaching(name: str) -> Iterator[None]:
    """EgrsdError where the cluster does not answer any more, or refuses; `name`: what it was asked about."""
    import requests

    try:
        yield
    except (requests.RequestException, ConnectionError, RuntimeError) as error:
        remedy = "A job may still run: the same command follows it again"
        raise EgrsdError(f"lost the cluster ({first_line(error)[:200]})", name, remedy) from error


def start_once(client: JobSubmissionClient, base: str, entrypoint: str, options: dict[str, Any]) -> tuple[str, bool]:
    """Id of the one job that runs `entrypoint`, and whether it was started here.

    Ids are `base`, `base-2`, ...: the first whose job has not ended is followed, the first unknown one is started. The cluster
    takes an id once, so of two terminals at the same time one starts the job and both follow it.
    """
    known = _jobs(client)
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in known or not known[name].status.is_terminal())
    if name not in known:
        try:
            return client.submit_job(entrypoint=entrypoint, submission_id=name, **options), True
        except (RuntimeError, ValueError) as error:
            known = _jobs(client)
            if name not in known:
                raise UserError(
                    f"the job was not accepted ({first_line(error)[:300]})", name, "Mend this and submit again"
                ) from error
    if known[name].entrypoint != entrypoint:
        raise SettingError(f"{name} is the id of another command: {known[name].entrypoint}", "--submission-id", "Choose another")
    return name, False


def _say_if_waiting(client: JobSubmissionClient, name: str, out: Session) -> None:
    """Tell why nothing is seen of a job that has not started after a while: its log begins only then."""
    deadline = time.monotonic() + START_S
    while (job := _info(client, name)).status == "PENDING":
        if time.monotonic() >= deadline:
            out.say(f"job {name}: {job.message}")
            return
        time.sleep(POLL_S)


def follow(client: JobSubmissionClient, name: str, out: Session) -> JobDetails:
    """Write the job's output, from its first line, until the job has ended; a connection that breaks is taken up again."""
    import requests

    seen = 0
    while True:
        seen = asyncio.run(_tail(client, name, seen, out))
        if (found := _info(client, name)).status.is_terminal():
            break
        time.sleep(POLL_S)
    for pause in (0, POLL_S, 5 * POLL_S):  # what a broken connection kept back; its node may be busy, or gone
        time.sleep(pause)
        with contextlib.suppress(requests.RequestException, RuntimeError):
            _write(out, client.get_job_logs(name)[seen:])
            break
    return found


async def _tail(client: JobSubmissionClient, name: str, seen: int, out: Session) -> int:
    """Output from character `seen` on; Ray always begins at the first. Returns how many characters are now written."""
    import aiohttp

    position = 0
    with contextlib.suppress(aiohttp.ClientError, RuntimeError):  # Ray raises RuntimeError for a socket that broke
        async for text in client.tail_job_logs(name):
            _write(out, text[max(0, seen - position) :])
            position += len(text)
    return max(seen, position)


def _write(out: Session, text: str) -> None:
    out.console.file.write(text)
    out.console.file.flush()


def _conclude(job: JobDetails, out: Session) -> int:
    """The exit code to end with; what Ray knows where the job's own output cannot tell."""
    out.say(f"job {job.submission_id}: {job.status}.")
    if job.status == "SUCCEEDED":
        return 0
    if job.driver_exit_code:  # negative: ended by that signal, as a shell would report it
        return job.driver_exit_code if job.driver_exit_code > 0 else 128 - job.driver_exit_code
    if job.status == "STOPPED":
        return 130
    out.say(" ".join((job.message or "Ray gives no reason").split())[:500])
    return 1
