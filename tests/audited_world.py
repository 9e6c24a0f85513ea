"""A tiny world, answered by a scripted engine: every token's true class and the teacher's signals are known. Also its audit."""

from __future__ import annotations

import random
import re

import numpy as np
from filled_runs import measured, planner_of, run_at
from in_process import brought

from actors.fakes import FakeEngine, most_likely
from jobs import audit as job
from pipeline.contract import Generation, Score
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems import worlds
from pipeline.problems.worlds import World
from pipeline.stages import LABELS

WORLD = World(forks=4, pivots=2, filler=3, style=0.5)
ENTROPY = {"filler": 0.01, "fork": 1.7, "pivot": 0.5, "style": 0.3, "choice": 0.2, "other": 0.4}  # of the teacher, nats
GAIN = {"pivot": 0.3, "choice": 0.1, "style": -0.2}  # log p_T - log p_S, nats; of the others 0
STUDENT = -0.5
SETS = [
    *("source.uri=tiny-worlds:forks=4,pivots=2,filler=3,style=0.5", f"grade.answer_pattern={worlds.ANSWER_PATTERN}"),
    *("rollout.prompts_per_round=24", "rollout.prompts_per_shard=24", "rollout.group_size=4"),
    "score.keep_topk=16",
    *("train.batch_traces=4", "profile.window=1", "label.gamma=1", "objective.gamma=1", "objective.window=1"),
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
        tokens = np.array(sequence.response, np.int32)
        kept = most_likely(tokens, logprobs, self._keep_topk, self._behaviour.vocab_size) if self._keep_topk else ()
        return Score(tokens, logprobs, entropy, 0.0, *kept)


def answered_world(folder, *sets):
    """A run of one round."""
    store, run = run_at(folder, *SETS, *sets)
    engine = Scripted(run.model, run.engines.rollout, run.score)
    planner = planner_of(store, run)
    brought(measured(planner, planner.plan(0, 0), engine=engine), *LABELS)
    return store


def audited_world(folder):
    """A run of one round with its audit."""
    store = answered_world(folder)
    job.audit_run(store.uri, 0, ("grpo,linear,egrsd,cl_egrsd", [], (12, 0, "adapter")), True)
    return store
