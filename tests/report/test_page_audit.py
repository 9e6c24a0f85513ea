"""The audit of a tiny world in the report: its tables, and the alignment of every token on the text."""

from __future__ import annotations

import pytest
from audited_world import audited_world
from pages import chosen, complaints, opened, soon, text
from selenium.webdriver.common.by import By

from jobs import report
from pipeline.evidence import documents
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round

pytestmark = pytest.mark.timeout(600)


AVERAGED = {"value": 0.123, "low": 0.111, "high": 0.135}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(store, page) of a run with an audit."""
    store = audited_world(tmp_path_factory.mktemp("page") / "run")
    document = store.read_json(documents.path_of(0, "json"))
    document["points"][1]["averaged_cosine"] = AVERAGED  # 24 problems tell no direction, and so no averaged cosine
    store.write_json(documents.path_of(0, "json"), document)
    report.report_run([store.uri], None, None, True)
    return store, f"{store.uri}/report.html"


def test_the_figures_of_an_audit_are_on_the_page(driver, world):
    store, page = world
    opened(driver, page, "#evidence")
    for summary in driver.find_elements(By.CSS_SELECTOR, "#view-evidence summary"):
        summary.click()
    shown = text(driver, "#view-evidence")
    assert "From 96 stored traces of 24 problems" in shown
    points = store.read_json(documents.path_of(0, "json"))["points"]
    push = next(point["push"] for point in points if point["name"] == "oracle")
    for one in (push, AVERAGED):
        assert f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" in shown.replace("\u2212", "-")
    for words in (
        "by tenth of the teacher's entropy",
        "What each true class of tokens has",
        "tokens of one class alone",
        "1.278",
        "75.0 %",
    ):
        assert words.lower() in shown.lower(), words
    assert complaints(driver) == []


def test_every_token_is_tinted_by_its_alignment(driver, world):
    store, page = world
    opened(driver, page, "#traces")
    chosen(driver, colour="alignment")
    soon(driver, ".legend.marks", "how far a likelier token raises accuracy")
    trace, found = driver.execute_script("return [reader.trace.id, Array.from(reader.signals.alignment)]")
    stored = documents.read_alignment(store, 0, Inventory(open_round(store, store.load_run(), "rounds", 0)).measured)[trace]
    assert found == pytest.approx(stored.tolist(), rel=2e-3, abs=1e-6)  # half precision
    tints = driver.execute_script("return reader.spans.map(s => s.className)")
    assert len({tint.split()[-1] for tint in tints}) > 2
    assert "alignment" in [name.text for name in driver.find_elements(By.CSS_SELECTOR, "#inspector dt")]
    assert complaints(driver) == []


def test_a_run_without_an_audit_offers_no_such_colour(driver, real):
    opened(driver, real, "#traces")
    assert not driver.find_elements(By.CSS_SELECTOR, "[data-name=colour] option[value=alignment]")
