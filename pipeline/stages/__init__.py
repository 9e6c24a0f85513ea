"""The stages in the order in which a row meets them. Each file has a stage's settings, columns, inputs and computation."""

from __future__ import annotations

from pipeline.contract import COLUMNS, Column, Stage
from pipeline.errors import ContractError
from pipeline.stages import grade, label, profile, prompts, rollout, score

PLAN: tuple[Stage, ...] = (prompts.STAGE, rollout.STAGE, grade.STAGE, score.STAGE, profile.STAGE, label.STAGE)
STAGES: dict[str, Stage] = {stage.name: stage for stage in PLAN}

MEASURE = tuple(stage.name for stage in PLAN if not stage.after_round)  # what training reads
LABELS = tuple(stage.name for stage in PLAN if stage.after_round)  # what the whole round's largest entropy is needed for
EVALUATION = tuple(stage.name for stage in (prompts.STAGE, rollout.STAGE, grade.STAGE))  # what held-out problems go through


def readers(column: str) -> tuple[str, ...]:
    """Names of the stages that read `column`."""
    return tuple(stage.name for stage in PLAN if column in stage.reads)


def check_plan(plan: tuple[Stage, ...] = PLAN) -> None:
    """Raise ContractError unless every column read was written by an earlier stage and every writer is in the plan."""
    written: set[str] = set()
    for stage in plan:
        for name in stage.reads:
            if name not in COLUMNS:
                raise ContractError(f"reads column '{name}' that no one defines", f"stage {stage.name}")
            if name not in written:
                raise ContractError(f"reads '{name}' before stage {COLUMNS[name].writer} has written it", f"stage {stage.name}")
        written |= {c.name for c in stage.writes}
    orphans = {c.writer for c in COLUMNS.values()} - {stage.name for stage in plan}
    if orphans:
        raise ContractError(f"columns are written by stages outside the plan: {sorted(orphans)}", "contract")


def stage_table() -> str:
    """The plan as a Markdown table, for the documents."""
    lines = ["| stage | where | reads | writes |", "| --- | --- | --- | --- |"]
    for stage in PLAN:
        writes = ", ".join(_with_shape(column) for column in stage.writes)
        lines.append(f"| {stage.name} | {stage.where} | {', '.join(stage.reads) or 'a source'} | {writes} |")
    return "\n".join(lines)


def _with_shape(column: Column) -> str:
    return f"{column.name} `[{column.shape}]`" if column.shape else column.name
