"""One prologue for all verbs: no verb joins a cluster, opens a run or takes a lease in another way."""

import ast
import importlib
from pathlib import Path

import pytest

import jobs
from jobs.cli import app
from jobs.opened import hold_run
from jobs.screen.terminal import session
from pipeline.errors import UserError
from pipeline.live import lease
from pipeline.recipes import demo
from pipeline.store.directory import Store

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
WORKING = {"jobs.engines.open_engines", "pipeline.training.worker.start", "pipeline.rounds.running.schedule.execute"}


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
