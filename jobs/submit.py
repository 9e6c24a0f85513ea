"""`egrsd submit`: run a verb as a Ray job on a cluster that answers over HTTP, and follow the job to its end.

The submission id is made from the verb and its arguments, so the same command finds its job again. It follows a job that still
runs, and starts another only when that job has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import requests

from actors.token import offer_token
from jobs.parcel import collect
from jobs.screen import envelope
from jobs.screen.terminal import Session, session
from pipeline.digest import short
from pipeline.errors import EgrsdError, SettingError, UserError, command, first_line
from pipeline.notices import NOTICE_S, late

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ANSWER_S, POLL_S, START_S = 10.0, 1.0, 15.0
SILENT_S = 120.0  # a server that sends nothing for so long is lost
QUIET_S = 30.0  # a job that prints nothing for so long may work, or its server may hang: the server is asked
STOP_S = 60  # Ray kills a stopped job after 3 s by default; engines and a commit need longer to end


@dataclass(frozen=True)
class JobPlacement:
    """Where a job's driver runs: the CPUs and NAME=AMOUNT resources that it takes, and the KEY=VALUE labels of its node."""

    cpus: float | None = None
    resources: Sequence[str] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """The options of the command line."""

    verb: list[str]  # with its arguments
    submission_id: str | None  # None: made from the verb and its arguments
    placement: JobPlacement
    folder: str  # the working directory, of which a part is sent
    include: Sequence[str]  # files and folders to send beside what the verb names
    wait: bool  # whether to follow the job


def submit(context: Any, job: Job, address: str | None, debug: bool) -> None:
    """Run `egrsd VERB ...` as a job on the cluster at `address`, and end with the job's exit code.

    `context` is Typer's context of the whole command line. Before anything is sent, a verb that it cannot parse raises click's
    usage errors. Raises SettingError for mistaken options, and UserError when the cluster does not answer or accept the job.
    """
    parsed = parse_verb(context, job.verb)
    with session(debug) as out:
        _check_paths(parsed)
        placement = _placement(job.placement)
        sent = collect(checked_folder(job.folder), parsed, job.include)
        package = out.exits.enter_context(tempfile.TemporaryDirectory(prefix="egrsd-"))
        sent.put(Path(package))
        options = {"runtime_env": runtime_env(package), **placement}
        entrypoint = shlex.join(["python", "-m", "jobs", *job.verb])
        client = open_client(address)
        if not debug:
            _quiet_ray()
        for line in sent.describe():
            out.say(line)
        name, started = start_once(client, job.submission_id or default_id(job.verb), entrypoint, options)
        out.say(f"job {name}: submitted." if started else f"job {name} is running already, with the code of its submission.")
        out.told.result = {"job": name, "started": started}
        stop_it = command("submit", "--address", _url(address), "--stop", name)
        if not job.wait:
            out.say(f"The same command without --no-wait follows it; {stop_it} ends it.")
            return
        try:
            _say_if_waiting(client, name, out)
            ended = follow(client, name, out)
        except KeyboardInterrupt:
            out.say(f"job {name} runs on. The same command follows it again; {stop_it} ends it.")
            raise
        sys.exit(_conclude(ended, out))


def stop(submission_id: str, address: str | None, wait: bool, debug: bool) -> None:
    """Ask a job to end, as Ctrl-C would, and with `wait` wait until it has. Raises SettingError for an unknown job."""
    with session(debug) as out:
        client = open_client(address)
        found = _jobs(client).get(submission_id)
        if found is None:
            raise SettingError("the cluster knows no such job", "--stop", "`egrsd submit` prints the id of each job it starts")
        out.told.result = {"job": submission_id, "status": found.status.value, "asked": not found.status.is_terminal()}
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
        out.told.result["status"] = found.status.value
        out.say(f"job {submission_id}: {found.status if wait else 'asked to stop'}.")


# ---- what is sent ------------------------------------------------------------------------------------------------------


def parse_verb(context: Any, verb: list[str]) -> dict[str, Any]:
    """The parameters that the verb's own command would get; the verb does not run. Raises click's usage errors."""
    name, command, rest = context.command.resolve_command(context, verb)
    if name == "submit":
        context.fail("A job cannot submit itself: give another verb.")
    mine = envelope.asked.get()
    parsed: dict[str, Any] = command.make_context(name, list(rest), parent=context).params
    envelope.asked.set(mine)  # the verb's own --json is the job's
    return parsed


