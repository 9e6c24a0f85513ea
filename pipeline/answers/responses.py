"""Responses: the answer that a solution states, and the one that a response ends with.

A response states its answer by a mark: `\\boxed{...}`, `#### x`, `<answer>x</answer>` or "the answer is x". Where the prompt asks
for no mark, the last formula or number may stand in for it. What lies inside a thought is no answer. What is denied is none.
"""

from __future__ import annotations

import re

_BOXED = re.compile(r"(\\(?:boxed|fbox|framebox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)|\\boxed([^\s{}$\\a-zA-Z])")
_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|◁/think▷")
_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|◁think▷")
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_FINAL = re.compile(r"####[ \t]*([^\n]+)")
_DISPLAY = re.compile(r"(?<!\\)\\\[")
_MOST_LINES = 50  # of a reference's answer
_HEADING = re.compile(
    r"\**(?:step|part|case|solution|verif|check|conclu|approach|method|given|explan|final|summary|analy|calcul|answer\W*$)", re.I
)
_STATED = re.compile(
    r"\b(?:answers?|(?:correct|right|best)[^\S\n]+(?:choice|option))\b[^\S\n]*"
    r"(?:\([^()\n]{0,30}\)[^\S\n]*)?(?:to (?:the|this) \w+[^\S\n]*)?"
    r"(?:(?:is|are|was|equals|be|becomes)\b(?:,?[^\S\n]*(?:therefore|thus|simply|then|just|exactly|equal to|now|indeed|"
    r"approximately|about|roughly|actually|clearly|also|definitely|certainly|for sure)\b,?)?"
    r"[^\S\n]*:?|[:=])(?:[^\S\n]|\*)*"
    r"(?:\n\s*(?:```\w*\s*\n|[-•*][^\S\n]+)?)?",
    re.I,
)
_BLANKS = re.compile(r"[^\S\n]{2,}")
_STATEMENT_END = re.compile(
    r"\.(?=\s|$|\*)|[!?](?=\s|$)|,?\s+(?:because|since|so that|as required|which is|where)\b|"
    r",\s*(?:not|but|it can(?:['’]t|not) be (?=\(?[A-J]\b))\b|"
    r"\s*\((?:since|because|as|which|where|i\.e\.|not (?=[-$\\(\d]|[A-J]\b))|\s+I hope\b", re.I
)  # fmt: skip
# a clause that ends before the statement, so that what it denies is something else
_EARLIER_CLAUSE = re.compile(
    r"^\W*(?:since|because|as|if|when|given)\b.*,(?=[^,]*$)|"
    r"^.*(?:^|[,;:])\s*(?:and )?(?:so|therefore|thus|hence|consequently)\b",
    re.I,
)
_THAT = re.compile(r"\W*(?:that|whether|which|if|\w+ (?:say|think|believe|claim)s?)\b", re.I)
_REMARK = re.compile(r"(?:indeed |also |thus |clearly )?(?:correct|right|valid|verified|confirmed|consistent|reasonable)\b", re.I)
_TAKEN_BACK = re.compile(
    r"\W*(?:(?:wait|no|but|and|hmm|actually|sorry|oh|oops)\b\W*)*(?:that|this|it|which|(?:the|this|that|my) (?:answer|result))"
    r"(?:['’]s| is| was| seems)? "
    r"(?:not (?:right|correct|true)|wrong|incorrect|false)\b(?!\s+(?:to|for|in general|when|if|unless|that)\b)",
    re.I,
)
_DENIALS = frozenset(("false", "impossible", "neither", "never"))  # each may itself be an answer
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<![\\\d])\$((?:\\\$|[^$\n])+)\$"
    # no formula begins inside another of its kind, and `\\[2pt]` begins none: so each text is read once
    r"|(?<!\\)\\\[((?:[^\\]|\\[^\[\]])+)\\\]|(?<!\\)\\\(((?:[^\\]|\\[^()])+)\\\)",
    re.DOTALL,
)
_MACRO_RUN = re.compile(
    r"[-+]?\d{0,12}\s{0,3}\\(?:[dtc]?frac|sqrt)(?:\[[^\]\n]{0,20}\])?(?:\{(?:[^{}\n]|\{[^{}\n]*\}){1,200}\}){1,2}"
)
_NUMBER = r"[-+]?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+|[eE][-+]?\d+(?!\w))?"
_PLAIN_NUMBER = re.compile(_NUMBER, re.ASCII)
_LAST_NUMBER = re.compile(
    rf"(?<![\d.])(?:[-+]?\\?\$)?{_NUMBER}(?:\s?(?:π|\\pi\b|pi\b)|[½⅓⅔¼¾]|"
    r"\s?(?:[×x*·]|\\times|\\cdot)\s?10(?:\^\{?-?\d+\}?|[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|"
    r"\s(?:hundred|thousand|million|billion|trillion|dozen)\b)?",
    re.ASCII,
)
# bold type, tags in pairs, GSM8K's sums and quotation marks. A raised number is a power, and stays
_MARKUP = re.compile(
    r"(?<![a-zA-Z0-9)\]}*])\*\*\*?(?=[^\s*])([^*\n]{1,200})(?<=[^\s*])\*\*\*?(?![a-zA-Z0-9(*])|"
    r"<(?!su[bp]>)([a-z]{1,12})>([^<>\n]{1,200})</\2>|<<[^<>\n]{1,200}>>|"
    r"(?<![^\n])[-+*•] {1,3}(?=\*\*)|(?<=\n)[ \t]{0,3}>[ \t]?"
)
# what stands before a number that is only the end of a power, bound, formula or list
_UNFINISHED = re.compile(
    r"(?:\^|\*\*|√|∛|(?<![=-])>|≥|<|≤|/|\\(?:sqrt|frac|leq?|geq?))\s?[{(]?\s?$|\d[^\S\n]?[-–+*×·÷]\s?$|"
    r"\d\s?(?:(?:[a-zA-Z]{1,20}\s)?\bor\b|\band\b)\s?$|"
    r"\b(?:negative|minus|sqrt|log|ln|(?<!no )(?<!not )(?:more|less) than)\s?\(?\s?$",
    re.I,
)
_LISTED = re.compile(r"\d\s?,\s?$")  # before a number that ends a list. Words may go on behind it: "After day 3, 18 remain"
_WORD_BEHIND = re.compile(r" (?!and\b|or\b)[a-z]{2,}")
_DASHED = re.compile(r"−|(?<![^\s(=$])[–—](?=\$?\d)")  # as a sign
_FACTOR_BEHIND = re.compile(r"[a-z](?![a-zA-Z])(?<![mgshl])")
_LAST_TUPLE = re.compile(r"[(\[](?:\s*[-+]?\d[\d./]*\s*,){1,9}\s*[-+]?\d[\d./]*\s*[)\]]", re.ASCII)
_JOIN = re.compile(r"\s*(?:,|and|or|,\s*(?:and|or))\s*")
_CHOSEN = re.compile(
    r"\b(?:I (?:choose|pick|select|would choose)|[Oo]ption(?= \(?[A-J]\)? is (?:the )?(?:correct|right)))"
    r"\s+(?:option |choice |answer )?\(?([A-J])\b\)?(?! (?:or|and)\b)(?![^.\n]*\?)"
)
_MENTION = re.compile(r"\b(?:page|chapter|question|problem|exercise|equation|line|step|part|case|no\.)\s*#?$", re.I)
DENIAL = re.compile(
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
    r"(?:not(?!\s+[$\d])|wrong|incorrect|false|impossible|too)\b|(?:isn|wasn|can|doesn|won)['’]?t\b|cannot\b|"
    r"does not\b|\?|\.?\s*(?:No[,.:!]|(?:Wrong|Incorrect)\b(?! \w+\W?:)|Not (?:quite|right|correct)))", re.I
)  # fmt: skip
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;/|&.!$]|\\[()\[\],; ]|\\quad|\\text\{|\}|"
    r"\b(?:for )?(?:part|case) \(?[a-h1-9]\)?|"
    r"\b(?:and|or|also|maybe|perhaps|possibly|alternatively|else|even|it|could|be|may|either)\b"
    r"|[a-zA-Z](?:_\{?\w{1,2}\}?|\w)?\s*=|\\\\|\?)*", re.I,
)  # fmt: skip
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_VALUE = re.compile(r"(?:\$[^$]{1,200}\$|[-+]?\$?\d[\d,./]{0,30}%?)(?:\s[a-zA-Z]{2,20}){0,2}", re.ASCII)
_VERB = re.compile(r"\b(?:is|are|was|were|equals)\s+")
_TRUTH = re.compile(r"(yes|no|true|false)[,.;!:](?=\s)", re.I)
_UNTRUE = re.compile(
    r"\b(?:that|this|it)(?:['’]s| \w+)?(?: not|n['’]t| never)\b|"
    r"\b(?:impossible|cannot be)\b|\bnot (?:correct|right|true|really|quite)\b",
    re.I,
)
_NO_TRUTH = frozenset(("yes", "no", "true", "false", "but", "or", "wait", "if", "maybe", "unsure", "sure", "wrong", "incorrect"))
# what a formula without a backslash may have
_NAMES = frozenset(("or", "and", "sqrt", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp"))
_MACRO = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[a-zA-Z]+")
_READ_CHARS = 20_000  # the end of a response in which an unmarked answer is looked for


def stated_answer(text: str) -> str | None:
    """The answer that a worked solution states: its last \\boxed{...} (MATH, Minerva), else the line after `####` (GSM8K).

    What stands in `<answer>...</answer>` behind the last box goes first.

    Boxes that follow one another are one answer.
    """
    if (tagged := _last_tagged(text)) is not None:
        text = f"#### {tagged.strip()}" if _last_boxes(tagged) is None else tagged
    boxed = _last_boxes(text)
    _, mark, stated = text.rpartition("####")
    return (boxed if boxed is not None else _first_lines(stated.strip()) if mark else "").strip() or None


def _first_lines(stated: str) -> str:
    """The first line, since MetaMathQA says the answer again in the next one. More lines where the first one goes on."""
    ends = [place for place, char in enumerate(stated) if char == "\n"]
    return next((stated[:end] for end in ends[:_MOST_LINES] if not _goes_on(stated[:end].rstrip())), stated)


def _goes_on(text: str) -> bool:
    """Whether a formula is still open at the end of a text, or it ends in the middle of a list, or with a heading."""
    opened = text.count("$$") % 2 or len(_DISPLAY.findall(text)) > text.count("\\]")
    listed = text.count("\\begin") > text.count("\\end") or text.endswith((":", ",", "\\\\", ":**"))
    return bool(opened) or listed


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
    after = _BLANKS.sub(" ", after[-_READ_CHARS:])  # a run of blanks would be read again from each of its places
    for match in reversed(list(_FINAL.finditer(after))):
        if match[1].strip() and not (_HEADING.match(match[1]) and not _PLAIN_NUMBER.fullmatch(match[1].strip())):
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
    every = _boxes(text)
    filled = [box for box in every if text[box[1] : box[2]].strip()]  # a box without content may repeat the task
    boxes = [box for box in filled or every if not _denied(text, box[0], box[3])]
    if not boxes and "\\\\boxed" in text:  # a text whose backslashes were escaped twice
        return _last_boxes(text.replace("\\\\", "\\"))
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
    """What the last "the answer is x" or "Answer: x" states. None without one, and where it is denied.

    "The answer is correct" is a remark on an answer, unless it is all that is stated.
    """
    remark = None
    for found in reversed(list(_STATED.finditer(text))):
        said = text[found.end() :].lstrip("*_: \n")
        formula = _FORMULA.match(said)
        said = said[: formula.end()] + said[formula.end() :].partition("\n")[0] if formula else said.partition("\n")[0].strip()
        rest = said[formula.end() :] if formula else said
        end = _STATEMENT_END.search(rest)
        said = said[: (formula.end() if formula else 0) + (end.start() if end else len(rest))].strip(" *_")
        after = rest[end.start() :] if end else ""
        sentence = text[max(text.rfind("\n", 0, found.start()), text.rfind(". ", 0, found.start())) + 1 : found.start()]
        denied = DENIAL.search(said) and said.casefold() not in _DENIALS
        if said and not denied and not DENIAL.search(_clause(sentence)) and not _TAKEN_BACK.match(after):
            if not _REMARK.match(said):
                return _value_of(said)
            remark = remark or said
        elif said:
            return None
    if remark:
        return remark
    chosen = _last(_CHOSEN, text)
    return chosen[1] if chosen and not _doubted(text, chosen) else None


def _clause(sentence: str) -> str:
    """The part of a sentence that a statement belongs to: `Since 2 is not a square, the answer is` denies only its cause."""
    earlier = _EARLIER_CLAUSE.match(sentence)
    clause = sentence[earlier.end() :] if earlier else sentence
    return sentence if _THAT.match(clause) else clause


def _value_of(said: str) -> str:
    """What a sentence with one number ends with, as in "Answer: the largest n is 34". Another text as it is."""
    *before, value = _VERB.split(said)
    return value if before and _VALUE.fullmatch(value) and not re.search(r"\d", " ".join(before)) else said


def _unmarked(text: str) -> str | None:
    """The answer of a response without a mark: the whole of it when it is no prose, else its last formula or number."""
    text = _DASHED.sub("-", _MARKUP.sub(lambda mark: mark[1] or mark[3] or "", text))
    whole = text.strip()
    words = re.findall(r"[^\W\d_]{2,}", _MACRO.sub(" ", whole))
    if whole and "\n" not in whole and len(whole) <= 200 and (set(words) <= _NAMES or whole.rstrip(".!") == words[0]):
        return whole
    formulas = [formula for formula in _FORMULA.finditer(text) if not _is_prose(formula)]
    formula = formulas[-1] if formulas else None
    number, run, listed = (_last(pattern, text) for pattern in (_LAST_NUMBER, _MACRO_RUN, _LAST_TUPLE))
    found = max((m for m in (formula, run, number, listed) if m), key=lambda m: (m.end(), -m.start()), default=None)
    if found is not None and formula and formula.start() <= found.start() and found.end() <= formula.end():
        found = formula
    if found is None:
        truth = _TRUTH.match(whole)
        plain = "\n" not in whole and "?" not in whole and not _NO_TRUTH & {word.casefold() for word in words[1:]}
        denied = truth and truth[1].casefold() in ("yes", "true") and _UNTRUE.search(whole)
        return truth[1] if truth and plain and not denied else None
    if found is number:
        before = text[max(0, found.start() - 30) : found.start()]
        lists = _LISTED.search(before) and not _WORD_BEHIND.match(text, found.end())
        if lists or _UNFINISHED.search(before) or _FACTOR_BEHIND.match(text, found.end()):
            return None
    if _doubted(text, found) or _TAKEN_BACK.match(text[found.end() : found.end() + 60]):
        return None
    return (_joined(text, formulas) if found is formula else found[0].strip()) or None


def _joined(text: str, formulas: list[re.Match[str]]) -> str:
    """The last formula, with those before it in a list such as `$1$ and $2$`."""
    contents: list[str] = []
    for formula, after in zip(reversed(formulas), [None, *reversed(formulas)], strict=False):
        if after is not None and not _JOIN.fullmatch(text[formula.end() : after.start()][:20]):
            break
        content = next((group for group in formula.groups() if group), "").strip()
        if after is not None and len(content) == 1 and content.islower():  # a name is no value
            break
        contents.insert(0, content)
    return ",".join(contents)


def _is_prose(formula: re.Match[str]) -> bool:
    """Whether two money signs only look like the ends of a formula: `$5 and then $7`."""
    inside = next((group for group in formula.groups() if group), "")
    return len(re.findall(r"[a-zA-Z]{3,}", _MACRO.sub(" ", _TEXT.sub(" ", inside)))) > 1


def _doubted(text: str, found: re.Match[str]) -> bool:
    """Whether the sentence of an unmarked answer denies it, asks it, or only points to a place."""
    start = max(text.rfind(mark, 0, found.start()) for mark in ("\n", ". ", "! ", "? "))
    end = min((place for mark in ("\n", ". ", "! ") if (place := text.find(mark, found.end())) >= 0), default=len(text))
    return bool(DENIAL.search(text[start + 1 : end]) or _MENTION.search(text[start + 1 : found.start()].rstrip()))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 - the last match is what is wanted
        pass
    return last
