"""The files of a folder or a glob, and the split that each belongs to, by the names that datasets of the hub use."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Iterable

from pyarrow.fs import FileSelector, FileSystem, FileType

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.problems import jsonl

_SIGNS = "*?["  # a path with one of these is a glob
_PARQUET, _DOCUMENTS = (".parquet", ".pq"), ".json"  # a folder has .json files that hold no rows, such as dataset_infos.json

_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?\.(parquet|pq|jsonl|ndjson)(\.\w+)?")  # train-00000-of-00002.parquet
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_one_file(uri: str) -> bool:
    """Whether an address names a single file by its ending. Such a source has no splits."""
    kinds = (*_PARQUET, _DOCUMENTS)
    return (jsonl.is_named(uri) or uri.endswith(kinds)) and not any(sign in uri for sign in _SIGNS)


def canonical(split: str) -> str:
    """One name for the names of a split: `val`, `valid` and `dev` are `validation`."""
    return _WORDS.get(split.lower(), split)


def split_of(path: str) -> tuple[str, str] | None:
    """(split, the folders above the part of the path that names it), or None when no part names a split.

    path: below the folder of the source, such as `data/train-00000-of-00001.parquet` or `test/0000.parquet`.
    """
    *folders, name = path.split("/")
    if shard := _SHARD.fullmatch(name):
        return canonical(shard["split"]), "/".join(folders)
    stem = re.sub(r"(\.(jsonl|ndjson|json))?\.\w+$", "", name)
    named = [canonical(word) for word in re.split(r"[^A-Za-z0-9]+", stem) if word.lower() in _WORDS]
    if named:
        return named[0], "/".join(folders)
    for depth in range(len(folders), 0, -1):
        if folders[depth - 1].lower() in _WORDS:
            return canonical(folders[depth - 1]), "/".join(folders[: depth - 1])
    return None


def files_of_split(source: Source, root: str, files: list[str], chosen: bool) -> list[str]:
    """The files of split `source.split`, or all files when their names tell of no split.

    root: folder of the source. chosen: whether a glob chose the files; then one split that is not asked for is taken too.

    Raises SourceError that lists the splits that are there, and for files of which only some belong to a split.
    """
    found = {path: split_of(path.removeprefix(root).lstrip("/")) for path in files}
    by_split: dict[str, set[str]] = defaultdict(set)
    for place in found.values():
        if place is not None:
            by_split[place[0]].add(place[1])
    if not by_split or (chosen and len(by_split) == 1):
        return files
    there = ", ".join(sorted(by_split))
    if stray := [path for path, place in found.items() if place is None]:
        remedy = "Give the files you mean as a glob, or move the others away"
        raise SourceError(f"belongs to no split; other files do ({there})", stray[0], remedy)
    wanted = canonical(source.split)
    check_split(source, wanted, by_split)
    if len(folders := by_split[wanted]) > 1:
        listed = ", ".join(sorted(folder or "." for folder in folders))
        raise SourceError(f"has split '{wanted}' in several folders: {listed}", source.uri, "Give one of the folders")
    return [path for path, place in found.items() if place is not None and place[0] == wanted]


def check_split(source: Source, wanted: str, known: Iterable[str]) -> None:
    """Raise SourceError that lists the known splits when the wanted one is not among them."""
    if wanted not in (names := sorted(known)):
        what = f"has no split '{source.split}'; there are: {', '.join(names)}"
        raise SourceError(what, source.uri, "Set its split to one of them")


def files_below(source: Source, filesystem: FileSystem, path: str) -> list[str]:
    """The file itself, or the files of split `source.split` below a folder or among those that a glob matches, sorted.

    All are Parquet files, or all are JSONL files: of a folder the latter where it has no Parquet file. A folder that exists is
    never taken for a glob, whatever its name is. Hidden files are passed over. The list may be empty. Raises SourceError when the
    folder cannot be listed, or lacks the split.
    """
    try:
        info = filesystem.get_file_info(path)
        if info.is_file:
            return [path] if path.endswith(_PARQUET) or jsonl.is_named(path) else []
        folder = info.type == FileType.Directory
        names_a_file = "/" in source.uri or jsonl.is_named(path) or path.endswith(_PARQUET)
        if info.type == FileType.NotFound and names_a_file and not any(sign in path for sign in _SIGNS):
            raise _absent(source)
        if not folder and not any(sign in path for sign in _SIGNS):
            return [path] if jsonl.is_named(path) else []  # to open it says why it cannot be read
        base, pattern = (path.rstrip("/"), "*") if folder else _literal_base(filesystem, path)
        below = filesystem.get_file_info(FileSelector(base or "/", recursive=True, allow_not_found=True))
    except OSError as error:
        raise SourceError(f"cannot be listed: {error}", path, "Check source.uri and the rights to read it") from error
    names = {item.path: item.path.removeprefix(base).lstrip("/") for item in below if item.is_file}
    files = sorted(file for file, name in names.items() if fnmatch.fnmatchcase(name, pattern) and not _is_hidden(name))
    lines = [file for file in files if jsonl.is_named(file) and not (folder and file.endswith(_DOCUMENTS))]
    packed = [file for file in files if (file.endswith(".parquet") if folder else file not in lines)]
    if packed and lines and not folder:
        raise SourceError("matches Parquet and JSONL files", source.uri, "Give one kind of files")
    return files_of_split(source, base, packed or lines, chosen=not folder)


class AbsentError(SourceError):
    """Nothing is at the path of a source."""


def _absent(source: Source) -> AbsentError:
    """The error of a path at which nothing is. A relative path is told with the folder that it is read from."""
    local = "://" not in source.uri and not os.path.isabs(os.path.expanduser(source.uri))
    where = f" (relative to the folder {os.getcwd()})" if local else ""
    return AbsentError(f"does not exist{where}", source.uri, "Check source.uri")


def _literal_base(filesystem: FileSystem, path: str) -> tuple[str, str]:
    """The folders at the front of a glob that exist as they are written, and the pattern below them."""
    *folders, last = path.split("/")
    base: list[str] = []
    for folder in folders:
        here = "/".join([*base, folder])
        if any(sign in folder for sign in _SIGNS) and filesystem.get_file_info(here).type != FileType.Directory:
            break
        base.append(folder)
    return "/".join(base), "/".join([*folders[len(base) :], last])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
