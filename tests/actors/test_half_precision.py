"""The engine in half precision: its head computes in float32, so that large logits are not rounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_log_probs_and_entropies_of_large_logits_are_those_of_a_head_in_double_precision(tmp_path):
    """With a head in bfloat16 log-probs are off by .028 nat here."""
    path = tmp_path / "told.json"
    command = [sys.executable, str(ROOT / "tests/actors/half_engine.py"), str(tmp_path / "model"), str(path)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(path.read_text())
    assert told["entropy_method"] == "exact"
    assert 18 <= told["largest"] <= 26
    assert told["logprobs"] < 0.005
    assert told["entropy"] < 0.005
