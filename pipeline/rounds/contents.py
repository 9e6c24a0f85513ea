"""models.json: what stood behind the paths of the models that a run was made with, so that another model there is noticed.

It has an entry for `model.path` and one for each `teachers.NAME.model`: the hashes of pipeline/models/content.py, and the commit
of a hub's model. The folder's place does not count. A run of an early version has no such file. It is trusted, and its next
command writes one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter

from pipeline.config import Model, Run
from pipeline.errors import ModelError, command
from pipeline.models.content import content_of
from pipeline.rounds.inventory import withdraw_rounds
from pipeline.rounds.round import evaluation_run
from pipeline.stages import PLAN
from pipeline.store.directory import Store, area
from pipeline.store.documents import Document, Sha256, Text
from pipeline.store.names import EVALUATION_FOLDER, MODELS

ACCEPT = "Put the old model back, use another --run, or pass --accept-changes"
KEPT = "What is finished stays as it is"
_NAMES_ONE = re.compile(r"(?P<teacher>teachers\.[^.]+)\.(model|revision)|model\.(path|revision)")
_MOST = 3  # files that a message names
Hashes = dict[Annotated[str, Field(max_length=255)], Sha256]


class KeptModel(Document):
    """What a run knows of one model. path and revision are its settings; the rest is as in `pipeline.models.content.Content`."""

    path: str
    revision: str | None = None
    commit: Text | None = None
    files: Hashes = Field(default_factory=dict)
    weights: Hashes = Field(default_factory=dict)


_MODELS: TypeAdapter[dict[str, KeptModel]] = TypeAdapter(dict[Text, KeptModel])


def read_models(store: Store) -> Mapping[str, KeptModel]:
    """The content of models.json, which is empty where there is none. Raises StoreError for a damaged file."""
    return store.read_document(MODELS, _MODELS) or {}


def look(run: Run) -> dict[str, KeptModel]:
    """What the models of a run are now, by the names of their settings. A model that is not on this machine is left out."""
    found = {}
    for name, (model, weights) in _models(run).items():
        now = content_of(model, weights)
        if now is not None:
            found[name] = KeptModel(
                path=model.path, revision=model.revision, commit=now.commit, files=now.files, weights=now.weights
            )
    return found


def keep(store: Store, run: Run, now: Mapping[str, KeptModel]) -> None:
    """Write what `look` has found. What another machine has found of a model that is not on this one stays.

    So do the hashes of files that this machine lacks: those of weights, and of one commit of a hub.
    """
    before, kept = read_models(store), {}
    for name, (model, _) in _models(run).items():
        old, new = before.get(name), now.get(name)
        if old is not None and (old.path, old.revision) != (model.path, model.revision):
            old = None
        if old is not None and new is not None and _difference(old, new) is None:
            is_same = old.commit == new.commit
            new = new.model_copy(
                update={
                    "files": {**old.files, **new.files} if is_same else new.files,
                    "weights": {**old.weights, **new.weights} if is_same or not new.weights else new.weights,
                }
            )
        if (found := new or old) is not None:
            kept[name] = found
    if kept != before:
        store.write_json(MODELS, {name: model.model_dump(mode="json") for name, model in kept.items()})


def changes(store: Store, now: Mapping[str, KeptModel]) -> dict[str, str]:
    """A sentence for each model whose content is not the one that the run was made with, by the name of its setting.

    `now` is what `look` has found. There is none before the run has traces: then nothing depends on a model.
    """
    if not (store.numbers("rounds") or store.numbers("evals") or any(store.named("evals", EVALUATION_FOLDER))):
        return {}
    before, found = read_models(store), {}
    for name, model in now.items():
        if name in before and (what := _difference(before[name], model)):
            found[name] = f"{name} {model.path} {what}"
    return found


def refuse_changes(store: Store, now: Mapping[str, KeptModel], accept: bool | Collection[str], remedy: str = ACCEPT) -> list[str]:
    """The sentences of `changes` when they are accepted: all, none, or those of the models that `accept` names.

    Raises ModelError, with `remedy`, for the others.
    """
    found = changes(store, now)
    if refused := [text for name, text in found.items() if not (accept if isinstance(accept, bool) else name in accept)]:
        raise ModelError("; ".join(refused), store.uri, remedy)
    return [f"note: {text}. {KEPT}." for text in found.values()]


def forget_unfinished(
    store: Store, run: Run, models: Collection[str], rounds: Collection[int], evaluations: Collection[int]
) -> list[str]:
    """Delete what the old models made of unfinished rounds and evaluations: none of them may have shards of two models.

    models: those that are others now, as in `changes`. Returns the folders in which something was deleted.
    """
    if not models:
        return []
    withdraw_rounds(store, rounds)
    found = []
    for kind, of, numbers in (("rounds", run, rounds), ("evals", evaluation_run(run), evaluations)):
        made = [s.name for s in PLAN if any(map(s.reads_setting, models)) or "writers" in s.round_inputs(of)]
        found += [(area(kind, n), name) for n in numbers for name in made if store.names(f"{area(kind, n)}/{name}")]
    for where, name in found:
        store.delete(f"{where}/{name}")
    return list(dict.fromkeys(where for where, _ in found))


def refuse_other(store: Store, run: Run) -> None:
    """Raise ModelError when another model than that of the run's traces lies at a path. For verbs without --accept-changes."""
    refuse_changes(store, look(run), accept=False, remedy=way_out(store))


def named_by(setting: str) -> str | None:
    """The model that `setting`, a dotted name, chooses: who changes it wants another one. None for other settings."""
    found = _NAMES_ONE.fullmatch(setting)
    return None if found is None else f"{found['teacher']}.model" if found["teacher"] else "model.path"


def way_out(store: Store) -> str:
    """The remedy of a verb that has no --accept-changes."""
    again = command("distill", "--run", store.uri, "--accept-changes")
    return f"Put the old model back. {again} goes on with the run, and takes the new one"


def _models(run: Run) -> dict[str, tuple[Model, bool]]:
    """The models that a run names, by their settings, and whether their weights are used here: those of a server are not."""
    of_teachers = {
        f"teachers.{name}.model": (run.model_of(teacher), not teacher.server)
        for name, teacher in run.teachers.items()
        if teacher.model
    }
    return {"model.path": (run.model, True)} | of_teachers


def _difference(old: KeptModel, new: KeptModel) -> str | None:
    """What differs between two contents, in words. Files that one side may lack for another reason are not counted."""
    if old.commit is not None and old.commit == new.commit:
        return None
    is_copy = bool(old.commit or new.commit)  # the local copy of a hub has the files that somebody has asked for
    names = _unlike(old.files, new.files, is_copy)
    if old.weights and new.weights:  # a driver's machine may have tokenizer and configuration alone
        names += _unlike(old.weights, new.weights, is_copy)
    if names:
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        return f"has other files than the run was made with: {', '.join(names[:_MOST])}{more}"
    if old.commit and new.commit and (not old.weights or old.weights.keys() != new.weights.keys()):
        return f"is at commit {new.commit[:12]} of the hub, and the run was made with {old.commit[:12]}"
    return None


def _unlike(old: Hashes, new: Hashes, is_copy: bool) -> list[str]:
    """The names of files with different hashes. Without `is_copy` also those that only one side has."""
    names = old.keys() & new.keys() if is_copy else old.keys() | new.keys()
    return sorted(name for name in names if old.get(name) != new.get(name))
