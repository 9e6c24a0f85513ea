"""One run that is disturbed by kills drawn from a seed, and what must be true of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from chaos_ground import Ground, title
from committed import round_table
from waiting import until

from pipeline.rounds.round import open_rounds
from pipeline.stages import PLAN
from pipeline.store.directory import Store, area

KINDS = ("driver", "engine", "pool", "task", "rank", "node")
RAYS_CLEANER = "PlacementGroupCleaner"
PATIENCE_S = 180.0  # for one step of a run on a machine that is busy with other things
SLOW_S = 5.0
STOPPED = {("stop", kind) for kind in ("engine", "pool", "task", "rank")}  # the others are continued or ended by the harness
STALL_S = 15  # far more than a living process needs for a sign of life, also under the load of a test
STALLS = (f"engines.rollout.stall_timeout_s={STALL_S}", f"train.stall_timeout_s={STALL_S}", f"stall_timeout_s={STALL_S}")
SMALL = (
    "rollout.prompts_per_round=8",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "rollout.max_new_tokens=24",
    "rollout.teacher_share=0.25",
    "grade.advantage=running",  # carried from round to round: a baseline folded twice would show in every later advantage
    "grade.running_warmup_steps=1",
    "grade.answer_pattern=([0-9])",  # so that a fake trace, which is noise, is right now and then
    "score.rescore_share=0.25",
    "engines.rollout.placement.cpus=0.5",
    "engines.rollout.placement.gpus=0.25",
    "engines.rollout.memory_share=0.25",
    "engines.rollout.placement.resources.rollout=1",
    "engines.rollout.request_tries=10",  # a SIGKILL cannot be told from a row that kills its engine
    "train.batch_traces=16",
    "train.placement.resources.train=1",
    "train.warmup_steps=0",
    "evaluation.problems=8",
    "evaluation.max_new_tokens=24",
)
TASKS = "shards_here=0"  # tasks of Ray Data compute every shard, so that they can be killed
FAKE = (*SMALL, TASKS, "engines.rollout.min=2", "engines.rollout.max=2")


@dataclass(frozen=True)
class Kill:
    """One kill: when (seconds into the run), what and whom, what it was doing, and how far the run was."""

    seed: int
    at_s: float
    kind: str
    pid: int
    doing: str
    progress: str
    how: str = "kill"  # or stop, or slow: stopped for a while

    def text(self) -> str:
        """A line for a log or a table."""
        who = f"seed {self.seed}  {self.at_s:6.1f} s  {self.how} {self.kind:6} pid {self.pid:<7}"
        return f"{who} {self.doing[:70]:70}  {self.progress}"


@dataclass
class Command:
    """A distill command: as started, and started again."""

    ground: Ground
    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again if it was started before."""
        self.process = self.ground.driver(self.arguments, self.log)

    def running(self) -> bool:
        """Whether it still works."""
        assert self.process is not None
        return self.process.poll() is None

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        assert self.process is not None
        code = self.process.wait(PATIENCE_S * 4)
        assert code == 0, f"exit code {code}:\n{self.log.read_text()[-4000:]}"


def once(sets: tuple[str, ...]) -> list[str]:
    """Each setting once, with its last value: a command refuses a setting that is given twice."""
    return list({name.partition("=")[0]: name for name in sets}.values())


def fake(ground: Ground, uri: str, *sets: str, start_s: float = 0.3, address: str | None = None) -> Command:
    """The command of a run on fake engines, 0.3 s a batch."""
    arguments = ["tests/chaos/driver.py", uri, address or ground.address, str(start_s), "0.3", *once(sets)]
    return Command(ground, arguments, Path(f"{uri}.log"))


def real(ground: Ground, uri: str, *sets: str) -> Command:
    """The command of a run on vLLM, as a person types it."""
    options = [part for name in once(sets) for part in ("--set", name)]
    arguments = ["-m", "jobs", "distill", "--recipe", "demo", "--run", uri, "--address", ground.address, *options]
    return Command(ground, arguments, Path(f"{uri}.log"))


def progress(uri: str) -> str:
    """How far a run is: its latest policy and the shards of its last round."""
    store = Store(uri)
    last = max(store.numbers("rounds"), default=None)
    if last is None:
        return "before the first round"
    count = {s.name: sum(n.endswith(".json") for n in store.names(f"{area('rounds', last)}/{s.name}")) for s in PLAN}
    ready = "  committed" if store.ready(last) else ""
    return f"policy {store.latest_policy()}, round {last}: " + " ".join(f"{k} {v}" for k, v in count.items() if v) + ready


def work_done(uri: str) -> int:
    """Shards committed and policies published so far."""
    store = Store(uri)
    areas = [area(kind, number) for kind in ("rounds", "evals") for number in store.numbers(kind)]
    names = [name for where in areas for stage in PLAN for name in store.names(f"{where}/{stage.name}")]
    return sum(name.endswith(".json") for name in names) + store.latest_policy()


