"""Settings of teachers: which model scores the traces, what it sees, and where it answers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.machines import Pool
from pipeline.config.section import LATER, UNCOUNTED, Count, Dtype, Positive, Section, Share

FEEDBACK = (
    "{problem}\n\nAn earlier attempt at this problem was checked, for your eyes only:\n{feedback}\n\n"
    "Work the problem out in your own words, step by step, and reach the answer by your own reasoning."
)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,29}")
RESERVED = {"rollout", "score"}  # names of the student's pools
TeacherPrompt = Literal["privileged", "plain", "sibling", "feedback"]


class Teacher(Section):
    """One teacher. With its defaults it is the student's frozen base, which sees the reference.

    Without any teacher in `teachers`, that one scores all traces. A sibling is another trace of the same group, verified as
    correct; it stands where the template has {solution}. Feedback is what the verifier said of the very trace that is scored.
    """

    model: str = Field("", description="a local folder or a hub id; empty: the student's base")
    revision: str | None = Field(None, description="branch, tag or commit of a hub's model; null: the newest")
    dtype: Dtype | None = Field(None, description="none: model.dtype")
    max_model_len: Count | None = Field(None, description="window of the teacher; none: model.max_model_len")
    prompt: TeacherPrompt = Field("privileged", description="what the teacher sees beside the problem")
    template: str = Field(
        "", description="its prompt; empty: prompts.teacher, prompts.student for plain, a stock one for feedback"
    )
    fallback: Literal["plain", "privileged", "reject"] = Field(
        "plain", description="what a trace without sibling or feedback gets in its place"
    )
    policy: str = Field("base", description="base, lag:N (N versions behind the writer) or ema:RATE (mean of its adapters)")
    engines: Annotated[Pool | None, UNCOUNTED] = Field(
        None, description="a pool of its own; none: the student's pool, or for another model one like engines.rollout"
    )
    server: str = Field("", description="address of a vLLM server that answers in the place of engines, such as http://host:8000")
    served_model: str = Field("", description="name of the model at the server; empty: the only one that it serves")
    top_k: Count = Field(20, description="most likely tokens that a server is asked for, and entropy bounds are computed from")
    max_half_width: Annotated[Positive, UNCOUNTED] = Field(
        0.5, description="widest half-width of entropy bounds that a gate may read, in nats"
    )
    timeout_s: Annotated[Positive, UNCOUNTED] = Field(120.0, description="seconds that a server may take for one request")
    tries: Annotated[Count, UNCOUNTED] = Field(4, description="times a request is sent to a server that is down or overloaded")
    concurrency: Annotated[Count, UNCOUNTED] = Field(8, description="requests that a server gets at one time")
    sample: Annotated[Annotated[int, Field(ge=0, le=4096)], UNCOUNTED] = Field(
        32, description="problems that teacher and base answer before the run, to say whether the teacher is better; 0: none"
    )
    gap_share: Annotated[Share, LATER] = Field(
        0.05, description="share of traces scored by the run's own base too, where the teacher has its weights but not its engine"
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str) -> str:
        kind, _, number = policy.partition(":")
        lag = kind == "lag" and number.isdecimal() and len(number) < 7
        ema = kind == "ema" and re.fullmatch(r"0?\.\d{1,12}|0", number) is not None
        if not (policy == "base" or lag or ema):
            raise ValueError(f"'{policy}' is no policy: write base, lag:N with N from 0, or ema:RATE with a rate below 1")
        return policy

    @field_validator("server")
    @classmethod
    def _address(cls, server: str) -> str:
        if server and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", server):
            raise ValueError("is no address such as http://host:8000; a token stands in the environment, never in the address")
        return server.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _one_kind(self) -> Teacher:
        if self.policy != "base" and (self.model or self.server):
            raise ValueError(f"policy {self.policy} is a policy of the student: leave model and server empty")
        if self.revision is not None and not self.model:
            raise ValueError("revision is that of model, which is empty: set model too, or model.revision of the run")
        if self.server and self.engines is not None:
            raise ValueError("has a server and engines: leave one of them")
        if self.server and not self.model:
            raise ValueError("server needs model: the folder or hub id whose tokenizer and chat template the server has")
        return self

    @property
    def before_grading(self) -> bool:
        """Whether what the teacher sees is known before a trace is written."""
        return self.prompt in ("privileged", "plain")

    @property
    def lag(self) -> int | None:
        """Versions by which the teacher is behind the writer. None for another policy."""
        return int(self.policy[4:]) if self.policy.startswith("lag:") else None

    @property
    def rate(self) -> float | None:
        """The share of the old mean in an exponential mean. None for another policy."""
        return float(self.policy[4:]) if self.policy.startswith("ema:") else None


def check_name(name: str) -> None:
    """Raise ValueError for a name that no teacher may have: it names a folder and a pool."""
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(
            f"'{name}' is no name of a teacher: write small letters, digits and _, and not {' or '.join(sorted(RESERVED))}"
        )


def template_of(teacher: Teacher, student: str, privileged: str) -> str:
    """The template of a teacher's prompt. `student` and `privileged` are prompts.student and prompts.teacher."""
    if teacher.template:
        return teacher.template
    return {"plain": student, "feedback": FEEDBACK}.get(teacher.prompt, privileged)


def reads_solution(teacher: Teacher, student: str, privileged: str) -> bool:
    """Whether a teacher needs reference solutions of the source."""
    falls_back = not teacher.before_grading and teacher.fallback == "privileged"
    own = template_of(teacher, student, privileged)
    return (teacher.prompt in ("privileged", "feedback") and "{solution}" in own) or (falls_back and "{solution}" in privileged)
