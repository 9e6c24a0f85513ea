"""The story of a run in words, made from the figures of its page: what improved, what was lost, what is odd."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

GAP = 0.01  # mean |log-prob gap| of engine and trainer in nats; importance ratios are then off by a percent
MOST_TRUNCATED = 0.1  # share of traces
MOST_SILENT = 0.5  # share of groups without signal
COLLAPSE = 0.5  # share of the first round's student entropy that the last one keeps at least
_SIGN = re.compile(r"(?<![\w/])-(?=\d)")  # a minus sign before a number, not the hyphen of a name
_PERCENT = re.compile(r"(\d)%")  # as the figures of the page have it
JUMP = 10.0  # times the median of the rounds' gradient norms


class Sentence(NamedTuple):
    """One sentence. kind: "fact", "gain", "loss", "same" or "odd". view: the part of the page that has more."""

    kind: str
    text: str
    view: str


def tell(document: dict[str, Any]) -> list[dict[str, str]]:
    """The sentences of a run's document, in the order in which they are read."""
    rounds = [figures for figures in document["rounds"] if figures["traces"]]
    held_out = (*_held_out(document), *_asked(document.get("asked", {})))
    gap = _gap(document["run"], rounds)
    usual = [gap] if gap is not None and gap.kind == "fact" else []
    told = [_about(document, rounds), *held_out, *_training(rounds), *usual, *_odd(document, rounds)]
    return [sentence._replace(text=_SIGN.sub("\u2212", _PERCENT.sub(r"\1 %", sentence.text)))._asdict() for sentence in told]


def _about(document: dict[str, Any], rounds: list[dict[str, Any]]) -> Sentence:
    total, run = document["ledger"]["total"], document["run"]
    trained = sum(figures["steps"] > 0 for figures in rounds)
    done = f"{_many(trained, 'round')} of {run['called']} on {run['source']}: {total['traces']:,} traces"
    return Sentence("fact", f"{done}, {total['in_loss']:,} of them trained on.", "run")


def _held_out(document: dict[str, Any]) -> Iterator[Sentence]:
    """Accuracy and length on the held-out problems: the last policy against the first."""
    change, evaluations = document["change"], document["evaluations"]
    if change is None or not change["accuracy"]:
        told = "No two policies answered the same held-out problems with the same settings: the gain is not measured."
        yield Sentence("fact", told, "run")
        return
    first, last = evaluations[0], evaluations[-1]
    moved, low, high = (100 * change["accuracy"][name] for name in ("value", "low", "high"))
    before, after = (100 * end["accuracy"]["value"] for end in (first, last))
    interval = f"{moved:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
    kind, word = _direction(low, high, "rose", "fell")
    ends = f"on {change['problems']} held-out problems from {before:.1f} % to {after:.1f} % ({interval})"
    yield Sentence(
        kind, f"Accuracy {word} {ends}." if kind != "same" else f"Accuracy did not change beyond noise {ends}.", "policies"
    )
    if "sampling" in last:
        yield Sentence("fact", f"Held-out answers were sampled {last['sampling']}.", "policies")
    if change["length"]:
        moved, low, high = (change["length"][name] for name in ("value", "low", "high"))
        kind, word = _direction(-high, -low, "shorter", "longer")
        if kind != "same":
            yield Sentence("fact", f"Answers became {word}: {moved:+.1f} tokens ({low:+.1f} to {high:+.1f}).", "policies")
    if change["worse"]:
        lost = f"{_many(change['worse'], 'problem')} got worse while {change['better']} got better"
        yield Sentence(
            "loss", f"What was lost: {lost}, comparing policy {first['policy']} and policy {last['policy']}.", "policies"
        )


def _asked(found: dict[int, list[str]]) -> Iterator[Sentence]:
    """What the first and the last policy had of other sources, or of the same one with other sampling."""
    for version in sorted({min(found), max(found)}) if found else ():
        for line in found[version]:
            yield Sentence("fact", f"`egrsd evaluate`, policy {version}, {line}.", "run")


def _direction(low: float, high: float, up: str, down: str) -> tuple[str, str]:
    """What an interval of a gain says: ("gain", up), ("loss", down) or ("same", "")."""
    return ("gain", up) if low > 0 else ("loss", down) if high < 0 else ("same", "")


def _training(rounds: list[dict[str, Any]]) -> Iterator[Sentence]:
    """The first and the last round of training, which asked different problems."""
    rounds = [figures for figures in rounds if figures.get("complete", True)]  # a round at work has some of its problems
    if len(rounds) < 2:
        return
    first, last = rounds[0], rounds[-1]
    parts = [
        f"{name} {format(first[key], form)} to {format(last[key], form)}{unit}"
        for name, key, form, unit in (
            ("accuracy", "accuracy", ".1%", ""),
            ("mean reward", "reward", ".2f", ""),
            ("length", "length", ".1f", " tokens"),
            ("entropy of the student", "student_entropy", ".3f", " nats"),
        )
        if first.get(key) is not None and last.get(key) is not None
    ]
    yield Sentence("fact", f"In training, from round {first['round']} to round {last['round']}: {', '.join(parts)}.", "run")


