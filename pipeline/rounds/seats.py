"""Where the teachers of a round answer, and with which policy of the student.

A teacher with `policy` lag:N is the policy N versions before the one that wrote the traces. One with ema:RATE is the exponential
mean of all policies up to that one. A mean is a folder `teachers/<name>/<version>` in peft format, with a manifest, like any
policy. It is float32, since a mean in half precision stands still.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pipeline.contract import Policy, Seat
from pipeline.digest import digest
from pipeline.errors import StoreError
from pipeline.method.averages import averaged
from pipeline.rounds.round import Round
from pipeline.store.directory import Store, area
from pipeline.store.documents import Digest, Document
from pipeline.store.folders import ADAPTER, ADAPTER_CONFIG, is_whole, put_folder

RECORD = "mean.json"
MEAN_REMEDY = "Delete the folder: the next round makes it again"
_REMEDY = "A mean needs every policy since the base: keep them all (train.keep_policies 0), or train the run again"


class Record(Document):
    """mean.json: what a mean was made of, as a hash of its rate and of the last policy in it."""

    made_of: Digest


def folder_of(name: str, version: int) -> str:
    """The folder of a teacher's mean."""
    return area(f"teachers/{name}", version)


def policy_of(work: Round, name: str) -> Policy:
    """The policy that a teacher of a round is. Raises StoreError when it is not published."""
    teacher, version = work.run.teachers[name], work.policy_version
    if teacher.lag is not None:
        return work.store.policy(max(0, version - teacher.lag))
    if teacher.rate is not None and version:
        return Policy(version, work.store.locate(folder_of(name, version)))
    return Policy(0)


def seats_of(work: Round) -> dict[str, Seat]:
    """Where each teacher that the run names answers: on engines of its own, or on those that score for the student."""
    shared = work.engines.get("score") or work.engines.get("rollout")
    found = {name: work.engines.get(f"teachers.{name}", shared) for name in work.run.teachers}
    return {name: Seat(engines, policy_of(work, name)) for name, engines in found.items() if engines is not None}


def digest_of_policies(work: Round) -> str | None:
    """Hash of the policies that the teachers of a round are. None when every one is the base."""
    parts: dict[str, object] = {}
    for name, teacher in work.run.teachers.items():
        version = max(0, work.policy_version - (teacher.lag or 0)) if teacher.policy != "base" else 0
        if version:
            parts[name] = [teacher.rate, work.store.content(version)]
    return digest(parts) if parts else None


def prepare(work: Round) -> None:
    """Make the means that the teachers of a round are, unless they are there. Only a driver of the run calls this.

    Raises StoreError when a policy of a mean, or the policy of a lagging teacher, is gone or damaged.
    """
    for name, teacher in work.run.teachers.items():
        if teacher.lag is not None:
            work.store.check_policy(max(0, work.policy_version - teacher.lag))
        if teacher.rate is not None:
            _make_means(work.store, name, teacher.rate, work.policy_version)


def _make_means(store: Store, name: str, rate: float, version: int) -> None:
    first = version
    while first and not _is_current(store, name, rate, first):
        first -= 1
    for number in range(first + 1, version + 1):
        _make_mean(store, name, rate, number)


def _made_of(store: Store, rate: float, version: int) -> str:
    """What the mean up to a policy is made of. A policy that is trained again changes every later one too."""
    return digest([rate, store.content(version)])


def _is_current(store: Store, name: str, rate: float, version: int) -> bool:
    """Whether a mean is whole, and made of the policies of now. A driver that died may have left a record alone."""
    record = store.read_document(f"{folder_of(name, version)}/{RECORD}", Record)
    return record is not None and is_whole(store, folder_of(name, version)) and record.made_of == _made_of(store, rate, version)


def _make_mean(store: Store, name: str, rate: float, version: int) -> None:
    """Publish the mean up to a policy, from the mean before it."""
    from safetensors.torch import load_file, save_file  # torch takes seconds to import

    with store.local(area("policy", version)) as policy, tempfile.TemporaryDirectory(prefix="egrsd-mean-") as out:
        if policy is None:
            raise StoreError(f"policy {version} is not published", store.locate("policy"), _REMEDY)
        before = None
        if version > 1:
            with store.local(folder_of(name, version - 1)) as last:
                if last is None:
                    raise StoreError("this mean is not there", store.locate(folder_of(name, version - 1)), MEAN_REMEDY)
                before = load_file(last / ADAPTER)
        mean = averaged(before, load_file(policy / ADAPTER), rate)
        save_file({key: weight.contiguous() for key, weight in mean.items()}, Path(out) / ADAPTER)
        shutil.copy(policy / ADAPTER_CONFIG, Path(out) / ADAPTER_CONFIG)
        (Path(out) / RECORD).write_text(Record(made_of=_made_of(store, rate, version)).model_dump_json())
        put_folder(store, folder_of(name, version), Path(out))
