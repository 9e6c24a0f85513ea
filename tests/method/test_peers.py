"""Functions of this project equal those of other projects on random inputs, in values and in gradients.

`make peers` builds the environment of the other projects and runs this file. Their code runs in processes of its own (peers.py).
"""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Objective
from pipeline.method import objective, rewards
from pipeline.method.objective import Kept, Signals
from pipeline.method.objective import ratio as ratios

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".peers/bin/python"
B, T, N, V, K, GROUP = 12, 17, 40, 97, 16, 3
CLIPS = {"vanilla": "ppo", "gspo": "gspo", "cispo": "cispo"}
BETAS = {"forward": 0.0, "mixed": 0.3, "reverse": 1.0}
CLOSE = 1e-6

pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="the other projects are not installed: `make peers` does it"),
]


def random_inputs(seed):
    """Inputs of every case, float64: log-probs and masks [B, T], logits [N, V] and [B, T, V], kept tokens [N, K], rewards [B]."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (B,), generator=noise)
    mask = (torch.arange(T) < lengths[:, None]).double()
    response_logits, tokens = normal(B, T, V) * 2, torch.randint(0, V, (B, T), generator=noise)
    student = response_logits.log_softmax(-1).gather(-1, tokens[:, :, None])[:, :, 0]
    kept = (normal(N, V) * 2).log_softmax(-1).topk(K)
    return {
        "mask": mask,
        "tokens": tokens,
        "response_logits": response_logits,
        "student": student,
        "teacher": (student + normal(B, T) * 0.4).clamp(max=0),
        "advantage": normal(B),
        "weights": normal(B, T),
        "rewards": torch.randint(0, 2, (B,), generator=noise).double() + normal(B) * 0.1,
        "group": torch.tensor(GROUP),
        "student_logits": normal(N, V) * 2,
        "teacher_logits": normal(N, V) * 2,
        "targets": torch.randint(0, V, (N,), generator=noise),
        "kept_ids": kept.indices.contiguous(),
        "kept_logprobs": kept.values.contiguous(),
    }


@pytest.fixture(scope="module")
def given():
    return random_inputs(seed=0)


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    """The outputs of all peers. They run one after the other, and each import takes some seconds."""
    folder, found = tmp_path_factory.mktemp("peers"), {}
    save_file(given, folder / "inputs")
    for peer in ("swift", "trl", "verl"):
        command = [str(PYTHON), str(ROOT / "tests/method/peers.py"), peer, str(folder / "inputs"), str(folder / peer)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found |= load_file(folder / peer)
    return found


# ---- this project's side: the value, and the gradient where there is one


def signals(given):
    """The inputs as an objective reads them. No entropy is read here."""
    entropy = torch.zeros_like(given["mask"])
    mask = given["mask"].bool()
    more = {"rollout_logprobs": given["student"]}
    return Signals(given["advantage"], given["teacher"], given["student"], entropy, mask, normaliser=1.0, **more)


def weights_of(given, **settings):
    return objective.token_weights(signals(given), Objective(**settings))


def tokens_mean(given, weights):
    """The gradient by the student's log-probs of the token mean of -A_t log p."""
    return objective.coefficients(weights, int(given["mask"].sum()))


def divergence(given, beta, support, full=False):
    """Values [N] of a measure, and the gradient of their sum by the student's logits [N, V]."""
    whole = given["teacher_logits"].log_softmax(-1)
    everything = torch.arange(V).expand(N, V)
    ids, logprobs = (everything, whole) if full else (given["kept_ids"], given["kept_logprobs"])
    kept = Kept(ids, logprobs, torch.ones(N, dtype=torch.float64))
    logits, none = given["student_logits"].clone(), torch.zeros(N, dtype=torch.float64)

    def measure(teacher, student):
        return objective.jensen_shannon(teacher, student, beta)

    _, values = objective.head_gradient_(logits, given["targets"], none, kept, measure, support)
    return values, logits


def sampled_opd(given):
    """-d log p of the sampled tokens [N] with the detached d, and its gradient by the student's logits."""
    student, teacher = (given[f"{name}_logits"].log_softmax(-1) for name in ("student", "teacher"))
    own = student.gather(1, given["targets"][:, None])[:, 0]
    slopes = own - teacher.gather(1, given["targets"][:, None])[:, 0]
    return slopes * own, by_logits(student, given["targets"], slopes)


def by_logits(logprobs, tokens, slopes):
    """The gradient by logits [.., V] of a sum of slopes [..] times the log-probs of tokens [..]."""
    gradient = -slopes[..., None] * logprobs.exp()
    return gradient.scatter_add(-1, tokens[..., None], slopes[..., None])


def iw_opd(given):
    logprobs = given["response_logits"].log_softmax(-1)
    slopes = tokens_mean(given, weights_of(given, name="iw_opd", iw_growth=0.5))
    return (slopes * given["student"]).sum(), by_logits(logprobs, given["tokens"], slopes)


