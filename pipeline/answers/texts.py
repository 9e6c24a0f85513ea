"""Answers: the one that a solution states, the one that a response ends with, and what their texts alone can decide.

A response states its answer by a mark: `\\boxed{...}`, `#### x`, `<answer>x</answer>` or "the answer is x". Where the prompt asks
for no mark, the last formula or number may stand in for it. What lies inside a thought is no answer. What is denied is none.
"""

from __future__ import annotations

import re
from functools import lru_cache

from pipeline.answers.quantities import UNITS, based, conflict, is_number, quantity, same_size, several, spoken, total
from pipeline.answers.spelling import plain

_BOXED = re.compile(r"(\\(?:boxed|fbox|framebox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)|\\boxed([^\s{}$\\a-zA-Z])")
_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|◁/think▷")
_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|◁think▷")
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_FINAL = re.compile(r"####[ \t]*([^\n]+)")
_HEADING = re.compile(
    r"\**(?:step|part|case|solution|verif|check|conclu|approach|method|given|explan|final|summary|analy|calcul|answer\W*$)", re.I
)
_STATED = re.compile(
    r"\banswers?\b[^\S\n]*(?:\([^()\n]{0,30}\)[^\S\n]*)?(?:to (?:the|this) \w+[^\S\n]*)?"
    r"(?:(?:is|are|was|equals|be|becomes)\b(?:[^\S\n]*(?:therefore|thus|simply|then|just|exactly|equal to|now)\b,?)?"
    r"[^\S\n]*:?|[:=])(?:[^\S\n]|\*)*"
    r"(?:\n\s*)?",
    re.I,
)
_STATEMENT_END = re.compile(
    r"\.(?=\s|$|\*)|[!?](?=\s|$)|,?\s+(?:because|since|so that|as required|which is|where)\b|,\s*(?:not|but)\b|\s+I hope\b", re.I
)
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<![\\\d])\$((?:\\\$|[^$\n])+)\$"
    # no formula begins inside another of its kind, and `\\[2pt]` begins none: so each text is read once
    r"|(?<!\\)\\\[((?:[^\\]|\\[^\[\]])+)\\\]|(?<!\\)\\\(((?:[^\\]|\\[^()])+)\\\)",
    re.DOTALL,
)
_MACRO_RUN = re.compile(
    r"[-+]?\d{0,12}\s{0,3}\\(?:[dtc]?frac|sqrt)(?:\[[^\]\n]{0,20}\])?(?:\{(?:[^{}\n]|\{[^{}\n]*\}){1,200}\}){1,2}"
)
_LAST_NUMBER = re.compile(r"(?<![\d.])[-+]?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?", re.ASCII)
_MENTION = re.compile(r"\b(?:page|chapter|question|problem|exercise|equation|line|step|part|case|no\.)\s*#?$", re.I)
_DENIAL = re.compile(
    r"\b(?:not|cannot|never|neither|nor|wrong|incorrect|false|impossible|unsure|unknown|guess|except|instead of|rather than|"
    r"no longer|rule[sd]? out|reject\w*|exclud\w+|unlikely|disagree)\b|n['’]t\b|n't\b|\?\s*$",
    re.I,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|unlike|than|instead of)|n['’]t)"
    r"\s*(?:be|equal|equal to|the answer|simply|just|exactly|quite|is)?\W*$",
    re.I,
)
_DENIED_AFTER = re.compile(
    r"^\W*(?:(?:is|was|are|would be|seems?|looks?|must be|has to be)\s+(?:\w+ly\s+|all\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|too)\b|(?:isn|wasn|can|doesn|won)['’]?t\b|cannot\b|"
    r"does not\b|\?|\.?\s*(?:No[,.:!]|Wrong\b|Not (?:quite|right|correct)|Incorrect\b))", re.I
)  # fmt: skip
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;/|&.!$]|\\[()\[\],; ]|\\quad|\\text\{|\}|"
    r"\b(?:and|or|also|maybe|perhaps|possibly|alternatively|else|even|it|could|be|may|either)\b"
    r"|[a-zA-Z]\w?\s*=|\\\\|\?)*", re.I,
)  # fmt: skip
_INTEGER = re.compile(r"-?\d+", re.ASCII)
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?", re.ASCII)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-J])\)|\[([A-J])\]|([A-J])(?=[.:)]|$))[.:)]?\s*(.*)", re.DOTALL | re.IGNORECASE
)
_OPERATOR = re.compile(r"[=+*/^_,<>]|\\(?:approx|cdot|times|div|pm|cup|cap|to|in)(?![a-zA-Z])")
_LETTER = re.compile(r"\(?([A-J])\)?[.:]?")
_RELATION = re.compile(r"(?:\\neq|\\geq|\\leq|<|>)(?![a-zA-Z])")
_LABEL = re.compile(r"(?:\\text\{([^{}]*)\}|([A-Za-z]{2,}(?: [A-Za-z]{2,})* ?))\s*[=:]\s*(?=[^\s=])(.+)", re.DOTALL)
_CONDITION = re.compile(r"[\s,;(]*(?:\\text\{\s*)?(?:,?\s*where|for (?:all|any|some|every|integers?)|with)\b.*$", re.DOTALL)
_ONLY_WORDS = re.compile(r"[a-zA-Z]{4,}")
_PUNCTUATION = re.compile(r"[.,;:!'\"]")
_PLAIN_TEXT = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+)*")
_LISTED = re.compile(r"(?<![a-zA-Z\\])or(?![a-zA-Z])")
_MACRO = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[a-zA-Z]+")
_SYNONYMS = [
    {"no solution", "no solutions", "no real solution", "no real solutions", "none", r"\emptyset"},
    {"does not exist", "dne", "doesn't exist", "undefined"},
    {"yes", "true"},
    {"no", "false"},
]
_READ_CHARS = 20_000  # the end of a response in which an unmarked answer is looked for


