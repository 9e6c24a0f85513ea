"""What `egrsd submit` sends: the packages, pyproject.toml, and the files that the verb's settings or `--include` name.

Nothing else of the folder leaves this machine. Files with names of secrets stay, even inside a folder that is named, unless the
file itself is named.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.settle import read_config
from pipeline.config import Run
from pipeline.errors import SettingError
from pipeline.overrides import resolve
from pipeline.recipes import recipe as named
from pipeline.written import read_override

PACKAGES = ("pipeline", "actors", "jobs")
MARKS = ("pipeline/driver.py", "jobs/cli.py")  # a folder with both is a checkout; other projects have a `jobs` of their own
_FILES = (".jsonl", ".json", ".parquet", ".gz", ".zst", ".bz2", ".lz4", ".py")  # ends of names that mean files
_PLACES = ("source.uri", "model.path", "evaluation.source.uri")  # settings that may name files of the folder
_TEACHER = re.compile(r"teachers\.[^.]+\.model")
_REWARDS = "grade.rewards"
_RATES = "source.pass_rates"
_SECTIONS = tuple(sorted({name.partition(".")[0] for name in (*_PLACES, _REWARDS, "teachers")}))
MOST_BYTES = 100 * 2**20  # the job server of Ray 2.60 takes no larger request
_SECRET = re.compile(
    r"^\.|^id_(rsa|dsa|ecdsa|ed25519)|^_netrc|^kubeconfig|^rclone\.conf|^keys?\.|[-_]sa\.json|~$|\.(pem|key|p12|pfx|p8|ppk|jks|kdbx|tfvars|tfstate|env|bak)(\.|$)"
    r"|token(?!iz)|secret|passw|credential|(api|private|deploy|access|root)[-_]?keys?\b|service.?account",
    re.IGNORECASE,
)
_SECRET_CODE = re.compile(r"(secret|password|credential)s?\.py$|^\.", re.IGNORECASE)
_TOKENIZER = {"special_tokens_map.json", "added_tokens.json"}  # they only sound like secrets


@dataclass
class Parcel:
    """The files to send by their names in the folder, and the names that stay because they look like secrets."""

    files: dict[str, Path] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def describe(self) -> list[str]:
        """Lines for the user: what goes, by its first folder, with sizes, and what stays."""
        groups: dict[str, list[int]] = {}
        for name, path in self.files.items():
            groups.setdefault(name.partition("/")[0], []).append(path.stat().st_size)
        parts = [f"{name} ({len(sizes)} files, {_amount(sum(sizes))})" for name, sizes in sorted(groups.items())]
        lines = [f"sends {len(self.files)} files, {_amount(self.size)}: {', '.join(parts)}."]
        if self.kept:
            lines.append(f"stays here, since its name is that of a secret: {', '.join(self.kept[:8])}. --include FILE sends one.")
        return lines

    def put(self, target: Path) -> None:
        """Copy the files to a folder."""
        for name, path in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def collect(folder: Path, asked: dict[str, Any], include: Sequence[str]) -> Parcel:
    """What a verb with the options `asked` needs from `folder`.

    Raises SettingError for a file that is not there, a link that leads out of the folder, or more than MOST_BYTES.
    """
    parcel = Parcel()
    for name, path in _product(folder):
        _add(parcel, folder if path.is_relative_to(folder) else code_root(), name, path, _SECRET_CODE)
    for option, text in [*_named(folder, asked), *(("--include", text) for text in include)]:
        _add_named(parcel, folder, option, text)
    if parcel.size > MOST_BYTES:
        largest = sorted(parcel.files.items(), key=lambda item: -item[1].stat().st_size)[:3]
        listed = ", ".join(f"{name} ({_amount(path.stat().st_size)})" for name, path in largest)
        remedy = "Put large files where every node reaches them, and name them by an absolute path or a URI"
        raise SettingError(
            f"{_amount(parcel.size)} are more than Ray takes ({_amount(MOST_BYTES)}): {listed}", str(folder), remedy
        )
    return parcel


def _product(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of the source code, of the packages' data as pyproject.toml names it, and of pyproject.toml itself.

    A folder without the project's packages sends those that are installed here, as from a wheel.
    """
    if not all((folder / name).is_file() for name in MARKS):
        yield from _installed(code_root())
        return
    project = folder / "pyproject.toml"
    globs: dict[str, list[str]] = {}
    if project.is_file():
        yield project.name, project
        settings = tomllib.loads(project.read_text(encoding="utf-8"))
        globs = settings.get("tool", {}).get("setuptools", {}).get("package-data", {})
    for package in PACKAGES:
        for pattern in ["**/*.py", *globs.get(package, [])]:
            for path in sorted((folder / package).glob(pattern)):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield path.relative_to(folder).as_posix(), path


