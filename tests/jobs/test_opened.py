"""One prologue for all verbs: no verb joins a cluster, opens a run or takes a lease in another way."""

import ast
import contextlib
import importlib
from pathlib import Path

import pytest

import jobs
from jobs import opened
from jobs.cli import app
from jobs.opened import hold_run
from jobs.screen.terminal import session
from pipeline.errors import UserError
from pipeline.live import lease
from pipeline.recipes import demo
from pipeline.store.directory import Store
from pipeline.store.files import RAY_FOLDER

FOLDER = Path(jobs.__file__).parent
VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
REPOSITORY = FOLDER.parent
BELOW = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in ("pipeline", "actors")
    for path in (REPOSITORY / folder).rglob("*.py")
    if path.parent.name != "store"
)
OTHERS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in {"opened", "__init__"})
FORBIDDEN = {
    "ray.init": "joins a cluster",
    "actors.cluster.connect": "joins a cluster",
    "actors.cluster.check_reach": "looks at the nodes by itself",
    "pipeline.store.directory.Store": "opens a folder",
    "pipeline.live.lease.held": "takes a lease",
}
WORKING = {"jobs.engines.open_engines", "pipeline.training.worker.start", "pipeline.rounds.schedule.execute"}


def used(module):
    """Full names of what a module of `jobs` calls, also from within functions and by an alias."""
    return names(ast.parse((FOLDER / f"{module}.py").read_text()))


def names(tree):
    """Full names of what is called or handed on in a syntax tree; annotations do not count."""
    known, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        parts = [node.func] if isinstance(node, ast.Call) else []
        parts += [*node.args, *(keyword.value for keyword in node.keywords)] if isinstance(node, ast.Call) else []
        for part in parts:
            first, *rest = ast.unparse(part).split(".")
            if first in known:
                found.add(".".join([known[first], *rest]))
    return found


def test_the_names_of_calls_are_found_by_alias_and_inside_functions():
    code = """
from pipeline.live import lease as one
def verb():
    from actors import cluster
    cluster.connect(None)
    with one.held(2):
        stack.enter(worker.start)
    run(ray.init)
import ray
"""
    assert names(ast.parse(code)) == {"actors.cluster.connect", "pipeline.live.lease.held", "ray.init"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_module_of_its_own(verb):
    assert importlib.import_module(f"jobs.{verb}").__doc__.startswith(f"`egrsd {verb}`")


@pytest.mark.parametrize("module", OTHERS)
def test_no_module_but_the_prologue_joins_a_cluster_opens_a_run_or_takes_a_lease(module):
    assert {name: why for name, why in FORBIDDEN.items() if name in used(module)} == {}


def test_no_module_below_the_verbs_takes_a_lease():
    """Only pipeline/store, which defines the lease, and jobs/opened.py may."""
    assert "pipeline/evidence/trackers.py" in BELOW
    takers = [path for path in BELOW if "pipeline.live.lease.held" in names(ast.parse((REPOSITORY / path).read_text()))]
    assert takers == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_works_on_a_run_holds_it_and_begins_with_the_prologue(verb):
    calls = used(verb)
    if calls & WORKING:
        assert "jobs.opened.start" in calls
        assert calls & {"jobs.opened.hold", "jobs.opened.hold_run"}


def test_the_working_verbs_are_known():
    assert [verb for verb in VERBS if used(verb) & WORKING] == ["ask", "compare", "distill", "evaluate", "stage", "train"]


def test_a_run_is_read_again_under_its_lease(tmp_path):
    """Another command may have changed its settings before the lease was free."""
    store = Store(str(tmp_path))
    store.save_run(demo(), {})
    with session(debug=False) as out:
        held = hold_run(out, store.uri)
        assert held.run == demo()
        with pytest.raises(UserError, match="is working on this run"), lease.held(store):
            pass
    with lease.held(store):
        pass


def test_what_a_slow_trainer_leaves_goes_with_the_ray_of_the_command(tmp_path, monkeypatch):
    """After SIGTERM while ranks still started, `train/stop` and `.tmp/ray` stayed in the run."""
    store, order = Store(str(tmp_path / "run")), []
    monkeypatch.setattr("jobs.screen.keeper.is_kept", lambda: True)
    monkeypatch.setattr("jobs.screen.keeper.tell", lambda **_: None)
    monkeypatch.setattr("actors.cluster.connect", lambda *_: True)
    monkeypatch.setattr("actors.watch.watching", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("actors.watch.leave", lambda: order.append(store.stop_requested()))
    # the workers of another cluster may start later, and then read the request
    for address, stays in (("10.0.0.1:6379", True), (None, False)):
        with session(debug=False) as out:
            out.held.append(store)
            opened.join(out, address, {})
            store.request_stop()
            store.write(f"{RAY_FOLDER}/controller.json", b"")
        assert store.stop_requested() == bool(store.names(RAY_FOLDER)) == stays
    assert order == [True, True]
