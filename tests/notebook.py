"""A notebook as a script: three plots of a run. `python tests/notebook.py runs/demo plots/`. It needs matplotlib and pandas.

Each block that begins with `# %%` is a cell in editors that know this mark.
"""

# %% Open a run. No engine is loaded, and the files are checked as they are read.
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline import open_run

run, folder = open_run(sys.argv[1]), sys.argv[2]

# %% Plot 1, what was learned: reward and length of each round.
traces = {number: run.rounds[number].traces(["reward", "response_tokens"]).to_pandas() for number in run.rounds}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot([t["reward"].mean() for t in traces.values()], marker="o")
left.set(xlabel="round", ylabel="mean reward")
right.plot([t["response_tokens"].str.len().mean() for t in traces.values()], marker="o")
right.set(xlabel="round", ylabel="tokens of a trace")
figure.savefig(f"{folder}/learning.png", bbox_inches="tight")

# %% Plot 2, the rewards of the last round, by verdict.
last = run.rounds.last.traces(["verdict", "reward"]).to_pandas().dropna()
figure, axes = plt.subplots(figsize=(5, 3))
axes.hist([part["reward"] for _, part in last.groupby("verdict")], label=sorted(last["verdict"].unique()), stacked=True)
axes.set(xlabel="reward", ylabel="traces")
axes.legend()
figure.savefig(f"{folder}/rewards.png", bbox_inches="tight")

# %% Plot 3, where the teacher is unsure: its entropy by place in the trace.
entropy = run.rounds.last.traces(["teacher_entropy"])["teacher_entropy"].to_pylist()
longest = max(len(values or ()) for values in entropy)
padded = np.full((len(entropy), longest), np.nan)
for row, values in enumerate(entropy):
    padded[row, : len(values or ())] = values or ()
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(np.nanmean(padded, axis=0))
axes.set(xlabel="token", ylabel="teacher entropy, nats")
figure.savefig(f"{folder}/entropy.png", bbox_inches="tight")
