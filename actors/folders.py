"""The folders of this machine that a command uses: the temporary one and the home. Nothing here imports Ray."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from actors.token import needs_file, token_file
from pipeline.errors import UserError
from pipeline.fit.machine import GIB, Line
from pipeline.store.private import private_folder, temporary_folder

ROOM_BYTES = 64 << 20  # of temporary files of a Ray that starts here
# bytes of a folder below which the sockets of Ray lie: the system allows 107 for a whole path
MOST_PATH = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


def check_folders() -> None:
    """Raise UserError for a folder of this machine that a Ray of our own could not use: the temporary one, or the home.

    Ray itself would say that no cluster answers.
    """
    _check_temporary("RAY_TMPDIR")
    _check_home()


def ray_folder() -> Path:
    """The folder of a Ray that starts here: `ray` in RAY_TMPDIR, as Ray itself has it, or else a private one.

    The private one is below TMPDIR, or below /tmp when sockets below TMPDIR had too long paths.
    """
    if chosen := os.environ.get("RAY_TMPDIR"):
        return Path(chosen) / "ray"
    folder = private_folder() / "r"
    return folder if len(os.fsencode(folder)) <= MOST_PATH else private_folder(above=Path("/tmp")) / "r"


def judge_folders() -> list[Line]:
    """Findings about the temporary folders and the home: where they are, their free space, and who else may change them."""
    names: list[tuple[str, ...]] = [(), ("RAY_TMPDIR",)] if os.environ.get("RAY_TMPDIR") else [()]
    temporary = [_judge("temporary files", *temporary_folder(*name), partial(_check_temporary, *name)) for name in names]
    return [*temporary, _judge("home", "HOME", str(Path.home()), _check_home)]


def _judge(topic: str, variable: str, folder: str, check: Callable[[], None]) -> Line:
    """The finding about one folder."""
    try:
        check()
        own = f"; yours alone: {private_folder()}" if variable == "TMPDIR" else ""
        found, free = os.stat(folder), shutil.disk_usage(folder).free
    except UserError as error:
        return Line("error", topic, str(error))
    except OSError as error:
        return Line("error", topic, f"{variable} {folder}: {error.strerror}. Set {variable} to another folder")
    text = f"{variable} {folder}, {free / GIB:.1f} GiB free{own}"
    if found.st_uid not in (0, os.geteuid()):
        return Line("warning", topic, f"{text}. It belongs to user {found.st_uid}, who can replace your files there")
    if found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX:
        return Line("warning", topic, f"{text}. Everybody can replace your files there: chmod +t {folder}")
    if not os.access(folder, os.W_OK):
        return Line("warning", topic, f"{text}. It takes no files, and libraries keep their caches there")
    return Line("ok" if free >= GIB else "warning", topic, text)


def _check_temporary(*preferred: str) -> None:
    """Raise UserError for a temporary folder that takes no files or has no space, or whose name is too long for Ray's sockets."""
    variable, folder = temporary_folder(*preferred)
    if variable == "RAY_TMPDIR" and len(os.fsencode(ray_folder())) > MOST_PATH:
        what = f"too long: Ray's sockets lie below it, and the system allows {MOST_PATH - len('/ray')} bytes for it"
        raise UserError(what, f"{variable} {folder}", "Set RAY_TMPDIR to a shorter path, or unset it")
    remedy = f"Free some space there, or set {variable} to a folder that takes files"
    _check_takes_files(f"{variable} {folder}", folder, remedy)
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        what = f"no space left: {free >> 20} MiB are free, and Ray's temporary files need {ROOM_BYTES >> 20} MiB"
        raise UserError(what, f"{variable} {folder}", remedy)


def _check_home() -> None:
    """Raise UserError for a home in which Ray cannot keep its token."""
    if needs_file() and not token_file().exists():
        home = Path.home()
        remedy = "Ray keeps its token in .ray/auth_token there. Set HOME to a folder that takes files, or set RAY_AUTH_TOKEN"
        _check_takes_files(f"HOME {home}", str(home), remedy)


def _check_takes_files(where: str, folder: str, remedy: str) -> None:
    """Raise UserError when a folder takes no file."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise UserError(f"cannot write there ({error.strerror})", where, remedy) from error