def stated_answer(text: str) -> str | None:
    """The answer that a worked solution states: its last \\boxed{...} (MATH, Minerva), else what follows `####` (GSM8K).

    Boxes that follow one another are one answer.
    """
    boxed = _last_boxes(text)
    _, mark, stated = text.rpartition("####")
    return (boxed if boxed is not None else stated if mark else "").strip() or None


def final_answer(text: str, fallback: bool = True) -> str | None:
    """The answer a response ends with, read from the text after its thought, or None.

    A mark decides: the last box, else `<answer>...</answer>`, `#### x`, or the last "the answer is x". With `fallback` a response
    without a mark gives itself when it is only an answer, else its last formula or number.
    """
    after = spoken_part(text)
    if (tagged := _last_tagged(after)) is not None:
        inside = _last_boxes(tagged)
        return (inside if inside is not None else tagged).strip() or None
    boxed = _last_boxes(after)
    if boxed is not None:
        return boxed.strip() or None
    after = after[-_READ_CHARS:]
    for match in reversed(list(_FINAL.finditer(after))):
        if match[1].strip() and not (_HEADING.match(match[1]) and not _LAST_NUMBER.fullmatch(match[1].strip())):
            return match[1].strip()
    return _statement(after) or (_unmarked(after) if fallback else None)


def spoken_part(text: str) -> str:
    """A response without its thought: the text after the last `</think>`, up to a thought that is not closed."""
    closed = _last(_THOUGHT, text) if "<" in text or "◁" in text else None
    after = text[closed.end() :] if closed else text
    opened = _OPENED.search(after)
    return after[: opened.start()] if opened else after


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces balance, or None. Takes one pass over the text at any depth of nesting."""
    boxes = _boxes(text)
    return text[boxes[-1][1] : boxes[-1][2]] if boxes else None


def normal_form(answer: str) -> str:
    """An answer in one spelling. LaTeX spacing and dollar signs go, `1,000.50` becomes `1000.5`, and `+07` becomes `7`.

    Answers with equal normal forms are the same.
    """
    return _number_form(_LOOSE_SPACE.sub("", _TEXT.sub(r"\1", plain(answer)).strip()).strip())


def compare_texts(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same. None when their texts cannot decide it; then the mathematical verifier must."""
    decided = decide(answer, reference)
    return decided if isinstance(decided, bool) else None


@lru_cache(maxsize=4096)
def decide(answer: str, reference: str) -> bool | tuple[str, str]:
    """Whether two answers are the same, or the pair of plain LaTeX texts that the mathematical verifier must compare.

    Different integers are different answers. So are different words, and their case does not count. The mathematical verifier
    reads a word as a product of letters, so 'listen' would equal 'silent'. A reference of two or three letters may really be a
    product, so it is left to the verifier.
    """
    ours, theirs = plain(answer), plain(reference)
    if not ours:
        return False
    if normal_form(ours) == normal_form(theirs):
        return True
    denied = (
        _DENIAL.search(_TEXT.sub(r" \1 ", ours.rstrip("? "))) is not None and _DENIAL.search(_TEXT.sub(r" \1 ", theirs)) is None
    )
    if denied or (_RELATION.match(ours) and not _RELATION.match(theirs)):
        return False
    chosen = _same_choice(ours, theirs)
    return chosen if chosen is not None else _same_value(_unlabelled(ours), _unlabelled(theirs))


