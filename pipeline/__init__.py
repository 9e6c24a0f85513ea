"""What happens to a row, and why. The path of one row through the system:

    sources   a problem, its reference solution and its answer            -> sources.Problem
    prompts   the ids the student sees, the ids the privileged teacher sees
    rollout   an engine writes G traces, each with its log-probs, entropies, seed and the policy that answered
    grade     did the answer verify? verdict, length-shaped reward, advantage: the direction
    score     the frozen teacher, reference in view, scores the same ids: log-probs and entropy
              ready.json: the round is committed, the trainer takes it
    profile   lookahead entropy and statistics of the trace
    label     regime of every token, spans, gate and token weight: to look at, not to train on
    training  advantage x magnitude x gate of every token against its log-prob under the current adapter -> policy n + 1

stages.py holds these functions from shards to shards; rounds.py what makes a shard stale; dataset.py runs them on Ray Data;
store.py commits; contract.py names every column. A row that cannot go on carries a reject_reason and stays.
"""
