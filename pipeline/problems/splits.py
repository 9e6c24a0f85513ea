"""The split that a Parquet file of a folder belongs to, by the names that datasets of the hub use."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from pipeline.config import Source
from pipeline.errors import SourceError

_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?\.(parquet|pq)")  # train-00000-of-00002.parquet
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


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
    named = [canonical(word) for word in re.split(r"[^A-Za-z0-9]+", name.rpartition(".")[0]) if word.lower() in _WORDS]
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