def _odd(document: dict[str, Any], rounds: list[dict[str, Any]]) -> Iterator[Sentence]:
    """What a reader should look at before believing the rest."""
    for text in document["warnings"]:
        yield Sentence("odd", text, "run")
    if not document["ledger"]["adds_up"]:
        yield Sentence("odd", "The ledger does not add up: a row is lost between source and loss.", "run")
    if not document["ledger"]["total"]["current"]:
        yield Sentence("odd", "Shards were computed again after their round was trained on: the page shows those of now.", "run")
    if rejected := document["ledger"]["total"]["num_rejected"]:
        said = f"{_many(rejected, 'trace')} of {document['ledger']['total']['traces']:,} were rejected"
        why = _reasons(document["ledger"]["total"].get("rejected", {}))
        yield Sentence("odd", f"{said}{why}. `Rejected rows` below names them.", "run")
    yield from _of_labels(document.get("sample", {}).get("rounds", {}))
    if document["evaluations"] and (last := document["evaluations"][-1]).get("truncated", 0) > MOST_TRUNCATED:
        said = f"{last['truncated']:.0%} of the held-out answers of policy {last['policy']} reached the limit of tokens"
        yield Sentence("odd", f"{said}, and count as wrong.", "policies")
    if (gap := _gap(document["run"], rounds)) is not None and gap.kind == "odd":
        yield gap
    if (worst := _worst(rounds, "truncated", MOST_TRUNCATED)) is not None:
        cut = f"{worst['truncated']:.0%} of the traces of round {worst['round']} reached the limit of tokens"
        yield Sentence("odd", f"{cut}, and count as wrong.", "run")
    yield from _of_signal(rounds, document["run"].get("advantage") != "unread")
    whole = [figures for figures in rounds if figures.get("complete", True)]
    start, end = (whole[place].get("student_entropy") if whole else None for place in (0, -1))
    if start and end is not None and end < COLLAPSE * start:
        yield Sentence("odd", f"The student's entropy fell to {end / start:.0%} of the first round's: it explores less.", "run")


def _worst(rounds: list[dict[str, Any]], name: str, most: float) -> dict[str, Any] | None:
    """The round with the largest value of a figure, where it is above `most`."""
    known = [figures for figures in rounds if figures.get(name) is not None and figures[name] > most]
    return max(known, key=lambda figures: figures[name]) if known else None


def _gap(run: dict[str, Any], rounds: list[dict[str, Any]]) -> Sentence | None:
    """How far the log-probs of engine and trainer are apart, where that is more than float32 explains.

    Half precision explains what lies within the limit of the run. Anything else is odd.
    """
    if (worst := _worst(rounds, "trainer_gap", GAP)) is None:
        return None
    said = f"Log-probs of engine and trainer differ by {worst['trainer_gap']:.3g} nat on average in round {worst['round']}"
    limit, dtype = run.get("largest_gap"), run.get("dtype", "float32")
    if limit is None:
        return Sentence("odd", f"{said}.", "run")
    usual = dtype != "float32" and worst["trainer_gap"] <= limit
    reason = f"usual for {dtype}" if usual else f"more than {dtype} explains"
    return Sentence("fact" if usual else "odd", f"{said}: {reason}; the run ends above {limit:g}.", "run")


def _of_labels(rounds: dict[str, dict[str, Any]]) -> Iterator[Sentence]:
    """What the labels that the page shows do not have in common with training, once for each kind."""
    notes = Counter(note for labels in rounds.values() if (note := labels.get("note")))
    for note, count in notes.items():
        where = "" if count == len(rounds) else f" ({_many(count, 'round')} of {len(rounds)})"
        yield Sentence("odd", f"{note}{where}", "groups")


def _reasons(rejected: dict[str, dict[str, int]]) -> str:
    """The commonest reasons in brackets: ` (8 missing answer)`. Empty when none is known."""
    found: Counter[str] = sum((Counter(reasons) for reasons in rejected.values()), Counter())
    listed = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found.most_common(3))
    return f" ({listed})" if listed else ""


def _of_signal(rounds: list[dict[str, Any]], reads_advantage: bool) -> Iterator[Sentence]:
    """Rounds without a signal, where the objective reads one, and rounds whose gradient is far from the others."""
    silent = [f for f in rounds if f.get("groups") and f["groups_without_signal"] > MOST_SILENT * f["groups"]]
    if silent and reads_advantage:
        worst = max(silent, key=lambda figures: figures["groups_without_signal"] / figures["groups"])
        share = worst["groups_without_signal"] / worst["groups"]
        said = f"{_many(len(silent), 'round')} had no signal in most groups (round {worst['round']}: {share:.0%})"
        yield Sentence("odd", f"{said}: all answers of a group got one reward.", "run")
    norms = sorted(figures["grad_norm"] for figures in rounds if figures.get("grad_norm") is not None)
    if len(norms) > 2 and norms[-1] > JUMP * (median := norms[len(norms) // 2]) > 0:
        worst = max((f for f in rounds if f.get("grad_norm") is not None), key=lambda figures: figures["grad_norm"])
        yield Sentence("odd", f"The gradient of round {worst['round']} has {norms[-1] / median:.0f} times the usual norm.", "run")


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
