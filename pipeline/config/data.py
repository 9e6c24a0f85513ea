"""Settings of problems, model, prompts and traces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import CHOOSES, LATER, Count, Dtype, Positive, Section, Share, Temperature, holds_credentials

_Prompts = Annotated[int, Field(ge=1, le=10**7)]  # the plan of a round lists them
_Samples = Annotated[int, Field(ge=1, le=10**5)]  # a shard has them all for a single prompt


class Source(Section):
    """Where problems come from.

    uri: a JSONL or Parquet path or URI, `datasets:<name or path>`, `reasoning-gym:<task>`, or `tiny-arithmetic`. A column may be
    named with dots: `reward_model.ground_truth` is a part of column `reward_model`. A column that is not there, and whose setting
    is at its default, is found by looking at the first rows; `egrsd doctor --source` shows what is understood.
    """

    uri: str = Field(
        "tiny-arithmetic",
        description="where problems come from: a path or URI, datasets:NAME, reasoning-gym:TASK or tiny-arithmetic",
    )
    split: str = Field("train", description="split of a folder, a data set or a generated task; a single file has none")
    problem: str = Field("problem", description="column of the problem text")
    solution: str = Field("solution", description="column of the reference solution; may be empty in an evaluation")
    answer: str = Field("answer", description="column of the answer; 'solution' reads its last \\boxed{} or what follows ####")
    teacher: Annotated[str, LATER] = Field("", description="column that names the teacher of a problem; empty: one teacher")
    response: Annotated[str, LATER] = Field(
        "",
        description="column of traces that somebody else wrote, which the run learns from; empty: the student writes them",
    )
    carry: Annotated[tuple[str, ...] | None, LATER] = Field(
        None, description="other columns that are kept for rewards; null: all of them"
    )
    carry_bytes: Annotated[Count, LATER] = Field(
        65_536,
        description="most bytes of the other columns of one row; the largest are left out, or the row is if `carry` names them",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="settings of a generated task (terms, digits, ...)")
    size: Count = Field(100_000, description="problems of a generated task; for a file, the most rows that are taken")
    skip: Annotated[int, LATER] = Field(
        0,
        ge=0,
        le=10**12,
        description="first rows of a file that are passed over, so that one file has training and held-out rows",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of a generated task")
    pass_rate: Annotated[tuple[Share, Share], CHOOSES] = Field(
        (0.0, 1.0), description="bounds, both included, of the pass rates of problems that rounds take"
    )
    pass_rates: Annotated[tuple[str, ...], CHOOSES] = Field(
        (), description="runs, or rounds or evaluations of runs, whose verdicts tell pass rates before this run's own verdicts do"
    )
    unmeasured: Annotated[Literal["kept", "left_out"], CHOOSES] = Field(
        "kept", description="what happens to problems without a known pass rate"
    )
    sampling: Annotated[Literal["shuffled", "variance"], CHOOSES] = Field(
        "shuffled",
        description="shuffled: every problem once an epoch; variance: the chance of a problem is proportional to p (1 - p)",
    )

    @property
    def chooses(self) -> bool:
        """Whether pass rates decide which problems rounds take."""
        return self.pass_rate != (0.0, 1.0) or self.unmeasured != "kept" or self.sampling != "shuffled"

    def row_of(self, index: int) -> int:
        """The row of a problem in its file, counted from 0. A problem's index does not count the rows that `skip` passes over."""
        return self.skip + index

    def reading(self) -> dict[str, Any]:
        """The settings by which the rows are read, as plain JSON. Those that choose among the rows are left out."""
        choosing = {name for name, field in type(self).model_fields.items() if CHOOSES in field.metadata}
        return self.model_dump(mode="json", exclude=choosing)

    @model_validator(mode="after")
    def _choice(self) -> Source:
        low, high = self.pass_rate
        if low > high:
            raise ValueError(f"pass_rate {low},{high}: the lower bound comes first")
        if self.pass_rates and not self.chooses:
            raise ValueError("pass_rates names runs that nothing reads: set pass_rate, unmeasured or sampling too")
        return self

    @field_validator("uri")
    @classmethod
    def _no_credentials(cls, uri: str) -> str:
        if holds_credentials(uri):
            raise ValueError("the URI holds credentials, which would be written to run.json: give them by environment or profile")
        return uri


