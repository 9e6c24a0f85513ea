"""A policy as a folder that other programs open: its weights, its tokenizer, and how to sample from it.

    adapter   adapter_model.safetensors, adapter_config.json    for peft and transformers, and for vLLM beside the base model
    merged    config.json, model*.safetensors                   for every program that opens a model

The base is opened in float32, so that a merge rounds once: to `model.dtype`, in which engines compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.config import Model, Run
from pipeline.errors import ModelError, UserError
from pipeline.models.blueprint import blueprint
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.store.files import Files
from pipeline.store.folders import ADAPTER, ADAPTER_CONFIG, read_manifest
from pipeline.training import checkpoint
from pipeline.training.student import student
from pipeline.training.student.whole import PROBE

MERGE_TOLERANCE = 1e-3  # nats between adapter and merged weights in float32; an adapter that is lost differs by more
_TERMS = ("license", "licence", "notice", "copying", "use_policy")  # how files begin that tell the terms of a model
SHARD = "5GB"  # largest file of merged weights
_PROBE = "1+2=3; so 3+4=7, and 7-2=5."  # text: special tokens, some never trained, blow rounding up to .01 nat in SmolLM2


def write_model(run: Run, policy: Path | None, out: Path, merge: bool, ends: list[int]) -> None:
    """Write a policy into the local folder `out`: its adapter, or with `merge` its whole weights, and what belongs to both.

    Where all weights are trained (model.tuning full), every policy has whole weights, and `merge` changes nothing.
    policy: a local folder of the policy; None for policy 0, which is the base. ends: ids of the tokens that end a trace. Raises
    UserError for the adapter of policy 0, which has none, and ModelError for an adapter that does not fit the run.
    """
    if run.model.tuning == "full" and policy is not None:
        for name in _published(policy):
            if name != PROBE:  # weights, their index, the configuration, and the model's own code where it has some
                shutil.copyfile(policy / name, out / name)
    elif merge or run.model.tuning == "full":
        merged(run, policy).save_pretrained(out, max_shard_size=SHARD)
    elif policy is None:
        raise UserError("policy 0 is the base model, which has no adapter", "--policy 0", "Add --merge, or name a later policy")
    else:
        _write_adapter(run.model, policy, out)
    if merge or run.model.tuning == "full":
        copy_terms(run.model, out)
    tokenizer_of(run.model).save_pretrained(out)
    generation(run, ends).save_pretrained(out)


def _published(policy: Path) -> list[str]:
    """The files of a policy that its manifest names. Others were not checked, and may be links to anywhere on this machine."""
    manifest = read_manifest(Files(str(policy.parent)), policy.name)
    return sorted(manifest.files if manifest is not None else (file.name for file in policy.iterdir()))


def copy_terms(model: Model, out: Path) -> None:
    """Copy the files in a local base's folder that tell its terms: who hands its weights on owes them."""
    base = Path(resolve_model(model.path)).resolve()
    own = [base, base.parents[1] / "blobs"] if base.parent.name == "snapshots" else [base]  # as the hub's copy keeps files
    # a link may lead to anything on this machine, and --push would send it
    for file in base.iterdir() if base.is_dir() else ():
        inside = any(file.resolve().is_relative_to(place) for place in own)
        if file.name.lower().startswith(_TERMS) and file.is_file() and inside:
            shutil.copyfile(file, out / file.name)


def merged(run: Run, policy: Path | None) -> Any:
    """The base model with the adapter of a policy added to its weights, in `model.dtype`, on the CPU.

    Raises ModelError when the merged weights do not answer as the adapter does.
    """
    wide = run.train.model_copy(update={"dtype": "float32", "gradient_checkpointing": False, "packing": "padded"})
    made = student.build(run.model_copy(update={"train": wide}), torch.device("cpu"))
    if policy is not None:
        checkpoint.load_policy(made, policy, run.model)
    made.eval()
    if made.trains_all:
        return _in_dtype(made.model, run.model)
    tokens = probe_ids(run.model)
    expected = _logprobs(made.model, tokens)
    whole = made.model.merge_and_unload()
    gap = float((_logprobs(whole, tokens) - expected).abs().max())
    if not gap <= MERGE_TOLERANCE:
        what = f"the merged weights answer otherwise than the adapter: log-probs differ by {gap:.3g} nat"
        raise ModelError(what, str(policy or run.model.path), "Leave out --merge: the adapter itself is right")
    return _in_dtype(whole, run.model)


def _in_dtype(whole: Any, model: Model) -> Any:
    """A model in `model.dtype`. Buffers and weights that its class never trains stay float32, as engines keep them.

    The bias by which a router corrects its choices is one of them: rounded to bfloat16, it sends tokens to other experts.
    """
    kept = {name for name, part in blueprint(model).named_parameters() if not part.requires_grad}
    for name, part in whole.named_parameters():
        if name not in kept:
            part.data = part.data.to(getattr(torch, model.dtype))
    return whole


def generation(run: Run, ends: list[int]) -> GenerationConfig:
    """How the run's evaluation samples, with the tokens that begin, pad and end a trace.

    Of the base's own configuration only these ids are kept. Its penalties were never applied here, so the figures are without.
    """
    path, sampling = resolve_model(run.model.path), run.evaluation
    config = GenerationConfig()
    try:
        config = student.token_ids(GenerationConfig.from_pretrained(path, revision=run.model.revision or "main"))
        config.eos_token_id = None
    except OSError:  # many models have no generation_config.json
        pass
    config.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config._from_model_config = False  # else transformers may make it anew from config.json
    return config


def base_name(model: Model) -> str:
    """The base as other programs find it: a hub id as it is, and a folder by its whole path on this machine."""
    path = resolve_model(model.path)
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _write_adapter(model: Model, policy: Path, out: Path) -> None:
    """Copy an adapter, and name its base as other programs find it."""
    shutil.copyfile(policy / ADAPTER, out / ADAPTER)
    settings = json.loads((policy / ADAPTER_CONFIG).read_text())
    settings |= {"base_model_name_or_path": base_name(model), "revision": model.revision}
    (out / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def probe_ids(model: Model) -> list[int]:
    """Ids of a plain text, on which adapter and merged weights are compared. They hold no special token."""
    return list(tokenizer_of(model)(_PROBE, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probs of all tokens behind each of some ids, under a model."""
    tokens = torch.tensor([ids])
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    return found
