"""The sample of one page: an index of groups and traces, and blocks with their texts and the signals of every token.

Numbers are half floats. Half precision keeps three digits at any size. Fixed-point numbers would lose the 0.002 nat of a token of
regime lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.report.figures import LabelledTraces
from pipeline.report.sampled.blocks import BLOCK_TOKENS, Words, pack
from pipeline.report.sampled.drawn import Limits, choose, groups_of
from pipeline.report.sampled.room import room
from pipeline.report.sampled.tokens import pieces
from pipeline.report.sampled.traces import ALTERNATIVES, groups_of_round, of_labels

MOST_PROMPT = 8_192  # tokens of one prompt that are shown, from its start; fewer when all prompts exceed their limit


def sample(measured: list[LabelledTraces], tokenizer: Any, limits: Limits | None = None) -> dict[str, Any]:
    """The sampled groups of all rounds in blocks, an index of them, the words that they use, and the counts behind the sample."""
    limits = limits or Limits()
    groups = groups_of(measured, limits.tokens)
    taken = choose(groups.strata, groups.keys, groups.traces, groups.tokens, limits)
    lengths = np.concatenate([rows.lengths for rows in measured])
    chosen = np.flatnonzero(np.isin(groups.of, taken))
    ends = np.cumsum([len(rows.trace_ids) for rows in measured])
    starts = [0, *ends[:-1].tolist()]
    found = [
        group
        for rows, start, end in zip(measured, starts, ends.tolist(), strict=True)
        for group in groups_of_round(rows, chosen[(chosen >= start) & (chosen < end)] - start)
    ]
    words = Words()
    most_text, most_prompt = _shorten(found, limits)
    shown = min(ALTERNATIVES, limits.alternatives // max(1, int(lengths[chosen].sum())))
    index = _Index()
    for group in found:
        index.add(group, words, most_prompt, shown)
    vocabulary = pieces(tokenizer, words.numbers)
    return {
        **index.document(),
        "rounds": {str(rows.seen.work.number): of_labels(rows.seen) for rows in measured if len(rows.trace_ids)},
        "vocabulary": [piece.text for piece in vocabulary],
        "kinds": "".join(piece.kind[0] for piece in vocabulary),  # t text, s special, b bytes
        "most_text": most_text,
        "most_prompt": most_prompt,
        "labelled": len(lengths),
        "labelled_groups": len({(g.seen.work.number, s, p) for g in measured for s, p in zip(g.shards, g.prompts, strict=True)}),
        "labelled_tokens": int(lengths.sum()),
        "shown_tokens": int(lengths[chosen].sum()),
        "strata": len(np.unique(groups.strata)),
    }


class _Index:
    """The index of traces and groups, column by column, and the blocks that are full."""

    def __init__(self) -> None:
        self.traces: dict[str, list[Any]] = {}
        self.groups: dict[str, list[Any]] = {}
        self.blocks: list[str] = []
        self._open = _Block()

    def add(self, group: dict[str, Any], words: Words, most_prompt: int, shown: int) -> None:
        """Put a group into the open block, and its facts into the index."""
        number = len(self.groups.get("round", []))
        for trace in group["traces"]:
            place = self._open.add_trace(trace, words, most_prompt, shown)
            _append(self.traces, trace["facts"] | {"group": number, "block": len(self.blocks), "place": place})
        self._open.add_group(group, words, most_prompt)
        _append(self.groups, group["facts"])
        if self._open.tokens >= BLOCK_TOKENS:
            self.close()

    def close(self) -> None:
        """Pack the open block, and begin the next."""
        if self._open.head["traces"]:
            self.blocks.append(self._open.packed())
            self._open = _Block()

    def document(self) -> dict[str, Any]:
        """Index and blocks as plain JSON."""
        self.close()
        return {"traces": self.traces, "groups": self.groups, "blocks": self.blocks}


class _Block:
    """A block that is being filled: texts in its head, numbers in sections."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {"traces": [], "groups": []}
        self.tokens = 0
        self._parts: dict[str, list[np.ndarray]] = {}
        self._prompts = 0

    def add_trace(self, trace: dict[str, Any], words: Words, most_prompt: int, shown: int) -> int:
        """Add a trace. Returns its place in the block."""
        ids, size = trace["ids"], len(trace["ids"])
        texts = {name: trace[name] for name in ("text", "extracted", "rewards", "taught")}
        texts |= {"start": self.tokens, "size": size, "context": self._prompt(trace["context"], words, most_prompt)}
        for name, values in {"tokens": words.of(ids), "regime": trace["regime"], **trace["signals"]}.items():
            self._parts.setdefault(name, []).append(values)
        if trace["alignment"] is not None:
            texts["aligned_start"] = sum(map(len, self._parts.get("alignment", [])))
            self._parts.setdefault("alignment", []).append(trace["alignment"])
        kept = trace["alternatives"]
        if kept is not None and shown:
            many = {name: kept[name][:, :shown] for name in ("tokens", "probs")}
            texts |= {"kept": many["tokens"].shape[1], "kept_start": sum(map(len, self._parts.get("kept_tokens", [])))}
            self._parts.setdefault("kept_tokens", []).append(words.of(np.ravel(many["tokens"])))
            self._parts.setdefault("kept_probs", []).append(np.ravel(many["probs"]))
        self.tokens += size
        self.head["traces"].append(texts)
        return len(self.head["traces"]) - 1

    def add_group(self, group: dict[str, Any], words: Words, most_prompt: int) -> None:
        """Add the texts of a group, whose traces are the last ones."""
        prompts = {name: self._prompt(group[name], words, most_prompt) for name in ("prompt", "teacher_prompt")}
        texts = {name: group[name] for name in ("problem", "answer", "solution")}
        self.head["groups"].append({**texts, **prompts, "traces": len(group["traces"])})

    def _prompt(self, ids: np.ndarray | None, words: Words, most: int) -> dict[str, int] | None:
        """Keep the first tokens of a prompt. Returns where they are, and how many tokens there are."""
        if ids is None or not len(ids):
            return None
        kept = words.of(ids[:most])
        self._parts.setdefault("prompts", []).append(kept)
        self._prompts += len(kept)
        return {"start": self._prompts - len(kept), "shown": len(kept), "size": len(ids)}

    def packed(self) -> str:
        """The block as text."""
        kinds = {"tokens": "u4", "kept_tokens": "u4", "prompts": "u4", "regime": "u1"}
        return pack(self.head, ((n, kinds.get(n, "f2"), np.concatenate(parts)) for n, parts in self._parts.items()))


def _append(columns: dict[str, list[Any]], row: dict[str, Any]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def _shorten(groups: list[dict[str, Any]], limits: Limits) -> tuple[int, int]:
    """Cut texts so that all fit. Returns the characters that each may keep, and the tokens that a prompt may keep."""
    traces = [trace for group in groups for trace in group["traces"]]
    named = [(group, ("problem", "answer", "solution")) for group in groups] + [
        (t, ("text", "extracted", "taught")) for t in traces
    ]
    texts = [holder[name] for holder, names in named for name in names]
    most_text = room(texts, limits.text)
    for holder, names in named:
        holder |= {name: holder[name][:most_text] for name in names}
    prompts = [len(g[n]) for g in groups for n in ("prompt", "teacher_prompt") if g[n] is not None]
    prompts += [len(trace["context"]) for trace in traces if trace["context"] is not None]
    most_prompt = MOST_PROMPT
    while most_prompt > 1 and sum(min(size, most_prompt) for size in prompts) > limits.prompts:
        most_prompt //= 2
    return most_text, most_prompt
