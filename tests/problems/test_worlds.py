"""Tiny worlds: problems, traces whose dials do what they say, true classes of tokens, what is refused."""

import random

import numpy as np
import pytest

from pipeline.config import Source
from pipeline.errors import SettingError
from pipeline.problems import worlds
from pipeline.problems.sources import open_source
from pipeline.problems.worlds import CLASSES, World

EARLIER = ("84!34?78?", ["abcqt=8:8;abcqp=4:4;abcuu=8:8#848", "abctq=8:8;abcqq=4:4;abcqp=8:8#848"])


def named(classes):
    return [CLASSES[code] for code in classes]


def test_the_example_of_the_module_has_the_classes_that_it_says():
    world = World(forks=2, pivots=2, filler=3)
    text = "ok,abcqt=7:7;abcps=4:4;ok,abcqq=9:9#749"
    found = named(worlds.token_classes("37?42!91?", text, world))
    assert len(found) == len(text)
    assert found[:13] == ["style"] * 3 + ["filler"] * 3 + ["fork"] * 2 + ["filler", "pivot"] + ["filler"] * 3
    assert found[13:23] == ["style", *["filler"] * 2, *["fork"] * 2, "filler", "choice", *["filler"] * 3]
    assert found.count("pivot") == 2
    assert found[-4:] == ["filler"] * 4


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("abcqt=5:5", 3),
        ("abcqt=7:3;", 2),
        ("abqt", 2),
        ("abcqt=7:7;abcps=4:4;abcqq=9:9#7499", 1),
        ("abcqt=7:7;abcps=4:4;abcqq=9:9#949", 3),  # a copied digit that makes the answer wrong was filler
        ("abcqt=3:3;abcps=4:4;abcqq=9:9#347", 1),
        ("abcqt=3:3;abcps=4:4;abcqq=9:9#349", 0),
        ("", 0),
        ("zz", 2),
        ("abcqt=7", 0),
    ],
)
def test_what_the_world_cannot_write_is_of_no_class(text, others):
    found = named(worlds.token_classes("37?42!91?", text, World()))
    assert found == found[: len(text) - others] + ["other"] * others
    assert "other" not in found[: len(text) - others]


@pytest.mark.parametrize("world", [World(), World(0, 0, 0, 0.0), World(6, 3, 10, 1.0), World(0, 1, 0, 0.3)])
def test_every_trace_of_a_world_has_a_class_for_each_character(world):
    rng = random.Random(1)
    for index in range(60):
        item = worlds.problem(index, 0, "train", world)
        for habits in (world.unaided, world.aided):
            text = worlds.trace(item["problem"], rng, world, habits)
            found = named(worlds.token_classes(item["problem"], text, world))
            assert "other" not in found
            assert found.count("pivot") == world.pivots
            # a step without filler and remark begins with its fork, and that character is of class style
            assert 3 * max(0, world.forks - (not world.filler)) <= found.count("fork") <= 3 * world.forks


def test_problems_are_repeatable_and_splits_share_none():
    world = World(pivots=1)
    train = {worlds.problem(i, 0, "train", world)["problem"].replace("?", "!") for i in range(300)}
    test = {worlds.problem(i, 0, "test", world)["problem"].replace("?", "!") for i in range(100)}
    assert not train & test
    item = worlds.problem(3, 0, "train", world)
    assert item == worlds.problem(3, 0, "train", world)
    assert item["problem"].count("?") == 1
    assert item["solution"] == ";".join(item["answer"]) + "#" + item["answer"]
    with pytest.raises(SettingError, match="no split"):
        worlds.problem(0, 0, "dev", world)


def test_style_moves_what_does_not_matter_and_nothing_else():
    """With style 1: a remark before .5 x .1 of the steps, and .95 of the fork letters of the first half."""
    plain, styled = World(style=0.0), World(style=1.0)
    assert plain.aided.pivot == styled.aided.pivot > plain.unaided.pivot
    rng, texts = random.Random(0), []
    for index in range(400):
        item = worlds.problem(index, 0, "train", styled)
        texts.append(worlds.trace(item["problem"], rng, styled, styled.aided))
    joined = "".join(texts)
    letters = [letter for letter in joined if letter in worlds.FORK]
    assert joined.count(worlds.REMARK) / 1200 == pytest.approx(0.05, abs=0.02)
    assert sum(letter in "pqr" for letter in letters) / len(letters) == pytest.approx(0.95, abs=0.02)


