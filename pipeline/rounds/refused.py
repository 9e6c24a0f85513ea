"""A round or an evaluation of nothing but rejected rows ends the run, with the commonest reason and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Objective, Run
from pipeline.contract import Place, Reject
from pipeline.errors import ModelError, SettingError, UserError
from pipeline.models.resolve import vocabulary_size
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.notices import NOTICE_S, late
from pipeline.problems.sources import ProblemSet
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.stages.prompts import prompts
from pipeline.stages.rollout import imported
from pipeline.stages.teachers import teacher_of

_AT_ONCE = 256  # prompts that are tokenised before one of them is looked for that can be answered

REMEDIES = {
    Reject.MISSING_PROBLEM: "Set source.problem to a column of text, or mend the rows",
    Reject.MISSING_SOLUTION: "Set source.solution to a column of text, or mend the rows",
    Reject.MISSING_ANSWER: "Set source.answer to the column of the answer, or mend the rows",
    Reject.NO_CONTEXT: "Let such traces fall back: teachers.NAME.fallback plain",
    Reject.BAD_MESSAGES: "Mend the messages, or set source.problem to another column",
    Reject.EXTRA_TOO_LARGE: "Raise source.carry_bytes, or leave the column out of source.carry",
    Reject.RESPONSE_TOO_LONG: "Raise rollout.max_new_tokens, or leave such traces out",
    Reject.UNKNOWN_TOKENS: "Use a model whose tokenizer knows the texts, or leave such traces out",
    Reject.PROMPT_TOO_LONG: "Raise model.max_model_len (or that of the teacher whose prompt it is), or lower max_new_tokens",
    Reject.ENGINE_ERROR: "The log names what the engine could not do. After that is mended: `egrsd stage rollout --force`",
    Reject.EMPTY_RESPONSE: "Check chat template and prompts: the model ends at once. Imported: source.response has empty cells",
    Reject.NON_FINITE: "The model gives no finite numbers: try model.dtype float32, or check its weights",
    Reject.IMPOSSIBLE: "The engine gave numbers that no model gives: check model.dtype, the weights and the engine's version",
    Reject.RESPONSE_MISMATCH: "The engine answered other ids than it was asked for: see its log",
    Reject.UNREADABLE_ANSWER: "Set source.answer to a column whose answers the verifier can read, or use grade.verifier exact",
    Reject.VERIFIER_TIMEOUT: "Raise grade.deadline_s",
    Reject.VERIFIER_ERROR: "See the log for what stopped the verifier",
    Reject.REWARD_ERROR: "Mend the function of this reward, or leave the reward out of grade.rewards",
    Reject.REWARD_TIMEOUT: "Raise deadline_s of this reward, or make its function faster",
    Reject.REWARD_MISSING: "Let one reward of grade.rewards give every trace a number",
}


def refuse_mixed_control(objective: Objective) -> None:
    """Raise SettingError for the student's entropy under eopd. Runs from before that have it can be read all the same."""
    if objective.name == "eopd" and objective.entropy == "student":
        what = "the student's would also decide which tokens learn the teacher's distribution under eopd"
        raise SettingError(what, "objective.entropy", "Leave it at teacher, or choose another objective for this control")


def refuse_few_imports(source: ProblemSet, run: Run) -> str | None:
    """A note when rows bring more traces than a group has. Raises SettingError when none of the first rows brings as many."""
    size, setting = run.writers.count("import"), "rollout.group_size" if run.only_imports else "rollout.import_share"
    counts = [len(row.imported) for row in source.rows(range(min(len(source), _AT_ONCE))) if row.imported]
    most = max(counts, default=size)
    if most < size:
        traces = f"{most} {'trace' if most == 1 else 'traces'}"
        what = f"asks for {size} of each row, and the first rows of {source.source.uri} bring at most {traces} each"
        alone = ", with grade.advantage=running" if most == 1 else ""
        remedy = f"Set it to {most}{alone}" if run.only_imports else f"Set it to {most / run.rollout.group_size:.3g}"
        raise SettingError(what, setting, remedy)
    said = f"rows bring up to {most} traces, and the first {size} of each are used ({setting})"
    return f"note: {source.source.uri}: {said}" if most > size else None