def _check_paths(parsed: dict[str, Any]) -> None:
    """Raise SettingError for a run or output at a relative path, which would be lost with the job's working directory."""
    names = ("run", "out", "csv", "model") if "merge" in parsed else ("run", "out", "csv")  # of `export`, --model is written
    for name in names:
        given = parsed.get(name)
        for path in [given] if isinstance(given, str) else given or []:  # `report` takes several runs
            if "://" not in path and not os.path.isabs(path):
                raise SettingError(
                    f"{path!r} would lie in the job's working directory, which Ray deletes",
                    f"--{name}",
                    f"Give {'' if name in ('model', 'csv') else 'a URI, or '}an absolute path that every node reaches",
                )


def default_id(verb: list[str]) -> str:
    """The submission id of a verb with its arguments. Code does not change it, since a run must never have two jobs."""
    return f"egrsd-{verb[0]}-{short(shlex.join(verb).encode(), 12)}"


def checked_folder(folder: str) -> Path:
    """The folder to send from. Raises SettingError for a missing folder, or one that holds the user's home."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise SettingError("no such folder", folder, "Check --working-dir")
    if Path.home().is_relative_to(path):
        raise SettingError("holds your home directory", str(path), "Submit from the project's folder, or pass --working-dir")
    return path


def runtime_env(folder: str) -> dict[str, Any]:
    """The job's Ray runtime environment: `folder`, and variables for its end and output. No variable of this shell is sent."""
    columns = shutil.get_terminal_size((120, 24)).columns
    variables = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "COLUMNS": str(columns)}
    return {"working_dir": folder, "env_vars": variables}


def _placement(placement: JobPlacement) -> dict[str, Any]:
    """The driver's placement as arguments of Ray's job client. Raises SettingError for a malformed pair."""
    amounts = _pairs(placement.resources, "--entrypoint-resources")
    try:
        numbers = {name: float(amount) for name, amount in amounts.items()}
    except ValueError as error:
        raise SettingError(f"{error}", "--entrypoint-resources", "Write NAME=AMOUNT") from error
    for option, amount in [
        ("--entrypoint-cpus", placement.cpus or 0.0),
        *(("--entrypoint-resources", n) for n in numbers.values()),
    ]:
        if not 0 <= amount < math.inf:
            raise SettingError(f"is {amount:g}, which is no amount", option, "Write a number from 0 on")
    chosen = {
        "entrypoint_num_cpus": placement.cpus,
        "entrypoint_resources": numbers,
        "entrypoint_label_selector": _pairs(placement.labels, "--entrypoint-label"),
    }
    return {name: value for name, value in chosen.items() if value}


