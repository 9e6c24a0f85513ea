"""Writes a policy as a model folder, for `egrsd export`, with the libraries that only this needs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from actors.inference.startup import inspect_model
from pipeline.config import Run
from pipeline.evidence.model_card import UNTRAINED, Released, facts, model_card
from pipeline.models.push import check_push, push
from pipeline.store.directory import Store, area
from pipeline.training.student.release import base_name, write_model

__all__ = ["UNTRAINED", "check_push", "push", "write"]


def write(store: Store, run: Run, version: int, merge: bool, folder: Path) -> dict[str, Any]:
    """Write everything that belongs to a policy into a local folder. Returns what a program reads of it (`facts`)."""
    ends, _ = inspect_model(run.model)
    with store.local(area("policy", version)) if version else _no_policy() as policy:
        write_model(run, policy, folder, merge, ends)
    released = Released(version, merge or run.model.tuning == "full", base_name(run.model))
    (folder / "README.md").write_text(model_card(store, run, released), encoding="utf-8")
    return facts(store, run, released)


def _no_policy() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()
