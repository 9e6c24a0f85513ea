"""What tests share: one local Ray, one real engine, two random adapters for it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: on two busy cores a second thread costs more than it gives
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest


@pytest.fixture(scope="session")
def ray_local():
    """A Ray of our own. Logical CPUs exceed the cores: with two, stages and actors would starve each other and hang."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def engine():
    """A real vLLM engine of the tiny reasoner in this process; about 14 s to load, so there is one."""
    from actors.engine import Engine
    from pipeline import config

    engine = Engine(config.Model(), config.Pool(threads=1), config.ScoreSettings())
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of two random LoRA adapters for the tiny reasoner, far enough from zero to change every trace."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline import config
    from pipeline.tiny import asset_path

    settings, folders = config.Model(), []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32)
        lora = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets))
        student = get_peft_model(model, lora)
        noise = torch.Generator().manual_seed(seed)
        for name, weight in student.named_parameters():
            if "lora_" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=noise) * 0.05)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        student.save_pretrained(folder)
        folders.append(str(folder))
    return folders
