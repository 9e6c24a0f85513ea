"""A run's complete configuration: every setting with its type, its default and its checks."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.digest import digest

Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LATER = (
    "later"  # marks a setting that is younger than existing runs, as in Annotated[float, LATER]: its default changes no digest
)
UNCOUNTED = "uncounted"  # marks a setting that no result depends on: it counts in no digest


class Section(BaseModel):
    """A group of settings. It is frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """Where problems come from.

    uri: a JSONL or Parquet path or URI, `datasets:<name or path>`, `reasoning-gym:<task>`, or `tiny-arithmetic`.
    """

    uri: str = "tiny-arithmetic"
    split: str = "train"
    problem: str = Field("problem", description="column of the problem text")
    solution: str = Field("solution", description="column of the reference solution; may be empty in an evaluation")
    answer: str = Field("answer", description="column of the answer; 'solution' reads its last \\boxed{} or what follows ####")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of a generated task (terms, digits, ...)")
    size: Count = Field(100_000, description="problems of a generated task; for a file, the most rows that are taken")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of a generated task")

    @field_validator("uri")
    @classmethod
    def _no_credentials(cls, uri: str) -> str:
        if "://" in uri and "@" in uri.split("://", 1)[1].split("/")[0]:
            raise ValueError("the URI holds credentials, which would be written to run.json: give them by environment or profile")
        return uri


class Model(Section):
    """The base model, which is both the student's base and the frozen teacher."""

    path: str = Field("tiny-reasoner", description="a local folder, a hub id, or 'tiny-reasoner' (ships with the project)")
    revision: str | None = None
    dtype: Dtype = "float32"
    max_model_len: Count = 256
    trust_remote_code: bool = False
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Share = 0.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Prompts(Section):
    """Prompt templates. `{problem}` and `{solution}` are filled in, and the tokenizer's own chat template wraps the result.

    A `teacher` template equal to `student` is a control: a teacher without the reference solution.
    """

    student: str = "{problem}"
    teacher: str = (
        "{problem}\n\nA correct solution of this problem, for your eyes only:\n{solution}\n\n"
        "Work the problem out in your own words, step by step, and reach the answer by your own reasoning."
    )
    system: str | None = None
    student_thinking: bool = True
    teacher_thinking: bool = True


class Rollout(Section):
    """How traces are written."""

    prompts_per_round: Count = 32
    prompts_per_shard: Count = 8
    group_size: Count = Field(8, description="G, traces per prompt")
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="tokens that sampling may choose from; 0: all")
    max_new_tokens: Count = 64
    teacher_share: Share = Field(0.0, description="share of each group that the privileged teacher writes")


class Grade(Section):
    """Verdicts, rewards and advantages."""

    verifier: Literal["math", "exact"] = "math"
    answer_pattern: str | None = Field(
        None, description="regex: group 1 of its last match is the answer; none: the last \\boxed or the last number"
    )
    deadline_s: Positive = Field(
        5.0, description="processor seconds that the verification of one answer may take; it gets them twice"
    )
    processes: Annotated[int, Field(ge=0)] = Field(
        0, description="verifier processes of one worker; 0: as many as it may use CPUs"
    )
    fallback: Annotated[Literal["auto", "on", "off"], LATER] = Field(
        "auto",
        description="whether the last formula or number counts where no answer is marked; auto: unless the prompt asks for a box",
    )
    set_relations: Annotated[bool, LATER] = Field(
        True, description="whether `x < 3` and the interval (-oo, 3) are the same answer"
    )
    beta_length: Annotated[float, Field(ge=0)] = Field(0.5, description="beta_L of the length-shaped reward")
    advantage: Literal["group", "running"] = "group"
    running_warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="warm-up of the running estimator, in rounds")


class ScoreSettings(Section):
    """How teacher and student log-probs and entropies are measured."""

    entropy: Literal["exact", "bounds"] = "exact"
    fallback: Annotated[bool, UNCOUNTED] = Field(
        True,
        description="whether bounds, with a warning, take the place of exact entropies; false: the run ends before it pays",
    )
    top_k: Count = Field(20, description="most likely tokens that entropy bounds are computed from")
    rescore_share: Share = Field(0.05, description="share of student traces scored again to measure the log-prob gap")