def test_an_early_answer_has_its_choices_in_the_answer():
    """After the first step: the digit that was told is filler, the two choices that are left are a choice and a pivot."""
    world, text = World(forks=2, pivots=2, filler=3, early=0.5), "ok,abcqt=7:7#742"
    found = named(worlds.token_classes("37?42!21?", text, world))
    assert found[11:] == ["filler", "style", "filler", "choice", "pivot"]
    plain = named(worlds.token_classes("37?42!21?", text, World()))
    assert plain[12:] == ["other"] * 4
    assert named(worlds.token_classes("37?42!21?", "ok,abcqt=7:7;", world))[-1] == "style"
    assert named(worlds.token_classes("37?42!21?", "ok,abcqt=7:7#342", world))[13:] == ["other"] * 3


def test_early_moves_how_often_a_step_is_skipped_and_not_how_often_an_answer_is_right():
    """Unaided .1 after each of two steps, .19 in all; aided .1 + .8 x .5 = .5, .75 in all. Without early nobody skips."""
    for world, writer, expected in (
        (World(early=0.5), "unaided", 0.19),
        (World(early=0.5), "aided", 0.75),
        (World(), "aided", 0),
    ):
        rng, short, right = random.Random(0), 0, 0
        for index in range(1000):
            item = worlds.problem(index, 0, "train", world)
            text = worlds.trace(item["problem"], rng, world, getattr(world, writer))
            found = named(worlds.token_classes(item["problem"], text, world))
            assert "other" not in found
            assert found.count("pivot") == world.pivots
            short += text.count("=") < worlds.STEPS
            right += text.endswith("#" + item["answer"])
        assert short / 1000 == pytest.approx(expected, abs=0.04)
        assert right / 1000 == pytest.approx(0.8**2 * 0.97 if writer == "aided" else 0.6**2 * 0.9, abs=0.04)


def test_a_world_without_early_answers_writes_what_it_always_wrote():
    item, world = worlds.problem(0, 0, "train", World()), World()
    texts = [worlds.trace(item["problem"], random.Random(seed), world, world.aided) for seed in range(2)]
    assert (item["problem"], texts) == EARLIER


def test_a_source_reads_its_dials():
    source = Source(uri="tiny-worlds:forks=1,pivots=3,filler=0,style=0.2", split="test")
    rows = open_source(source).rows([0, 5])
    assert rows[0].problem.count("?") == 3
    assert open_source(source).fingerprint != open_source(source.model_copy(update={"uri": "tiny-worlds:pivots=3"})).fingerprint


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ("forks=7", "forks is '7'.*from 0 to 6"),
        ("pivots=1.5", "pivots is '1.5'.*whole number"),
        ("style=nan", "style is 'nan'"),
        ("style=2", "from 0 to 1"),
        ("early=1.2", "from 0 to 1"),
        ("fork=2", "is no dial"),
        ("forks", "is no dial"),
        ("forks=1,forks=2", "is no dial with one value"),
    ],
)
def test_other_dials_are_refused(dials, message):
    with pytest.raises(SettingError, match=message):
        open_source(Source(uri=f"tiny-worlds:{dials}"))


def test_regimes_are_scored_against_the_truth():
    """Regime 3 on tokens 0, 1, 2; class fork on 1, 2, 3, 4: precision 2 / 3, recall 2 / 4."""
    fork = CLASSES.index("fork")
    regimes, classes = np.array([3, 3, 3, 0, 0]), np.array([0, fork, fork, fork, fork])
    assert worlds.scores(regimes, classes, 3, "fork") == {"precision": 2 / 3, "recall": 0.5}
    assert worlds.scores(np.array([0]), np.array([0]), 3, "fork") == {"precision": None, "recall": None}
