"""Settings of the objective: what the trainer minimises, and a table of the settings and columns that each objective reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.method import ScoreSettings, Weights
from pipeline.config.section import LATER, Positive, Share

# What an objective reads beside the settings that all of them read. `OBJECTIVES` has their names in order.
READS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "rlsd": ("epsilon", "rlsd_lam", "rlsd_decay_steps"),
    "egrsd": ("epsilon",),
    "cl_egrsd": ("epsilon",),
    "position": ("epsilon", "position_min", "position_tau", "position_scale"),
    "opd": (),
    "reward_opd": ("opd_coefficient",),
    "iw_opd": ("iw_growth",),
    "sdar": ("sdar_coefficient", "sdar_slope"),
    "minillm": ("minillm_gamma", "minillm_mean"),
    "fkl": ("support", "top_k"),
    "gkd": ("support", "top_k", "gkd_beta"),
    "eopd": ("support", "top_k", "eopd_threshold"),
    "opsd": ("support", "top_k", "opsd_clamp"),
    "sft": (),
}
OBJECTIVES = tuple(READS)
USES_ADVANTAGE = ("grpo", "rlsd", "egrsd", "cl_egrsd", "position", "reward_opd", "sdar")  # filled rounds want a signal
SCALES_ADVANTAGE = ("grpo", "rlsd", "egrsd", "cl_egrsd", "position")  # the advantage times a factor
DISTRIBUTIONAL = ("fkl", "gkd", "eopd", "opsd")  # these read the teacher's K most likely tokens
SAMPLED = tuple(name for name in OBJECTIVES if name not in {"fkl", "gkd", "opsd", "sft"})  # policy gradients: a clip makes sense
OWN_GATE = {"egrsd": "entropy", "cl_egrsd": "cl_entropy"}  # of all others: off
OWN_CLIP = {"eopd": "ppo"}  # of all others: none
OWN_TOP_K = {"eopd": 16}
GATE_READS = {
    "off": (),
    "entropy": ("gamma", "floor", "min_normaliser", "entropy"),
    "cl_entropy": ("gamma", "floor", "min_normaliser", "entropy", "window"),
    "top_entropy": (),
}
GATES = ("own", "off", "entropy", "cl_entropy", "top_entropy:SHARE")
CONTROLS = ("shuffled", "uniform", "inverted")
TOPK = ("teacher_topk_tokens", "teacher_topk_logprobs")
_ALWAYS = ("name", "gate", "control", "normalise")


class Objective(Weights):
    """What the trainer minimises, computed from the stored signals."""

    name: Literal[
        "grpo",
        "rlsd",
        "egrsd",
        "cl_egrsd",
        "position",
        "opd",
        "reward_opd",
        "iw_opd",
        "sdar",
        "minillm",
        "fkl",
        "gkd",
        "eopd",
        "opsd",
        "sft",
    ] = Field("cl_egrsd", description="what the trainer minimises; pipeline/method/README.md has the equations")
    gate: str = Field(
        "own",
        description="factor of every token: off, entropy, cl_entropy, top_entropy:SHARE; own: cl_entropy in cl_egrsd, entropy in "
        "egrsd, else off",
    )
    control: Annotated[Literal["none", "shuffled", "uniform", "inverted"], LATER] = Field(
        "none", description="what is changed in the gate, to test whether it matters; see pipeline/method/README.md"
    )
    entropy: Literal["teacher", "student"] = Field("teacher", description="whose entropy the gate reads; `student` is a control")
    window: Annotated[int, Field(ge=0)] = Field(3, description="W, tokens that the gate of cl_egrsd looks ahead")
    rlsd_lam: Share = Field(0.5, description="lambda, share of the teacher's factor in rlsd at the first step")
    rlsd_decay_steps: Annotated[int, Field(ge=0)] = Field(
        50, description="optimiser steps in which that share falls to 0; 0: it stays"
    )
    position_min: Share = Field(0.25, description="least weight of a token in `position`")
    position_tau: float = Field(0.30, description="place in the trace, as a share of it, where the weight of `position` changes")
    position_scale: Positive = Field(0.10, description="width of that change, as a share of the trace")
    opd_coefficient: Annotated[Positive, LATER] = Field(1.0, description="weight of log T - log S beside the advantage")
    iw_growth: Annotated[Annotated[float, Field(ge=0)], LATER] = Field(0.5, description="g, by which early tokens weigh more")
    sdar_coefficient: Annotated[Positive, LATER] = Field(0.1, description="weight of the sigmoid beside the advantage")
    sdar_slope: Annotated[Positive, LATER] = Field(5.0, description="slope of the sigmoid, per nat")
    minillm_gamma: Annotated[Share, LATER] = Field(1.0, description="discount of later tokens")
    minillm_mean: Annotated[bool, LATER] = Field(True, description="whether the discounted sum is divided by that of its weights")
    support: Annotated[Literal["tail", "renormalised", "truncated"], LATER] = Field(
        "tail", description="tokens of a divergence: the kept ones and one bucket for the rest, or the kept ones alone"
    )
    top_k: Annotated[Annotated[int, Field(ge=0)], LATER] = Field(
        0, description="kept tokens that are used, the likeliest first; 0: all, and 16 in eopd"
    )
    gkd_beta: Annotated[Share, LATER] = Field(0.5, description="0: forward KL; 1: reverse KL; between: the generalised JSD")
    eopd_threshold: Annotated[Annotated[float, Field(ge=0)], LATER] = Field(
        0.8, description="nats of teacher entropy above which a token also learns the teacher's distribution"
    )
    opsd_clamp: Annotated[Positive, LATER] = Field(0.05, description="nats, the most that one token of the vocabulary adds")
    clip: Annotated[Literal["own", "none", "ppo", "gspo", "cispo"], LATER] = Field(
        "own", description="bound on the ratio of the policy to the engine's log-probs; own: ppo in eopd, else none"
    )
    clip_low: Annotated[Annotated[float, Field(gt=0, le=1)], LATER] = Field(0.2, description="the ratio's bound is 1 - this")
    clip_high: Annotated[Positive, LATER] = Field(0.2, description="the ratio's bound is 1 + this")
    correction: Annotated[Literal["off", "token", "sequence"], LATER] = Field(
        "off", description="importance ratio of trainer to rollout: token: truncated; sequence: a trace above the cap is left out"
    )
    correction_cap: Annotated[Annotated[float, Field(ge=0)], LATER] = Field(0.0, description="0: 2 for token, 3 for sequence")
    kl: Annotated[Annotated[float, Field(ge=0)], LATER] = Field(0.0, description="coefficient of the reverse KL to the base")
    normalise: Annotated[Literal["token", "sequence", "constant"], LATER] = Field(
        "token", description="mean over all tokens, over the means of the traces, or the sum over traces x rollout.max_new_tokens"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, data: Any) -> Any:
        return as_meant(data) if isinstance(data, dict) else data

    @field_validator("gate")
    @classmethod
    def _is_a_gate(cls, gate: str) -> str:
        kind, sep, share = gate.partition(":")
        if (kind, bool(sep)) in {("own", False), *((name, name == "top_entropy") for name in GATE_READS)}:
            try:
                if not sep or 0 < float(share) <= 1:
                    return gate
            except ValueError:
                pass
        raise ValueError(f"'{gate}' is no gate: write off, entropy, cl_entropy or top_entropy:SHARE, such as top_entropy:0.2")

    @model_validator(mode="after")
    def _fits(self) -> Objective:
        if self.control != "none" and self.gate_kind == "off":
            raise ValueError(f"control changes a gate, and '{self.name}' has no gate: set objective.gate, or control none")
        if self.entropy != "teacher" and self.gate_kind not in {"entropy", "cl_entropy"}:
            why = "reads the student's anyway" if self.gate_kind == "top_entropy" else "has no gate"
            raise ValueError(f"entropy says whose entropy the gate reads, and '{self.name}' {why}: set objective.gate")
        if self.ratio_kind != "none" and self.correction_kind != "off":
            raise ValueError(
                "clip and correction would use one ratio twice, as only the engine's log-probs are stored: choose one"
            )
        return self

    @property
    def gate_kind(self) -> str:
        """The gate without its share: off, entropy, cl_entropy or top_entropy."""
        return OWN_GATE.get(self.name, "off") if self.gate == "own" else self.gate.partition(":")[0]

    @property
    def gate_share(self) -> float:
        """The share of tokens that `top_entropy` lets learn."""
        return float(self.gate.partition(":")[2])

    @property
    def ratio_kind(self) -> str:
        """The clip that applies: none, ppo, gspo or cispo."""
        if self.name not in SAMPLED:
            return "none"
        return OWN_CLIP.get(self.name, "none") if self.clip == "own" else self.clip

    @property
    def correction_kind(self) -> str:
        """The correction that applies: off, token or sequence."""
        return "off" if self.name == "sft" else self.correction

    @property
    def cap(self) -> float:
        """The cap of the importance ratio."""
        return self.correction_cap or {"off": 0.0, "token": 2.0, "sequence": 3.0}[self.correction]

    @property
    def kl_weight(self) -> float:
        """The coefficient of the KL to the base that applies."""
        return 0.0 if self.name == "sft" else self.kl

    @property
    def kept(self) -> int:
        """The number of the teacher's most likely tokens that are used. 0: all that were kept."""
        return self.top_k or OWN_TOP_K.get(self.name, 0)

    @property
    def is_distributional(self) -> bool:
        """Whether the objective reads the teacher's most likely tokens."""
        return self.name in DISTRIBUTIONAL

    @property
    def reads_logprobs(self) -> bool:
        """Whether the coefficients depend on the trainer's own log-probs, so that these are needed before the gradient."""
        return self.ratio_kind != "none" or self.correction_kind != "off" or self.kl_weight > 0

    @property
    def needs_advantage(self) -> bool:
        """Whether a trace whose advantage is 0 teaches nothing: every term of its loss has the advantage as a factor."""
        return self.name in SCALES_ADVANTAGE and self.kl_weight == 0

    @property
    def unlike_labels(self) -> list[str]:
        """How its token weight differs in kind from that of labels: advantage x magnitude x gate on the teacher's entropy."""
        if self.name not in OWN_GATE:
            return [f"advantage x magnitude x gate (training: objective {self.name})"]
        found = [] if self.gate_kind in OWN_GATE.values() else [f"a gate on the entropy (training: {self.gate})"]
        found += ["the teacher's entropy (training: the student's)"] if self.entropy == "student" else []
        return found + ([f"the gate as it is (training: {self.control})"] if self.control != "none" else [])

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the objective reads beside those that every objective reads."""
        rollout = ("rollout_logprobs",) if self.correction_kind != "off" or self.name == "iw_opd" else ()
        entropy = ("rollout_entropy",) if self.gate_kind == "top_entropy" else ()
        base = ("base_logprobs",) if self.kl_weight > 0 else ()
        return (*rollout, *entropy, *base, *(TOPK if self.is_distributional else ()))

    @property
    def sources(self) -> tuple[str, ...]:
        """The writers whose traces it may learn from, by `trace_source`.

        `sft` on the student's own traces would teach nothing. A ratio to the writer needs the writer's log-probs, which imported
        traces lack.
        """
        if self.name == "sft":
            return ("teacher", "import")
        ratio = self.ratio_kind != "none" or self.correction != "off" or self.name == "iw_opd"
        return ("student", "teacher") if ratio else ("student", "teacher", "import")

    def reads(self, setting: str) -> bool:
        """Whether a change of `setting`, a name of this section, can change what is trained."""
        sampled = ("clip",) if self.name in SAMPLED else ()
        bounds = ("clip_low", "clip_high") if self.ratio_kind != "none" else ()
        traced = ("correction", "kl") if self.name != "sft" else ()
        cap = ("correction_cap",) if self.correction != "off" else ()
        return setting in {*_ALWAYS, *READS[self.name], *GATE_READS[self.gate_kind], *sampled, *bounds, *traced, *cap}


def as_meant(section: dict[str, Any]) -> dict[str, Any]:
    """An objective section in which the gate is written as it is written now.

    Earlier versions had no `control`. Their gate was `entropy`, the objective's own gate, or the name of a control. A section of
    theirs lists all its settings. Elsewhere `entropy` is the gate on the plain entropy, and under cl_egrsd on the lookahead.
    """
    gate, name = section.get("gate"), section.get("name", Objective.model_fields["name"].default)
    if gate in CONTROLS:
        return section | {"gate": "own", "control": gate}
    own = OWN_GATE.get(str(name), "off")
    earlier = "control" not in section and {"rlsd_lam", "position_min"} <= section.keys()
    if gate == own or (gate == "entropy" and (earlier or name == "cl_egrsd")):
        return section | {"gate": "own"}
    return section


def refuse_missing(objective: Objective, score: ScoreSettings, others: set[str]) -> None:
    """Raise ValueError when the settings of a run do not bring what its objective reads.

    score has the settings of that stage. others: who else than the student writes traces, `teacher` or `import`.
    """
    name, again = objective.name, "for stored traces run `egrsd stage score --round N --set"
    most, least = objective.kept, max(objective.kept, 1)
    if objective.is_distributional and score.keep_topk < least:
        what = f"reads {most or 'some'} of the teacher's most likely tokens, and score.keep_topk is {score.keep_topk}"
        setting = f"score.keep_topk={max(16, least)}"
        raise ValueError(f"objective '{name}' {what}: set {setting}; {again} {setting}`")
    if objective.kl_weight and not score.base_logprobs:
        setting = "score.base_logprobs=true"
        raise ValueError(f"objective.kl reads the base's log-probs, which are not stored: set {setting}; {again} {setting}`")
    if others and (objective.entropy == "student" or objective.gate_kind == "top_entropy"):
        which = "objective.entropy 'student'" if objective.entropy == "student" else "objective.gate 'top_entropy'"
        why = "the student's entropy of a trace that it did not write is not measured"
        raise ValueError(f"{which} needs rollout.teacher_share 0 and no source.response: {why}")
    if name == "sft" and not others:
        raise ValueError("objective 'sft' learns from traces of others: set source.response, or rollout.teacher_share above 0")
    if "import" in others and "import" not in objective.sources:
        raise ValueError(_without_writer(objective))


def _without_writer(objective: Objective) -> str:
    """Why an objective cannot learn from imported traces, and the setting that is in the way."""
    if objective.name == "iw_opd":
        return "objective 'iw_opd' needs the writer's log-probs, and imported traces have none: choose another objective"
    setting, none = ("clip", "none") if objective.ratio_kind != "none" else ("correction", "off")
    kind = objective.ratio_kind if setting == "clip" else objective.correction
    own = f", which objective '{objective.name}' has by itself," if setting == "clip" and objective.clip == "own" else ""
    what = f"objective.{setting} '{kind}'{own} is a ratio to the policy that wrote a trace"
    return f"{what}, and nobody knows who wrote imported ones: set objective.{setting}={none}"


def approximation(objective: Objective, score: ScoreSettings) -> list[str]:
    """A note on an objective that sees only a part of the vocabulary which its source sees whole. Empty for the others."""
    if objective.name != "opsd":
        return []
    number = objective.kept or score.keep_topk
    return [f"note: objective opsd is approximate: it sees the teacher's {number} most likely tokens, its source all of them"]


def readers(setting: str) -> str:
    """A sentence about what must be set so that `setting`, a name of the section, is read."""
    if names := [name for name, reads in READS.items() if setting in reads]:
        return f"It is read by: {', '.join(names)}"
    if gates := [gate for gate, reads in GATE_READS.items() if setting in reads]:
        return f"It is read under objective.gate {' or '.join(gates)}"
    needs = {"clip_low": "objective.clip", "clip_high": "objective.clip", "correction_cap": "objective.correction"}
    if setting in needs:
        return f"It is read with {needs[setting]}"
    return f"It is read by: {', '.join(SAMPLED)}" if setting == "clip" else "It is read by all objectives but sft"


def unread(objectives: Iterable[Objective], settings: Iterable[str]) -> str | None:
    """The first of `settings`, dotted names, that belongs to `objective` and that none of the objectives reads."""
    read_by = list(objectives)
    names = (name.partition(".") for name in sorted(settings))
    return next((key for section, _, key in names if section == "objective" and not any(o.reads(key) for o in read_by)), None)
