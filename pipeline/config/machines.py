"""Settings of what runs where: placement, pools of engines, the trainer, trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import LATER, UNCOUNTED, Count, Dtype, Positive, Section, Share

# Nats of the mean and of the largest gap. In float32 the families that agree stay below 1.3e-5 at most (actors/README.md). In
# half precision seven families had means of .01. The mean finds the faults that are known; the largest alone would miss some.
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (0.05, 2.5), "float16": (0.05, 2.5)}


class Placement(Section):
    """What one Ray actor asks for. `labels` match labels of Ray nodes; `resources` are custom resources (cluster.yaml)."""

    cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="CPUs that one actor asks Ray for")
    gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="GPUs that one actor asks Ray for; 0: it runs on CPU")
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="amounts of the cluster's own resources that one actor asks for"
    )
    labels: dict[str, str] = Field(default_factory=dict, description="labels that the node of an actor must have")

    @model_validator(mode="after")
    def _as_ray_takes_it(self) -> Placement:
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g}: more than one GPU must be a whole number")
        if builtin := {"CPU", "GPU", "memory", "object_store_memory"} & self.resources.keys():
            raise ValueError(f"resources holds {', '.join(sorted(builtin))}: use cpus and gpus; it is for a cluster's own names")
        return self


class Pool(Section):
    """A pool of engines. `min` engines start with the run. Waiting work adds engines up to `max`; idle ones end again."""

    min: Annotated[int, Field(ge=0)] = Field(1, description="engines that start with the run and stay")
    max: Count = Field(1, description="most engines that waiting work may add")
    grow_after_s: Annotated[float, Field(ge=0)] = Field(2.0, description="seconds that work waits before the pool adds an engine")
    shrink_after_s: Annotated[float, Field(ge=0)] = Field(120.0, description="seconds until an unneeded engine ends")
    placement: Placement = Placement()
    tensor_parallel: Count = Field(1, description="GPUs of one engine, over which its weights are split")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads of one engine; 0: as many as Ray grants CPUs")
    memory_share: Share = Field(0.9, description="share of the GPU memory that an engine takes")
    kv_cache_gib: Positive = Field(1.0, description="KV cache of an engine on CPU, in GiB")
    max_num_seqs: Count = Field(256, description="most traces that one engine writes at one time")
    max_batched_tokens: Count = Field(2048, description="most tokens of one step of an engine")
    enforce_eager: bool = Field(True, description="whether CUDA graphs are left out: a faster start and slower tokens")
    start_timeout_s: Positive = Field(600.0, description="seconds that a start may take, and a step, since the first may compile")
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds without a sign of life after which an engine or its dispatcher is replaced"
    )
    request_tries: Count = Field(3, description="times a request may kill its engine before its row is rejected")
    colocate: Annotated[bool, LATER] = Field(
        False, description="engine and trainer take turns on one GPU: the engine sleeps, or ends, while the trainer steps"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: raise max or lower min")
        return self

    @model_validator(mode="after")
    def _alone_on_a_shared_card(self) -> Pool:
        if self.colocate and (self.max > 1 or self.tensor_parallel > 1):
            raise ValueError(
                f"colocate is for one engine beside the trainer: set max 1 (it is {self.max}) and "
                f"tensor_parallel 1 (it is {self.tensor_parallel})"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Pool:
        if self.tensor_parallel > 1 and self.placement.gpus != self.tensor_parallel:
            count = self.tensor_parallel
            raise ValueError(
                f"tensor_parallel {count} needs placement.gpus {count}, one for each process; it is {self.placement.gpus:g}"
            )
        return self


class Client(Pool):
    """A pool of one process that asks a server. It runs on the driver's node, which has checked the server, and needs no card."""


class EnginePools(Section):
    """The pools of engines: one for rollout and scoring, or two that scale apart where `score` is given."""

    rollout: Pool = Pool()
    score: Pool | None = Field(None, description="a pool of its own for scoring; null: the engines of rollout score too")
    inflight_shards: Count = Field(4, description="shards that may wait on one engine at one time")


class Train(Section):
    """The trainer and its optimiser."""

    workers: Count = Field(1, description="ranks of the trainer, each a process with its own device")
    placement: Placement = Placement()
    threads: Annotated[int, Field(ge=0)] = Field(0, description="torch threads of one rank; 0: as many as Ray grants CPUs")
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="ddp: every rank has all weights; fsdp2: the weights are split over ranks"
    )
    dtype: Dtype = Field("float32", description="type of the weights in the forward pass; the adapter is kept in float32")
    gradient_checkpointing: bool = Field(
        False, description="whether activations are computed again in the backward pass: less memory, more time"
    )
    batch_traces: Count = Field(256, description="traces of one optimiser step over all ranks: the minibatch of Eq. 5")
    micro_batch_tokens: Count = Field(16_384, description="most tokens of one forward pass: prompt, response and padding")
    packing: Annotated[Literal["auto", "padded", "packed"], LATER] = Field(
        "auto",
        description="packed: a prompt that traces of a minibatch share is computed once, without padding; auto: where that saves "
        "enough, on a CPU",
    )
    head_chunk_tokens: Count = Field(1024, description="tokens whose logits exist at one time; on a CPU at most 48 MiB of logits")
    learning_rate: Positive = Field(1e-3, description="learning rate of AdamW")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="beta_1 and beta_2 of AdamW"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay of AdamW")
    grad_clip: Positive = Field(1.0, description="largest norm of the gradient; a larger one is scaled down to it")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps in which the learning rate grows to its value"
    )
    logprob_gap: Annotated[Positive | None, UNCOUNTED] = Field(
        None,
        description="largest mean |trainer's - engine's log-prob| of a step in nats, above which the run ends; null: by dtype",
    )
    logprob_gap_max: Annotated[Positive | None, UNCOUNTED] = Field(
        None, description="the same for the largest gap of a step; null: by dtype"
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="training states kept; a resume needs the last one")
    checkpoint_every: Annotated[Count, LATER] = Field(
        1, description="rounds between two training states; a resume trains the rounds after the last one again"
    )
    keep_policies: Annotated[Annotated[int, Field(ge=0)], LATER] = Field(
        0,
        description="last policies whose weights are kept, besides the first and those of evaluations; "
        "0: all, or with model.tuning full those that engines may still need",
    )
    offload: Annotated[Literal["none", "optimizer", "all"], LATER] = Field(
        "none", description="what leaves a shared GPU while the engine uses it: optimiser state, or weights too (all)"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="times that the trainer is started again after a rank has died"
    )
    stall_timeout_s: Annotated[Positive, LATER] = Field(
        60.0, description="seconds without a sign of life after which a rank counts as dead"
    )

    @model_validator(mode="after")
    def _one_card_each(self) -> Train:
        if self.workers > 1 and 0 < self.placement.gpus < 1:
            raise ValueError(
                f"placement.gpus {self.placement.gpus:g} would let ranks share a GPU, which NCCL refuses: set 1, or workers 1"
            )
        return self


class Metrics(Section):
    """Where metrics go besides the run's own JSONL files. No result depends on it, so a resume may change it."""

    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="trackers; each needs its package extra")

    @field_validator("sinks", mode="before")
    @classmethod
    def _names(cls, sinks: Any) -> Any:
        names = [name.strip() for name in sinks.split(",") if name.strip()] if isinstance(sinks, str) else sinks
        return list(dict.fromkeys(names)) if isinstance(names, list | tuple) else names
