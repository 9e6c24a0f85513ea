"""Settings of the method: verdicts and rewards, scores, profiles and labels. objective.py has those of the objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.rewards import Reward, check_rewards
from pipeline.config.section import LATER, UNCOUNTED, Count, Positive, Section, Share
from pipeline.errors import SettingError

if TYPE_CHECKING:
    from pipeline.config.objective import Objective


class Grade(Section):
    """Verdicts, rewards and advantages."""

    verifier: Literal["math", "exact"] = Field("math", description="math: answers are compared as mathematics; exact: as text")
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
    advantage: Literal["group", "running"] = Field(
        "group", description="group: against the mean of the problem's traces; running: against a running mean over rounds"
    )
    std: Annotated[Literal["population", "sample"], LATER] = Field(
        "population", description="spread of the group estimator: divided by n, or by n - 1 as TRL and verl do"
    )
    running_warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="warm-up of the running estimator, in rounds")
    rewards: Annotated[tuple[Reward, ...], LATER] = Field(
        (), description="functions whose weighted sum is the reward; none: the verifier's length-shaped reward"
    )
    verdict_reward: Annotated[str | None, LATER] = Field(
        None, description="reward that decides the verdict in the verifier's place: a value of 1 or more is correct"
    )

    @property
    def tests_decide(self) -> bool:
        """Whether the tests of a problem decide the verdict of a trace."""
        return any(one.function == "python_tests" and one.name == self.verdict_reward for one in self.rewards)

    @model_validator(mode="after")
    def _rewards_agree(self) -> Grade:
        check_rewards(self.rewards, self.verdict_reward)
        return self


class ScoreSettings(Section):
    """How teacher and student log-probs and entropies are measured."""

    entropy: Literal["exact", "bounds"] = Field(
        "exact", description="exact: over the whole vocabulary; bounds: from the top_k likeliest tokens"
    )
    fallback: Annotated[bool, UNCOUNTED] = Field(
        True,
        description="whether bounds, with a warning, take the place of exact entropies; false: the run ends before it pays",
    )
    top_k: Count = Field(20, description="most likely tokens that entropy bounds are computed from")
    keep_topk: Annotated[Annotated[int, Field(ge=0)], LATER] = Field(
        0, description="K, most likely tokens of the teacher that are stored at each response position; 0: none"
    )
    base_logprobs: Annotated[bool, LATER] = Field(
        False, description="whether the base's log-probs under the student's prompt are stored too, for objective.kl"
    )
    rescore_share: Share = Field(0.05, description="share of student traces scored again to measure the log-prob gap")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise SettingError when `keep_topk` asks for more tokens than the teacher's vocabulary has."""
        if self.keep_topk > vocab_size:
            what = f"{self.keep_topk} is more than the {vocab_size} tokens of the teacher's vocabulary"
            raise SettingError(what, "score.keep_topk", f"Set it to at most {vocab_size}")


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

    gamma: Annotated[float, Field(ge=0)] = Field(0.3, description="strength of the gate; 0: no gate")
    floor: Share = Field(0.1, description="least value of the gate")
    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="the magnitude is clipped to 1 - epsilon .. 1 + epsilon"
    )
    min_normaliser: Positive = Field(1.0, description="least value of the gate's maximum M, in nats")


class Label(Weights):
    """Gate and token weight that are stored as data. Their maximum M is the round's. Training does not read them."""

    lookahead: bool = Field(True, description="whether the gate reads the lookahead entropy (CL-EGRSD) or the plain one (EGRSD)")

    def differs_from(self, trained: Objective, window: int) -> str:
        """What to know of a gate that labels and report show otherwise than training has it; "" when it is the same.

        window: of the profile, in tokens. Constants that training does not read are not compared.
        """
        apart = [
            f"label.{name} {getattr(self, name):g} (training: {getattr(trained, name):g})"
            for name in Weights.model_fields
            if trained.reads(name) and getattr(self, name) != getattr(trained, name)
        ]
        mine, its = (window if self.lookahead else 0), (trained.window if trained.gate_kind == "cl_entropy" else 0)
        if trained.gate_kind in ("entropy", "cl_entropy") and mine != its:
            apart.append(f"a lookahead of {mine} tokens (training: {its})")
        apart += trained.unlike_labels
        what = "labels and report show weights that training does not use"
        return f"{what}: {', '.join(apart)}. Training goes by the section objective" if apart else ""
