"""A fake engine that spoils answers, and the policy and place that tests of stages ask it for."""

from actors.fakes import FakeEngine
from pipeline.contract import Place, Policy
from pipeline.recipes import demo

POLICY, PLACE = Policy(3, "adapter"), Place("rounds/0003")


class Odd(FakeEngine):
    """A fake engine that spoils chosen answers, by order of request."""

    def __init__(self, model, spoil_generate=None, spoil_score=None, score=None):
        super().__init__(model, None, score or demo().score)
        self.spoil = {"generate": spoil_generate or {}, "score": spoil_score or {}}
        self.calls = []

    def generate(self, requests, policy, sampling):
        self.calls.append(("generate", policy, len(requests)))
        return [self.spoil["generate"].get(i, lambda a: a)(a) for i, a in enumerate(super().generate(requests, policy, sampling))]

    def score(self, sequences, policy):
        self.calls.append(("score", policy, len(sequences)))
        return [self.spoil["score"].get(i, lambda a: a)(a) for i, a in enumerate(super().score(sequences, policy))]
