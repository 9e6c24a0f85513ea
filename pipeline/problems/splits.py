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
_TABLE = re.compile(r"(.*/)?(_delta_log/.+|\.hoodie/.+|metadata/[^/]+\.metadata\.json)")  # a log that says which files count

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

    Raises SourceError for a path that names two splits, such as `train/test.parquet`.
    """
    *folders, name = path.split("/")
    if shard := _SHARD.fullmatch(name):
        return canonical(shard["split"]), "/".join(folders)
    stem = re.sub(r"(\.(jsonl|ndjson|json))?\.\w+$", "", name)
    named = {depth: found for depth, part in enumerate([*folders, stem]) if (found := _splits_in(part))}
    if not named:
        return None
    if len(splits := set[str]().union(*named.values())) > 1:
        what = f"names two splits: {', '.join(sorted(splits))}"
        raise SourceError(what, path, "Give the files you mean as a glob, or rename it")
    return splits.pop(), "/".join(folders[: max(named)])


def _splits_in(name: str) -> set[str]:
    """The splits that a name speaks of: `test` for `my-test_2`, `testSet` and `split=test`, none for `contest`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return {canonical(word) for word in words if word.lower() in _WORDS}


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

    All are Parquet files, or all are JSONL files. A folder that exists is never taken for a glob, whatever its name is. Hidden
    files are passed over, and in a folder what lies below a name such as `_temporary`. The list may be empty.

    Raises SourceError when the folder cannot be listed, when it lacks the split, and when it has both kinds of files. A folder
    whose files count only as far as a log of its own says so is refused too.
    """
    try:
        info = filesystem.get_file_info(path)
        if info.is_file:
            return [path] if _is_parquet(path) or jsonl.is_named(path) else []
        folder = info.type == FileType.Directory
        names_a_file = "/" in source.uri or jsonl.is_named(path) or _is_parquet(path)
        if info.type == FileType.NotFound and names_a_file and not any(sign in path for sign in _SIGNS):
            raise _absent(source)
        if not folder and not any(sign in path for sign in _SIGNS):
            return [path] if jsonl.is_named(path) else []  # to open it says why it cannot be read
        base, pattern = (path.rstrip("/"), "*") if folder else _literal_base(filesystem, path)
        below = filesystem.get_file_info(FileSelector(base or "/", recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:  # ValueError: a name that no file has
        raise SourceError(f"cannot be listed: {error}", path, "Check source.uri and the rights to read it") from error
    names = {item.path: item.path.removeprefix(base).lstrip("/") for item in below if item.is_file}
    if folder and (log := next((name for name in names.values() if _TABLE.fullmatch(name)), None)):
        remedy = "Write its rows to Parquet files of their own, or give the files you mean as a glob"
        raise SourceError(f"is a table whose log ({log}) says which of its files count", source.uri, remedy)
    files = sorted(file for file, name in names.items() if _is_meant(name, pattern, folder))
    lines = [file for file in files if jsonl.is_named(file) and not (folder and file.lower().endswith(_DOCUMENTS))]
    packed = [file for file in files if (_is_parquet(file) if folder else file not in lines)]
    if packed and lines:
        what = f"has Parquet and JSONL files, such as {names[packed[0]]} and {names[lines[0]]}"
        raise SourceError(what, source.uri, "Give one kind of files as a glob, such as FOLDER/**/*.parquet")
    return files_of_split(source, base, packed or lines, chosen=not folder)


def _is_parquet(path: str) -> bool:
    """Whether a path has the name of a Parquet file."""
    return path.lower().endswith(_PARQUET)


def _is_meant(name: str, pattern: str, folder: bool) -> bool:
    """Whether a file below a folder is one of the source, by its name there. Without `folder` the pattern decides."""
    if _is_hidden(name):
        return False
    if folder:  # other programs keep unfinished files there, as Spark does below `_temporary`
        return not any(part.startswith("_") for part in name.split("/")[:-1])
    return _matches(name.split("/"), pattern.split("/"))


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a path fits a glob, as in a shell: `*` stands for a part of one name, and `**` for any number of folders."""
    if not patterns:
        return not parts
    first, *others = patterns
    if first == "**":
        return _matches(parts, others or ["*"]) or (bool(parts) and _matches(parts[1:], patterns))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], others)


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
