"""Plain JSON of figures."""

import json
import math

import numpy as np

from pipeline.evidence.documents import plain
from pipeline.evidence.intervals import Estimate


def test_what_is_not_finite_becomes_null_and_arrays_become_lists():
    found = plain(
        {1: np.array([[1.0, math.nan], [math.inf, -2.5]]), "b": (np.int64(3), None, True, "x"), "c": np.float32(math.nan)}
    )
    assert found == {"1": [[1.0, None], [None, -2.5]], "b": [3, None, True, "x"], "c": None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert type(found["b"][0]) is int


def test_a_record_becomes_an_object():
    assert plain([Estimate(0.5, 0.25, math.inf)]) == [{"value": 0.5, "low": 0.25, "high": None}]


def test_digits_are_significant_ones_and_the_rest_is_kept_whole():
    assert plain([np.float32(1 / 3), 123456.789, 7], digits=6) == [0.333333, 123457.0, 7]
    assert plain(1 / 3) == 1 / 3
