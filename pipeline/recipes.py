"""Complete runs by name, one function each. `--recipe NAME` starts from one, and `--set` changes it."""

from __future__ import annotations

from pipeline.config import (
    EnginePools,
    Evaluation,
    Grade,
    Label,
    Model,
    Objective,
    Placement,
    Pool,
    Profile,
    Prompts,
    Rollout,
    Run,
    ScoreSettings,
    Source,
    Train,
)
from pipeline.errors import SettingError, nearest
from pipeline.models.resolve import MODEL_NAME
from pipeline.problems import tiny


def demo() -> Run:
    """The tiny reasoner learns arithmetic from itself on two CPU cores in minutes."""
    return Run(
        name="demo",
        rounds=16,
        source=Source(uri="tiny-arithmetic", split="train"),
        model=Model(path=MODEL_NAME, dtype="float32", max_model_len=128, lora_rank=16, lora_alpha=32),
        prompts=Prompts(student=tiny.STUDENT_PROMPT, teacher=tiny.TEACHER_PROMPT),
        rollout=Rollout(prompts_per_round=32, prompts_per_shard=8, group_size=8, max_new_tokens=72),
        grade=Grade(verifier="exact", answer_pattern=tiny.ANSWER_PATTERN, advantage="group"),
        profile=Profile(window=3),
        label=Label(gamma=0.3),
        objective=Objective(name="cl_egrsd", gamma=0.3, window=3),
        engines=EnginePools(rollout=Pool(placement=Placement(cpus=1), threads=1, kv_cache_gib=0.25, max_batched_tokens=4096)),
        train=Train(batch_traces=256, learning_rate=1e-3, warmup_steps=8, grad_clip=1.0, threads=1, micro_batch_tokens=2048),
        evaluation=Evaluation(source=Source(uri="tiny-arithmetic", split="test"), problems=512, max_new_tokens=72),
    )


def smollm2() -> Run:
    """SmolLM2-135M-Instruct on sums of two one-digit terms: a real pretrained model on two CPU cores (`make smollm2`).

    There are 200 such problems, of which about 40 are held out; each is answered four times.
    """
    terms = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return Run(
        name="smollm2",
        rounds=3,
        source=Source(uri="reasoning-gym:chain_sum", options=terms),
        model=Model(path="assets-cache/smollm2", dtype="bfloat16", max_model_len=512, lora_rank=16, lora_alpha=32),
        prompts=Prompts(teacher="{problem}\nThe result is known: {solution}\nState the final answer."),
        rollout=Rollout(prompts_per_round=8, prompts_per_shard=4, group_size=8, top_p=0.95, top_k=20, max_new_tokens=32),
        grade=Grade(verifier="math", advantage="group"),
        engines=EnginePools(rollout=Pool(placement=Placement(cpus=1), threads=2, max_num_seqs=64, max_batched_tokens=1024)),
        train=Train(
            batch_traces=64,
            learning_rate=5e-4,
            grad_clip=1.0,
            threads=2,
            dtype="bfloat16",
            micro_batch_tokens=2048,
            head_chunk_tokens=256,
        ),
        evaluation=Evaluation(
            source=Source(uri="reasoning-gym:chain_sum", split="test", options=terms, size=200),
            problems=40,
            samples=4,
            top_p=0.95,
            top_k=20,
            max_new_tokens=32,
        ),
    )


def gemma3_270m() -> Run:
    """Gemma 3 270M on sums of two one-digit terms: a vocabulary of 262 144 tokens on two CPU cores (`make gemma3`)."""
    run = smollm2()
    parts = {
        "model": Model(path="assets-cache/gemma3-270m", dtype="bfloat16", max_model_len=256, lora_rank=16, lora_alpha=32),
        "rollout": run.rollout.model_copy(update={"group_size": 4, "max_new_tokens": 16}),
        "engines": EnginePools(
            rollout=Pool(placement=Placement(cpus=1), threads=2, max_num_seqs=16, max_batched_tokens=256, kv_cache_gib=0.5)
        ),
        "train": run.train.model_copy(update={"batch_traces": 32, "micro_batch_tokens": 1024, "head_chunk_tokens": 64}),
        "evaluation": run.evaluation.model_copy(update={"problems": 40, "samples": 1, "max_new_tokens": 16}),
    }
    return run.model_copy(update={"name": "gemma3_270m", "rounds": 2, **parts})


def qwen3_4b() -> Run:
    """The paper's Qwen3-4B setting: CL-EGRSD with gamma 0.3 and W 3, on 8 training GPUs and 8 rollout GPUs."""
    return _paper("qwen3_4b", "Qwen/Qwen3-4B", gamma=0.3, window=3, micro_batch_tokens=24_576)


def qwen3_8b() -> Run:
    """The paper's Qwen3-8B setting: CL-EGRSD with gamma 1.0 and W 5."""
    return _paper("qwen3_8b", "Qwen/Qwen3-8B", gamma=1.0, window=5, micro_batch_tokens=20_480)


