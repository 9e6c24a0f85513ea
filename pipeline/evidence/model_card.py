"""The model card of an exported policy: what it is, how it was made, what was measured, and by which code."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.config import Run
from pipeline.evidence.documents import asked
from pipeline.evidence.evaluation import MEANS, comparable, differences, figures, held_out, same_evaluation, sampling
from pipeline.evidence.intervals import Estimate
from pipeline.models.resolve import MODEL_NAME
from pipeline.problems.sources import named
from pipeline.recipes import called
from pipeline.store.directory import Store

_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that a vLLM server allocates for
UNTRAINED = "No round was trained for policy 0: these are the base's weights, and nothing was learned."
_LABELS = {"avg": ("accuracy, %", 100.0), "length": ("length, tokens", 1.0)}
_USE = {
    True: """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
```

    vllm serve DIR""",
    False: """\
The adapter needs its base model, `{base}`.

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("DIR")
```

    vllm serve {base} --tokenizer DIR --enable-lora --max-lora-rank {rank} --lora-modules policy=DIR""",
}


@dataclass(frozen=True)
class Released:
    """What a folder holds: the policy `version`, as whole weights or as an adapter, and the `base` as others find it."""

    version: int
    whole: bool
    base: str


def model_card(store: Store, run: Run, released: Released) -> str:
    """README.md of a model folder: metadata of the hub's kind, and the text."""
    version = released.version
    made = (_metadata(run, released), _title(run, released), _data(run), _recipe(run, version))
    parts = (*made, _measured(store, run, version))
    rank = next((rank for rank in _VLLM_RANKS if rank >= run.model.lora_rank), run.model.lora_rank)
    use = _USE[released.whole].format(base=released.base, rank=rank)
    return "\n\n".join((*parts, f"## How to open it\n\n{use}", _made_by(store), _settings(run))) + "\n"


def facts(store: Store, run: Run, released: Released) -> dict[str, Any]:
    """What a program reads of an exported policy, as plain JSON: which run and policy it is, and the versions that made it."""
    stored = store.run_file()
    return {
        "run": store.uri,
        "recipe": run.name,
        "policy": released.version,
        "base": released.base,
        "weights": "whole" if released.whole else "adapter",
        "settings": run.model_dump(mode="json"),
        "versions": stored.versions if stored is not None else {},
    }


def _metadata(run: Run, released: Released) -> str:
    local = released.base.startswith("/") or run.model.path == MODEL_NAME
    data = ModelCardData(
        base_model=None if local else released.base,
        library_name="transformers" if released.whole else "peft",
        pipeline_tag="text-generation",
        tags=["egrsd", *(["self-distillation"] if _is_guided(run) else []), run.objective.name],
    )
    return f"---\n{data.to_yaml()}\n---"


def _title(run: Run, released: Released) -> str:
    kind = "whole weights" if released.whole else "LoRA adapter"
    paper = "by entropy-guided self-distillation ([arXiv 2605.13255](https://arxiv.org/abs/2605.13255))"
    how = paper if _is_guided(run) else f"with the objective `{run.objective.name}`"
    names = {"student": "its own answers", "teacher": "answers of a teacher", "import": "answers that the source brings"}
    whose = _writers(run, names)
    learned = f"The model learned from {whose} {how}." if released.version else f"{UNTRAINED} Later policies learn {how}."
    return (
        f"# Policy {released.version} of {called(run)}: {kind}\n\n"
        f"The base model is `{released.base}`. Its licence applies to these weights too. {learned}"
    )


def _is_guided(run: Run) -> bool:
    """Whether a teacher's entropy guides the objective, as in the paper."""
    return run.objective.gate_kind in ("entropy", "cl_entropy") and run.objective.control == "none"


def _writers(run: Run, names: dict[str, str]) -> str:
    """Who wrote the answers that are learned from, by the names of the student, a teacher and the source."""
    return " and ".join(text for one, text in names.items() if one in run.writers and one in run.objective.sources)


def _data(run: Run) -> str:
    rollout, source = run.rollout, run.source
    judge, names = run.grade.verdict_reward, {"student": "the model itself", "teacher": "a teacher", "import": "the source"}
    graded = f"A verifier ({run.grade.verifier})" if judge is None else f"The reward function `{judge}`"
    return (
        f"## Data\n\n{rollout.prompts_per_round} problems a round of {named(source)}, with {rollout.group_size} "
        f"traces of at most {rollout.max_new_tokens} tokens for each problem. Those of {_writers(run, names)} are "
        f"trained on. {graded} graded every answer.\n\n"
        f"The prompt, inside the tokenizer's chat template:\n\n{_quoted(run.prompts.student)}"
    )


def _recipe(run: Run, version: int) -> str:
    train, model = run.train, run.model
    adapter = f"LoRA rank {model.lora_rank}, alpha {model.lora_alpha:g} on {', '.join(model.lora_targets)}"
    adapter = "All weights were trained" if model.tuning == "full" else adapter
    rounds = f"{version} of {run.rounds} rounds" if version else f"{run.rounds} rounds"
    planned = "" if version else "None of this was trained for policy 0. The recipe of later policies:\n\n"
    return (
        f"## Recipe\n\n{planned}Objective `{run.objective.name}`, {rounds}, seed {run.seed}. AdamW, learning rate "
        f"{train.learning_rate:g}, {train.batch_traces} traces a step. {adapter}. Every setting stands at the end."
    )


def _measured(store: Store, run: Run, version: int) -> str:
    """Figures of the policy on the run's held-out problems, beside the base's, and on what `egrsd evaluate` asked it."""
    others = [f"- {line}" for line in asked(store, version)]
    found = ["\n".join(lines) for lines in (_held_out(store, run, version), others) if lines]
    if not found:
        return "## Figures\n\nThis policy has answered no held-out problems."
    return "\n\n".join(("## Figures", "Mean and 95 % interval over problems.", *found))


def _held_out(store: Store, run: Run, version: int) -> list[str]:
    after, before = held_out(store, run, version), held_out(store, run, 0)
    if after is None:
        return []
    with contextlib.suppress(ValueError):
        columns = {f"policy {version}": figures(after, 1, names=MEANS)}
        if version and before is not None and same_evaluation(after, before) and comparable(after, before):
            columns = {"base": figures(before, 1, names=MEANS)} | columns
            columns["difference, paired"] = differences(after, before, 1, names=MEANS)
        head = f"{len(after)} held-out problems" + ("" if after.earlier else f" of {named(run.evaluation.source)}")
        rows = [
            f"| {label} | {' | '.join(_cell(found.get(name), scale, key.startswith('diff')) for key, found in columns.items())} |"
            for name, (label, scale) in _LABELS.items()
        ]
        table = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}", *rows]
        return [*table, "", f"Answers were sampled {sampling(after, run)}."]
    return []


def _cell(found: Estimate | None, scale: float, signed: bool = False) -> str:
    return "-" if found is None else found.text(scale, signed=signed)


def _made_by(store: Store) -> str:
    stored = store.run_file()
    versions = stored.versions if stored is not None else {}
    return "## Made by\n\n" + "\n".join(f"- {name} {version}" for name, version in sorted(versions.items()) if version)


def _settings(run: Run) -> str:
    return f"## Every setting\n\n```yaml\n{run.to_yaml()}```"


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
