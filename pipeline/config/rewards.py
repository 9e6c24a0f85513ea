"""Settings of rewards: which functions judge a trace, their weights, and the settings of the functions that the project ships."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, ValidationError, model_validator

from pipeline.config.section import Count, Positive, Section

RESERVED = ("prompts", "completions", "completion_ids", "problem", "solution", "answer", "trainer_state")
_FILE = re.compile(r".+\.py(:[A-Za-z_]\w*)?", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


class Accuracy(Section):
    """Settings of the shipped reward `accuracy`: none. `grade` has those of the verifier, and `grade.beta_length`."""


class Format(Section):
    """Settings of the shipped reward `format`: 1 where the pattern matches the response, else 0."""

    pattern: str
    whole: bool = Field(True, description="whether the pattern must match the whole response, or may match a part of it")

    @model_validator(mode="after")
    def _compiles(self) -> Format:
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from error
        return self


class SoftOverlong(Section):
    """Settings of the shipped reward `soft_overlong` (DAPO): a penalty that grows over the last `cache` tokens."""

    cache: Count = Field(description="tokens below the limit in which the penalty grows from 0 to -1")
    limit: Annotated[int, Field(ge=0)] = Field(0, description="tokens at which it is -1; 0: rollout.max_new_tokens")


class PythonTests(Section):
    """Settings of the shipped reward `python_tests`: the limits of one program, and where its tests are."""

    column: str = Field("tests", description="column of the source with the tests; `answer` is source.answer's")
    partial: bool = Field(False, description="whether the value is the share of passed tests; false: 1 only when all pass")
    time_s: Annotated[float, Field(gt=0, le=600)] = Field(5.0, description="processor seconds of one test")
    memory_mb: Annotated[int, Field(ge=64, le=65_536)] = Field(512, description="address space of the program")
    scratch_mb: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="files that the program may write, together")
    output_kb: Annotated[int, Field(ge=1, le=65_536)] = Field(64, description="output of one test; more ends it as failed")
    most_tests: Annotated[int, Field(ge=1, le=1000)] = Field(
        50, description="tests of one problem that are run, from the first on"
    )
    locks: Literal["required", "available"] = Field(
        "required", description="required: no program runs where the kernel gives no lock on network, files and processes"
    )


SHIPPED: dict[str, type[Section]] = {
    "accuracy": Accuracy,
    "format": Format,
    "soft_overlong": SoftOverlong,
    "python_tests": PythonTests,
}


class Reward(Section):
    """One reward: a function that gives each trace a number, or nothing."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] = Field(
        description="name of the reward: small letters, digits and _; its values stand in column reward_NAME"
    )
    function: str = Field(description="file.py, file.py:function, module:function, or a shipped one by its name")
    weight: float = Field(1.0, description="factor in the weighted sum; 0: the values are stored only")
    settings: dict[str, Any] = Field(default_factory=dict, description="further arguments of the function")
    deadline_s: Positive = Field(60.0, description="seconds that one call of the function may take")
    per: Literal["group", "trace"] = Field("group", description="the traces of one call: all of a problem, or a single one")

    @model_validator(mode="after")
    def _is_known(self) -> Reward:
        if self.function in SHIPPED:
            self.shipped()
        elif not (_FILE.fullmatch(self.function) or _MODULE.fullmatch(self.function)):
            raise ValueError(
                f"{self.name}: function {self.function!r} is no module:function, no file.py or file.py:function, and none of "
                f"{', '.join(SHIPPED)}"
            )
        if taken := sorted(set(RESERVED) & self.settings.keys()):
            raise ValueError(f"{self.name}: settings.{taken[0]} has the name of an argument that every reward gets: rename it")
        return self

    def shipped(self) -> Section:
        """The settings of a shipped function, checked. Raises ValueError that names the reward and the setting."""
        try:
            return SHIPPED[self.function].model_validate(self.settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["settings", *map(str, first["loc"])])
            raise ValueError(f"{self.name}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def check_rewards(rewards: tuple[Reward, ...], verdict_reward: str | None) -> None:
    """Raise ValueError when rewards contradict each other."""
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"rewards: two are named '{twice[0]}': each has a column of its own, so rename one")
    if rewards and not any(reward.weight for reward in rewards):
        raise ValueError("rewards: every weight is 0, so nothing would be learned: give one another weight")
    if verdict_reward is not None and verdict_reward not in names:
        raise ValueError(f"verdict_reward '{verdict_reward}' is none of the rewards: {', '.join(names) or 'there are none'}")
    judge = next((reward for reward in rewards if reward.name == verdict_reward), None)
    if judge is not None and any(reward.function == "accuracy" for reward in rewards):
        raise ValueError(
            f"verdict_reward '{verdict_reward}' takes the place of the verifier, which the reward `accuracy` needs: leave one out"
        )