def _same_value(ours: str, theirs: str) -> bool | tuple[str, str]:
    """`decide` for two plain texts that are no choices."""
    if (mine := based(ours)) and (yours := based(theirs)):
        return mine == yours
    if mine or (yours := based(theirs)):
        ours, theirs = mine[0] if mine else ours, yours[0] if not mine and yours else theirs
    if several(ours) or several(theirs):
        amount = total(theirs)
        return amount is not None and total(ours) == amount
    one, other = quantity(_CONDITION.sub("", ours) or ours), quantity(_CONDITION.sub("", theirs) or theirs)
    if conflict(one, other):
        return same_size(one, other)
    mine_text, your_text = spoken(one.value) or _letter_unit(one.value, other.value), spoken(other.value) or other.value
    forms = [_number_form(_LOOSE_SPACE.sub("", _TEXT.sub(r"\1", text)).strip()) for text in (mine_text, your_text)]
    if forms[0] == forms[1]:
        return True
    if all(map(_INTEGER.fullmatch, forms)) or (is_number(forms[1]) and _LISTED.search(ours)):
        return False
    words = _same_words(forms[0], forms[1], your_text)
    if words is None and _TEXT.fullmatch(mine_text) and "\\text" not in your_text:
        return False  # a word is no formula
    return words if words is not None else (mine_text, your_text)


def _same_words(ours: str, theirs: str, reference: str) -> bool | None:
    """Whether two texts of words are the same. None when the reference may be mathematics."""
    mine, yours = (" ".join(_PUNCTUATION.sub(" ", text).split()).casefold() for text in (ours, theirs))
    if any({mine, yours} <= same for same in _SYNONYMS) or (mine == yours and _PLAIN_TEXT.fullmatch(yours)):
        return True
    if _WORDS.fullmatch(theirs):
        return None if len(theirs) <= 3 else False
    spoken_words = [word for word in _TEXT.findall(reference) if word.strip() not in UNITS]
    prose = " ".join(spoken_words) + _MACRO.sub(" ", _TEXT.sub(" ", reference))
    if _ONLY_WORDS.search(prose):
        return sorted(re.split(r" and |, ?", ours.casefold())) == sorted(re.split(r" and |, ?", theirs.casefold()))
    return None


def _same_choice(ours: str, theirs: str) -> bool | None:
    """Whether two choices such as `B`, `(B)` and `\\text{(B)} 5` are the same. None when the reference is no choice."""
    ours, theirs = (" ".join(_TEXT.sub(r" \1 ", text).replace("{", " ").replace("}", " ").split()) for text in (ours, theirs))
    reference = _LETTER.fullmatch(theirs)
    if reference is None:
        return _same_option(ours, theirs)
    given = _CHOICE.fullmatch(ours)
    if given is None:
        return False if re.search(r"\(?\b[A-J]\b\)?.*\b[A-J]\b", ours) else None
    letter, rest = given[1] or given[2] or given[3], given[4]
    if not letter.isupper() and given[3]:
        return None
    if re.search(r"(?<![\w\\])\(?[A-J]\)?(?![\w])", rest) or _OPERATOR.match(rest):
        return False
    return letter.upper() == reference[1]


def _same_option(ours: str, theirs: str) -> bool | None:
    """The same for a reference with letter and text, `(B) 5`: its letter decides."""
    reference = re.fullmatch(r"\(([A-J])\) ?(\S.*)", theirs)
    given = reference and (_CHOICE.fullmatch(ours) or _LETTER.fullmatch(ours))
    if not reference or not given or ours[:1] not in "([ABCDEFGHIJ":
        return None if not reference else (normal_form(ours) == normal_form(reference[2]) or None)
    letters = [group for group in given.groups()[:3] if group]
    return bool(letters) and letters[0].upper() == reference[1]


def _unlabelled(text: str) -> str:
    """A plain answer without the words in front of it: `\\text{Area} = 5`, `Profit: 5`, `the answer is 5`."""
    text = re.sub(r"^(?:\\text\{)?\s*(?:the |final )*answers? (?:is|are):?\s*\}?\s*", "", text, flags=re.I)
    text = re.sub(r"^\\approx\s*|^\\(?:therefore|implies|Rightarrow)\s*|^=\s*", "", text)
    label = _LABEL.fullmatch(text)
    if label is None or (label[2] and len(label[2].strip()) < 3):
        return text
    return label[3].strip()


def _letter_unit(ours: str, theirs: str) -> str:
    """Our answer without a unit of one letter, `5 m`, where the reference is a plain number."""
    if not is_number(theirs):
        return ours
    found = re.fullmatch(r"([-+]?[\d,.]+) ?[mgshL]", ours)
    return found[1] if found else ours


