"""What users rely on changes on purpose only: verbs, options, settings, recipes, columns, stages, exit codes, names.

A failure names every item that changed. Where the change is wanted, `python -m tests.surface --write` renews tests/surface.json,
and the commit says what users must do.
"""

import json

import surface as measured

from pipeline import errors
from pipeline.config import Label, Run

STORED = json.loads(measured.FILE.read_text())


def test_the_surface_is_the_one_that_users_know():
    changed = measured.differences(STORED, measured.surface())
    assert not changed, "\n".join(["what users rely on has changed:", *changed, "wanted? python -m tests.surface --write"])


class OtherLabel(Label):
    gamma: float = 0.25
    brightness: float = 1.0


class OtherRun(Run):
    label: OtherLabel = OtherLabel()


def test_a_changed_default_and_a_new_setting_are_seen(monkeypatch):
    monkeypatch.setattr(measured, "Run", OtherRun)
    changed = measured.differences(STORED, measured.surface())
    assert [line for line in changed if line.startswith("settings label.gamma: ") and line.endswith('"default": 0.25}')], changed
    assert [line for line in changed if line.startswith("settings label.brightness: (absent) -> ")], changed


def test_a_lost_option_and_a_number_of_another_type_are_seen():
    found = json.loads(measured.FILE.read_text())
    del found["verbs"]["distill accept_changes"]
    found["settings"]["rounds"]["default"] = 20.0
    found["exit_codes"]["UserError"] = 1
    items = [line.partition(": ")[0] for line in measured.differences(STORED, found)]
    assert items == ["verbs distill accept_changes", "settings rounds", "exit_codes UserError"]


def test_the_stored_file_is_as_it_would_be_written():
    assert measured.FILE.read_text() == measured.to_text(STORED)


def test_an_error_that_ray_makes_while_a_process_runs_is_no_part_of_the_surface():
    kind = type("RayTaskError(EngineError)", (errors.EngineError,), {})
    assert kind.__name__ not in measured.surface()["exit_codes"]
