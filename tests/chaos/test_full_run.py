"""A run that trains all weights, with the real engine: each round's log-probs are those of the weights that the trainer has."""

import pytest
import torch

from jobs.cli import app
from pipeline.store.directory import Store, area

SETS = ("model.tuning=full", "train.learning_rate=0.0001", "rounds=3", "rollout.prompts_per_round=16", "evaluation.problems=8")


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_engine_and_trainer_agree_after_each_publication_and_the_policy_opens_elsewhere(tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    run = str(tmp_path / "run")
    app(
        ["distill", "--recipe", "demo", "--run", run, *(word for text in SETS for word in ("--set", text))], standalone_mode=False
    )
    assert "weights:" in capfd.readouterr().out
    store = Store(run)
    steps = [row for row in store.metrics() if row["writer"] == "train"]
    gaps = {int(row["round"]): row["logprob_gap_max"] for row in steps if "logprob_gap_max" in row}
    assert gaps.keys() == {0, 1, 2}
    assert max(gaps.values()) < 1e-4
    app(["export", "--run", run, "--model", str(tmp_path / "out")], standalone_mode=False)
    there, out = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (store.fetch(area("policy", 3)), tmp_path / "out")
    )
    assert all(torch.equal(one, two) for one, two in zip(there.parameters(), out.parameters(), strict=True))
