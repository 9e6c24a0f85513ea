"""A run's complete configuration: every setting with its type, its default and its checks."""

from __future__ import annotations

import re
from functools import reduce
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from pipeline.config.data import Evaluation, Model, Prompts, Rollout, Source
from pipeline.config.machines import TOLERANCES, Client, EnginePools, Metrics, Placement, Pool, Train
from pipeline.config.method import Grade, Label, Profile, ScoreSettings, Weights
from pipeline.config.objective import Objective, refuse_missing
from pipeline.config.rewards import Reward, SoftOverlong
from pipeline.config.section import CHOOSES, LATER, UNCOUNTED, Count, Dtype, Positive, Section, Share, counted, left_out
from pipeline.config.teachers import Teacher, check_name, reads_solution, template_of
from pipeline.digest import digest

__all__ = [
    "CHOOSES",
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
    "Teacher",
    "Train",
    "Weights",
]


class Run(Section):
    """All settings of one run. `egrsd recipes --show NAME` prints one as YAML."""

    name: str = Field(description="name of the recipe; a run keeps the one that it was started with")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of traces, of the order of problems and of controls")
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = Field(20, description="rounds of the run; each ends with a new policy")
    max_staleness: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="rounds that rollout may be ahead of training; 0: on-policy"
    )
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds in which a data task has used no processor time, after which it is ended and done again"
    )
    shards_here: Annotated[int, Field(ge=0), LATER, UNCOUNTED] = Field(
        16, description="a stage with at most so many shards to compute runs in the command's process, one with more as Ray tasks"
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
    teachers: Annotated[dict[str, Teacher], LATER] = Field(
        default_factory=dict, description="teachers by name; none: the frozen base of the student, which sees the reference"
    )

    @property
    def writers(self) -> list[str]:
        """Who writes each of the G traces of a problem, in their order: the student, the teacher, or the source (`import`)."""
        size = self.rollout.group_size
        imports = round(size * self.rollout.import_share) if self.source.response else 0
        teachers = round(size * self.rollout.teacher_share)
        return ["student"] * (size - teachers - imports) + ["teacher"] * teachers + ["import"] * imports

    @property
    def only_imports(self) -> bool:
        """Whether the source brings all traces, so that no engine writes any."""
        return set(self.writers) == {"import"}

    @property
    def taught_by(self) -> dict[str, Teacher]:
        """The teachers by name. A run that names none has one, without a name."""
        return self.teachers or {"": Teacher()}

    def model_of(self, teacher: Teacher) -> Model:
        """The model that a teacher is, as the settings of a model. LoRA is the student's."""
        own = {"path": teacher.model, "revision": teacher.revision} if teacher.model else {}
        more = {"dtype": teacher.dtype or self.model.dtype, "max_model_len": teacher.max_model_len or self.model.max_model_len}
        return self.model.model_copy(update=own | more)

    def has_pool(self, teacher: Teacher) -> bool:
        """Whether a teacher has engines, or a client of a server, of its own. Otherwise the student's engines answer."""
        return self.model_of(teacher) != self.model or bool(teacher.engines or teacher.server)

    def pool_of(self, teacher: Teacher) -> Pool:
        """The settings of a teacher's own pool. The client of a server is a pool of one small process that takes no CPU."""
        if teacher.server:
            return Client(placement=Placement(cpus=0), start_timeout_s=max(60.0, 2 * teacher.tries * teacher.timeout_s))
        return teacher.engines or self.engines.score or self.engines.rollout

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools of engines by name: `rollout`, `score` where it is apart, and those of teachers by the teacher's name."""
        own = {name: self.pool_of(teacher) for name, teacher in self.teachers.items() if self.has_pool(teacher)}
        student = {"rollout": self.engines.rollout} | ({"score": self.engines.score} if self.engines.score is not None else {})
        return student | own

    def needs_solution(self, teacher: Teacher) -> bool:
        """Whether a teacher needs reference solutions of the source."""
        prompts = self.prompts
        if not self.teachers and prompts.teacher == prompts.student:  # a control: the teacher without the reference
            return False
        return reads_solution(teacher, prompts.student, prompts.teacher)

    @property
    def reads_solutions(self) -> bool:
        """Whether any teacher needs reference solutions of the source."""
        return any(self.needs_solution(teacher) for teacher in self.taught_by.values())

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if not self.source.solution and self.reads_solutions:
            raise ValueError(
                "source.solution is empty: the teacher needs reference solutions, since its template has {solution}; write "
                "{answer} there, or give it the prompt plain, sibling or feedback (teachers.NAME.prompt)"
            )
        caps = {"rollout": self.rollout.max_new_tokens}
        caps |= {"evaluation": self.evaluation.max_new_tokens} if self.evaluation.problems else {}
        for section, cap in caps.items():
            if cap >= self.model.max_model_len:
                raise ValueError(
                    f"{section}.max_new_tokens {cap} leaves no room for a prompt in "
                    f"model.max_model_len {self.model.max_model_len}: raise the window or lower the cap"
                )
        self._takes_turns()
        self._trains_all_weights()
        if self.train.packing == "packed" and self.model.lora_dropout > 0:
            raise ValueError("train.packing packed would drop one choice of features for all traces of a prompt: set it padded")
        if 0 < self.train.keep_policies < self.max_staleness + 2:
            raise ValueError(
                f"train.keep_policies {self.train.keep_policies} drops policies that engines still need: set 0, or "
                f"{self.max_staleness + 2} or more"
            )
        if self.evaluation.source.response:
            raise ValueError("evaluation.source.response: an evaluation asks the model; leave it empty")
        self._shares_fit()
        refuse_missing(self.objective, self.score, set(self.writers) - {"student"})
        for reward in self.grade.rewards:
            if reward.function == "soft_overlong":
                shipped = reward.shipped()
                assert isinstance(shipped, SoftOverlong)
                limit, cache = shipped.limit or self.rollout.max_new_tokens, shipped.cache
                if cache > limit:
                    raise ValueError(f"grade.rewards.{reward.name}: settings.cache {cache} is above the limit of {limit} tokens")
        if self.grade.advantage == "group" and self.rollout.group_size < 2:
            raise ValueError("grade.advantage 'group' needs rollout.group_size of at least 2: raise it or use 'running'")
        if self.rollout.fill_groups and self.grade.advantage != "group":
            raise ValueError("rollout.fill_groups needs grade.advantage 'group': with 'running' no group is without signal")
        if self.rollout.fill_groups and self.only_imports:
            raise ValueError("rollout.fill_groups needs traces that the student writes: lower rollout.import_share")
        return self

    @model_validator(mode="after")
    def _teachers_fit(self) -> Run:
        for name, teacher in self.teachers.items():
            check_name(name)
            self._check_teacher(f"teachers.{name}", teacher)
        if len(self.teachers) > 1 and not self.source.teacher:
            raise ValueError(f"teachers has {len(self.teachers)} names: source.teacher must name the column that chooses one")
        if self.source.teacher and not self.teachers:
            raise ValueError("source.teacher names a column of teachers, and `teachers` has none: add teachers.NAME")
        return self

    def _check_teacher(self, where: str, teacher: Teacher) -> None:
        """Raise ValueError for a teacher that does not fit the rest of the run."""
        template, kept = template_of(teacher, self.prompts.student, self.prompts.teacher), self.train.keep_policies
        wanted = {"sibling": "{solution}", "feedback": "{feedback}"}.get(teacher.prompt)
        if "{problem}" not in template or (wanted and wanted not in template):
            raise ValueError(f"{where}.template lacks {'{problem}' if '{problem}' not in template else wanted}: it must have it")
        sees = bool(re.search(r"\{solution\}|(?<!\\boxed)\{answer\}", template))
        if teacher.template and teacher.prompt == "privileged" and not sees:
            raise ValueError(f"{where}.template lacks {{solution}} or {{answer}}: write one of them, or set {where}.prompt plain")
        if teacher.template and teacher.prompt == "plain" and sees:
            raise ValueError(f"{where}.template names what a plain teacher does not see: set {where}.prompt privileged")
        if teacher.prompt == "sibling" and self.rollout.group_size < 2:
            raise ValueError(f"{where}.prompt sibling needs rollout.group_size of at least 2: a trace alone has no sibling")
        if self.rollout.teacher_share and not teacher.before_grading:
            raise ValueError(f"{where}.prompt {teacher.prompt} exists only after grading: set rollout.teacher_share 0")
        if self.engines.rollout.colocate and self.has_pool(teacher) and not (teacher.engines or teacher.server):
            raise ValueError(f"{where} has a model of its own, which finds no room under colocate: set {where}.engines or server")
        if 0 < kept < self.max_staleness + 2 + (teacher.lag or 0) or (kept and teacher.rate is not None):
            raise ValueError(f"train.keep_policies {kept} drops policies that {where}.policy {teacher.policy} needs: set 0")

    def _shares_fit(self) -> None:
        """Raise ValueError for shares of a group that name no trace, or more traces than there are."""
        size, share = self.rollout.group_size, self.rollout.import_share
        if not self.source.response:
            if share < 1:
                raise ValueError("rollout.import_share is read with source.response only: name the column of traces there")
            return
        if "import" not in self.writers:
            raise ValueError(f"rollout.import_share {share} of {size} traces (rollout.group_size) is none: raise it")
        if self.rollout.teacher_share + share > 1 or len(self.writers) > size:
            raise ValueError(
                "source.response needs rollout.teacher_share 0 or a lower rollout.import_share: "
                f"{self.rollout.teacher_share} and {share} of a group of {size} are more than all"
            )

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

    def _trains_all_weights(self) -> None:
        """Raise ValueError for settings that do not go with `model.tuning`."""
        if self.model.tuning == "lora":
            return
        if any(teacher.rate is not None for teacher in self.teachers.values()):
            raise ValueError("teachers.NAME.policy ema is a mean of adapters: with model.tuning full use base or lag:N")
        if self.train.dtype == "float16" or self.model.dtype == "float16":
            raise ValueError("model.tuning full trains in float32 or bfloat16: set train.dtype and model.dtype to one of them")

    @property
    def kept_policies(self) -> int:
        """Last policies whose weights are kept; 0: all. Whole weights are large: without a setting only those in use are kept."""
        if self.train.keep_policies or self.model.tuning == "lora":
            return self.train.keep_policies
        return self.max_staleness + 2 + max((teacher.lag or 0 for teacher in self.teachers.values()), default=0)

    @property
    def accepted_gap(self) -> tuple[float, float]:
        """Nats of the mean and of the largest gap of engine and trainer: as set, or as measured for the coarser dtype of both."""
        halves = {self.model.dtype, self.train.dtype} - {"float32"}
        mean, largest = TOLERANCES[min(halves, default="float32")]
        asked = self.train.logprob_gap, self.train.logprob_gap_max
        return mean if asked[0] is None else asked[0], largest if asked[1] is None else asked[1]

    def digest(self, settings: tuple[str, ...]) -> str:
        """Hash of the named settings or sections, such as `label` or `rollout.top_p`. A shard is stale when its hash changes.

        `teachers.*.model` is that setting of every teacher; a run that names no teacher does not have it. A setting marked
        LATER counts only when it is not at its default, and one marked UNCOUNTED never. Raises AttributeError or KeyError for an
        unknown name.
        """
        picked: dict[str, Any] = {}
        for name in settings:
            if name.startswith("teachers.*."):
                picked |= _of_teachers(self.teachers, name)
                continue
            *parents, last = name.split(".")
            section = reduce(getattr, parents, self)
            if not left_out(section, last):
                picked[name] = counted(getattr(section, last))
        return digest(picked)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, readable by `--config`."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def _of_teachers(teachers: dict[str, Teacher], name: str) -> dict[str, dict[str, Any]]:
    """The part of a digest that a setting of every teacher makes. It is empty when it counts for none."""
    last = name.rpartition(".")[2]
    values = {who: counted(getattr(one, last)) for who, one in teachers.items() if not left_out(one, last)}
    return {name: values} if values else {}


class _Dumper(yaml.SafeDumper):
    """Writes YAML in which text that looks like a JSON number stands in quotes; YAML 1.1 takes 1e5 for text."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text[:1] in "-0123456789" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