class Profile(Section):
    """Entropy profile of a trace. Thresholds on the normalised entropy decide the regimes (2605.13255, section 5.5)."""

    window: Annotated[int, Field(ge=0)] = Field(3, description="W, tokens of the lookahead; 0 is EGRSD")
    normaliser: Literal["log_vocab", "batch_max"] = Field("log_vocab", description="what entropy is divided by")
    tau_low: Share = Field(0.01, description="a token at or below it is a lock (normalised entropy)")
    tau_high: Share = Field(0.17, description="a token at or above it is a pivot or a fork (normalised entropy)")

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        if self.tau_low >= self.tau_high:
            raise ValueError(f"tau_low {self.tau_low} must be below tau_high {self.tau_high}")
        return self


class Weights(Section):
    """Constants of the token weight (2605.13255, Eq. 2, 5 and 6). Labels and objective each have their own values of them."""

    gamma: Annotated[float, Field(ge=0)] = 0.3
    floor: Share = 0.1
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    min_normaliser: Positive = Field(1.0, description="least value of the gate's maximum M, in nats")


class Label(Weights):
    """Gate and token weight that are stored as data. Their maximum M is the round's. Training does not read them."""

    lookahead: bool = Field(True, description="whether the gate reads the lookahead entropy (CL-EGRSD) or the plain one (EGRSD)")


class Objective(Weights):
    """What the trainer minimises, computed from the stored signals."""

    name: Literal["grpo", "rlsd", "egrsd", "cl_egrsd", "position"] = "cl_egrsd"
    gate: Literal["entropy", "shuffled", "uniform", "inverted"] = Field(
        "entropy", description="gate of egrsd and cl_egrsd, or a control in its place; see pipeline/method/objective.py"
    )
    entropy: Literal["teacher", "student"] = Field("teacher", description="whose entropy the gate reads; `student` is a control")
    window: Annotated[int, Field(ge=0)] = 3
    rlsd_lam: Share = 0.5
    rlsd_decay_steps: Annotated[int, Field(ge=0)] = 50
    position_min: Share = 0.25
    position_tau: float = 0.30
    position_scale: Positive = 0.10

    @model_validator(mode="after")
    def _has_a_gate(self) -> Objective:
        if (self.gate, self.entropy) != ("entropy", "teacher") and self.name not in {"egrsd", "cl_egrsd"}:
            raise ValueError(f"gate and entropy are controls of egrsd and cl_egrsd; '{self.name}' has no gate")
        return self


class Placement(Section):
    """What one Ray actor asks for. `labels` match labels of Ray nodes; `resources` are custom resources (cluster.yaml)."""

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _as_ray_takes_it(self) -> Placement:
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g}: more than one GPU must be a whole number")
        if builtin := {"CPU", "GPU", "memory", "object_store_memory"} & self.resources.keys():
            raise ValueError(f"resources holds {', '.join(sorted(builtin))}: use cpus and gpus; it is for a cluster's own names")
        return self


