"""`distill` with a teacher of its own and with one at a server that is down: fake engines, real Ray, real stages."""

import pytest
from waiting import free_port

from actors.fakes import UNWATCHED, FakeEngine
from jobs import distill
from jobs.settle import Choices
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import joined_round
from pipeline.store.directory import Store

SETS = [
    *UNWATCHED,
    "rounds=1",
    "rollout.prompts_per_round=4",
    "rollout.group_size=2",
    "evaluation.problems=0",
    "grade.advantage=running",
]
BIG = ["teachers.big.model=tiny-reasoner", "teachers.big.dtype=bfloat16", "teachers.big.prompt=plain", "teachers.big.sample=2"]


@pytest.mark.timeout(900)
def test_a_teacher_has_a_pool_and_a_server_that_is_down_ends_the_run_in_one_line(
    ray_local, trained_here, tmp_path, capfd, monkeypatch
):
    distill.distill(str(tmp_path / "two"), Choices("demo", [*SETS, *BIG]), engine_class=FakeEngine)
    store = Store(str(tmp_path / "two"))
    [work] = open_rounds(store, store.load_run())
    assert set(joined_round(work)["teacher_name"].to_pylist()) == {"big"}
    assert "teacher big: solves" in capfd.readouterr().out
    down = [f"teachers.big.server=http://127.0.0.1:{free_port()}", "teachers.big.tries=1"]
    with pytest.raises(SystemExit) as ended:
        distill.distill(str(tmp_path / "served"), Choices("demo", [*SETS, *BIG, *down]), engine_class=FakeEngine)
    said = "".join(capfd.readouterr())
    assert ended.value.code == 1
    assert "error: teachers.big, http://127.0.0.1" in said
    assert "cannot be reached (ConnectionError), asked once" in said
    assert "Traceback" not in said
    assert not Store(str(tmp_path / "served")).exists()  # it was asked before anything started
