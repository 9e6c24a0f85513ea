"""Files below one URI, each put there whole: a local disk, or an object store that pyarrow.fs opens.

Local files are written in a folder of their own, `.tmp`, fsynced and renamed. An object store has no rename: there an object
appears when its last byte has arrived, and a writer that dies before leaves nothing that a listing shows (the parts of a large
one may stay behind, unseen, until the bucket's lifecycle rule drops them). What is relied on: an object that was written,
replaced or deleted is at once seen so by every reader and in every listing. Put-if-absent is not used: pyarrow does not offer
it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import EgrsdError, StoreError, UserError

SCRATCH = ".tmp"
RESTORE = "Restore it from a copy, or delete it and run the same command again: what it described is then made anew"
NO_SPACE = "Free some space and run the same command again: nothing half-written counts"
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

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file at `path`, atomically and durably. Raises StoreError (no space) or UserError (no right)."""
        filesystem, root = self.opened
        with self._explained("cannot write", path):
            if self.local_root is not None:
                _write_local(self.local_root / path, self.local_root / SCRATCH, data)
            else:
                with filesystem.open_output_stream(f"{root}/{path}") as stream:
                    stream.write(data)

    def read_bytes(self, path: str) -> bytes | None:
        """A whole file, or None where there is none."""
        filesystem, root = self.opened
        try:
            with filesystem.open_input_file(f"{root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _told(error, "cannot read", self.locate(path)) from error

    def write_json(self, path: str, value: Any) -> None:
        """Put a JSON file, atomically."""
        self.write(path, json.dumps(value, indent=1, sort_keys=True).encode())

    def read_json(self, path: str, *keys: str) -> Any | None:
        """A JSON file, or None where there is none. Raises StoreError when it is torn, or not an object with `keys`."""
        data = self.read_bytes(path)
        if data is None:
            return None
        try:
            document = json.loads(data)
        except ValueError as error:
            raise StoreError(f"is not JSON ({error})", self.locate(path), RESTORE) from error
        if keys and not (isinstance(document, dict) and set(keys) <= document.keys()):
            raise StoreError(f"is not what belongs here: {', '.join(keys)} expected", self.locate(path), RESTORE)
        return document

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; empty where there is none."""
        filesystem, root = self.opened
        with self._explained("cannot list", folder), contextlib.suppress(FileNotFoundError):
            if self.local_root is not None:
                return sorted(os.listdir(self.local_root / folder))  # arrow asks for every file's size too: nine times the work
            found = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
            return sorted(info.base_name for info in found)
        return []

    def delete(self, path: str) -> None:
        """Remove a file or folder if it is there."""
        filesystem, root = self.opened
        with self._explained("cannot delete", path), contextlib.suppress(FileNotFoundError):
            info = filesystem.get_file_info(f"{root}/{path}")
            if info.type == fs.FileType.Directory:
                filesystem.delete_dir(f"{root}/{path}")
            elif info.type == fs.FileType.File:
                filesystem.delete_file(f"{root}/{path}")

    def scratch(self) -> Path | None:
        """A local folder for what is not finished, on the run's own disk; None on an object store, which needs none."""
        if self.local_root is None:
            return None
        folder = self.local_root / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def sweep(self) -> None:
        """Remove what processes that were killed had begun to write. For whoever holds the run alone."""
        if self.local_root is None:
            self.delete(SCRATCH)
        else:
            shutil.rmtree(self.local_root / SCRATCH, ignore_errors=True)  # a rank that is about to end may still write there

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
    said = error.strerror or re.sub(r" \(Request ID: [^)]*\)|; Details: .*", "", str(error))  # which name the endpoint
    if code is not None and code[1] in _REMEDIES:
        return UserError(f"{what} ({said})", where, _REMEDIES[code[1]])
    if error.errno in _RIGHTS:
        return UserError(f"{what} ({said})", where, "Get the right to, or use another place")
    remedy = NO_SPACE if error.errno == errno.ENOSPC else "Check that the place exists and its permissions"
    return StoreError(f"{what} ({said})", where, remedy)


def _write_local(path: Path, scratch: Path, data: bytes, tries: int = 10) -> None:
    temporary = scratch / f"{uuid4().hex}-{path.name}"
    try:
        for folder in (path.parent, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError:
        temporary.unlink(missing_ok=True)
        if tries == 1:
            raise
        return _write_local(path, scratch, data, tries - 1)  # swept meanwhile: an evaluation writes beside a driver that ends
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