def qwen3_4b_8gpu() -> Run:
    """The paper's Qwen3-4B setting on one machine with 8 GPUs: 4 engines, 4 ranks, no cluster file."""
    run = _paper("qwen3_4b_8gpu", "Qwen/Qwen3-4B", gamma=0.3, window=3, micro_batch_tokens=20_480)
    card = Placement(cpus=2, gpus=1)
    pool = run.engines.rollout.model_copy(update={"min": 4, "max": 4, "placement": card})
    train = run.train.model_copy(update={"workers": 4, "placement": card})
    return run.model_copy(update={"engines": EnginePools(rollout=pool), "train": train})


def qwen3_1_7b_1gpu() -> Run:
    """Qwen3-1.7B with the paper's settings for 4B, on one GPU of 24 GB or more: engine and trainer take turns on it.

    The paper has no such model. Window and evaluation are smaller than its own.
    """
    run = _paper("qwen3_1_7b_1gpu", "Qwen/Qwen3-1.7B", gamma=0.3, window=3, micro_batch_tokens=16_384)
    half = Placement(cpus=2, gpus=0.5)
    one = {"min": 1, "max": 1, "placement": half, "colocate": True, "memory_share": 0.7}
    train = {"workers": 1, "placement": half, "strategy": "ddp", "offload": "optimizer"}
    parts = {
        "model": run.model.model_copy(update={"max_model_len": 16_384}),
        "engines": EnginePools(rollout=run.engines.rollout.model_copy(update=one)),
        "train": run.train.model_copy(update=train),
        "evaluation": run.evaluation.model_copy(update={"problems": 250, "samples": 2, "max_new_tokens": 8192}),
    }
    return run.model_copy(update=parts)


def _paper(name: str, model: str, gamma: float, window: int, micro_batch_tokens: int) -> Run:
    """Settings of 2605.13255: AdamW 5e-6, clip 0.1, batch 32, 100 steps, LoRA rank 64, temperature 1.1, 1 024 new tokens.

    The node types of cluster.yaml declare the resources `rollout` and `train`, one per GPU. Engines and ranks ask for them.
    The 32 traces of a step fill half of one engine (64 at once). More engines shorten scoring and the evaluation.
    Such a run costs too much for bounds in the place of exact entropies.
    """
    rollout_gpu = Placement(cpus=4, gpus=1, resources={"rollout": 1})
    return Run(
        name=name,
        rounds=100,
        source=Source(uri="datasets:open-thoughts/OpenThoughts-114k-math", answer="solution", size=100_000),
        model=Model(path=model, dtype="bfloat16", max_model_len=20_000, lora_rank=64, lora_alpha=128),
        rollout=Rollout(
            prompts_per_round=32, prompts_per_shard=4, group_size=1, temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=1024
        ),
        grade=Grade(verifier="math", advantage="running"),
        score=ScoreSettings(rescore_share=0.05, fallback=False),
        profile=Profile(window=window),
        label=Label(gamma=gamma),
        objective=Objective(name="cl_egrsd", gamma=gamma, window=window),
        engines=EnginePools(
            rollout=Pool(
                min=8,
                max=8,
                placement=rollout_gpu,
                enforce_eager=False,
                max_batched_tokens=2048,
                max_num_seqs=64,
                start_timeout_s=1800,  # a first start downloads the model, compiles it and records CUDA graphs
            )
        ),
        train=Train(
            workers=8,
            placement=Placement(cpus=4, gpus=1, resources={"train": 1}),
            strategy="fsdp2",
            dtype="bfloat16",
            gradient_checkpointing=True,
            batch_traces=32,
            micro_batch_tokens=micro_batch_tokens,
            learning_rate=5e-6,
            grad_clip=0.1,
            keep_checkpoints=4,
        ),
        evaluation=Evaluation(
            source=Source(uri="datasets:HuggingFaceH4/MATH-500", split="test"),
            problems=500,
            samples=4,
            top_p=0.95,
            max_new_tokens=16_384,
        ),
    )


_RECIPES = (demo, smollm2, gemma3_270m, qwen3_1_7b_1gpu, qwen3_4b_8gpu, qwen3_4b, qwen3_8b)


def recipe(name: str) -> Run:
    """A recipe by name. Raises SettingError that lists the known names."""
    known = {function.__name__: function for function in _RECIPES}
    if name not in known:
        raise SettingError(f"unknown recipe '{name}'", "--recipe", nearest(name, known, f"Known: {', '.join(known)}"))
    return known[name]()


def called(run: Run) -> str:
    """What a run was made from, for a sentence: `recipe demo`, or `the settings 'mine'` of somebody's own file."""
    return f"recipe {run.name}" if run.name in descriptions() else f"the settings '{run.name}'"


def descriptions() -> dict[str, str]:
    """The name of every recipe, with the first line of its docstring."""
    return {f.__name__: (f.__doc__ or "").splitlines()[0] for f in _RECIPES}
