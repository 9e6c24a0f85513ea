"""Whole files below one URI, which is a folder of a local disk or any URI that pyarrow.fs opens.

Local files are written in the folder `.tmp`, fsynced and renamed. The name of an unfinished file begins with the mark of its
process (owner.py), so that a sweep takes only what the dead have left. An object store has no rename. There an object appears
when its last byte has arrived. A writer that dies earlier leaves nothing that a listing shows. Unseen parts of a large object may
stay until a lifecycle rule of the bucket deletes them. One property of the store is required. After an object is written,
replaced or deleted, every reader and every listing must see it at once. Put-if-absent is not used: pyarrow does not offer it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs
from pydantic import JsonValue, TypeAdapter

from pipeline.config.section import holds_credentials
from pipeline.errors import GONE, EgrsdError, StoreError, UserError
from pipeline.notices import NOTICE_S, late, tell
from pipeline.store import owner
from pipeline.store.documents import RESTORE, T, parse
from pipeline.store.names import inside

SCRATCH = ".tmp"
RAY_FOLDER = f"{SCRATCH}/ray"  # Ray Train demands a folder that all nodes see; the run keeps nothing in it
_ANY: TypeAdapter[Any] = TypeAdapter(JsonValue)
NO_SPACE = "Free some space and run the same command again: unfinished files are ignored"
_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_REMEDIES = {
    "ACCESS_DENIED": "Give these credentials the right to list, read, write and delete there, or use another place",
    "NO_SUCH_BUCKET": "Create the bucket, or check its name and AWS_ENDPOINT_URL",
    "NETWORK_CONNECTION": "Check AWS_ENDPOINT_URL and the network",
}
_LOST = "NETWORK_CONNECTION"
PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between tries of a store that has answered before; no pause may outlast a lease's TTL_S
P = ParamSpec("P")
R = TypeVar("R")


def _patient(act: Callable[P, R]) -> Callable[P, R]:
    """A method of `Files` that is tried again while the network to a store that has answered before is lost.

    Each method reads, or leaves the same files when it is done twice. A rank's work of hours would end with one lost request.
    """

    @wraps(act)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        for pause_s in PAUSES_S:
            try:
                return act(*args, **kwargs)
            except StoreError as error:
                if _code(error.__cause__) != _LOST:
                    raise
                tell("object store lost", f"{error.where}: {error.what}. It is tried again in {pause_s:g} s.")
                time.sleep(pause_s)
        return act(*args, **kwargs)

    return tried


class Files:
    """The files below `uri`, a local path or any URI that pyarrow.fs opens. Picklable: the file system opens on first use.

    An object store shows a file when it is whole, but for Azure, which shows it empty while it is written. No file of ours is
    empty, so an empty one there is none yet.

    Endpoint and credentials come from the environment or a profile, and never from the URI, since the URI is logged.
    """

    begun: str | None = None  # a file that is there once the folder has a run; without it nothing is written any more
    is_ours: bool = True  # a person's own folder gets no folder for unfinished files
    reached: bool = False  # whether the place has answered: what fails later is no mistake in its address

    def __init__(self, uri: str) -> None:
        if not uri.strip():
            raise UserError("the path is empty", "--run", "Name a folder or a URI")
        if "://" in uri:
            _check_uri(uri)
        try:
            uri.encode()
            self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"is no path ({error})", ascii(uri)[1:-1], "Name a folder or a URI") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,), {"begun": self.begun, "reached": self.reached}

    @cached_property
    def opened(self) -> tuple[fs.FileSystem, str]:
        """The file system and the path in it. Raises UserError for a URI that cannot be opened."""
        # a small object then takes one request instead of three; an error of the opening comes at the close
        options = "?allow_delayed_open=true" if self.uri.startswith("s3://") else ""
        try:
            with self._waited(f"open {self.uri}"):
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
        """Seconds between two looks for a file of another process. They are more on an object store, where each is a request."""
        return 0.05 if self.local_root is not None else 0.25

    def locate(self, path: str) -> str:
        """URI or local path of a file, as engines and users can open it."""
        return f"{self.uri}/{path}"

    @_patient
    def write(self, path: str, data: bytes) -> None:
        """Write a whole file atomically and durably. Raises UserError when the right to write is missing, else StoreError."""
        filesystem, root = self.opened
        with self._explained("write", inside(path)):
            if self.local_root is not None:
                self._check_there()
                place = self.local_root / path
                _write_local(place, self.local_root / SCRATCH if self.is_ours else place.parent, data)
            else:
                assert data, path  # `read_bytes` would not find it
                with filesystem.open_output_stream(f"{root}/{path}") as stream:
                    stream.write(data)

    def check_writable(self) -> None:
        """Raise UserError when a local folder takes no files. An object store tells that when it is written to."""
        folder = self.local_root
        if folder is None:
            return
        with self._explained("write", ""):
            while not folder.exists():
                folder = folder.parent
            _check_right(folder)

    @_patient
    def read_bytes(self, path: str) -> bytes | None:
        """The content of a file, or None when it does not exist. Raises StoreError or UserError when it cannot be read."""
        filesystem, root = self.opened
        with (
            self._explained("read", inside(path)),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            filesystem.open_input_file(f"{root}/{path}") as file,
        ):
            data: bytes = file.read()
            return data if data or self.local_root is not None else None
        return None

    @_patient
    def size(self, path: str) -> int | None:
        """Bytes of a file, or None when it does not exist."""
        filesystem, root = self.opened
        with self._explained("read", inside(path)):
            info = filesystem.get_file_info(f"{root}/{path}")
        return int(info.size) if info.type == fs.FileType.File else None

    def write_json(self, path: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self.write(path, _as_json(value))

    def keep_json(self, path: str, value: Any) -> None:
        """Write a JSON file, unless it has this content already: a place that may only be read is then as good as any."""
        if self.read_bytes(path) != _as_json(value):
            self.write_json(path, value)

    def read_json(self, path: str, *keys: str) -> Any | None:
        """The content of a JSON file, or None when it does not exist.

        Raises StoreError when the file is not JSON, or not an object with `keys`.
        """
        document: Any = self.read_document(path, _ANY)
        if document is not None and keys and not (isinstance(document, dict) and set(keys) <= document.keys()):
            raise StoreError(f"is not what belongs here: {', '.join(keys)} expected", self.locate(path), RESTORE)
        return document

    def read_document(self, path: str, kind: type[T] | TypeAdapter[T], remedy: str = RESTORE) -> T | None:
        """The content of a JSON file as a `kind`, or None when it does not exist.

        Raises StoreError, with the field that is wrong and `remedy`, when the file is not a `kind`.
        """
        data = self.read_bytes(path)
        return None if data is None else parse(kind, data, self.locate(path), remedy)

    @_patient
    def names(self, folder: str) -> list[str]:
        """Sorted names of all files and folders in a folder. Empty when the folder does not exist."""
        filesystem, root = self.opened
        with self._explained("list", inside(folder)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.local_root is not None:
                # arrow also reads the size of every file, which takes nine times as long
                return sorted(os.listdir(self.local_root / folder))
            infos = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
            return sorted(info.base_name for info in infos)
        return []

    @_patient
    def kinds(self, folder: str) -> dict[str, fs.FileType]:
        """Whether each name in a folder is a file or a folder, sorted by name. Empty when the folder does not exist."""
        filesystem, root = self.opened
        with self._explained("list", inside(folder)):
            infos = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
            return {info.base_name: info.type for info in sorted(infos, key=lambda info: info.base_name)}

    def named(self, folder: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """The names in a folder that match the whole `pattern` (names.py), sorted. Files that do not belong are passed over."""
        return (match for name in self.names(folder) if (match := pattern.fullmatch(name)) is not None)

    @_patient
    def delete(self, path: str) -> None:
        """Delete a file or a folder, if it exists."""
        filesystem, root = self.opened
        with self._explained("delete", inside(path)), contextlib.suppress(FileNotFoundError):
            info = filesystem.get_file_info(f"{root}/{path}")
            if info.type == fs.FileType.Directory:
                filesystem.delete_dir(f"{root}/{path}")
            elif info.type == fs.FileType.File:
                filesystem.delete_file(f"{root}/{path}")

    def scratch(self) -> Path | None:
        """A local folder for unfinished files, on the disk of the run. None on an object store, which needs no such folder."""
        if self.local_root is None:
            return None
        self._check_there()
        folder = self.local_root / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def sweep(self) -> None:
        """Delete the unfinished files of processes that have ended. The folder itself stays: somebody may be writing there."""
        if self.local_root is None:
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for left in filter(owner.is_left, list((self.local_root / SCRATCH).iterdir())):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def is_gone(self) -> bool:
        """Whether a local folder that held a run does not any more: it was moved, or its disk has left."""
        return self.begun is not None and self.local_root is not None and not (self.local_root / self.begun).exists()

    def _check_there(self) -> None:
        """Raise StoreError when the folder has gone. A write would make it anew, on another disk or beside the moved one."""
        if self.is_gone():
            raise StoreError(GONE, self.uri, "Bring it back, then run the same command again")

    @contextlib.contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        """Raise an OSError of the block as an error of ours that says what could not be done. A long wait is told."""
        try:
            with self._waited(f"{verb} {self.locate(path)}"):
                yield
            self.reached = True
        except OSError as error:
            raise _as_egrsd_error(error, f"cannot {verb}", self.locate(path), self.reached) from error

    def _waited(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Tell who is waited for when a request to an object store takes long. A local disk is not waited for."""
        if "://" not in self.uri:
            return contextlib.nullcontext()
        return late("object store", f"waiting for the object store: to {what} has taken {NOTICE_S:g} s so far.")


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _check_uri(uri: str) -> None:
    rest = uri.split("://", 1)[1]
    if holds_credentials(uri):
        remedy = "Give them by environment or profile"
        raise UserError("the URI holds credentials, which would end up in logs", "--run", remedy)
    if sign := next((sign for sign in "?#" if sign in rest), None):
        raise UserError(
            f"the URI holds '{sign}': options would end up in logs",
            "--run",
            "Give them by environment: the endpoint of an object store as AWS_ENDPOINT_URL",
        )