def seconds(start: float) -> float:
    """Since `start`, to a tenth."""
    return round(time.monotonic() - start, 1)


def disturb(
    command: Command, uri: str, seed: int, kinds: tuple[str, ...] = KINDS, pace: int = 36, how: str = "kill"
) -> Iterator[Kill]:
    """Run a command to its end while victims of `kinds` are killed or stopped, in an order and at moments drawn from `seed`.

    A moment is an amount of work since the kill before (shards and policies), and a time after that: what is killed faster than
    it can start proves nothing.
    """
    rng, start, goal = random.Random(seed), time.monotonic(), 0
    command.start()
    for kind in rng.sample(kinds, len(kinds)):
        goal += rng.randint(1, pace)
        until(lambda goal=goal: work_done(uri) >= goal or not command.running(), PATIENCE_S, f"no progress: {progress(uri)}")
        time.sleep(rng.uniform(0, 2))
        kill = strike(command, uri, kind, rng, seed, start, how)
        if kill is None:
            break  # the run was over first
        begun, before = time.monotonic(), work_done(uri)
        until(lambda kill=kill: not holds(kill) or not command.running(), PATIENCE_S, f"nobody ends {kill.text()}")
        gone = seconds(begun)
        until(lambda before=before: work_done(uri) > before or not command.running(), PATIENCE_S, f"no progress: {progress(uri)}")
        print(f"{kill.text()}  ended after {gone} s, work after {seconds(begun)} s")
        yield kill
        goal = max(goal, work_done(uri))
    command.finish()


