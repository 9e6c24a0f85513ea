"""One Chromium and one page of each run for all tests of pages."""

from __future__ import annotations

import json
import os
import shutil

import browser as browsers
import pytest
from report_runs import evaluated, hostile_run

from jobs import report, sweep
from pipeline.overrides import resolve
from pipeline.store.directory import Store

COMPARED = {
    "points": [
        {
            "objective": name,
            "seed": seed,
            "run": f"{name}-s{seed}",
            "accuracy": {"value": 0.8 + 0.01 * seed, "low": 0.75, "high": 0.85},
            "length": {"value": 30.0 - seed, "low": 28.0, "high": 33.0},
        }
        for name in ("grpo", "<b>egrsd</b>")
        for seed in (0, 1)
    ],
    "objectives": [],
    "pairs": [],
}


@pytest.fixture(scope="session")
def driver():
    """Chromium, or a reason why not. Where all tests are to run, as in CI, the lack of it is a failure."""
    if (reason := browsers.missing()) is not None:
        (pytest.fail if os.environ.get("EGRSD_NEEDS_BROWSER") else pytest.skip)(reason)
    with browsers.chromium() as found:
        yield found


@pytest.fixture(scope="session")
def real(stored_run, tmp_path_factory):
    """The report of a real run, with a sweep and a comparison."""
    folder = tmp_path_factory.mktemp("report")
    store = Store(str(shutil.copytree(stored_run.uri, folder / "run")))
    (folder / "compare.json").write_text(json.dumps(COMPARED))
    sweep.sweep_run(store.uri, ["label.gamma=0,1", "label.window=0,3"], None, 0, True)
    report.report_run([store.uri], str(folder), str(folder / "report.html"), True)
    return str(folder / "report.html")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """The report of a hostile run, and its texts."""
    folder = tmp_path_factory.mktemp("hostile")
    store, texts = hostile_run(folder)
    report.report_run([store.uri], None, None, True)
    return f"{store.uri}/report.html", texts


@pytest.fixture(scope="session")
def two_runs(stored_run, tmp_path_factory):
    """The report of two runs that answered the same held-out problems with the same and with other answers."""
    folder = tmp_path_factory.mktemp("runs")
    uris = []
    for name, sets in (("one", []), ("other", ["rollout.temperature=0.9"])):
        store = Store(str(shutil.copytree(stored_run.uri, folder / name)))
        run = resolve(store.load_run(), [*sets, "evaluation.problems=4"])
        store.save_run(run, {})
        evaluated(store, 0, ["correct", "correct", "wrong", "wrong"])
        evaluated(store, 2, ["correct", "wrong", "correct", "wrong"])
        uris.append(store.uri)
    report.report_run(uris, None, str(folder / "report.html"), True)
    return str(folder / "report.html")