class Pool(Section):
    """A pool of engines. `min` engines start with the run. Waiting work adds engines up to `max`; idle ones end again."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Count = 1
    grow_after_s: Annotated[float, Field(ge=0)] = Field(2.0, description="seconds that work waits before the pool adds an engine")
    shrink_after_s: Annotated[float, Field(ge=0)] = Field(120.0, description="seconds until an unneeded engine ends")
    placement: Placement = Placement()
    tensor_parallel: Count = 1
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads of one engine; 0: as many as Ray grants CPUs")
    memory_share: Share = Field(0.9, description="share of the GPU memory that an engine takes")
    kv_cache_gib: Positive = Field(1.0, description="KV cache of an engine on CPU, in GiB")
    max_num_seqs: Count = 256
    max_batched_tokens: Count = 2048
    enforce_eager: bool = True
    start_timeout_s: Positive = Field(600.0, description="seconds that a start may take, and a step, since the first may compile")
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds without a sign of life after which an engine or its dispatcher is replaced"
    )
    request_tries: Count = Field(3, description="times a request may kill its engine before its row is rejected")

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: raise max or lower min")
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Pool:
        if self.tensor_parallel > 1 and self.placement.gpus != self.tensor_parallel:
            count = self.tensor_parallel
            raise ValueError(
                f"tensor_parallel {count} needs placement.gpus {count}, one for each process; it is {self.placement.gpus:g}"
            )
        return self


class EnginePools(Section):
    """The pools of engines: one for rollout and scoring, or two that scale apart where `score` is given."""

    rollout: Pool = Pool()
    score: Pool | None = None
    inflight_shards: Count = Field(4, description="shards that may wait on one engine at one time")


class Train(Section):
    """The trainer and its optimiser."""

    workers: Count = 1
    placement: Placement = Placement()
    threads: Annotated[int, Field(ge=0)] = Field(0, description="torch threads of one rank; 0: as many as Ray grants CPUs")
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    batch_traces: Count = Field(256, description="traces of one optimiser step over all ranks: the minibatch of Eq. 5")
    micro_batch_tokens: Count = Field(16_384, description="most tokens of one forward pass: prompt, response and padding")
    head_chunk_tokens: Count = Field(1024, description="tokens whose logits exist at one time")
    learning_rate: Positive = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Positive = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="training states kept; a resume needs the last one")
    checkpoint_every: Annotated[Count, LATER] = Field(
        1, description="rounds between two training states; a resume trains the rounds after the last one again"
    )
    keep_policies: Annotated[Annotated[int, Field(ge=0)], LATER] = Field(
        0, description="last policies whose weights are kept, besides the first and those of evaluations; 0: all"
    )
    max_failures: Annotated[int, Field(ge=0)] = 3
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds without a sign of life after which a rank counts as dead"
    )

    @model_validator(mode="after")
    def _one_card_each(self) -> Train:
        if self.workers > 1 and 0 < self.placement.gpus < 1:
            raise ValueError(
                f"placement.gpus {self.placement.gpus:g} would let ranks share a GPU, which NCCL refuses: set 1, or workers 1"
            )
        return self


class Evaluation(Section):
    """Held-out problems, which the run answers before its first and after its last round."""

    source: Source = Source(split="test")
    problems: Annotated[int, Field(ge=0)] = 512
    samples: Count = 1
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Count = 64


class Metrics(Section):
    """Where metrics go besides the run's own JSONL files. No result depends on it, so a resume may change it."""

    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="trackers; each needs its package extra")

    @field_validator("sinks", mode="before")
    @classmethod
    def _names(cls, sinks: Any) -> Any:
        names = [name.strip() for name in sinks.split(",") if name.strip()] if isinstance(sinks, str) else sinks
        return list(dict.fromkeys(names)) if isinstance(names, list | tuple) else names


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
        if 0 < self.train.keep_policies < self.max_staleness + 2:
            raise ValueError(
                f"train.keep_policies {self.train.keep_policies} drops policies that engines still need: set 0, or "
                f"{self.max_staleness + 2} or more"
            )
        if self.objective.entropy == "student" and self.rollout.teacher_share:
            raise ValueError(
                "objective.entropy 'student' needs rollout.teacher_share 0: the student's entropy of a trace that the teacher "
                "wrote is not measured"
            )
        if self.grade.advantage == "group" and self.rollout.group_size < 2:
            raise ValueError("grade.advantage 'group' needs rollout.group_size of at least 2: raise it or use 'running'")
        return self

    def digest(self, settings: tuple[str, ...]) -> str:
        """Hash of the named settings or sections, such as `label` or `rollout.top_p`. A shard is stale when its hash changes.

        A setting marked LATER counts only when it is not at its default, and one marked UNCOUNTED never.
        Raises AttributeError or KeyError for an unknown name.
        """
        picked = {}
        for name in settings:
            *parents, last = name.split(".")
            section = reduce(getattr, parents, self)
            if not _left_out(section, last):
                picked[name] = _counted(getattr(section, last))
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


def _left_out(section: Section, name: str) -> bool:
    """Whether a setting counts in no digest: it is marked UNCOUNTED, or marked LATER and at its default."""
    field = type(section).model_fields[name]
    later = LATER in field.metadata and getattr(section, name) == field.get_default(call_default_factory=True)
    return later or UNCOUNTED in field.metadata


def _counted(value: Any) -> Any:
    """The value of a setting, or the part of a section that counts in a digest."""
    if not isinstance(value, Section):
        return value
    return {name: _counted(part) for name, part in value if not _left_out(value, name)}
