"""A run's complete configuration: every setting with its type, its default and its checks."""

from __future__ import annotations

from functools import reduce
from typing import Annotated

import yaml
from pydantic import Field, model_validator

from pipeline.config.data import Evaluation, Model, Prompts, Rollout, Source
from pipeline.config.machines import EnginePools, Metrics, Placement, Pool, Train
from pipeline.config.method import Grade, Label, Profile, ScoreSettings, Weights
from pipeline.config.objective import Objective, refuse_missing
from pipeline.config.rewards import Reward
from pipeline.config.section import LATER, UNCOUNTED, Count, Dtype, Positive, Section, Share, counted, left_out
from pipeline.digest import digest

__all__ = [
    "LATER",
    "UNCOUNTED",
    "Count",
    "Dtype",
    "EnginePools",
    "Evaluation",
    "Grade",
    "Label",
    "Metrics",
    "Model",
    "Objective",
    "Placement",
    "Pool",
    "Positive",
    "Profile",
    "Prompts",
    "Reward",
    "Rollout",
    "Run",
    "ScoreSettings",
    "Section",
    "Share",
    "Source",
    "Train",
    "Weights",
]


class Run(Section):
    """All settings of one run. `egrsd recipes --show NAME` prints one as YAML."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    max_staleness: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="rounds that rollout may be ahead of training; 0: on-policy"
    )
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds in which a data task has used no processor time, after which it is ended and done again"
    )
    source: Source = Source()
    model: Model = Model()
    prompts: Prompts = Prompts()
    rollout: Rollout = Rollout()
    grade: Grade = Grade()
    score: ScoreSettings = ScoreSettings()
    profile: Profile = Profile()
    label: Label = Label()
    engines: EnginePools = EnginePools()
    objective: Objective = Objective()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if not self.source.solution:
            raise ValueError("source.solution is empty: the teacher needs reference solutions; only an evaluation can do without")
        caps = {"rollout": self.rollout.max_new_tokens}
        caps |= {"evaluation": self.evaluation.max_new_tokens} if self.evaluation.problems else {}
        for section, cap in caps.items():
            if cap >= self.model.max_model_len:
                raise ValueError(
                    f"{section}.max_new_tokens {cap} leaves no room for a prompt in "
                    f"model.max_model_len {self.model.max_model_len}: raise the window or lower the cap"
                )
        self._takes_turns()
        if 0 < self.train.keep_policies < self.max_staleness + 2:
            raise ValueError(
                f"train.keep_policies {self.train.keep_policies} drops policies that engines still need: set 0, or "
                f"{self.max_staleness + 2} or more"
            )
        if self.evaluation.source.response:
            raise ValueError("evaluation.source.response: an evaluation asks the model; leave it empty")
        if self.source.response and self.rollout.teacher_share:
            raise ValueError("source.response needs rollout.teacher_share 0: all traces of such a run are imported")
        others = {"teacher": self.rollout.teacher_share > 0, "import": bool(self.source.response)}
        refuse_missing(self.objective, self.score, {name for name, writes in others.items() if writes})
        for reward in self.grade.rewards:
            if reward.function == "soft_overlong":
                limit, cache = reward.settings.get("limit") or self.rollout.max_new_tokens, reward.settings["cache"]
                if cache > limit:
                    raise ValueError(f"grade.rewards.{reward.name}: settings.cache {cache} is above the limit of {limit} tokens")
        if self.grade.advantage == "group" and self.rollout.group_size < 2:
            raise ValueError("grade.advantage 'group' needs rollout.group_size of at least 2: raise it or use 'running'")
        return self

    def _takes_turns(self) -> None:
        """Raise ValueError for settings that do not go with one card for engine and trainer, or that only go with it."""
        pools = self.engines
        if pools.score is not None and (pools.score.colocate or pools.rollout.colocate):
            raise ValueError("engines.score: with colocate one engine does all. Leave score out and set engines.rollout.colocate")
        if not pools.rollout.colocate:
            if self.train.offload != "none":
                raise ValueError(
                    f"train.offload {self.train.offload!r} is for a GPU that an engine shares: set engines.rollout.colocate "
                    "true, or offload none"
                )
            return
        if self.max_staleness:
            raise ValueError(
                f"max_staleness {self.max_staleness} lets rollout and training run at one time, and with "
                "engines.rollout.colocate they take turns on one card: set max_staleness 0"
            )
        if self.train.workers > 1:
            raise ValueError(f"train.workers {self.train.workers}: with engines.rollout.colocate one rank trains: set workers 1")

    def digest(self, settings: tuple[str, ...]) -> str:
        """Hash of the named settings or sections, such as `label` or `rollout.top_p`. A shard is stale when its hash changes.

        A setting marked LATER counts only when it is not at its default, and one marked UNCOUNTED never.
        Raises AttributeError or KeyError for an unknown name.
        """
        picked = {}
        for name in settings:
            *parents, last = name.split(".")
            section = reduce(getattr, parents, self)
            if not left_out(section, last):
                picked[name] = counted(getattr(section, last))
        return digest(picked)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, readable by `--config`."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=False)


class _Dumper(yaml.SafeDumper):
    """Writes YAML in which text that looks like a JSON number stands in quotes; YAML 1.1 takes 1e5 for text."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text[:1] in "-0123456789" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
