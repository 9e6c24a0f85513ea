"""Words to the person who waits: one for each kind, at the terminal or in the log."""

import logging

from waiting import until

from pipeline import notices


def test_one_word_for_each_kind_and_the_rest_in_the_log(caplog):
    said = []
    with notices.shown(said.append), caplog.at_level(logging.INFO):
        for number in range(3):
            notices.tell("engine", f"engine {number}")
        notices.tell("dispatcher", "dispatcher")
    assert said == ["engine 0", "dispatcher"]
    assert [record.getMessage() for record in caplog.records] == ["engine 1", "engine 2"]


def test_without_a_terminal_words_are_warnings_of_the_log(caplog):
    notices.tell("engine", "engine 0")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "engine 0")]


def test_what_is_seen_again_and_again_is_told_when_it_is_news(caplog):
    seconds = [0, 2, 59, 60, 61, 200, 201]
    sparing = notices.Sparing(iter(seconds).__next__)
    for text, about in (("a", ""), ("b", ""), ("a", ""), ("b", "x"), ("b", ""), ("b", ""), ("c", "")):
        sparing.tell("engine", text, about)
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "b", "c"]


def test_a_block_is_told_of_only_when_it_is_late(monkeypatch):
    said = []
    with notices.shown(said.append):
        with notices.late("quick", "quick"):
            pass
        monkeypatch.setattr(notices, "NOTICE_S", 0.01)
        with notices.late("late", "late"):
            until(lambda: said)
    assert said == ["late"]