def _number_form(text: str) -> str:
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return text
    whole, part = number[2].replace(",", "").lstrip("0") or "0", (number[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if number[1] == "-" and value != "0" else value


# ---- reading a response ------------------------------------------------------------------------------------------------


def _last_tagged(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`. None without one, or when a box follows it. Takes one pass."""
    start = end = after = -1
    while (opened := text.find(_OPEN_TAG, after + 1)) >= 0 and (closed := text.find(_CLOSE_TAG, opened)) >= 0:
        start, end, after = opened + len(_OPEN_TAG), closed, closed + len(_CLOSE_TAG) - 1
    return None if start < 0 or text.find("\\boxed", after + 1) >= 0 else text[start:end]


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Every box that has no box inside, in order: where it begins, its content's start and end, and where it ends."""
    if "\\boxed" not in text and "\\fbox" not in text and "\\framebox" not in text:
        return []
    found: list[tuple[int, int, int, int]] = []
    opened: list[tuple[int, int]] = []  # where each open brace begins and its content starts; (-1, -1): not a box
    for token in _BOXED.finditer(text):
        if token[1]:
            opened.append((token.start(), token.end()))
        elif token[0] == "{":
            opened.append((-1, -1))
        elif token[0] == "}" and opened:
            begin, start = opened.pop()
            if start >= 0 and not (found and found[-1][0] > begin):
                found.append((begin, start, token.start(), token.end()))
    return found


def _last_boxes(text: str) -> str | None:
    """The content of the last box, with the boxes that stand next to it, joined by commas. A box that is denied is no answer."""
    boxes = [box for box in _boxes(text) if not _denied(text, box[0], box[3])]
    if not boxes:
        bare = _last(_BARE_BOX, text) if "\\boxed" in text else None
        return (bare[1] or bare[2]) if bare else None
    chosen = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text[box[3] : chosen[0][0]][:200]) or chosen[0][0] - box[3] > 200:
            break
        chosen.insert(0, box)
    contents = [text[start:end].strip() for _, start, end, _ in chosen]
    return ",".join(dict.fromkeys(contents))


def _denied(text: str, begin: int, end: int) -> bool:
    before, after = text[max(0, begin - 60) : begin], text[end : end + 60]
    return bool(_DENIED_BEFORE.search(before.rstrip("$ \\([")) or _DENIED_AFTER.match(after.lstrip("$ \\)]")))


def _statement(text: str) -> str | None:
    """What the last "the answer is x" or "Answer: x" states. None without one, and where it is denied."""
    for found in reversed(list(_STATED.finditer(text))):
        said = text[found.end() :].partition("\n")[0].strip().lstrip("*: ")
        formula = _FORMULA.match(said)
        rest = said[formula.end() :] if formula else said
        end = _STATEMENT_END.search(rest)
        said = said[: (formula.end() if formula else 0) + (end.start() if end else len(rest))].strip(" *")
        sentence = text[max(text.rfind("\n", 0, found.start()), text.rfind(". ", 0, found.start())) + 1 : found.start()]
        if said and not _DENIAL.search(said) and not _DENIAL.search(sentence):
            return said
        if said:
            return None
    return None


def _unmarked(text: str) -> str | None:
    """The answer of a response without a mark: the whole of it when it is no prose, else its last formula or number."""
    whole = text.strip()
    words = re.findall(r"[^\W\d_]{2,}", _MACRO.sub(" ", whole))
    if whole and "\n" not in whole and len(whole) <= 200 and (not words or whole == words[0]):
        return whole
    formula = next((f for f in reversed(list(_FORMULA.finditer(text))) if not _is_prose(f)), None)
    number, run = _last(_LAST_NUMBER, text), _last(_MACRO_RUN, text)
    found = max((m for m in (formula, run, number) if m), key=lambda m: (m.end(), -m.start()), default=None)
    if found is not None and formula and formula.start() <= found.start() < formula.end():
        found = formula
    if found is None or _doubted(text, found):
        return None
    return next((group for group in found.groups() if group), found[0]).strip() or None


def _is_prose(formula: re.Match[str]) -> bool:
    """Whether two money signs only look like the ends of a formula: `$5 and then $7`."""
    inside = next((group for group in formula.groups() if group), "")
    return len(re.findall(r"[a-zA-Z]{3,}", _MACRO.sub(" ", _TEXT.sub(" ", inside)))) > 1


def _doubted(text: str, found: re.Match[str]) -> bool:
    """Whether the sentence of an unmarked answer denies it, asks it, or only points to a place."""
    start = max(text.rfind(mark, 0, found.start()) for mark in ("\n", ". ", "! ", "? "))
    end = min((place for mark in ("\n", ". ", "! ") if (place := text.find(mark, found.end())) >= 0), default=len(text))
    return bool(_DENIAL.search(text[start + 1 : end]) or _MENTION.search(text[start + 1 : found.start()].rstrip()))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 - the last match is what is wanted
        pass
    return last
