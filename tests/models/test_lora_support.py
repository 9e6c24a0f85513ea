"""What vLLM's sources say of adapters is what its classes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import Forks

from pipeline.models.lora_support import serves_lora

SCRIPT = """
import json, sys
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry

told = {name: bool(supports_lora(ModelRegistry.models[name].load_model_cls())) for name in sys.argv[1:]}
print(json.dumps(told))
"""
KNOWN = {
    **dict.fromkeys(("LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM"), True),
    **dict.fromkeys(("GPT2LMHeadModel", "StableLmForCausalLM", "BloomForCausalLM", "FalconForCausalLM"), False),
}


@pytest.mark.engine
def test_sources_and_classes_agree(vllm_forks: Forks, tmp_path: Path) -> None:
    """MistralForCausalLM descends from a class of another module, by its full name. GPT-2 has other abilities than LoRA."""
    script = tmp_path / "asks.py"
    script.write_text(SCRIPT)
    done = vllm_forks.script(script, *KNOWN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == KNOWN
    assert {name: serves_lora(name) for name in KNOWN} == KNOWN


def test_what_sources_do_not_tell_is_unknown() -> None:
    assert serves_lora("NobodyForCausalLM") is None
    assert serves_lora("GlmForCausalLM") is None  # made by a call
