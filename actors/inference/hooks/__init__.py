"""What is hooked into vLLM where it returns too little, computes wrong or computes too much; each is checked, or falls back."""

from __future__ import annotations

import functools
import os
import pkgutil
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Install the hooks that change no answer, and the LoRA kernels, in this process's vLLM.

    This is the entry point `egrsd_lora` of `vllm.general_plugins`, which vLLM calls in its own process and in its workers. It
    does nothing where no engine of this project has set EGRSD_EXACT_ENTROPY. exact_entropy.py, which changes answers, has an
    entry point of its own.
    """
    if "EGRSD_EXACT_ENTROPY" not in os.environ:
        return
    from actors.inference.hooks import head, lora, prompt_logprobs, sampling  # torch takes seconds to import

    for hook in (prompt_logprobs, head, sampling, lora):
        hook.install()


def replace(place: str, name: str, mark: str, change: Callable[[Any], Any]) -> bool:
    """Put `change(original)` into the place of a function of vLLM, once. False when vLLM lacks it, or what `change` imports.

    place: `module` or `module:Class`. mark: the attribute by which a function is known as changed, by this copy or another.
    """
    try:
        holder = pkgutil.resolve_name(place)
        original = getattr(holder, name)
        if hasattr(original, mark):
            return True
        changed = functools.wraps(original)(change(original))
    except (ImportError, AttributeError):
        return False
    setattr(changed, mark, True)
    setattr(holder, name, staticmethod(changed) if isinstance(vars(holder).get(name), staticmethod) else changed)
    return True
