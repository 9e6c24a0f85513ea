"""Engine and trainer agree about a model of each family, or the run is refused. `make families` runs all, `make test` a sample.

All families of a test run are measured by one process, since importing vLLM takes longer than a tiny model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

from families.models import ABOVE, FAMILIES, REFUSED, SAMPLE

ROUNDS = Path(__file__).parent / "rounds.py"
PROMISE = 1e-4  # nats, in float32
NAMES = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.families) for name in FAMILIES]


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, vllm_forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rounds.py found for each family that this test run asks for."""
    asked = [item.callspec.params["name"] for item in request.session.items if "measured" in getattr(item, "fixturenames", ())]
    done = vllm_forks.script(ROUNDS, str(tmp_path_factory.mktemp("families")), *dict.fromkeys(asked))
    found = {row["family"]: row for row in map(json.loads, done.stdout.splitlines())}
    if target := os.environ.get("EGRSD_FAMILIES"):
        Path(target).write_text(json.dumps({name: _kept(row) for name, row in found.items()}, indent=1) + "\n")
    found["error"] = done.stderr[-2000:]
    return found


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs from one measurement to the next."""
    return {key: value for key, value in row.items() if key not in ("family", "seconds", "notes")}


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_engine_and_trainer_agree(name: str, measured: dict[str, Any]) -> None:
    """Or the run is refused, with the reason that REFUSED has."""
    found = measured.get(name, measured["error"])
    if name in REFUSED:
        assert REFUSED[name] in found["refused"]
        return
    assert "largest" in found, found
    base, adapted = found["largest"]
    assert max(base, adapted) <= ABOVE.get(name, PROMISE)
    assert found["entropies"] == "exact"
    assert found["moved"] > 0.05  # nats by which the adapter of round 1 moved log-probs, so that its faults would show