def code_root() -> Path:
    """The folder of the packages that run here: a checkout, or the site-packages of an environment."""
    return Path(__file__).resolve().parents[1]


def _installed(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file of the packages below `root`."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix(), path


def _named(folder: Path, asked: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(option or setting, text) of every place that a verb's options name. The settings of a recipe are checked on the way."""
    document, sets = {}, list(asked.get("set") or [])
    if config := asked.get("config"):
        yield "--config", config
        if _elsewhere(config) or not (folder / config).is_file():
            remedy = "Give a path relative to --working-dir"
            raise SettingError("no such file in the folder that is sent", f"--config {config}", remedy)
        document = read_config(str(folder / config))
    for text in _listed(asked.get("source")):
        yield "--source", text.partition("=")[2] or text
    if recipe := asked.get("recipe"):
        yield from _places(resolve(named(recipe), sets, document).model_dump())
        return
    places = dict(_places(document))
    for line in sets:
        if line.strip().startswith(_SECTIONS):  # a sweep writes several values of other settings in one line
            places |= _places(read_override(Run, line))
    yield from places.items()


def _listed(value: str | Sequence[str] | None) -> Sequence[str]:
    """An option that one verb takes once and another several times, as a list."""
    return [value] if isinstance(value, str) else value or []


def _places(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every place of a source, a model, a run or a reward's file in nested settings."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _places(value, f"{name}.")
        elif isinstance(value, str) and (name in _PLACES or _TEACHER.fullmatch(name)):
            yield name, value
        elif name == _REWARDS:
            yield from _of_rewards(value)
        elif name == _RATES:
            yield from ((name, text) for text in value if not _elsewhere(text))


def _of_rewards(rewards: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every file that a reward names. An installed module is the cluster's own."""
    for reward in rewards:
        function = str(reward.get("function", ""))
        place = function if function.endswith(".py") else function.rpartition(":")[0]
        if place.endswith(".py"):
            yield f"{_REWARDS}.{reward.get('name')}", place


def _add_named(parcel: Parcel, folder: Path, option: str, text: str) -> None:
    """Add the files at a relative path or glob. Absolute paths, URIs and hub ids mean something to the cluster only."""
    text = text.removeprefix("datasets:")
    if _elsewhere(text):
        if option == "--include":
            raise SettingError(f"{text!r} is not in the folder that is sent", option, "Give a path relative to --working-dir")
        return
    if option == _RATES:
        raise SettingError(f"the run {text!r} is not sent with the job", option, "Give a URI, or an absolute path of all nodes")
    found = sorted(folder.glob(text)) if any(sign in text for sign in "*?[") else [folder / text]
    found = [path for path in found if path.exists() or path.is_symlink()]
    if not found and (option == "--include" or text.startswith(".") or text.endswith(_FILES)):
        raise SettingError(f"{text!r} is not in the folder that is sent", option, "Check the path and --working-dir")
    for path in found:
        name = Path(text).as_posix() if path == folder / text else path.relative_to(folder).as_posix()
        if path.is_dir():
            _inside(folder, name, path)
            for file in sorted(path.rglob("*")):
                if file.is_file() or file.is_symlink():
                    _add(parcel, folder, f"{name}/{file.relative_to(path).as_posix()}", file, _SECRET)
        else:
            _add(parcel, folder, name, path, None)


def _elsewhere(text: str) -> bool:
    """Whether a text names no place of the folder that is sent."""
    return "://" in text or text.startswith(("/", "~")) or not text


def _add(parcel: Parcel, folder: Path, name: str, path: Path, secret: re.Pattern[str] | None) -> None:
    """Add one file, unless one part of its name in the folder looks like a secret's."""
    parts = Path(name).parts
    if secret is not None and any(secret.search(part) for part in parts if part not in _TOKENIZER):
        parcel.kept.append(name)
        return
    _inside(folder, name, path)
    parcel.files[name] = path


def _inside(folder: Path, name: str, path: Path) -> None:
    """Raise SettingError when a path leads out of the folder, as through a link."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise SettingError(f"leads out of the folder that is sent, to {real}", name, "Copy it into the folder, or leave it out")


def _amount(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
