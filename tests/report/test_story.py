"""The story says what its figures say: gains and losses only beyond their interval, and what is odd."""

from __future__ import annotations

import pytest

from pipeline.report.story import tell


def a_round(number, **changes):
    whole = {"round": number, "traces": 64, "steps": 1, "accuracy": 0.5, "reward": 0.6, "length": 40.0, "truncated": 0.0}
    whole |= {"student_entropy": 0.2, "trainer_gap": 1e-6, "groups": 8.0, "groups_without_signal": 1.0, "grad_norm": 0.1}
    return whole | changes


def told(rounds=None, moved=(0.1, 0.05, 0.15), longer=(-5.0, -6.0, -4.0), worse=0, **changes):
    """The sentences on a run of three rounds, with changes."""
    estimate = lambda found: dict(zip(("value", "low", "high"), found, strict=True))  # noqa: E731
    document = {
        "run": {"name": "demo", "called": "recipe demo", "source": "sums"},
        "rounds": rounds or [a_round(0), a_round(1), a_round(2, accuracy=0.75)],
        "ledger": {"adds_up": True, "total": {"traces": 1920, "in_loss": 1900, "num_rejected": 0, "current": True}},
        "evaluations": [{"policy": 0, "accuracy": {"value": 0.5}}, {"policy": 3, "accuracy": {"value": 0.6}}],
        "change": {"accuracy": estimate(moved), "length": estimate(longer), "better": 20, "worse": worse, "problems": 100},
        "warnings": [],
    }
    return [(one["kind"], one["text"]) for one in tell(document | changes)]


def test_a_gain_beyond_its_interval_is_told_with_it():
    assert told()[:3] == [
        ("fact", "3 rounds of recipe demo on sums: 1,920 traces, 1,900 of them trained on."),
        ("gain", "Accuracy rose on 100 held-out problems from 50.0 % to 60.0 % (+10.0 points, 95 % interval +5.0 to +15.0)."),
        ("fact", "Answers became shorter: \u22125.0 tokens (\u22126.0 to \u22124.0)."),
    ]
    ends = "mean reward 0.60 to 0.60, length 40.0 to 40.0 tokens, entropy of the student 0.200 to 0.200 nats."
    assert ("fact", f"In training, from round 0 to round 2: accuracy 50.0 % to 75.0 %, {ends}") in told()
    assert not [text for kind, text in told() if kind == "odd"]


def test_a_change_within_its_interval_is_no_gain():
    kind, text = told(moved=(0.02, -0.01, 0.05), longer=(1.0, -1.0, 3.0))[1]
    assert kind == "same"
    assert text.startswith("Accuracy did not change beyond noise on 100")
    assert not any("Answers became" in said for _, said in told(longer=(1.0, -1.0, 3.0)))


def test_a_loss_is_told():
    assert told(moved=(-0.1, -0.2, -0.05))[1][0] == "loss"
    assert ("loss", "What was lost: 3 problems got worse while 20 got better, comparing policy 0 and policy 3.") in told(worse=3)
    assert any("Answers became longer: +5.0" in text for _, text in told(longer=(5.0, 4.0, 6.0)))


def test_without_evaluations_nothing_is_claimed():
    said = "No two policies answered the same held-out problems with the same settings: the gain is not measured."
    assert told(change=None)[1] == ("fact", said)


RUN = {"name": "demo", "called": "recipe demo", "source": "sums"}
CUT = {"policy": 3, "accuracy": {"value": 0.5}, "truncated": 0.3}
REASONS = {"rollout": {"too_long": 8}, "grade": {"no_answer": 12}}
TOTAL = {"traces": 1920, "in_loss": 1900, "num_rejected": 0, "current": True}


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"rounds": [a_round(0), a_round(1, trainer_gap=0.05)]}, "differ by 0.05 nat on average in round 1"),
        ({"rounds": [a_round(0, truncated=0.25)]}, "25 % of the traces of round 0 reached the limit"),
        ({"rounds": [a_round(0, groups_without_signal=6.0)]}, "1 round had no signal in most groups (round 0: 75 %)"),
        ({"rounds": [a_round(0), a_round(1, student_entropy=0.05)]}, "fell to 25 % of the first round's"),
        ({"rounds": [a_round(0), a_round(1), a_round(2, grad_norm=5.0)]}, "gradient of round 2 has 50 times the usual norm"),
        ({"ledger": {"adds_up": False, "total": TOTAL}}, "The ledger does not add up"),
        ({"ledger": {"adds_up": True, "total": TOTAL | {"current": False}}}, "computed again after their round was trained on"),
        ({"ledger": {"adds_up": True, "total": TOTAL | {"num_rejected": 20}}}, "20 traces of 1,920 were rejected"),
        ({"ledger": {"adds_up": True, "total": TOTAL | {"num_rejected": 20, "rejected": REASONS}}}, "(12 no answer, 8 too long)"),
        ({"evaluations": [CUT | {"policy": 0}, CUT]}, "30 % of the held-out answers of policy 3 reached the limit"),
        (
            {"run": RUN | {"largest_gap": 0.001, "dtype": "float32"}, "rounds": [a_round(0, trainer_gap=0.03)]},
            "0.03 nat on average in round 0: more than float32 explains; the run ends above 0.001",
        ),
        ({"sample": {"rounds": {"0": {"note": "Labels show."}, "1": {"note": None}}}}, "Labels show. (1 round of 2)"),
        ({"warnings": ["bounds instead"]}, "bounds instead"),
    ],
)
def test_what_is_odd_is_told(changes, odd):
    found = [text for kind, text in told(**changes) if kind == "odd"]
    assert len(found) == 1
    assert odd in found[0]


def test_groups_of_equal_rewards_are_no_oddity_where_the_objective_reads_no_advantage():
    """A run of `opd` whose student is mostly right was called odd."""
    silent = [a_round(0, groups_without_signal=6.0)]
    assert not [text for kind, text in told(rounds=silent, run=RUN | {"advantage": "unread"}) if kind == "odd"]
    assert [text for kind, text in told(rounds=silent, run=RUN | {"advantage": "used"}) if kind == "odd"]


def test_a_gap_that_half_precision_explains_is_no_oddity():
    """A newcomer saw a red mark beside .0312 nat, which bfloat16 has, and asked whether that is bad."""
    run = RUN | {"largest_gap": 0.05, "dtype": "bfloat16"}
    found = told(run=run, rounds=[a_round(0, trainer_gap=0.0312)])
    text = (
        "Log-probs of engine and trainer differ by 0.0312 nat on average in round 0: usual for bfloat16; the run ends above 0.05."
    )
    assert ("fact", text) in found
    assert not [said for kind, said in found if kind == "odd"]


def test_accuracies_come_with_how_they_were_sampled():
    """A newcomer read 6.7 % and would have published it. Asked greedily the same policy had 53.3 %."""
    ends = [{"policy": number, "accuracy": {"value": 0.5}, "sampling": "at temperature 1"} for number in (0, 3)]
    assert ("fact", "Held-out answers were sampled at temperature 1.") in told(evaluations=ends)


def test_what_evaluate_found_of_the_first_and_the_last_policy_is_told():
    """A greedily sampled evaluation stood in `status` and nowhere on the page."""
    asked = {0: ["30 problems (T 1, top-k 1): accuracy 53.3 %"], 2: ["x"], 3: ["30 problems (T 1, top-k 1): accuracy 90.0 %"]}
    said = [text for _, text in told(asked=asked) if "egrsd evaluate" in text]
    assert said == [f"`egrsd evaluate`, policy {number}, {asked[number][0]}." for number in (0, 3)]
