"""The grader on answers of every kind: each has a right verdict (answers.jsonl), and no hostile answer is accepted."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.grader.verifier import Graded, Grader

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
GOLDS = [
    *(
        "18",
        "-7",
        "3.5",
        "1200",
        "12",
        "50\\%",
        "B",
        "4t",
        "4210_5",
        "x=5",
        "3+4i",
        "x^2-1",
        "(1,2)",
        "[2,5)",
        "10^{-8}",
        "2^{100}",
    ),
    *(r"\frac{3}{4}", r"\sqrt{2}", r"2\pi", r"\{1,2,3\}", r"\$18.90", r"\text{even}", r"1.6\times10^{-19}", r"(-\infty,3)"),
    *(
        r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}",
        r"\frac{x+1}{2}",
        r"5\text{ cm}",
        "e^{-20}",
        r"\text{Monday}",
        r"1\frac{1}{2}",
    ),
]
# GOLD is the reference and OTHER the reference of another problem
HOSTILE = {
    "another problem's answer": r"So the result is \boxed{OTHER}.",
    "another problem's answer after ####": "We compute.\n#### OTHER",
    "denied before": r"The answer is not \boxed{GOLD}.",
    "denied after": r"\boxed{GOLD} is wrong.",
    "denied, then another": r"It is not \boxed{GOLD}. The answer is \boxed{OTHER}.",
    "denied inside the box": r"\boxed{\text{not } GOLD}",
    "denied statement": "The answer is not $GOLD$.",
    "doubted statement": "I do not think that the answer is $GOLD$.",
    "impossible": "It cannot be $GOLD$.",
    "called wrong": "$GOLD$ is wrong.",
    "listed": r"\boxed{GOLD, OTHER}",
    "listed with or": r"\boxed{OTHER \text{ or } GOLD}",
    "listed with and": r"\boxed{OTHER \text{ and } GOLD}",
    "listed with a slash": r"\boxed{OTHER / \text{or} / GOLD}",
    "boxes in a row": r"\boxed{OTHER} \boxed{GOLD}",
    "boxes with or": r"\boxed{GOLD} or \boxed{OTHER}",
    "boxes of guesses": r"\boxed{1}, \boxed{7/3}, \boxed{OTHER}, \boxed{GOLD}, \boxed{\pi^2}",
    "boxes on lines": "\\boxed{OTHER}\n\\boxed{GOLD}\n\\boxed{-99}",
    "a guess, then another answer": r"Maybe \boxed{GOLD}. Let me check that with more care; it turns out to be \boxed{OTHER}.",
    "only in the thought": r"<think>The answer is \boxed{GOLD}</think> I could not find it.",
    "in the thought, then another": r"<think>\boxed{GOLD}</think> \boxed{OTHER}",
    "in a thought that does not end": r"<think>The answer is \boxed{GOLD}",
    "a question": "Is the answer $GOLD$?",
    "the question repeated": "What is the value if it is not $GOLD$?",
    "a mention": "I don't know, see $GOLD$ in the book.",
    "nothing": "",
    "an empty box": r"\boxed{}",
    "hidden": r"\boxed{\phantom{GOLD}}",
    "struck out": r"\boxed{\cancel{GOLD} OTHER}",
    "not equal": r"\boxed{\neq GOLD}",
    "a variable that is not equal": r"\boxed{q \neq GOLD}",
    "greater": r"\boxed{> GOLD}",
    "about another": r"\boxed{(GOLD) \approx (OTHER)}",
    "a sum": r"\boxed{GOLD + OTHER}",
    "a product": r"\boxed{(GOLD) \cdot q}",
    "either": "The answer is either $GOLD$ or $OTHER$.",
    "an answer that is taken back": "The answer is $GOLD$. Wait, the answer is $OTHER$.",
    "both signs": r"\boxed{\pm (GOLD)}",
    "millions": r"\boxed{GOLD \text{ million}}",
    "another answer in the tag": "The answer is GOLD. <answer>OTHER</answer>",
    "a list of formulas": "The candidates are $OTHER$ and $GOLD$.",
    "a list that goes on": r"\boxed{GOLD, \ldots}",
    "an ending left out": r"\boxed{GOLD \ldots}",
    "a count of something else": r"\boxed{\text{two times } GOLD}",
    "out of": r"\boxed{GOLD \text{ out of } 97}",
    "a cube root of another": r"\boxed{\sqrt[3]{OTHER}}",
    "a residue": r"\boxed{OTHER \pmod{97}}",
}


TINY = {r"1.6\times10^{-19}", "e^{-20}"}


@pytest.fixture(scope="module")
def grader():
    with closing(Grader(deadline_s=30)) as grader:
        yield grader


def graded(grader: Grader, rows: list[dict]) -> list[Graded]:
    return grader.grade([row["response"] for row in rows], [row["gold"] for row in rows], ["stop"] * len(rows))


def hostile() -> list[dict]:
    return [
        {
            "kind": kind,
            "gold": gold,
            "response": form.replace("OTHER", GOLDS[(place + 7) % len(GOLDS)]).replace("GOLD", gold),
        }
        for kind, form in HOSTILE.items()
        for place, gold in enumerate(GOLDS)
        if not (kind == "a sum" and GOLDS[(place + 7) % len(GOLDS)] in TINY)  # equal within the tolerance
    ]


def test_every_answer_has_its_verdict(grader):
    right = {"wrong": {"wrong", "unparsable"}, "unparsable": {"wrong", "unparsable"}, "correct": {"correct"}}
    failed = [
        (row, result)
        for row, result in zip(ROWS, graded(grader, ROWS), strict=True)
        if result.verdict not in right[row["expected"]]
    ]
    assert not failed


def test_no_hostile_answer_is_accepted(grader):
    rows = hostile()
    assert len(rows) >= 1000
    accepted = [row for row, result in zip(rows, graded(grader, rows), strict=True) if result.verdict == "correct"]
    assert not accepted
