"""`egrsd ask`: what is said of the answers, so that nobody takes a sampled answer for all that a policy can do."""

from __future__ import annotations

import contextlib

from actors.fakes import FakeEngine
from jobs import ask
from pipeline.recipes import demo
from pipeline.store.directory import Store


def test_the_sampling_the_means_and_the_partings_are_explained(tmp_path, monkeypatch, capfd):
    """A newcomer read `entropy, nats` and `teacher parts at 'To' at 0 (-2.85)`, and a silly answer without its temperature."""
    store, run = Store(str(tmp_path / "run")), demo()
    store.save_run(run, {})
    engine = FakeEngine(run.model, run.engines.rollout, run.score)
    monkeypatch.setattr(ask, "start", lambda *_, **__: None)
    monkeypatch.setattr(ask, "open_engines", lambda *_, **__: contextlib.nullcontext({"rollout": engine}))
    ask.ask(store.uri, ask.Question("1+2", "0", "1+2=3#3"), None, False)
    said = " ".join(capfd.readouterr().out.split())
    for name in ("entropy, mean", "log-prob, mean", "teacher: log-prob", "teacher parts at"):
        assert name in said
    assert "verdict" in said
    assert "The verdict is that of the run's grader, which reads '3' in the reference." in said
    assert f"Answers were sampled {run.evaluation.sampling}; `--set evaluation.top_k=1` asks greedily." in said
    assert "Means are over tokens, in nats." in said
    assert "The teacher parts where its log-prob is lowest against the policy's: token, place, difference." in said
