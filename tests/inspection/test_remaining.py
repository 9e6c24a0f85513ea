"""What a run directory leaves to be done. Small rounds of fake engines, and policies of any bytes."""

import pytest
from in_process import SETS, brought, evaluate, planned, publish

from pipeline.errors import UserError
from pipeline.inspection.remaining import Remaining, trainable_rounds
from pipeline.inspection.staleness import look
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.stages import LABELS, MEASURE
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED, drop_weights

RUN = resolve(demo(), [*SETS, "rounds=2", "evaluation.problems=0"])


def trained_once(tmp_path):
    """A run whose round 0 is measured and trained, with its training state."""
    work = planned(tmp_path / "run", "rounds=2")
    brought(work, *MEASURE)
    folder = tmp_path / "made"
    folder.mkdir()
    for name in NEEDED["train"]:
        (folder / name).write_text("a policy")
    work.store.save_state(1, folder)
    work.store.publish_policy(1, folder)
    return work


def test_an_empty_run_needs_everything(tmp_path):
    remaining = Remaining.of(Store(str(tmp_path)), resolve(RUN, ["evaluation.problems=4"]))
    assert remaining == Remaining(train=[0, 1], label=[], evaluate=[0, 2], stale=[])
    assert remaining.asking == ("rollout", "score", "evaluation")
    assert remaining.describe(RUN) == "2 rounds of recipe demo"


def test_a_trained_round_is_labelled_later_and_its_stale_stages_are_only_told(tmp_path):
    work = trained_once(tmp_path)
    assert Remaining.of(work.store, RUN) == Remaining([1], [0], [], [])
    assert Remaining.of(work.store, RUN).describe(RUN) == "resuming: rounds 1 to 1 to train, 1 rounds to label"
    brought(work, *LABELS)
    assert Remaining.of(work.store, RUN) == Remaining([1], [], [], [])
    done = Remaining.of(work.store, resolve(RUN, ["rounds=1"]))
    assert done.is_empty
    assert done.asking == ()
    assert Remaining([], [0], [1], []).asking == ("evaluation",)  # a teacher of its own is not asked
    changed = Remaining.of(work.store, resolve(RUN, ["grade.beta_length=0", "label.gamma=1"]))
    assert changed.label == []  # labels are not made from stale grades
    uri = work.store.uri
    assert changed.stale == [
        "stale: grade of round 0 (settings), and trained on",
        f"mend: `egrsd stage grade --run {uri} --round 0`, then `egrsd train --run {uri} --from-round 0 --replace`",
    ]


def test_a_stale_evaluation_of_an_earlier_end_is_made_anew_by_the_command_that_is_named(tmp_path):
    """Of a prolonged run `status` named `egrsd distill` for ever, and that command answered that nothing was to do."""
    store, run = Store(str(tmp_path / "run")), resolve(RUN, ["evaluation.problems=4"])
    for version in (0, 1, 2):
        if version:
            publish(store, version, tmp_path / "policy")
        evaluate(store, run, version)
    assert Remaining.of(store, run).is_empty
    cooler = resolve(run, ["evaluation.temperature=0.5"])
    assert look(store, cooler).remedies() == [f"`egrsd distill --run {store.uri}`"]
    assert Remaining.of(store, cooler).evaluate == [0, 1, 2]
    for version in (0, 2):
        evaluate(store, cooler, version)
    drop_weights(store, "policy/0001")
    assert look(store, cooler).lines() == ["stale: evaluation of policy 1 (settings)"]  # nobody can answer for it any more
    assert Remaining.of(store, cooler).is_empty
    publish(store, 1, tmp_path / "policy")
    for version in Remaining.of(store, cooler).evaluate:
        evaluate(store, cooler, version)
    assert look(store, cooler).is_empty


def test_only_measured_rounds_without_a_gap_are_trained(tmp_path):
    with pytest.raises(UserError, match="round 0 is not measured"):
        trainable_rounds(Store(str(tmp_path)), RUN, 0)
    for number in (0, 1, 3):
        brought(planned(tmp_path, "max_staleness=3", number=number), *MEASURE)
    planned(tmp_path, number=2)
    store, run = Store(str(tmp_path)), resolve(RUN, ["rounds=4", "max_staleness=3"])
    assert [work.number for work in trainable_rounds(store, run, 0)] == [0, 1]
    with pytest.raises(UserError, match="rolled out by policy 0, more than max_staleness 0 behind"):
        trainable_rounds(store, RUN, 0)


def test_a_stale_round_is_not_trained_and_its_stage_is_named(tmp_path):
    work = trained_once(tmp_path)
    assert [work.number for work in trainable_rounds(work.store, RUN, 0)] == [0]
    with pytest.raises(UserError, match=r"grade is stale \(settings\).*`egrsd stage grade --run .* --round 0` first"):
        trainable_rounds(work.store, resolve(RUN, ["grade.beta_length=0"]), 0)
    with pytest.raises(UserError, match="round 1 is not measured"):
        trainable_rounds(work.store, RUN, 1)
    work.store.delete("train/0001")
    with pytest.raises(UserError, match=r"training state beside policy 1 is not kept.*these rounds: 0"):
        trainable_rounds(work.store, RUN, 1)