def aggregated(given, normalise):
    mask = given["mask"].bool()
    parts = objective.denominators(mask, int(mask.sum()), B, 20, normalise)
    slopes = torch.zeros_like(given["mask"])
    slopes[mask] = 1 / torch.as_tensor(parts, dtype=torch.float64)
    return (given["student"] * slopes).sum(), slopes


def clipped(given, clip):
    """The sum of a clipped objective over the response tokens, and its gradient by the log-probs [B, T]."""
    mask = given["mask"].bool()
    rows = torch.arange(B)[:, None].expand(B, T)[mask]
    stored = ratios.Ratios(given["weights"][mask], given["teacher"][mask], rows)
    found = objective.surrogate(given["student"][mask], stored, Objective(name="grpo", clip=clip, clip_low=0.2, clip_high=0.3))
    slopes = torch.zeros_like(given["student"])
    slopes[mask] = found.slopes
    return found.values.sum(), slopes


def corrected(given, kind, cap):
    mask = given["mask"].bool()
    rows = torch.arange(B)[:, None].expand(B, T)[mask]
    weights = torch.zeros_like(given["student"])
    weights[mask] = ratios.correction((given["student"] - given["teacher"])[mask], rows, kind, cap)
    return weights


def advantages(given):
    return torch.from_numpy(rewards.group_advantage(given["rewards"].numpy(), GROUP, std="sample"))


OURS = {
    "swift logratio": lambda g: weights_of(g, name="opd"),
    "swift rlsd": lambda g: weights_of(g, name="rlsd", rlsd_lam=0.5, rlsd_decay_steps=0, epsilon=0.2),
    "swift advantages": advantages,
    "swift reward_opd": lambda g: weights_of(g, name="reward_opd", opd_coefficient=0.3),
    "swift sdar": lambda g: (None, tokens_mean(g, sdar_alone(g))),
    **{f"swift jsd {n}": lambda g, b=b: summed(divergence(g, b, "truncated", full=True)) for n, b in BETAS.items()},
    **{f"swift renormalised {n}": lambda g, b=b: summed(divergence(g, b, "renormalised")) for n, b in BETAS.items()},
    **{f"trl tail {n}": lambda g, b=b: divergence(g, b, "tail") for n, b in BETAS.items()},
    **{f"trl truncated {n}": lambda g, b=b: divergence(g, b, "truncated") for n, b in BETAS.items()},
    "trl opd": sampled_opd,
    "trl iw_opd": iw_opd,
    "trl overlong": lambda g: torch.from_numpy(rewards.soft_overlong(g["mask"].sum(1).numpy(), 12, 8)),
    "verl truncated forward": lambda g: divergence(g, 0.0, "truncated"),
    **{f"verl agg {n}": lambda g, n=n: aggregated(g, n) for n in ("token", "sequence", "constant")},
    **{f"verl {peer}": lambda g, n=n: clipped(g, n) for peer, n in CLIPS.items()},
    "verl correction token": lambda g: corrected(g, "token", 2.0),
    "verl correction sequence": lambda g: corrected(g, "sequence", 3.0),
    "verl k3": lambda g: ratios.k3(g["student"], g["teacher"]) * g["mask"],
    "verl advantages": advantages,
}


def sdar_alone(given):
    """The weights of `sdar` without the task's advantage."""
    alone = given | {"advantage": torch.zeros(B, dtype=torch.float64)}
    return weights_of(alone, name="sdar", sdar_coefficient=1.0, sdar_slope=5.0)


def summed(pair):
    return pair[0].sum(), pair[1]


@pytest.mark.parametrize("name", OURS)
def test_a_function_equals_that_of_another_project(given, theirs, name):
    ours = OURS[name](given)
    value, gradient = ours if isinstance(ours, tuple) else (ours, None)
    if value is not None:
        torch.testing.assert_close(value.double(), theirs[name], atol=CLOSE, rtol=CLOSE)
        assert theirs[name].abs().max() > 1e-3
    if f"{name} gradient" in theirs:
        torch.testing.assert_close(gradient.double(), theirs[f"{name} gradient"], atol=CLOSE, rtol=CLOSE)
        assert gradient.abs().max() > 1e-3
    else:
        assert gradient is None


def test_every_function_of_a_peer_is_compared_and_stands_in_the_documents(theirs):
    names = {name.removesuffix(" gradient") for name in theirs}
    assert names == OURS.keys()
    table = (ROOT / "pipeline/method/README.md").read_text()
    code = (ROOT / "tests/method/peers.py").read_text()
    called = set(re.findall(r"\b(_?(?:compute|apply|jsd|expand|add|agg|kl|get)_\w+)\(", code)) - {"kl_divergence"}
    assert {name for name in called if f"`{name}`" not in table} == set()


def test_the_clip_and_the_caps_of_the_random_inputs_bind(given):
    """Without this a broken bound would pass."""
    gap = (given["student"] - given["teacher"])[given["mask"].bool()]
    assert (gap > np.log(1.3)).any()
    assert (gap < np.log(0.8)).any()
    assert (gap > np.log(2)).any()
    sums = ((given["student"] - given["teacher"]) * given["mask"]).sum(1)
    assert (sums > np.log(3)).any()