def _code(error: BaseException | None) -> str | None:
    """The name that an object store's client gives a failure, or None."""
    found = re.search(r"AWS Error ([A-Z_]+)", str(error))
    return found[1] if found is not None else None


def _as_egrsd_error(error: OSError, what: str, where: str, reached: bool) -> EgrsdError:
    """UserError when the place has not answered yet or the right is missing, which the user can mend. Else StoreError."""
    code = _code(error)
    cause = error.strerror or re.sub(r" \(Request ID: [^)]*\)|; Details: .*", "", str(error))  # the details name the endpoint
    if code == _LOST and reached:
        return StoreError(f"{what} ({cause})", where, "The network was lost. Run the same command again: it goes on")
    if code in _REMEDIES:
        return UserError(f"{what} ({cause})", where, _REMEDIES[code])
    if error.errno in _RIGHTS:
        return UserError(f"{what} ({cause})", where, "Get the right to do this, or use another place")
    remedy = NO_SPACE if error.errno == errno.ENOSPC else "Check that the place exists and its permissions"
    return StoreError(f"{what} ({cause})", where, remedy)


def check_place(path: Path) -> None:
    """Raise OSError when `replace_local` could not write a file there: its folder is missing or takes no files."""
    path = path.expanduser()
    folder = path.resolve().parent
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}")
    _check_right(path if path.exists() and not path.is_file() else folder)


def _check_right(place: Path) -> None:
    """Raise OSError when this user may not write to a place, or nobody may."""
    if not os.access(place, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def replace_local(path: Path, text: str) -> None:
    """Write a local file that a person named. An old one stays until the new one is whole, and a link to it stays a link.

    A device, such as /dev/stdout, is written to. Raises OSError.
    """
    path = path.expanduser()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{owner.mark()}{uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_local(path: Path, scratch: Path, data: bytes) -> None:
    temporary = scratch / f"{'' if scratch.name == SCRATCH else '.'}{owner.mark()}{uuid4().hex[:12]}"
    for folder in (path.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