def holds(kill: Kill) -> bool:
    """Whether a process that was stopped for good is still there."""
    try:
        return (kill.how, kill.kind) in STOPPED and psutil.Process(kill.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def strike(command: Command, uri: str, kind: str, rng: random.Random, seed: int, start: float, how: str) -> Kill | None:
    """Kill or stop a victim of a kind, or stop it for SLOW_S seconds. None when the run was over first."""
    ground, choice, at_raylet = command.ground, rng.random(), rng.random() < 0.5

    def record(pid: int, doing: str) -> Kill:
        return Kill(seed, seconds(start), kind, pid, doing, progress(uri), how)

    if kind == "node":
        lose = ground.stop_node if how == "stop" else partial(ground.lose_node, at_raylet=at_raylet)
        kill = record(*lose(int(choice * 2))) if command.running() else None
        time.sleep(rng.uniform(0, 3))
        ground.add_node()
        return kill
    while command.running():
        victims = [psutil.Process(command.process.pid)] if kind == "driver" else ground.victims(kind)
        if not victims:
            time.sleep(0.02)
            continue
        victim = victims[int(choice * len(victims))]
        kill = record(victim.pid, title(victim))
        try:
            os.kill(victim.pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            continue
        if how == "slow" or (how, kind) == ("stop", "driver"):  # nobody ends a driver that stands still: its user may want it so
            time.sleep(SLOW_S)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGCONT)
        elif kind == "driver":
            command.process.wait()
            command.start()
        return kill
    return None


# ---- what must be true afterwards --------------------------------------------------------------------------------------


def check(ground: Ground, uri: str, undisturbed: str) -> None:
    """A disturbed run on fake engines is the undisturbed one, to the last bit, and left nothing behind."""
    check_whole(uri, undisturbed)
    assert shards(uri) == shards(undisturbed)
    assert weights(uri) == weights(undisturbed)
    assert metrics(uri) == metrics(undisturbed)
    check_clean(ground, uri, undisturbed)


def check_whole(uri: str, undisturbed: str) -> None:
    """All rounds are finished, every trace is there once and counted once, and the adapter moved in every round."""
    from pipeline.inspection.remaining import Remaining

    store = Store(uri)
    run = store.load_run()
    assert Remaining.of(store, run).is_empty
    assert store.latest_policy() == run.rounds
    ids = trace_ids(uri)
    assert len(ids) == len(set(ids)) == run.rounds * run.rollout.prompts_per_round * run.rollout.group_size
    assert sorted(ids) == sorted(trace_ids(undisturbed))
    adapters = [store.read_json(f"policy/{n:04d}/manifest.json")["files"] for n in range(1, run.rounds + 1)]
    assert len({files["adapter_model.safetensors"] for files in adapters}) == run.rounds
    check_counted(store, run.rounds)


def check_counted(store: Store, rounds: int) -> None:
    """Metrics have one file for each writer and round; traces trained and rejected add up to the rows of the round."""
    names = [name for name in store.names("metrics") if not name.startswith(".")]
    assert names == sorted(f"{number:04d}-{writer}.jsonl" for number in range(rounds) for writer in ("round", "train"))
    for number in range(rounds):
        rows = [row for row in store.metrics() if row["round"] == number]
        trained = [row for row in rows if row["writer"] == "train"]
        steps = [row["step"] for row in trained]
        assert len(steps) == len(set(steps))
        total = round_table(store, number).num_rows
        rejected = {row["rejected"] for row in trained}
        assert sum(row["traces"] for row in trained) + rejected.pop() == total
        assert [row["num_rows"] for row in rows if row["writer"] == "round"] == [total]


def check_clean(ground: Ground, uri: str, undisturbed: str, same_names: bool = True) -> None:
    """No temporary file, actor, process or reservation is left, and no file that the undisturbed run has not.

    `same_names`: shards too are named alike, hence have the same content.
    """

    check_nothing_held(ground)
    orphans = {name for name in files(uri) if name.endswith(".parquet")} - named(uri)
    assert not orphans
    names = [set(files(run) if same_names else filter(lambda n: ".parquet" not in n, files(run))) for run in (uri, undisturbed)]
    assert not names[0] ^ names[1]
    assert not list(ground.tmp.glob("egrsd*"))


def check_nothing_held(ground: Ground, patience_s: float = 90) -> None:
    """No actor, process or reservation of a driver is left: at once, or as soon as Ray has noticed that it is gone.

    Ray Train's detached cleaner stays where a driver dies between its creation and its first call; it holds no CPU and no GPU.
    tests/README.md tells of it, and so does the output.
    """

    def left() -> list[str]:
        return [*map(str, ground.reserved().items()), *ground.actors(), *ground.remains()]

    deadline = time.monotonic() + patience_s
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    for line in found:
        print(f"left behind: {line}")
    assert not [line for line in found if RAYS_CLEANER not in line], found


def files(uri: str) -> list[str]:
    """Every file and folder of a run but its logs."""
    found = (str(path.relative_to(uri)) for path in Path(uri).rglob("*"))
    return sorted(name for name in found if not name.startswith("logs/"))


def named(uri: str) -> set[str]:
    """The data files that entries of a run name."""
    store = Store(uri)
    areas = [area(kind, number) for kind in ("rounds", "evals") for number in store.numbers(kind)]
    return {f"{w}/{s.name}/{e.data}" for w in areas for s in PLAN for e in store.entries(w, s.name).values()}


def trace_ids(uri: str) -> list[str]:
    """Of all rounds, as they are stored."""
    store = Store(uri)
    tables = [round_table(store, number) for number in store.numbers("rounds")]
    return [trace for table in tables for trace in table["trace_id"].to_pylist()]


def shards(uri: str) -> dict[tuple[str, str, str], str]:
    """Content hash of every shard of every stage, of rounds and evaluations."""
    store = Store(uri)
    areas = [area(kind, number) for kind in ("rounds", "evals") for number in store.numbers(kind)]
    found = {}
    for where in areas:
        for stage in PLAN:
            for shard, entry in store.entries(where, stage.name).items():
                store.read(entry)  # its bytes are those of the hash
                found[where, stage.name, shard] = entry.sha256
    return found


def weights(uri: str) -> dict[str, str]:
    """Hash of every file of every policy and of the training states that are kept; all are checked against their manifests."""
    store = Store(uri)
    found = {}
    for kind in ("policy", "train"):
        for number in store.numbers(kind):
            store.fetch(area(kind, number))
            for name, digest in store.read_json(f"{area(kind, number)}/manifest.json")["files"].items():
                found[f"{area(kind, number)}/{name}"] = digest
    return found


def metrics(uri: str) -> list[str]:
    """All metrics but times."""
    rows = Store(uri).metrics()
    kept = [{k: v for k, v in row.items() if "seconds" not in k and k not in ("tokens_per_s", "tokens_measured")} for row in rows]
    return [json.dumps(row, sort_keys=True) for row in kept]


def check_policy_versions(uri: str) -> Counter[tuple[str, int]]:
    """Every stored row was answered by the policy its round asked for; rows by (writer, version)."""
    store = Store(uri)
    seen: Counter[tuple[str, int]] = Counter()
    for work in open_rounds(store, store.load_run()):
        for entry in store.entries(work.area, "rollout").values():
            table = store.read(entry, ["trace_source", "policy_version", "seed", "response_tokens"])
            for source, version in zip(table["trace_source"].to_pylist(), table["policy_version"].to_pylist(), strict=True):
                assert version == (work.policy_version if source == "student" else 0)
                seen[source, version] += 1
    return seen


def largest_difference(uri: str, undisturbed: str, version: int | None = None) -> tuple[float, float]:
    """(largest difference between two adapters in any weight, largest weight of the undisturbed one). None: the last policy."""
    from safetensors.numpy import load_file

    last = version or Store(undisturbed).latest_policy()
    one, other = (load_file(Store(u).local_root / area("policy", last) / "adapter_model.safetensors") for u in (uri, undisturbed))
    assert one.keys() == other.keys()
    return max(float(np.abs(one[k] - other[k]).max()) for k in one), max(float(np.abs(v).max()) for v in other.values())
