"""`egrsd doctor`: whether this machine, or a cluster, can carry a recipe, said in lines of ok, warning and error."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from uuid import uuid4

from actors.cluster import connect
from jobs.distill import demands
from jobs.terminal import Session, divert_output, session
from pipeline import config
from pipeline.errors import EgrsdError
from pipeline.fit import footprint, machine
from pipeline.fit.machine import Facts, Line
from pipeline.recipes import recipe as named
from pipeline.rounds.todo import Missing
from pipeline.store import lease
from pipeline.store.directory import Store

EVERYTHING = Missing([0], [], [], [])
PROBE_S = 120.0


def doctor(recipe: str | None, uri: str | None, address: str | None, debug: bool) -> None:
    """Print every finding; exit code 1 when one is an error. Raises SettingError for an unknown recipe."""
    with session(debug) as out:
        store = Store(uri) if uri is not None else None
        run = store.load_run() if store is not None and recipe is None and store.exists() else named(recipe or "demo")
        facts = machine.gather(nearest_folder(store))
        found = [out_line(line, out) for line in machine.judge(facts, machine.requirements())]
        carrier = facts
        if address is not None:
            connect(address)
            nodes = gather_nodes()
            found += [out_line(line, out) for line in judge_nodes(nodes, machine.requirements())]
            carrier = best([there for there in nodes.values() if isinstance(there, Facts)] or [facts])
        for part in (
            check_tokenizer(run),
            check_fit(run, carrier),
            check_demands(run, facts, address),
            check_hook(run, facts, debug),
        ):
            found += [out_line(line, out) for line in part]
        if store is not None:
            found += [out_line(line, out) for line in check_store(store)]
        errors, warnings = (sum(line.level == level for line in found) for level in ("error", "warning"))
        out.say(f"recipe {run.name}: {errors} errors, {warnings} warnings")
        if errors:
            sys.exit(1)


def nearest_folder(store: Store | None) -> str:
    """The existing folder that a run's local directory is in, or will be: its disk is what counts."""
    place = store.local_root if store is not None and store.local_root is not None else Path()
    while not place.is_dir():
        place = place.parent
    return str(place)


def out_line(line: Line, out: Session) -> Line:
    """Print a finding, aligned, and hand it on."""
    out.say(f"{line.level:<8} {line.topic:<16} {' '.join(line.text.split())}")
    return line


def check_tokenizer(run: config.Run) -> list[Line]:
    """Tokenizer and template hash. Student and teacher are one model, so that they see the same ids."""
    from pipeline.models.tokenizer import template_hash, tokenizer_of

    try:
        tokenizer = tokenizer_of(run.model)
    except EgrsdError as error:
        return [Line("error", "tokenizer", str(error))]
    return [Line("ok", "tokenizer", f"{len(tokenizer)} tokens, hash {template_hash(tokenizer)}, student and teacher alike")]


def check_fit(run: config.Run, facts: Facts) -> list[Line]:
    """Engines, ranks and KV cache against this machine's memory."""
    try:
        return footprint.fit(run, footprint.measure(run.model), facts)
    except EgrsdError as error:
        return [Line("error", "model", str(error))]


def check_demands(run: config.Run, facts: Facts, address: str | None) -> list[Line]:
    """Actors against the cluster's resources, or against what Ray would count on this machine."""
    from actors import resources
    from actors.pool import check_room

    try:
        if address is not None:
            if lacking := check_room(demands(run, EVERYTHING)):
                return [Line("warning", "resources", f"nodes that the autoscaler would have to start: {lacking}")]
        else:
            here = resources.Node({"CPU": 8.0, "GPU": float(len(facts.gpus))})  # CPUs as jobs.session.connect counts them
            resources.check(demands(run, EVERYTHING), [here])
    except EgrsdError as error:
        return [Line("error", "resources", str(error))]
    return [Line("ok", "resources", "engines, ranks and a data task find their place at one time")]


def check_hook(run: config.Run, facts: Facts, debug: bool) -> list[Line]:
    """Start a real engine, of the recipe's model where that can be here, and ask what its self-check allowed."""
    from pipeline.models.resolve import resolve_model

    pool, model = run.engines.rollout, run.model
    if not Path(resolve_model(model.path)).is_dir() or pool.placement.gpus > len(facts.gpus):
        model, pool = config.Model(), config.Pool(threads=1, kv_cache_gib=0.25)
    exact = config.ScoreSettings()
    try:
        with divert_output(Path("/dev/stderr" if debug else os.devnull)):
            from actors.engine import Engine

            engine = Engine(model, pool, exact)
            said = engine.facts()
            engine.close()
    except EgrsdError as error:
        return [Line("error", "exact entropy", str(error))]
    text = f"{said.entropy_method}, by the self-check of {said.engine} with {model.path}"
    if said.entropy_method == "exact":
        return [Line("ok", "exact entropy", text)]
    return [Line("warning", "exact entropy", f"{text}. Install a vLLM in the supported window for exact entropies")]


def check_store(store: Store) -> list[Line]:
    """Write, read back and delete a probe; then who holds the lease."""
    name, data = f"doctor-{uuid4().hex}", os.urandom(64)
    try:
        root = store.local_root
        new = root is not None and not root.exists()
        store.write(name, data)
        same = store.read_bytes(name) == data
        store.delete(name)
        if new and root is not None:
            shutil.rmtree(root / ".tmp", ignore_errors=True)
            root.rmdir()
        holder = None if new else lease.living_holder(store, lease.TTL_S)
    except (EgrsdError, OSError) as error:
        return [Line("error", "store", str(error))]
    if not same:
        return [Line("error", "store", f"{store.uri} gives back other bytes than were written. Use another place")]
    held = Line("warning", "lease", f"{holder} is working on this run. Wait for it or stop it")
    return [
        Line("ok", "store", f"{store.uri}: a probe was written, read back and deleted"),
        held if holder else Line("ok", "lease", "free"),
    ]


def gather_nodes() -> dict[str, Facts | str]:
    """The facts of every node of the cluster by its address, each from a task that ran there, or why there are none."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe, asked = ray.remote(num_cpus=0, max_retries=0)(machine.gather), {}
    for number, node in enumerate(node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node['NodeManagerAddress']}/{number}"] = probe.options(scheduling_strategy=there).remote()
    found: dict[str, Facts | str] = {}
    for name, ref in asked.items():
        try:
            found[name] = ray.get(ref, timeout=PROBE_S)
        except (RayError, GetTimeoutError) as error:
            found[name] = f"failed ({type(error).__name__}). Install the same environment on every node"
    return found


def judge_nodes(nodes: dict[str, Facts | str], window: list[str]) -> list[Line]:
    """What stands in the way on each node; one `ok` for a node where nothing does."""
    lines = []
    for name, there in nodes.items():
        found = [Line("error", "probe", there)] if isinstance(there, str) else machine.judge(there, window)
        wrong = [line for line in found if line.level != "ok"]
        told = [(line.level, f"{line.topic}: {line.text}") for line in wrong] or [("ok", f"{len(found)} checks")]
        lines += [Line(level, f"node {name}", text) for level, text in told]
    return lines


def best(nodes: list[Facts]) -> Facts:
    """The node that carries most: by its smallest card, then by its memory. Engines and ranks are held against it."""
    return max(nodes, key=lambda there: (min(there.gpus, default=0), there.memory))
