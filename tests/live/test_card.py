"""The lock of the card that engine and trainer share, with real processes: it ends with its holder, however that ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from pipeline.live import card
from pipeline.live.card import Card

ROOT = Path(__file__).parent.parent.parent
HOLDS = """
import sys, time
from pipeline.live.card import Card
assert Card(sys.argv[1]).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return "card of a test"


@pytest.fixture
def holder(name):
    """A process that holds the card until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_card_is_free_when_the_process_that_held_it_was_killed_and_not_before(name, holder):
    mine = Card(name)
    assert not mine.take(within_s=0.2)
    assert mine.holder() == str(holder.pid)
    holder.kill()
    assert mine.take(within_s=60)
    assert mine.take(within_s=0)  # a holder keeps it
    assert not Card(name).take(within_s=0)


def test_whoever_waits_gets_a_card_that_is_released_and_no_file_stays(name, tmp_path):
    first, second = Card(name), Card(name)
    assert first.take()
    assert not second.take(within_s=0)
    first.release()
    assert second.take(within_s=0)
    assert not first.take(within_s=0)
    second.release()
    second.release()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_waiter_stops_when_it_is_told_to_and_a_block_says_so(name, holder):
    with Card(name).held(stopped=lambda: True) as mine:
        assert mine is False
    holder.kill()
    waiter = Card(name)
    with waiter.held() as mine:
        assert mine is True
        assert not Card(name).take(within_s=0)
    assert until(lambda: Card(name).take(within_s=0), what="the card is free behind the block")


def test_a_driver_hands_one_name_to_engine_and_trainer():
    assert card.name_here() == card.name_here()
