"""The student in the trainer: a frozen base with a LoRA adapter, or a model that is trained whole; a chunked head; its ranks.

Where all weights are trained (model.tuning full), they are float32, and so are gradients and moments. With train.dtype bfloat16,
autocast multiplies in bfloat16 copies of them. The engine gets the weights in model.dtype.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from pipeline.config import Model, Run, Train
from pipeline.errors import ModelError, SettingError
from pipeline.method.objective import weighted_sum
from pipeline.models.blueprint import blueprint, settings_of
from pipeline.models.head_form import form_of
from pipeline.models.resolve import open_model
from pipeline.training.agreement.base_model import is_asked
from pipeline.training.packing import attention, packable
from pipeline.training.packing.attention import Layout
from pipeline.training.student import whole
from pipeline.training.student.head import Head, Terms, logprobs_of, weighted_logprob, with_divergence
from pipeline.training.student.trained_head import trained

_NOISE = ("drop", "jitter")  # parts of the names of settings by which a model in training is another one
_FUSED = "mamba2_split_conv1d_scan_combined"  # of the modules of transformers whose layers are Mamba 2
HEAD_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}  # nats between our head and the model's own; a wrong head differs by more


class Student(nn.Module):
    """A model whose forward pass returns the weighted sum of response log-probs instead of logits.

    model: a peft model, or with `trains_all` a model of transformers whose weights are trained. product: the dtype of matrix
    products, which is that of the weights, or bfloat16 by autocast. base_answers: with `trains_all`, the log-probs in nats of the
    sequence in whole.py under the base.
    """

    def __init__(self, model: Any, chunk: int, product: torch.dtype = torch.float32, trains_all: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.chunk, self.product, self.trains_all = chunk, product, trains_all
        self.base_answers: tuple[float, ...] = ()
        self.form = form_of(self.base.config)
        self.packs = False

    @property
    def base(self) -> Any:
        """The model of transformers, without peft around it."""
        return self.model if self.trains_all else self.model.get_base_model()

    def forward(self, tokens: Tensor, sources: Tensor, terms: Terms, layout: Layout | None = None) -> tuple[Tensor, ...]:
        """tokens [B, L], sources [N] flat positions in them, terms of N tokens -> sum_n c_n log p_n, log p [N] nats.

        Only the positions that predict a response token reach the head. The sum depends on the hidden states even when N = 0,
        because every rank must have a backward pass.

        With a divergence its weighted sum is added, and its values [N] come third. With a surrogate the head runs twice: log p is
        made first, without a gradient, and decides the slopes.
        """
        hidden = self.states(tokens, sources, layout)
        if terms.surrogate is None:
            return self.head(hidden, terms)
        made, divergence = terms.surrogate(logprobs_of(hidden, self._head(), terms.targets)), terms.divergence
        if divergence is not None:
            kept = divergence.kept
            divergence = divergence._replace(kept=kept._replace(weights=kept.weights * made.trust))
        slopes = made.slopes * terms.coefficients
        total, logprobs, *values = self.head(hidden, Terms(terms.targets, slopes, divergence))
        offset = (made.values * terms.coefficients).sum() - (slopes * logprobs).sum()
        return total + offset, logprobs, *values

    @property
    def vocab_size(self) -> int:
        """Ids that the model has an embedding for."""
        return int(self.base.get_input_embeddings().num_embeddings)

    @property
    def layer_weights(self) -> float:
        """Weights of the decoder in one layer, on average, without embeddings and adapter."""
        decoder = self.base.get_decoder()
        tables = {
            id(weight) for module in decoder.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()
        }
        weights = [w for name, w in decoder.named_parameters() if "lora_" not in name and id(w) not in tables]
        return sum(weight.numel() for weight in weights) / getattr(self.base.config.get_text_config(), "num_hidden_layers", 1)

    def states(self, tokens: Tensor, sources: Tensor, layout: Layout | None = None) -> Tensor:
        """Hidden states [N, H] at the flat positions `sources` [N] of tokens [B, L], or of a stream [1, L] with its layout."""
        decoder, half = self.base.get_decoder(), self.trains_all and self.product != torch.float32
        with attention.placed(layout) as more, torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
            hidden: Tensor = decoder(input_ids=tokens, use_cache=False, **more).last_hidden_state
        return hidden.flatten(0, 1)[sources]

    def head(self, hidden: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        """sum_n c_n log p_n and log p [N] nats of hidden states [N, H]; see `forward`. `terms` has no surrogate."""
        if not torch.is_grad_enabled() and terms.divergence is None:  # the gradient of a chunk would be made beside its logits
            logprobs = logprobs_of(hidden, self._head(), terms.targets)
            return weighted_sum(logprobs, terms.coefficients), logprobs
        if self.trains_all:
            layer = self.base.get_output_embeddings()
            own = layer.weight, getattr(layer, "bias", None)
            return trained(hidden, own, self._head(), terms)
        if terms.divergence is None:
            return weighted_logprob(hidden, self._head(), terms.targets, terms.coefficients)
        return with_divergence(hidden, self._head(), terms.targets, terms.coefficients, terms.divergence)

    def _head(self) -> Head:
        layer = self.base.get_output_embeddings()
        weight = layer.weight.detach().to(self.product) if self.trains_all else layer.weight
        return Head(weight, getattr(layer, "bias", None), self.chunk, *self.form)


def build(run: Run, device: torch.device) -> Student:
    """The base from `run.model.path` in `run.train.dtype`, frozen, with a new adapter that changes nothing yet (B = 0).

    The adapter is always float32, and `run.seed` decides its weights. With model.tuning full the base itself is trained.

    Raises ModelError when the model cannot be loaded or its head is not a plain linear layer. Raises SettingError when the LoRA
    settings do not fit the model.
    """
    _check_settings(run.model, run.train)
    logging.disable_progress_bar()
    base: Any = _load(run.model, run.train).to(device)
    if run.model.tuning == "full":
        student = Student(base, run.train.head_chunk_tokens, getattr(torch, run.train.dtype), trains_all=True)
    else:
        student = Student(_with_adapter(base, run), run.train.head_chunk_tokens)
    _check_head(student.eval(), run, device)
    student.packs = packable.prepare(student, run, device)
    if student.trains_all or is_asked(run):
        student.base_answers = answers(student, device, whole.sequence(student.vocab_size, run.model.max_model_len))
    if run.train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.train()
    _check_dropout(student, run, device)
    return student


def _with_adapter(base: Any, run: Run) -> Any:
    """The frozen base with a new adapter. Raises SettingError when the LoRA settings do not fit it."""
    config = LoraConfig(
        r=run.model.lora_rank,
        lora_alpha=run.model.lora_alpha,  # type: ignore[arg-type]  # peft says int, computes with floats
        lora_dropout=run.model.lora_dropout,
        target_modules=list(run.model.lora_targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(run.seed)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        remedy = "Name linear layers of this model"
        raise SettingError(f"does not fit {run.model.path} ({error})", "model.lora_targets", remedy) from error
    model.peft_config["default"].base_model_name_or_path = run.model.path  # a resolved path would hold on one machine only
    return model


def spread(student: Student, strategy: Literal["ddp", "fsdp2"], device: torch.device) -> nn.Module:
    """The student over all ranks: replicated with averaged gradients (DDP), or sharded layer by layer (FSDP2).

    A single rank, with or without a process group, gets the student itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return student
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = set(student.base._no_split_modules or ())
    for layer in [module for module in student.modules() if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)  # in place; the root keeps embeddings, last norm and head
    return student


