"""The stages in the order in which a row meets them. Each file has the settings, columns, inputs and computation of one."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.contract import Stage
from pipeline.errors import SettingError, UserError, nearest
from pipeline.stages import grade, label, profile, prompts, rollout, score

PLAN: tuple[Stage, ...] = (prompts.STAGE, rollout.STAGE, grade.STAGE, score.STAGE, profile.STAGE, label.STAGE)
STAGES: dict[str, Stage] = {stage.name: stage for stage in PLAN}

MEASURE = tuple(stage.name for stage in PLAN if not stage.after_round)  # training reads what these stages write
LABELS = tuple(stage.name for stage in PLAN if stage.after_round)  # these need the largest entropy of the whole round
EVALUATION = tuple(stage.name for stage in (prompts.STAGE, rollout.STAGE, grade.STAGE))  # held-out problems pass through these


def find_stage(name: str) -> Stage:
    """A stage by name. Raises UserError that lists the known names."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'", "egrsd stage", nearest(name, STAGES, f"Stages: {', '.join(STAGES)}"))
    return STAGES[name]


def refuse_unread(stage: Stage, settings: Iterable[str]) -> None:
    """Raise SettingError for the first setting that `stage` does not read. The error names the stages that read it.

    Settings of `engines` pass, although no stage reads them: they say how many engines answer and where.
    """
    for setting in settings:
        if not stage.reads_setting(setting) and not setting.startswith("engines."):
            readers = [other.name for other in PLAN if other.reads_setting(setting)]
            hint = "No stage reads it; pass it to `egrsd distill` or `egrsd train`"
            hint = f"It is read by: {', '.join(readers)}" if readers else hint
            raise SettingError(f"stage {stage.name} does not read this setting", setting, hint)