def refuse_unusable(source: ProblemSet, indices: Sequence[int], run: Run, whose: str) -> None:
    """Raise UserError when all problems `indices` of a source are rejected before an engine is asked. `whose` names them.

    Where the source brings traces (`source.response`), these must be usable too: one of them ends the search. Raises ModelError
    for a prompt with a token that the model does not have.

    It ends at the first problems of which one can be asked, so it takes long only where it ends with the error.
    """
    reasons, details, tokenizer, brings = Counter[str](), dict[str, str](), tokenizer_of(run.model), "import" in run.writers
    with late("prompts", f"prompts of {source.source.uri} have been made for {NOTICE_S:g} s so far: none fits yet."):
        for start in range(0, len(indices), _AT_ONCE):
            asked = prompts(source.rows(indices[start : start + _AT_ONCE]), run, tokenizer, taught=whose != "the evaluation")
            _refuse_unknown_ids(asked, run, tokenizer)
            if brings:
                asked = imported(asked, run, Place(""))
            for reason, detail in zip(asked["reject_reason"].to_pylist(), asked["reject_detail"].to_pylist(), strict=True):
                if reason is None:
                    return
                reasons[reason] += 1
                details.setdefault(reason, detail)
    if reasons:
        reason, count = reasons.most_common(1)[0]
        things = "imported traces" if brings else "prompts"
        what = f"all {reasons.total()} {things} of {whose} are rejected, {count} as {reason}: {details[reason]}"
        remedy = REMEDIES[Reject(reason)]
        if whose == "the evaluation":
            remedy = remedy.replace("source.", "evaluation.source.").replace("rollout.max", "evaluation.max")
        raise UserError(what, source.source.uri, remedy)


def _refuse_unknown_ids(asked: pa.Table, run: Run, tokenizer: Any) -> None:
    """Raise ModelError when a prompt has an id that the model does not have: a template may write added tokens beyond them.

    Other tokens lie within, as `pipeline.models.fitness` has seen. Without an added one the configuration is not opened.
    """
    columns = [asked[name].combine_chunks().flatten() for name in ("prompt_tokens", "teacher_prompt_tokens")]
    largest = max((top for ids in columns if (top := pc.max(ids).as_py()) is not None), default=-1)
    added = tokenizer.added_tokens_decoder.get(largest)
    if added is not None and largest >= (size := vocabulary_size(run.model)):
        what = f"its prompts hold {added.content!r}, id {largest}, and the model has {size} tokens"
        raise ModelError(what, run.model.path, "Take the tokenizer that belongs to the model, or resize its embedding")


def refuse_unknown_teachers(source: ProblemSet, run: Run) -> None:
    """Raise SourceError, with the row and the name, for the first row of a source that names no teacher of the run."""
    if not (run.teachers and run.source.teacher):
        return
    with late("teacher column", f"the teachers in {source.source.uri} have been read for {NOTICE_S:g} s so far."):
        for start in range(0, len(source), _AT_ONCE):
            for row in source.rows(range(start, min(start + _AT_ONCE, len(source)))):
                where = f"{source.source.uri}, row {source.source.row_of(row.index)}"
                teacher_of(run, {"problem_teacher": row.teacher}, where)


def is_gated(objective: Objective) -> bool:
    """Whether an objective reads the teacher's entropy."""
    return (objective.gate_kind in ("entropy", "cl_entropy") and objective.entropy == "teacher") or objective.name == "eopd"


def refuse_wide_bounds(work: Round) -> None:
    """Raise UserError when a gate would read entropies of a served teacher that are known less well than its settings ask.

    A round whose objective has no gate passes. Bounds of an engine of the run are told as a warning elsewhere.
    """
    served = {name: teacher for name, teacher in work.run.teachers.items() if teacher.server}
    if not served or not is_gated(work.run.objective):
        return
    widths: dict[str, list[float]] = {name: [] for name in served}
    for entry in Inventory(work).entries("score").values():
        rows = work.store.read(entry, ["reject_reason", "teacher_name", "entropy_error"]).to_pylist()
        for row in rows:
            if row["reject_reason"] is None and row["teacher_name"] in served:
                widths[row["teacher_name"]].append(row["entropy_error"])
    for name, found in widths.items():
        most = served[name].max_half_width
        if wide := [width for width in found if width > most]:
            what = f"{len(wide)} of {len(found)} traces have a token whose entropy is known only to +-{max(wide):.2g} nat"
            raise UserError(
                f"{what}, and the gate may read +-{most:g}",
                f"{work.area}, teachers.{name}",
                f"Raise teachers.{name}.top_k, let the server give exact entropies (EGRSD_EXACT_ENTROPY=served), raise "
                f"teachers.{name}.max_half_width, or take an objective without a gate",
            )


def refuse_nothing_left(work: Round, stages: tuple[str, ...]) -> None:
    """Raise UserError when every row was rejected by one of the `stages`, which are computed."""
    seen = Inventory(work)
    last = seen.entries(stages[-1])
    rows = sum(entry.rows for entry in last.values())
    rejected = seen.rejected(stages[-1])
    if not rows or rejected.total() < rows:
        return
    reason, count = rejected.most_common(1)[0]
    columns = ["reject_reason", "reject_detail"]
    told = (row for shard in sorted(last) for row in work.store.read(last[shard], columns).to_pylist())
    detail = next((row["reject_detail"] for row in told if row["reject_reason"] == reason and row["reject_detail"]), "")
    what = f"all {rows} rows were rejected, {count} as {reason}" + (f": {detail}" if detail else "")
    raise UserError(what, work.store.locate(work.area), REMEDIES.get(Reject(reason), ""))
