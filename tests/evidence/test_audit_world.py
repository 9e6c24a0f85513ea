"""`egrsd audit` on a tiny world, whose true token classes are known: traces of a scripted engine, gradients of the real model."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from filled_runs import measured, planner_of, run_at
from in_process import brought

from actors.fakes import FakeEngine
from jobs import audit as job
from pipeline.contract import Generation, Score
from pipeline.evidence import audit_tokens, documents
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems import worlds
from pipeline.problems.worlds import World
from pipeline.rounds.round import open_round
from pipeline.stages import LABELS

WORLD = World(forks=4, pivots=2, filler=3, style=0.5)
ENTROPY = {"filler": 0.01, "fork": 1.7, "pivot": 0.5, "style": 0.3, "choice": 0.2, "other": 0.4}  # of the teacher, nats
GAIN = {"pivot": 0.3, "choice": 0.1, "style": -0.2}  # log p_T - log p_S, nats; of the others 0
STUDENT = -0.5
SETS = [
    *("source.uri=tiny-worlds:forks=4,pivots=2,filler=3,style=0.5", f"grade.answer_pattern={worlds.ANSWER_PATTERN}"),
    *("rollout.prompts_per_round=24", "rollout.prompts_per_shard=24", "rollout.group_size=8"),
    *("train.batch_traces=8", "profile.window=1", "label.gamma=1", "objective.gamma=1", "objective.window=1"),
]


class Scripted(FakeEngine):
    """Writes traces of the world, and reads them with the entropies and log-ratios of the true classes."""

    def __init__(self, model, *settings):
        super().__init__(model, *settings)
        self.tokenizer = tokenizer_of(model)

    def _problem(self, prompt):
        return re.search(r"(\d\d[?!]){3}", self.tokenizer.decode(prompt)).group()

    def _write(self, request, policy, sampling):
        text = worlds.trace(self._problem(request.prompt), random.Random(request.seed), WORLD, WORLD.unaided)
        tokens = np.array([*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id], np.int32)
        flat = np.full(len(tokens), STUDENT, np.float32)
        return Generation(tokens, flat, flat + 1, 0.0, "stop", policy.version)

    def _read(self, sequence, policy):
        text = self.tokenizer.decode(sequence.response[:-1])
        names = [worlds.CLASSES[code] for code in worlds.token_classes(self._problem(sequence.prompt), text, WORLD)] + ["filler"]
        teaches = len(sequence.prompt) > 12  # the teacher's prompt has the reference too
        logprobs = np.array([STUDENT + teaches * GAIN.get(name, 0.0) for name in names], np.float32)
        entropy = np.array([ENTROPY[name] for name in names], np.float32)
        return Score(np.array(sequence.response, np.int32), logprobs, entropy, 0.0)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """(store, document) of an audit of round 0."""
    store, run = run_at(tmp_path_factory.mktemp("world") / "run", *SETS)
    engine = Scripted(run.model, run.engines.rollout, run.score)
    planner = planner_of(store, run)
    work = measured(planner, planner.plan(0, 0), engine=engine)
    for name in LABELS:
        brought(work, name)
    job.audit_run(store.uri, 0, ("grpo,egrsd,cl_egrsd", [], (12, 0, "adapter")), True)
    return store, store.read_json(documents.path_of(0, "json"))


def test_every_token_has_its_true_class_and_the_dials_are_read_back(audited):
    store, document = audited
    by_class = document["classes"]["labels"]["by_class"]
    assert by_class["fork"]["tokens"] == 24 * 8 * 3 * 4
    assert by_class["other"]["tokens"] == 0
    for name in ("filler", "fork", "pivot", "style", "choice"):
        assert by_class[name]["entropy"] == pytest.approx(ENTROPY[name], abs=1e-5)
        assert by_class[name]["log_ratio"] == pytest.approx(GAIN.get(name, 0.0), abs=1e-5)
        assert by_class[name]["delta"] == pytest.approx(abs(GAIN.get(name, 0.0)), abs=1e-5)
    # of four fork letters the first three look at another one, and the last at "=": (3 x 1.7 + .01) / 4
    assert by_class["fork"]["lookahead"] == pytest.approx((3 * 1.7 + 0.01) / 4, abs=1e-5)
    table = pq.read_table(store.locate(documents.path_of(0, "parquet")))
    assert table["token_class"].combine_chunks().value_lengths().equals(table["alignment"].combine_chunks().value_lengths())


def test_regimes_are_scored_against_the_truth(audited):
    """W is 1: the label finds three of four fork letters, and calls the last one, before certain tokens, a pivot."""
    scored = audited[1]["classes"]["labels"]["regimes"]
    assert scored["fork"] == {"class": "fork", "precision": 1.0, "recall": 0.75}
    assert scored["pivot"]["class"] == "pivot"


def test_the_two_oracles_share_out_the_push_of_the_reference(audited):
    push = {point["name"]: point["push"]["value"] for point in audited[1]["points"] if point["push"]}
    assert push["reinforce"] == 1
    assert push["oracle"] + push["inverted_oracle"] == pytest.approx(1, abs=1e-4)


def test_all_traces_are_in_a_block(audited):
    """Blocks once held a minibatch of traces at most, and the rest of a wide round was counted and left out."""
    document = audited[1]
    assert document["blocks"] * document["traces_in_block"] == document["traces"] == 24 * 8


def test_the_step_is_the_rounds_own(audited):
    """rlsd changes over its first steps. A later round was weighed as if it were the first."""
    store, _ = audited
    work = open_round(store, store.load_run(), "rounds", 0)
    assert audit_tokens.first_step(work) == 0
    for number, steps in ((0, (0, 1)), (1, (2, 3))):
        store.write_metrics("train", number, [{"round": number, "step": step} for step in steps])
    assert [audit_tokens.first_step(replace(work, number=number)) for number in (0, 1, 2)] == [0, 2, 4]
