"""Figures as plain JSON."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any

import numpy as np


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` as plain JSON data. A number that is not finite becomes null, an array a list, and a record an object.

    With `digits`, every float is rounded to that many significant digits.
    """
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part, digits) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
