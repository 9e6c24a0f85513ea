"""Files below one URI, each put there whole: a local disk, or an object store that pyarrow.fs opens.

Local files are written under a temporary name, fsynced and renamed. An object store has no rename: there an object appears when
its last byte has arrived, and a writer that dies before leaves nothing that a listing shows (the parts of a large one may stay
behind, unseen, until the bucket's lifecycle rule drops them). What is relied on: an object that was written, replaced or deleted
is at once seen so by every reader and in every listing. Put-if-absent is not used: pyarrow does not offer it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Self
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import EgrsdError, StoreError, UserError

_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_REMEDIES = {
    "ACCESS_DENIED": "Give these credentials the right to list, read, write and delete there, or use another place",
    "NO_SUCH_BUCKET": "Create the bucket, or check its name and AWS_ENDPOINT_URL",
    "NETWORK_CONNECTION": "Check AWS_ENDPOINT_URL and the network",
}


class Files:
    """The files below `uri`: a local path or any URI that pyarrow.fs opens. Picklable; the file system opens on first use.

    Endpoint and credentials come from the environment or a profile, never from the URI: it is written down and printed.
    """

    def __init__(self, uri: str) -> None:
        if not uri.strip():
            raise UserError("the path is empty", "--run", "Name a folder or a URI")
        if "://" in uri:
            _check_uri(uri)
        try:
            self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"is no path ({error})", uri, "Name a folder or a URI") from error
        self._seen: dict[str, bytes | None] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.uri,)

    @cached_property
    def opened(self) -> tuple[fs.FileSystem, str]:
        """The file system and the path in it. Raises UserError for a URI that cannot be opened."""
        # S3 small objects then go up in one request instead of three; what would fail at the opening fails at the close
        options = "?allow_delayed_open=true" if self.uri.startswith("s3://") else ""
        try:
            filesystem, root = fs.FileSystem.from_uri(self.uri + options)
            if isinstance(filesystem, fs.LocalFileSystem) and filesystem.get_file_info(root).type == fs.FileType.File:
                raise UserError("is a file, not a folder", self.uri, "Name a folder")
            return filesystem, root
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"cannot be opened ({error})", self.uri, "Use a local path or a URI pyarrow.fs knows") from error

    @property
    def local_root(self) -> Path | None:
        """The folder as a local path, or None on an object store."""
        filesystem, root = self.opened
        return Path(root) if isinstance(filesystem, fs.LocalFileSystem) else None

    @property
    def poll_s(self) -> float:
        """Seconds between two looks for what another process will write: each look at an object store is a request."""
        return 0.05 if self.local_root is not None else 0.25

    def locate(self, path: str) -> str:
        """URI or local path of a file, as engines and users open it."""
        return f"{self.uri}/{path}"

    def snapshot(self) -> Self:
        """The same files, each JSON file read once at the most: for a short piece of work that asks for them again and again."""
        again = copy.copy(self)
        again._seen = {}
        return again

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file at `path`, atomically and durably. Raises StoreError (no space) or UserError (no right)."""
        filesystem, root = self.opened
        self._forget(path)
        with self._explained("cannot write", path):
            if self.local_root is not None:
                _write_local(self.local_root / path, data)
            else:
                with filesystem.open_output_stream(f"{root}/{path}") as stream:
                    stream.write(data)

    def read_bytes(self, path: str) -> bytes | None:
        """A whole file, or None where there is none."""
        if self._seen is None or not path.endswith(".json"):
            return self._read(path)
        if path not in self._seen:
            self._seen[path] = self._read(path)
        return self._seen[path]

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; empty where there is none."""
        filesystem, root = self.opened
        with self._explained("cannot list", folder):
            found = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
        return sorted(info.base_name for info in found)

    def delete(self, path: str) -> None:
        """Remove a file or folder if it is there."""
        filesystem, root = self.opened
        self._forget(path)
        with self._explained("cannot delete", path), contextlib.suppress(FileNotFoundError):
            info = filesystem.get_file_info(f"{root}/{path}")
            if info.type == fs.FileType.Directory:
                filesystem.delete_dir(f"{root}/{path}")
            elif info.type == fs.FileType.File:
                filesystem.delete_file(f"{root}/{path}")

    def _read(self, path: str) -> bytes | None:
        filesystem, root = self.opened
        try:
            with filesystem.open_input_file(f"{root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _told(error, "cannot read", self.locate(path)) from error

    def _forget(self, path: str) -> None:
        for name in [name for name in self._seen or () if name == path or name.startswith(f"{path}/")]:
            del self._seen[name]  # type: ignore[union-attr]

    @contextlib.contextmanager
    def _explained(self, what: str, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _told(error, what, self.locate(path)) from error


def _check_uri(uri: str) -> None:
    rest = uri.split("://", 1)[1]
    if "@" in rest.split("/")[0]:
        remedy = "Give them by environment or profile"
        raise UserError("the URI holds credentials, which would end up in logs", "--run", remedy)
    if sign := next((sign for sign in "?#" if sign in rest), None):
        raise UserError(
            f"the URI holds '{sign}': options would end up in logs",
            "--run",
            "Give them by environment: the endpoint of an object store as AWS_ENDPOINT_URL",
        )


def _told(error: OSError, what: str, where: str) -> EgrsdError:
    """The user's to mend: a place that does not answer, or where one may not do this. Else StoreError."""
    code = re.search(r"AWS Error ([A-Z_]+)", str(error))
    said = error.strerror or re.sub(r" \(Request ID: [^)]*\)", "", str(error))
    if code is not None and code[1] in _REMEDIES:
        return UserError(f"{what} ({said})", where, _REMEDIES[code[1]])
    if error.errno in _RIGHTS:
        return UserError(f"{what} ({said})", where, "Get the right to, or use another place")
    remedy = "Check that the place exists and its permissions"
    if error.errno == errno.ENOSPC:
        remedy = "Free some space and run the same command again: nothing half-written counts"
    return StoreError(f"{what} ({said})", where, remedy)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid4().hex}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