def _pairs(items: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a dict. Raises SettingError that names the option."""
    for item in items:
        if not all(item.partition("=")):
            raise SettingError(
                f"{item!r} is not NAME=VALUE", option, "Write one name, '=', one value; repeat the option for more"
            )
    return dict(item.split("=", 1) for item in items)


# ---- the cluster -------------------------------------------------------------------------------------------------------


def open_client(address: str | None) -> JobSubmissionClient:
    """Ray's job client for `address`, or else for RAY_API_SERVER_ADDRESS or RAY_ADDRESS, after the server has answered.

    Raises SettingError for another kind of address, and UserError when no job server answers or the token is refused.
    """
    url = _url(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray's client prefers the environment to its argument
    offer_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        requests.get(f"{url}/api/version", timeout=ANSWER_S)  # Ray's own requests have no deadline
        client = JobSubmissionClient(url)
        client._do_request = partial(client._do_request, timeout=(ANSWER_S, SILENT_S))  # type: ignore[method-assign]
        return client
    except AuthenticationError as error:
        remedy = "Put the cluster's token into RAY_AUTH_TOKEN, a file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
        raise UserError(first_line(error)[:200], url, remedy) from error
    except (requests.RequestException, ConnectionError, RuntimeError, KeyError) as error:
        remedy = "Check --address: the head's dashboard, http://HEAD:8265, reachable from here"
        raise UserError("no Ray job server answers", url, remedy) from error


def _url(address: str | None) -> str:
    """The HTTP address of the cluster's head, from the option or the environment. Raises SettingError for another address."""
    where = "--address"
    if address is None:
        where = next((name for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ), where)
        address = os.environ.get(where, "")
    remedy = "Give the head's dashboard: http://HEAD:8265"
    if "@" in address or "?" in address:  # the message does not repeat the address, since it may hold a password
        raise SettingError("may hold no password or token", where, remedy)
    if urlsplit(address).scheme not in ("http", "https"):
        raise SettingError(f"{address!r} is no HTTP address", where, remedy)
    return address.rstrip("/")


def _quiet_ray() -> None:
    """Show only Ray's warnings, for example of a large file, and not each step of its packaging."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)


def _jobs(client: JobSubmissionClient) -> dict[str, JobDetails]:
    """The cluster's jobs by submission id. Raises EgrsdError when the cluster does not answer."""
    with _reaching("its jobs"):
        return {job.submission_id: job for job in client.list_jobs() if job.submission_id is not None}


def _info(client: JobSubmissionClient, name: str) -> JobDetails:
    """The state of one job. Raises EgrsdError when the cluster does not answer."""
    with _reaching(name):
        return client.get_job_info(name)


@contextlib.contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Turn an answer that fails or never comes into an EgrsdError about `name`."""
    try:
        with late("job server", f"waiting for the cluster's job server, about {name}: for {NOTICE_S:g} s so far."):
            yield
    except (requests.RequestException, ConnectionError, RuntimeError) as error:
        remedy = "A job may still run: the same command follows it again"
        raise EgrsdError(f"lost the cluster ({first_line(error)[:200]})", name, remedy) from error


def start_once(client: JobSubmissionClient, base: str, entrypoint: str, options: dict[str, Any]) -> tuple[str, bool]:
    """(id of the one job that runs `entrypoint`, whether this call started it).

    The ids `base`, `base-2` and so on are tried in order. The first job that has not ended is followed; the first unknown id is
    started. The cluster accepts an id only once, so of two terminals at the same time one starts the job and both follow it.
    Raises UserError when the cluster refuses the job, and SettingError when the id belongs to another command.
    """
    known = _jobs(client)
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in known or not known[name].status.is_terminal())
    if name not in known:
        try:
            with late("job server", f"waiting for the cluster's job server to take {name}: for {NOTICE_S:g} s so far."):
                return client.submit_job(entrypoint=entrypoint, submission_id=name, **options), True
        except (RuntimeError, ValueError, requests.RequestException) as error:
            known = _jobs(client)
            if name not in known:
                raise UserError(
                    f"the job was not accepted ({first_line(error)[:300]})", name, "Mend this and submit again"
                ) from error
    if known[name].entrypoint != entrypoint:
        raise SettingError(f"{name} is the id of another command: {known[name].entrypoint}", "--submission-id", "Choose another")
    return name, False


def _say_if_waiting(client: JobSubmissionClient, name: str, out: Session) -> None:
    """Print Ray's reason when a job has not started after a while. A job has no log before its start."""
    deadline = time.monotonic() + START_S
    while (job := _info(client, name)).status == "PENDING":
        if time.monotonic() >= deadline:
            out.say(f"job {name}: {job.message}")
            return
        time.sleep(POLL_S)


def follow(client: JobSubmissionClient, name: str, out: Session) -> JobDetails:
    """Print the job's output from its first line until the job has ended, and return its last state.

    A broken connection is opened again. Raises EgrsdError when the cluster does not answer any more.
    """
    written = 0  # characters
    while True:
        written = asyncio.run(_tail(client, name, written, out))
        if (job := _info(client, name)).status.is_terminal():
            break
        time.sleep(POLL_S)
    for pause in (0, POLL_S, 5 * POLL_S):  # fetch what a broken connection did not bring; the node may be busy or lost
        time.sleep(pause)
        with contextlib.suppress(requests.RequestException, RuntimeError):
            _write(out, client.get_job_logs(name)[written:])
            break
    return job


async def _tail(client: JobSubmissionClient, name: str, written: int, out: Session) -> int:
    """Print output from character `written` on, until the job ends or the connection breaks.

    Ray always sends the output from its first character. Returns how many characters are written now. Raises EgrsdError when
    neither output nor another answer comes from the server.
    """
    position, texts = 0, client.tail_job_logs(name)
    with contextlib.suppress(aiohttp.ClientError, RuntimeError, StopAsyncIteration):  # RuntimeError: a socket that broke
        while True:
            coming = asyncio.ensure_future(anext(texts))
            while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                await asyncio.to_thread(_info, client, name)
            text = coming.result()
            _write(out, text[max(0, written - position) :])
            position += len(text)
    return max(written, position)


def _write(out: Session, text: str) -> None:
    """Write a job's output as it is, at once."""
    out.console.file.write(text)
    out.console.file.flush()


def _conclude(job: JobDetails, out: Session) -> int:
    """Print the job's end and return the exit code. Ray's reason is printed when the job has no exit code of its own."""
    out.say(f"job {job.submission_id}: {job.status}.")
    if job.status == "SUCCEEDED":
        return 0
    if job.driver_exit_code:  # a negative code is a signal, which a shell reports as 128 + signal
        return job.driver_exit_code if job.driver_exit_code > 0 else 128 - job.driver_exit_code
    if job.status == "STOPPED":
        return 130
    out.say(" ".join((job.message or "Ray gives no reason").split())[:500])
    return 1
