"""The contract holds together, and so do its columns."""

from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline import contract
from pipeline.contract import COLUMNS
from pipeline.contract.engines import Usage
from pipeline.errors import ContractError
from pipeline.stages import PLAN, STAGES


def check_plan(plan=PLAN):
    """Raise ContractError unless every column read was written by an earlier stage and every writer is in the plan."""
    written: set[str] = set()
    for stage in plan:
        for name in stage.reads:
            if name not in COLUMNS:
                raise ContractError(f"reads column '{name}' that no one defines", f"stage {stage.name}")
            if name not in written:
                raise ContractError(f"reads '{name}' before stage {COLUMNS[name].writer} has written it", f"stage {stage.name}")
        written |= {c.name for c in stage.writes}
    orphans = {c.writer for c in COLUMNS.values()} - {stage.name for stage in plan}
    if orphans:
        raise ContractError(f"columns are written by stages outside the plan: {sorted(orphans)}", "contract")


def test_the_plan_reads_only_what_was_written():
    assert check_plan() is None


def test_a_plan_out_of_order_is_refused_with_stage_and_column():
    with pytest.raises(ContractError, match="stage label: reads 'teacher_entropy' before stage score"):
        check_plan((STAGES["prompts"], STAGES["rollout"], STAGES["reward"], STAGES["grade"], STAGES["label"]))


def test_a_column_without_a_definition_is_refused():
    with pytest.raises(ContractError, match="reads column 'mood' that no one defines"):
        check_plan((replace(STAGES["prompts"], reads=("mood",)), *PLAN[1:]))


def test_every_shard_starts_with_its_key_and_its_rejection():
    for stage in PLAN:
        names = contract.schema(stage, contract.COLUMNS).names
        assert names[:3] == [stage.key, "reject_reason", "reject_detail"]
        assert len(names) == len(set(names))


def test_lists_are_plain_arrow_lists():
    for column in COLUMNS.values():
        assert pa.types.is_list(column.type) == bool(column.shape), column.name
        assert not isinstance(column.type, pa.ExtensionType)


def test_every_column_has_a_meaning_and_entropies_have_a_unit():
    for column in COLUMNS.values():
        assert column.doc or column.unit, column.name
        if "entropy" in column.name and column.name != "entropy_method":
            assert column.unit == "nats"


def test_readers_and_inputs_are_two_views_of_one_table():
    for stage in PLAN:
        for name in stage.reads:
            assert COLUMNS[name].writer in stage.inputs


def test_the_busiest_engine_of_each_pool_counts_also_one_that_came_in_between():
    """Pool `a`: 40 - 30 = 10, and 4 of a new engine. Pool `b`: 3 - 1 = 2. An engine that ended takes nothing."""
    before = Usage({"a": {"a1": 30.0, "gone": 99.0}, "b": {"b1": 1.0}}, 0.0, 2)
    now = Usage({"a": {"a1": 40.0, "a2": 4.0}, "b": {"b1": 3.0}, "c": {}}, 0.0, 2)
    assert now.busiest_since(before) == 10.0 + 2.0
    assert Usage({}, 0.0, 0).busiest_since(before) == 0.0