def rest(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward one leaves gathered: FSDP2 keeps the root's weights, soon stale."""
    if isinstance(module, FSDPModule):
        module.reshard()


def accumulate(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context in which a micro-batch runs forward and backward. Only the `last` one reduces gradients over ranks."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


def _load(model: Model, train: Train) -> nn.Module:
    trained_whole = model.tuning == "full"
    settings = without_dropout(settings_of(model))
    more = attention_for(settings)
    more["dtype"] = torch.float32 if trained_whole else getattr(torch, train.dtype)
    base = open_model(AutoModelForCausalLM, model, "weights", config=settings, **more)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(its := sys.modules[type(module).__module__], _FUSED):
            setattr(its, _FUSED, _by_parts)
    if (sampling := getattr(base, "generation_config", None)) is not None:
        base.generation_config = token_ids(sampling)
    frozen = {name for name, p in blueprint(model, settings).named_parameters() if not p.requires_grad} if trained_whole else ()
    for name, parameter in base.named_parameters():  # transformers unfreezes what it loads; some of it gets no gradient
        parameter.requires_grad_(trained_whole and name not in frozen)
    return base


def _by_parts(*_: Any, **__: Any) -> None:
    """What Mamba 2 layers call in training for a fused kernel. With None they go on to the kernels that they use otherwise.

    The fused one reads the weight of the last layer itself, so that an adapter there would be passed by.
    """


def token_ids(sampling: GenerationConfig) -> GenerationConfig:
    """The tokens that begin, pad and end a trace, and nothing else of a generation configuration. No id below 0 pads.

    Transformers opens a folder whose options contradict each other, and refuses to save them: a round would be paid by then.
    """
    pad = sampling.pad_token_id
    kept = {"bos_token_id": sampling.bos_token_id, "eos_token_id": sampling.eos_token_id}
    return GenerationConfig(**kept, pad_token_id=None if pad is None or pad < 0 else pad)


def attention_for(settings: Any) -> dict[str, Any]:
    """The option with which transformers computes a model's own attention. Torch's fused one ignores a cap of its logits."""
    capped = bool(getattr(settings.get_text_config(), "attn_logit_softcapping", None))
    return {"attn_implementation": "eager"} if capped else {}


def without_dropout(settings: Any) -> Any:
    """A model's configuration, with every dropout and jitter in it set to 0: engines have none, and the base is frozen."""
    for part in {id(one): one for one in (settings, settings.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and any(sign in name for sign in _NOISE):
                setattr(part, name, 0.0)
    return settings


def _check_settings(model: Model, train: Train) -> None:
    if train.dtype == "float16":
        raise SettingError("float16 gradients underflow without loss scaling", "train.dtype", "Use bfloat16 or float32")
    if model.tuning == "lora" and "lm_head" in model.lora_targets:
        raise SettingError("the head's log-probs are computed from its plain weight", "model.lora_targets", "Leave lm_head out")


@torch.no_grad()
def answers(module: nn.Module, device: torch.device, tokens: list[int]) -> tuple[float, ...]:
    """Log-probs in nats of all but the first of these tokens, by a student or by what spreads it. Every rank must call this."""
    ids, places = torch.tensor(tokens, device=device), torch.arange(len(tokens) - 1, device=device)
    _, logprobs, *_ = module(ids[None], places, Terms(ids[1:], torch.zeros(len(places), device=device)))
    rest(module)
    return tuple(logprobs.tolist())


@torch.no_grad()
def _check_head(student: Student, run: Run, device: torch.device) -> None:
    """Raise ModelError when our log-probs differ from the model's own on a few tokens: some models scale or cap their logits."""
    tokens = torch.arange(1, 9, device=device)[None]
    logits = student.model(input_ids=tokens, use_cache=False).logits.float()
    expected = logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    _, found = student(tokens, torch.arange(7, device=device), Terms(tokens[0, 1:], torch.zeros(7, device=device)))
    gap = float((found - expected).abs().max())
    if not gap <= HEAD_TOLERANCE[run.train.dtype]:
        raise ModelError(
            f"its head is not a plain linear one: log-probs differ by {gap:.3g} nat from the model's own",
            run.model.path,
            "Use a model whose logits are the output layer's, scaled or capped as pipeline/models/head_form.py says",
        )


@torch.no_grad()
def _check_dropout(student: Student, run: Run, device: torch.device) -> None:
    """Raise ModelError when the base computes otherwise in training than in use, as dropout would make it."""
    tokens, places = torch.arange(1, 9, device=device)[None], torch.arange(7, device=device)
    found = []
    for training in (True, False):
        student.train(training)
        for module in student.modules():
            if isinstance(module, nn.ModuleDict | nn.Dropout):  # LoRA's own dropout is meant
                module.eval()
        with nullcontext() if student.trains_all else student.model.disable_adapter():
            found.append(student.states(tokens, places))
    student.train()
    if not torch.equal(*found):
        what = "its layers compute otherwise in training than in use"
        raise ModelError(what, run.model.path, "Set its dropout to 0 in config.json")
