"""Twenty real resumes of a run that was cut off, each after another damage to one of its files.

A resume ends with the policies of the undamaged run, to the bit, or it is refused in one line. A shard or a tensor file that it
did not read is found by `egrsd verify`. The run is small, on fake engines, and its trainer works in this process.
"""

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzzed import findings, json_mutations

from actors.fakes import UNWATCHED, FakeEngine
from jobs.distill import distill
from jobs.settle import Choices
from pipeline.store.directory import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
RESUMES, OF_SWAPS, OF_SHARDS, OF_TENSORS = 20, 4, 4, 3
SETS = (
    *UNWATCHED,
    *("rounds=3", "rollout.prompts_per_round=4", "rollout.prompts_per_shard=2", "rollout.group_size=4"),
    *("grade.advantage=running", "grade.running_warmup_steps=1", "grade.answer_pattern=([0-9])"),
    *("train.batch_traces=8", "train.warmup_steps=0", "evaluation.problems=4"),
)
LAST = ("policy/0003", "train/0003", "evals/0003", "rounds/0002/score", "rounds/0002/profile", "rounds/0002/label")
LAST += ("rounds/0002/ready.json", "metrics/0002-train.jsonl", "metrics/0002-round.jsonl", "sinks", "logs")


@dataclass(frozen=True)
class Damage:
    """One file below the run, and what it holds instead: None for nothing."""

    file: str
    data: bytes | None
    what: str


@pytest.fixture(scope="module")
def whole(ray_local, tmp_path_factory):
    """A run of three rounds that nobody disturbed."""
    store = Store(str(tmp_path_factory.mktemp("runs") / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        trains_here(patch)
        distill(store.uri, Choices("demo", SETS), engine_class=FakeEngine)
    return store


def trains_here(patch):
    """Train in this process: Ray Train's processes take far longer to start than a tiny round to train."""
    import trainer_here

    from pipeline.training import worker

    patch.setattr(worker, "fit", trainer_here.fit)


def cut_off(whole, folder):
    """A copy of the run as a kill in its last round leaves it."""
    shutil.copytree(whole.local_root, folder)
    store = Store(str(folder))
    for name in LAST:
        store.delete(name)
    return store


def damages(store):
    """Twenty damages: of JSON files, each of another file, by another file of its kind, of shards and of tensors."""
    draw, root = random.Random(0), store.local_root
    by_file = {}
    for name, data, what in json_mutations(store):
        by_file.setdefault(name, []).append(Damage(name, data, what))
    for name in draw.sample(sorted(by_file), RESUMES - OF_SWAPS - OF_SHARDS - OF_TENSORS):
        yield draw.choice(by_file[name])
    for name in draw.sample([name for name in by_file if name.startswith("rounds/")], OF_SWAPS):
        others = [path for path in root.glob(f"rounds/*/**/{Path(name).name}") if path != root / name]
        other = draw.choice(sorted(others))
        yield Damage(name, other.read_bytes(), f"{name} <- {other.relative_to(root)}")
    for suffix, number in ((".parquet", OF_SHARDS), (".safetensors", OF_TENSORS)):
        paths = sorted(path for path in root.rglob(f"*{suffix}") if "0000" not in path.parts)
        for index, path in enumerate(draw.sample(paths, number)):
            data, name = path.read_bytes(), str(path.relative_to(root))
            flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
            changed = (flipped, data[:-7], None, b"")[index]
            yield Damage(name, changed, f"{name}: {'missing' if changed is None else len(changed)}")


def made(store):
    """What a resume makes: the last policy with its training state, and the shards of the last round."""
    folders = {name: store.read_json(f"{name}/manifest.json") for name in ("policy/0003", "train/0003")}
    stages = ("rollout", "grade", "score", "label")
    shards = {s: {shard: e.sha256 for shard, e in store.entries("rounds/0002", s).items()} for s in stages}
    return folders, shards


def resumed(store, capfd):
    """The exit code of a resume, and what it printed."""
    capfd.readouterr()
    try:
        distill(store.uri, Choices(), engine_class=FakeEngine)
    except SystemExit as ended:
        return ended.code, "".join(capfd.readouterr())
    return 0, "".join(capfd.readouterr())


def test_a_resume_ends_with_the_same_policies_or_is_refused(whole, ray_local, trained_here, tmp_path, capfd):
    assert findings(whole) == []
    straight = cut_off(whole, tmp_path / "straight")
    asked = list(damages(straight))
    assert resumed(straight, capfd)[0] == 0
    assert made(straight) == made(whole)

    ends = Counter()
    for number, damage in enumerate(asked):
        store = cut_off(whole, tmp_path / f"{number}")
        path = store.local_root / damage.file
        path.unlink() if damage.data is None else path.write_bytes(damage.data)
        code, said = resumed(store, capfd)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code:
            assert len(errors) == 1, (damage.what, said)
            assert "Internal error" not in said, (damage.what, said)
            assert "Traceback" not in said, (damage.what, said)
        else:
            assert made(store) == made(whole), (damage.what, said)
            is_left = not damage.file.endswith(".json") and (path.read_bytes() if path.is_file() else None) == damage.data
            assert not is_left or findings(store), (damage.what, said)
        ends["refused" if code else "the same"] += 1
        with capfd.disabled():
            print(f"{'refused' if code else 'the same':8} {damage.what[:80]}  {' '.join(errors)[-120:]}")
    assert ends.total() == len(asked) == RESUMES
    assert min(ends["refused"], ends["the same"]) >= 3
