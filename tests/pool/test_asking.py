"""Where the Ray actors of engines and of clients are asked for."""

from types import SimpleNamespace

from actors.pool import asking
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
        asking.Actors(settings).start("big-1", settings.placement, 4)
    client, engine = asked
    assert (client["scheduling_strategy"].node_id, client["scheduling_strategy"].soft) == ("a" * 56, False)
    assert client["num_cpus"] == 0, "a node whose CPUs are taken, or a head without any, has room for it"
    assert "scheduling_strategy" not in engine
