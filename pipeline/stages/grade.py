"""Stage `grade`: the verdict on each trace, its reward, and its advantage, the direction of the update.

The reward is the verifier's length-shaped one. In a run with `grade.rewards` it is the weighted sum of what stage `reward`
stored. This stage then asks no verifier and no function, so a changed weight costs a sum.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import REWARD_PREFIX, Reject, ShardInputs, ShardResult, Stage, Verdict
from pipeline.errors import SourceError
from pipeline.grader.verifier import Grader, grader_of
from pipeline.method.rewards import RunningBaseline, group_advantage, length_shaped_reward, weighted_sum
from pipeline.notices import NOTICE_S, late
from pipeline.problems.sources import ProblemSet
from pipeline.stages.prompts import why_unusable
from pipeline.stages.reward import JUDGING
from pipeline.stages.tables import Draft, clean

_CHECKED = 256  # reference answers that are read when a source is opened: seconds at most


def grade(prompts: pa.Table, rollout: pa.Table, run: Run, grader: Grader, baseline: RunningBaseline | None) -> pa.Table:
    """Verdict, reward and advantage of every trace. A row whose verifier failed is rejected and gets no reward."""
    return graded_shard(prompts, rollout, run, grader, baseline).table


def graded_shard(prompts: pa.Table, rollout: pa.Table, run: Run, grader: Grader, baseline: RunningBaseline | None) -> ShardResult:
    """The shard of `grade`, and how often the verifier gave up on a row, as the fact `gave_up` when it did.

    `baseline` is the running reward state at the start of the round. None means the group estimator.
    """
    draft = Draft.after(STAGE, rollout)
    live = np.array(draft.live(), np.int64)
    answers = prompts["answer"].take(rollout["prompt_index"]).take(live).to_pylist()
    lengths = pc.list_value_length(rollout["response_tokens"]).to_numpy(zero_copy_only=False)
    rewards = np.full(rollout.num_rows, np.nan)
    chosen = rollout.take(live)
    verdicts = grader.grade(chosen["response_text"].to_pylist(), answers, chosen["finish_reason"].to_pylist())
    for row, verdict in zip(live.tolist(), verdicts, strict=True):
        draft.values[row] = {"verdict": verdict.verdict, "extracted_answer": verdict.answer and clean(verdict.answer)}
        if verdict.reject is not None:
            draft.reject(row, verdict.reject, verdict.detail)
            continue
        correct = np.array([verdict.verdict == Verdict.CORRECT])
        rewards[row] = length_shaped_reward(correct, np.array([lengths[row]]), run.rollout.max_new_tokens, run.grade.beta_length)[
            0
        ]
    _direct(draft, rewards, run, baseline)
    gave_up = sum(verdict.gave_up for verdict in verdicts)
    return ShardResult(draft.table(), {"gave_up": gave_up} if gave_up else {})


def _direct(draft: Draft, rewards: np.ndarray, run: Run, baseline: RunningBaseline | None) -> None:
    """Give each live row its reward and its advantage. `rewards` [N] is NaN in the other rows."""
    advantages = (
        group_advantage(rewards, run.rollout.group_size, run.grade.std)
        if baseline is None
        else baseline.advantage(rewards, run.grade.running_warmup_steps)
    )
    for row in draft.live():
        draft.values[row] |= {"reward": float(rewards[row]), "advantage": float(advantages[row])}


def weighed(judged: pa.Table, run: Run, baseline: RunningBaseline | None) -> pa.Table:
    """Verdict, weighted sum of rewards and advantage of every trace. A row without any reward is rejected.

    judged: the shard of stage `reward`, with a column for each reward of the run.
    """
    draft = Draft.after(STAGE, judged)
    columns = [judged[f"{REWARD_PREFIX}{reward.name}"].to_numpy(zero_copy_only=False) for reward in run.grade.rewards]
    weights = np.array([reward.weight for reward in run.grade.rewards])
    rewards = weighted_sum(np.stack(columns), weights)
    verdicts, answers = judged["judged_verdict"].to_pylist(), judged["judged_answer"].to_pylist()
    for row, values in enumerate(draft.values):
        values |= {"verdict": verdicts[row], "extracted_answer": answers[row]}
        if np.isnan(rewards[row]):
            draft.reject(row, Reject.REWARD_MISSING, "every reward of this row is absent (None)")
    live = np.zeros(len(rewards), bool)
    live[draft.live()] = True
    _direct(draft, np.where(live, rewards, np.nan), run, baseline)
    return draft.table()


def check_references(problems: ProblemSet, run: Run) -> str | None:
    """A note about reference answers among the first _CHECKED that mathematics cannot read. None when all can be read.

    Their rows are rejected unless an answer has the same text. Raises SourceError when none of several can be read.
    """
    rows = problems.rows(range(min(_CHECKED, len(problems))))
    rows = [row for row in rows if why_unusable(row, run)[0] is None and row.answer]
    if run.grade.verdict_reward is not None:
        return None
    grader = grader_of(run)
    uri = problems.source.uri
    words = f"waiting for the verifier: it has read the first {len(rows)} reference answers of {uri} for {NOTICE_S:g} s so far."
    with late("references", words):
        unread = [rows[i] for i in grader.unreadable([row.answer or "" for row in rows])]
    grader.close()
    if not unread:
        return None
    example = f"row {problems.source.row_of(unread[0].index)}: {str(unread[0].answer)[:80]!r}"
    if len(unread) == len(rows) > 1:
        what = f"none of its first {len(rows)} reference answers is mathematics that can be read ({example})"
        raise SourceError(what, uri, "Check source.answer, or compare texts with --set grade.verifier=exact")
    return (
        f"note: {uri}: {len(unread)} of its first {len(rows)} references are not mathematics that can be read ({example}). "
        "Such rows are rejected as unreadable_answer unless the texts are equal. grade.verifier=exact compares texts"
    )


def _compute(shard: ShardInputs) -> ShardResult:
    tables, run = shard.tables, shard.run
    if run.grade.rewards:
        return ShardResult(weighed(tables["reward"], run, shard.baseline), dict(shard.facts["reward"]))
    return graded_shard(tables["prompts"], tables["rollout"], run, grader_of(run), shard.baseline)


STAGE = Stage(
    "grade",
    "CPU",
    "trace_id",
    reads=("answer", "prompt_index", "response_text", "response_tokens", "finish_reason"),
    settings=(
        *JUDGING,
        "grade.advantage",
        "grade.std",
        "grade.running_warmup_steps",
        "grade.rewards",
        "grade.verdict_reward",
        "rollout.max_new_tokens",
        "rollout.group_size",
    ),
    compute=_compute,
    more_reads=lambda run: ("judged_verdict", "judged_answer") if run.grade.rewards else (),
    round_inputs=lambda _: ("baseline",),
)
