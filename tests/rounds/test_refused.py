"""A round of nothing but rejected rows ends with the commonest reason and its remedy."""

import pytest
from in_process import brought, planned

from pipeline.contract import Reject
from pipeline.errors import UserError
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.refused import REMEDIES, refuse_nothing_left
from pipeline.stages import MEASURE


def test_a_round_of_rejected_rows_is_refused_with_reason_and_remedy(tmp_path):
    work = planned(tmp_path, "model.max_model_len=80")  # no prompt fits beside 72 new tokens
    brought(work, *MEASURE)
    with pytest.raises(UserError, match=r"all 8 rows were rejected, 8 as prompt_too_long: .*Raise model\.max_model_len"):
        refuse_nothing_left(work, MEASURE)


def test_a_round_with_a_row_left_goes_on(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    assert Inventory(work).rejected(MEASURE[-1]).total() < 8
    assert refuse_nothing_left(work, MEASURE) is None


def test_every_reason_has_a_remedy():
    assert REMEDIES.keys() == set(Reject)
