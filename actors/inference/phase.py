"""What an engine's process does until the engine serves. The dispatcher asks for it with each sign of life."""

from __future__ import annotations

IMPORTS, WEIGHTS, CHECKS = "importing vLLM", "loading the weights", "warming up: exact entropies are checked"

_now = ""


def enter(phase: str) -> None:
    """Note that a phase has begun."""
    global _now
    _now = phase


def now() -> str:
    """The phase of this process. Empty before the first one, and where the engine is none of vLLM's."""
    return _now
