"""Where the Ray actors of engines and of clients are asked for, and for whose engines one of them waits."""

import asyncio
from types import SimpleNamespace

from pools import serving
from waiting import until

from actors.pool import asking
from pipeline import config
from pipeline.overrides import resolve
from pipeline.recipes import demo


def test_a_client_of_a_server_runs_on_the_node_that_checked_the_server(monkeypatch):
    """An address such as 127.0.0.1 is another machine's elsewhere. Engines go where there is room."""
    asked = []

    def remote(kind):
        return SimpleNamespace(options=lambda **options: asked.append(options) or SimpleNamespace(remote=object))

    context = SimpleNamespace(get_node_id=lambda: "a" * 56)
    monkeypatch.setattr(asking, "ray", SimpleNamespace(remote=remote, get_runtime_context=lambda: context))
    run = resolve(demo(), ["teachers.big={model: tiny-reasoner, server: 'http://127.0.0.1:8000'}"])
    for settings in (run.pools["big"], run.pools["rollout"]):
        asking.Actors("big", settings).start("big-1", settings.placement, 4)
    client, engine = asked
    assert (client["scheduling_strategy"].node_id, client["scheduling_strategy"].soft) == ("a" * 56, False)
    assert client["num_cpus"] == 0, "a node whose CPUs are taken, or a head without any, has room for it"
    assert "scheduling_strategy" not in engine


def test_a_pool_holds_more_than_it_keeps_while_work_has_made_it_grow(start):
    """Another pool whose only engine has died waits for such a place, and does not end the run."""
    pool = start(size=1, shrink_after_s=900.0)
    other, own = (asking.Actors(name, config.Pool()) for name in ("score", "rollout"))

    async def hold_more(actors):
        return await actors.others_hold_more()

    for least in (1, 2):  # sizes that are wanted
        pool.resize(least)
        until(lambda least=least: len(serving(pool)) == least)
        assert not asyncio.run(hold_more(other))
    pool.resize(1, 2)
    assert asyncio.run(hold_more(other))
    assert not asyncio.run(hold_more(own))
