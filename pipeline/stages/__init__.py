"""The stages in the order in which a row meets them. Each file has the settings, columns, inputs and computation of one."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.config import Run
from pipeline.contract import Stage
from pipeline.errors import UserError, nearest, refuse_unread
from pipeline.stages import grade, label, profile, prompts, reward, rollout, score

PLAN: tuple[Stage, ...] = (
    prompts.STAGE,
    rollout.STAGE,
    reward.STAGE,
    grade.STAGE,
    score.STAGE,
    profile.STAGE,
    label.STAGE,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in PLAN}

PLAIN = tuple(stage for stage in PLAN if stage is not reward.STAGE)  # a run without `grade.rewards` has these

MEASURE = tuple(stage.name for stage in PLAIN if not stage.after_round)  # training reads what these stages write
LABELS = tuple(stage.name for stage in PLAN if stage.after_round)  # these need the largest entropy of the whole round
EVALUATION = tuple(stage.name for stage in (prompts.STAGE, rollout.STAGE, grade.STAGE))  # held-out problems pass through these


def chain_of(run: Run, names: Iterable[str]) -> tuple[str, ...]:
    """The stages that a run needs for `names`, in order: a run with rewards needs `reward` wherever it needs `grade`."""
    asked = set(names)
    asked |= {"reward"} if "grade" in asked else set()
    return tuple(stage.name for stage in PLAN if stage.name in asked and stage.in_run(run))


def find_stage(name: str) -> Stage:
    """A stage by name. Raises UserError that lists the known names."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'", "egrsd stage", nearest(name, STAGES, f"Stages: {', '.join(STAGES)}"))
    return STAGES[name]


def check_settings(stage: Stage, settings: Iterable[str]) -> None:
    """Raise SettingError for the first setting that `stage` does not read. The error names the stages that read it.

    Settings of `engines` pass, although no stage reads them: they say how many engines answer and where. A stage that reads one
    setting of the teachers takes whole teachers.
    """
    taught = any(name.startswith("teachers.") for name in stage.settings)

    def reads(setting: str) -> bool:
        """Whether the stage takes a setting."""
        return stage.reads_setting(setting) or setting.startswith("engines.") or (taught and setting.startswith("teachers"))

    refuse_unread(f"stage {stage.name} does not read this setting", settings, reads, _readers)


def _readers(setting: str) -> str:
    """A sentence about the stages that read a setting."""
    readers = [stage.name for stage in PLAN if stage.reads_setting(setting)]
    return f"It is read by: {', '.join(readers)}" if readers else "No stage reads it; pass it to `egrsd distill` or `egrsd train`"