class Model(Section):
    """The base model, which is both the student's base and the frozen teacher."""

    path: str = Field("tiny-reasoner", description="a local folder, a hub id, or 'tiny-reasoner' (ships with the project)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub's model; null: the newest")
    dtype: Dtype = Field("float32", description="type of weights and arithmetic in the engines")
    max_model_len: Count = Field(256, description="window in tokens: prompt and response together")
    trust_remote_code: bool = Field(False, description="whether code that comes with a model may run")
    tuning: Annotated[Literal["lora", "full"], LATER] = Field(
        "lora", description="what is trained: an adapter beside the frozen base (lora), or all weights (full)"
    )
    lora_rank: Annotated[int, Field(ge=1, le=512)] = Field(16, description="rank of the adapter that is trained")
    lora_alpha: Positive = Field(32.0, description="scale of the adapter: its update is multiplied by alpha / rank")
    lora_dropout: Share = Field(0.0, description="dropout of the adapter's input in training")
    lora_targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="names of the linear layers that get an adapter",
    )

    @field_validator("lora_targets")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Each name once: peft keeps a set."""
        return tuple(dict.fromkeys(names))


class Prompts(Section):
    """Prompt templates. The tokenizer's own chat template wraps the filled text.

    `{problem}` is filled in, and for a teacher `{solution}` and `{answer}` too. `\\boxed{answer}` stays as it is written. A
    `teacher` template equal to `student` is a control: a teacher without the reference solution.
    """

    student: str = Field(
        "{problem}", description="what the student reads, with {problem}; the chat template of the model is put around it"
    )
    teacher: str = Field(
        (
            "{problem}\n\nA correct solution of this problem, for your eyes only:\n{solution}\n\n"
            "Work the problem out in your own words, step by step, and reach the answer by your own reasoning."
        ),
        description="what the teacher reads, with {problem} and {solution} or {answer}",
    )
    system: str | None = Field(None, description="text of a system turn before both prompts; null: none")
    student_thinking: bool = Field(
        True, description="whether the student's template turns on thinking, where it knows `enable_thinking`"
    )
    teacher_thinking: bool = Field(
        True, description="whether the teacher's template turns on thinking, where it knows `enable_thinking`"
    )


class Rollout(Section):
    """How traces are written."""

    prompts_per_round: _Prompts = Field(32, description="problems of one round")
    prompts_per_shard: _Prompts = Field(8, description="problems of one shard, the smallest piece of work")
    group_size: _Samples = Field(8, description="G, traces per prompt")
    temperature: Temperature = Field(
        1.0, description="temperature of sampling; stored log-probs are those at temperature 1; top_k 1 is greedy"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sampling chooses among the likeliest tokens of this total probability; 1: all"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="tokens that sampling may choose from; 0: all")
    max_new_tokens: Count = Field(64, description="most tokens of a response; a longer one is truncated")
    teacher_share: Share = Field(0.0, description="share of each group that the privileged teacher writes")
    import_share: Annotated[Annotated[float, Field(gt=0, le=1)], LATER] = Field(
        1.0, description="share of each group that source.response brings, where it is set; others are written"
    )
    fill_groups: Annotated[Annotated[int, Field(ge=0, le=1_000_000)], LATER] = Field(
        0, description="most further prompts of a round, asked in place of groups without signal; 0: none"
    )


class Evaluation(Section):
    """Held-out problems, which the run answers before its first and after its last round."""

    source: Source = Source(split="test")
    problems: Annotated[int, Field(ge=0)] = Field(
        512, description="held-out problems that are asked, the first ones of their source; 0: no evaluation"
    )
    samples: _Samples = Field(1, description="answers to each held-out problem")
    temperature: Temperature = Field(1.0, description="temperature of sampling; top_k 1 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sampling chooses among the likeliest tokens of this total probability; 1: all"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="tokens that sampling may choose from; 0: all")
    max_new_tokens: Count = Field(64, description="most tokens of a response; a longer one is truncated")

    @property
    def sampling(self) -> str:
        """How answers are sampled, in words: accuracies of other samplings do not compare."""
        few = f"top-p {self.top_p:g}, top-k {self.top_k or 'off'}, at most {self.max_new_tokens} tokens"
        return (
            f"greedily, at most {self.max_new_tokens} tokens"
            if self.top_k == 1
            else f"at temperature {self.temperature:g}, {few}"
        )

    @model_validator(mode="after")
    def _takes_all(self) -> Evaluation:
        if self.source.chooses or self.source.pass_rates:
            raise ValueError("source: pass rates choose problems of training, not of an evaluation: leave these settings out")
        return self
