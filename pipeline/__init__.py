"""What happens to a row, and why.

The rooms stand in the order in which a row meets them. The values belong to one row of the demo.

    problems         A problem, its reference solution and its answer: "2+9-4-1", "2+9=11;11-4=7;7-1=6#6" and "6".
    models           The base model, and the tokenizer that turns text into ids.
    stages/prompts   The ids that the student sees (here 9), and those that the privileged teacher sees (here 31).
    stages/rollout   An engine writes G traces per prompt. It stores the log-prob and the entropy of each token.
                     One trace of 40 tokens is "maybe 2+9=11;wait;2+9=11;11-4=7;7-1=6#6".
                     The `w` of its "wait" has log-prob -1.93 and entropy 1.21 nats.
    stages/reward    Only in a run with rewards of its own: the verdict, and what each of its functions says.
    stages/grade     The verdict on the answer (correct), the length-shaped reward (1.222) and the advantage (+1.617).
                     The sign of the advantage is the direction of the update.
    stages/score     The frozen teacher, with the reference in view, scores the same ids.
                     Under the teacher the `w` has log-prob -2.44 and entropy 1.13 nats.
                     Now the driver commits the round (ready.json), and the trainer takes it.
    stages/profile   The least entropy of each token and the next W tokens. It is 0.003 for the `w`, which makes it a pivot.
    stages/label     Regime, gate and token weight, for people who look at the data. Training does not read them.
                     The `w` is a pivot with gate 0.9995 and token weight 1.617 x 0.8 x 0.9995.
    training         The loss: advantage x magnitude x gate, against the log-prob under the current adapter.
                     Its result is policy n + 1.

The other rooms:

    method           The mathematics, on arrays alone.
    store            Commits shards and policies.
    live             The lease of a run, questions to its driver, the lock of a shared card.
    rounds           Says which shards are stale, and runs the stages on Ray Data.
    inspection       Looks that change nothing: what remains, what is proven.
    driver.py        Brings one round after the other to its policy.
    evidence         Figures with their intervals: evaluations, comparisons and sweeps.
    report           One run, or several, as one page.
    reading.py       A run for notebooks: `from pipeline import open_run`.
    fit              What a machine can hold.
    contract/        The name and type of every column.
    config/          Every setting.

A row that cannot go on carries a reject_reason and stays in every later shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.reading import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]


def __getattr__(name: str) -> Any:
    """Load what notebooks use when it is asked for, so that `import pipeline` alone stays cheap. Raises AttributeError."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline import reading

    return getattr(reading, name)
