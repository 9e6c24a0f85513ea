"""Results as plain JSON: numbers and lists, with null in the place of NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` as JSON holds it: arrays and tuples become lists, keys text, NaN and infinity null.

    `digits` keeps that many significant digits of every float; None keeps all of them.
    """
    if isinstance(value, dict):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part, digits) for part in value]
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            return None
        return number if digits is None else float(f"{number:.{digits}g}")
    return value.item() if isinstance(value, np.generic) else value
