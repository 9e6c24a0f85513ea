"""A long run with random faults: kill, stop, slow, full disk, node gone. The next one comes only after progress since the last.

    make soak                                    ten minutes on fake engines
    SOAK_S=120 SOAK_SEED=7 make soak             two minutes, and the faults of that seed
    SOAK_ENGINE=vllm make soak                   the tiny reasoner on vLLM

On fake engines all policies and shards must be those of a run that nobody disturbed, to the bit. On vLLM the last adapter must be
the same within the tolerance of tests/chaos. A full disk needs the right to mount a tmpfs; without it that fault is left out.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_ground import Ground
from chaos_run import FAKE, PATIENCE_S, SMALL, STALLS, TASKS, Command, fake, holds, progress, real, seconds, strike, work_done
from waiting import until

from pipeline.store.directory import Store, area

PARTS = ("engine", "pool", "task", "rank")
FAULTS = (
    *(("kill", part) for part in (*PARTS, "driver", "node")),
    *(("stop", part) for part in (*PARTS, "driver", "node")),
    *(("slow", part) for part in PARTS),
    ("full", "disk"),
)
ROUNDS = ("rounds=10000", "evaluation.problems=0")
REAL = (
    *SMALL,
    TASKS,
    "rollout.max_new_tokens=72",
    r"grade.answer_pattern=#(-?\d+)$",
    "engines.rollout.placement.cpus=1",
    "engines.inflight_shards=1",
)
TOLERANCE = 1e-3  # of the largest weight, as in test_kills.py


@dataclass(frozen=True)
class Felt:
    """A fault, and how many seconds passed until the run had made progress after it."""

    how: str
    kind: str
    recovered_s: float


def soak(length_s: float, seed: int, on_vllm: bool) -> None:
    """Disturb a run for `length_s` seconds, hold it against an undisturbed one, and print the figures."""
    scratch = Path(tempfile.mkdtemp(prefix="soak"))
    print(f"soak of {length_s:g} s, seed {seed}, {'vLLM' if on_vllm else 'fake engines'}", flush=True)
    ground = Ground(scratch)
    try:
        with small_disk(scratch / "disk") as disk:
            uri = str((disk or scratch) / "run")
            sets = (*(REAL if on_vllm else FAKE), *ROUNDS)
            command = real(ground, uri, *sets, *STALLS) if on_vllm else fake(ground, uri, *sets, *STALLS)
            command.log = scratch / "run.log"
            felt = list(faults(command, uri, length_s, random.Random(seed), seed, disk))
            last = end(command, uri)
            assert last, f"no round was trained in {length_s:g} s, so there is nothing to compare: set SOAK_S higher"
            calm_uri = str(scratch / "calm")
            calm = real(ground, calm_uri, *sets) if on_vllm else fake(ground, calm_uri, *sets)
            calm.start()
            until(lambda: Store(calm_uri).latest_policy() >= last or not calm.running(), 3600, "the calm run gets as far")
            end(calm, calm_uri)
            compare(uri, calm_uri, last, on_vllm)
        tell(felt, last)
    except BaseException:
        print((scratch / "run.log").read_text()[-3000:] if (scratch / "run.log").exists() else "no log", flush=True)
        for log in (scratch / "disk/run/logs").glob("*.log"):
            print(log.read_text()[-3000:], flush=True)
        raise
    finally:
        ground.close()
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of its own for the run, which can be filled. None where this user may not mount one."""
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        print("this user may not mount a tmpfs: no disk gets full", flush=True)
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def faults(command: Command, uri: str, length_s: float, rng: random.Random, seed: int, disk: Path | None) -> Iterator[Felt]:
    """Start the run, and one fault after the other until the time is over."""
    start = time.monotonic()
    command.start()
    until(lambda: work_done(uri) > 0 or not command.running(), 4 * PATIENCE_S, "the first work")
    bag: list[tuple[str, str]] = []
    while seconds(start) < length_s:
        bag = bag or rng.sample(FAULTS, len(FAULTS))  # each once before any comes again
        how, kind = bag.pop()
        if how == "full" and disk is None:
            continue
        before, begun = work_done(uri), time.monotonic()
        if how == "full":
            fill(command, disk)
            before = work_done(uri)
        else:
            hit = strike(command, uri, kind, rng, seed, start, how)
            assert hit is not None, f"the run has ended:\n{command.log.read_text()[-3000:]}"
            until(lambda hit=hit: not holds(hit), PATIENCE_S, f"nobody ends {hit.text()}")
            before = max(before, work_done(uri))
        until(lambda before=before: work_done(uri) > before, PATIENCE_S, f"no progress after {how} {kind}: {progress(uri)}")
        felt = Felt(how, kind, seconds(begun))
        print(f"{seconds(start):6.1f} s  {how} {kind:7} recovered in {felt.recovered_s:5.1f} s  {progress(uri)}", flush=True)
        yield felt
        time.sleep(rng.uniform(0, 2))


def fill(command: Command, disk: Path) -> None:
    """Fill the run's disk until its command ends for it; then free the space, and start the command again."""
    filler, size = disk / "filler", 0
    with filler.open("wb") as file:
        for piece in (1 << 20, 1 << 12):  # by pieces, since the command writes meanwhile
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
    until(lambda: not command.running(), PATIENCE_S, "a full disk ends the command")
    said = command.log.read_text()[-2000:]
    assert "o space left" in said, said
    filler.unlink()
    command.start()


def end(command: Command, uri: str) -> int:
    """Interrupt a command, and return the last policy that it has published. It must end as one that was interrupted."""
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(PATIENCE_S) == 130, command.log.read_text()[-3000:]
    return Store(uri).latest_policy()


def compare(uri: str, calm: str, last: int, on_vllm: bool) -> None:
    """Hold rounds and policies up to `last` against those of the undisturbed run."""
    one, other = Store(uri), Store(calm)
    for number in range(1, last + 1):
        policies = [store.read_json(f"policy/{number:04d}/manifest.json")["files"] for store in (one, other)]
        assert on_vllm or policies[0] == policies[1], f"policy {number} differs"
    if on_vllm:
        difference, largest = chaos_run.largest_difference(uri, calm, last)
        print(f"policy {last}: adapters differ by {difference:.3g} at most, largest weight {largest:.3g}")
        assert difference <= TOLERANCE * largest
        return
    kept = {(where, *rest): digest for (where, *rest), digest in chaos_run.shards(uri).items()}
    expected = chaos_run.shards(calm)
    rounds = {area("rounds", number) for number in range(last)}
    differing = [key for key, digest in expected.items() if key[0] in rounds and kept.get(key) != digest]
    assert not differing, differing[:5]
    print(f"the same to the bit: {last} policies, {sum(key[0] in rounds for key in expected)} shards")


def tell(felt: list[Felt], last: int) -> None:
    """Print the faults by kind, with the seconds until the run went on."""
    by_kind: dict[tuple[str, str], list[float]] = defaultdict(list)
    for fault in felt:
        by_kind[fault.how, fault.kind].append(fault.recovered_s)
    print(f"{len(felt)} faults, {last} policies. Seconds to recover, most of each kind:")
    for (how, kind), spent in sorted(by_kind.items()):
        print(f"  {how:5} {kind:7} {len(spent):3} x  {min(spent):5.1f} to {max(spent):5.1f} s")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, and the run then would too
    soak(
        float(os.environ.get("SOAK_S", "600")),
        int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10_000)),
        os.environ.get("SOAK_ENGINE", "fake") == "vllm",
    )
