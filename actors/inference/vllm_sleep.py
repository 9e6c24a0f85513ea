"""vLLM's sleep mode: an engine gives the memory of its card back and keeps its weights in the machine's memory.

Level 1 of the mode is used. The cache of keys and values is dropped, since a trace must not depend on what the engine did before.
vLLM has the mode on GPUs. On a CPU it only warns, so `available` is False there and the pool ends the engine instead.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import EngineError


def available() -> bool:
    """Whether vLLM can sleep on this machine."""
    from vllm.platforms import current_platform

    # Without its own allocator vLLM would fail at the start. Versions that cannot be asked have it on every card.
    allocates = getattr(current_platform, "is_cumem_allocator_available", lambda: True)
    return bool(current_platform.is_sleep_mode_available() and allocates())


def sleep(engine: Any) -> bool:
    """Put a started LLMEngine without requests to sleep. False when it was started without the mode."""
    if not engine.model_config.enable_sleep_mode:
        return False
    engine.sleep(level=1)
    return True


def wake(engine: Any) -> None:
    """Wake an LLMEngine that sleeps. Raises EngineError when it goes on sleeping."""
    engine.wake_up()
    if engine.is_sleeping():
        raise EngineError("vLLM did not wake up", str(engine.model_config.model))
