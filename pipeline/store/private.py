"""A temporary folder that belongs to this user alone, on this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.errors import UserError


def temporary_folder(*preferred: str) -> tuple[str, str]:
    """The variable that names the temporary folder of this machine, and the folder. It is /tmp when no variable names one."""
    name = next((name for name in preferred if os.environ.get(name)), "TMPDIR")
    return name, os.environ.get(name) or "/tmp"


def private_folder(*names: str, above: Path | None = None) -> Path:
    """The folder `names` below a temporary folder of this user, made with mode 0700. It lies in `above`, or in TMPDIR.

    Its own name is short, because Ray and vLLM put sockets below it, whose paths the system limits to 107 bytes.

    Raises UserError when something else has its name: a link, a file, or a folder that another user owns or may change.
    """
    folder = (above or Path(temporary_folder()[1])) / f"e-{os.geteuid()}"
    for name in ("", *names):
        folder = folder / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            raise UserError(f"cannot be made ({error.strerror})", str(folder), "Set TMPDIR to a folder of your own") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            what = "is not a folder that only you may change, so its files cannot be trusted"
            raise UserError(what, str(folder), "Remove it, or set TMPDIR to a folder of your own")
        if not name and found.st_mode & 0o077:
            folder.chmod(0o700)
    return folder
