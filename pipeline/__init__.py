"""What happens to a row, and why. The rooms stand in the order in which a row meets them; the values are of one row of the demo.

    problems    a problem, its reference solution, its answer        "2+9-4-1", "2+9=11;11-4=7;7-1=6#6", "6"
    models      the base model and its tokenizer: text becomes ids
    stages/prompts   the ids that the student sees, and those that the privileged teacher sees       9 ids, 31 ids
    stages/rollout   an engine writes G traces per prompt, each token with log-prob and entropy
                     "maybe 2+9=11;wait;2+9=11;11-4=7;7-1=6#6", 40 tokens; the `w` of "wait": log-prob -1.93, entropy 1.21 nats
    stages/grade     did the answer verify? verdict, length-shaped reward, advantage (the direction)  correct, 1.222, +1.617
    stages/score     the frozen teacher, reference in view, scores the same ids                `w`: log-prob -2.44, entropy 1.13
                     now the round is committed (ready.json) and the trainer takes it
    stages/profile   the least entropy of each token and the next W                            `w`: 0.003, so it is a pivot
    stages/label     regime, gate, token weight: to look at, not to train on      `w`: pivot, gate 0.9995, 1.617 x 0.8 x 0.9995
    training    advantage x magnitude x gate against the log-prob under the current adapter            -> policy n + 1

The other rooms: method is the mathematics, on arrays alone. store commits shards and policies; rounds says which shards are
stale and runs the stages on Ray Data; driver.py puts rounds in motion. evidence and report say what came of it, fit what a
machine can hold. contract.py names every column, config.py every setting. A row that cannot go on carries a reject_reason and
stays.
"""
