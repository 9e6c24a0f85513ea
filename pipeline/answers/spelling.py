"""One spelling of an answer: LaTeX without layout, as a parser and a comparison of texts read it.

Nothing here decides what an answer is worth. Money signs, spaces, fonts and Unicode go; e-notation, repeating decimals and plain
signs such as `>=` become LaTeX. What a reader cannot see, such as `\\phantom{5}`, goes with its content.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_FRACTIONS = {char: unicodedata.normalize("NFKC", char).split("⁄") for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SIGNS = {
    **dict.fromkeys("−–—‐‑﹣", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060\u2061\u2062\u2063\u2064\u00ad\u200e\u200f\u202a\u202c", ""),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("£€¥₹₽₩", ""),
    "⁄": "/",
    "。": ".",
    "又": " ",  # Chinese writes a mixed number as 3又1/2
    "×": r" \times ",
    "✕": r" \times ",
    "÷": r" \div ",
    "·": r" \cdot ",
    "⋅": r" \cdot ",
    "≤": r" \leq ",
    "⩽": r" \leq ",
    "≥": r" \geq ",
    "⩾": r" \geq ",
    "≠": r" \neq ",
    "≈": r" \approx ",
    "±": r" \pm ",
    "∞": r"\infty ",
    "∪": r" \cup ",
    "∩": r" \cap ",
    "∈": r" \in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "∖": r" \setminus ",
    **dict.fromkeys("°º˚", r"^\circ "),
    "∨": r" \text{ or } ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    **{
        char: rf"\{name} "
        for char, name in zip(
            "πθαβγδφλμσωΔΩτρ",
            [
                "pi",
                "theta",
                "alpha",
                "beta",
                "gamma",
                "delta",
                "phi",
                "lambda",
                "mu",
                "sigma",
                "omega",
                "Delta",
                "Omega",
                "tau",
                "rho",
            ],
            strict=True,
        )
    },
}
_UNICODE = str.maketrans(
    {char: f"\\frac{{{top}}}{{{bottom}}}" for char, (top, bottom) in _FRACTIONS.items()}
    | _SIGNS
    | {char: f"_{{{plain}}}" for char, plain in _LOWERED.items()}
)
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Z]))")
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_LOOSE_ROOT = re.compile(r"\\sqrt ?\[(\d{1,3})\] ?(\w)")
_HIDDEN = re.compile(r"\\(?:[hv]?phantom|[bx]?cancel|sout|label|tag|hspace|vspace|color|href)\*?\s*" + _GROUP)
_FONT = re.compile(
    r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|pmb|(?:text|f)?color(?:box)?\s*\{[^{}]*\}|underline|ensuremath|displaylines)\s*"
    + _GROUP
)
_WORDS = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|sc)?|mathrm|mbox|hbox|emph|operatorname\*?)\s*" + _GROUP)
_LAYOUT = re.compile(
    r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|boxed|fbox|"
    r"bf|it|rm|sf|tt|bfseries|tiny|(?:script|footnote|normal)size|small|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])"
)
_MONEY = re.compile(r"\\[$#]|\$|\\[()\[\]]|\\(?:pounds|euro|textdollar|textsterling)(?![a-zA-Z])")
_DIGIT_SPACE = re.compile(r"(?<=\d)(?:,?\\!\s*|\\[,;: ]|\{,\}\s*|~|[\u00a0\u2009\u202f])+(?=\d{3}(?!\d))")
_SPACE = re.compile(r"(?<!\\)\\[,;: >]|\\(?:quad|qquad|thinspace|medspace|enspace|hfill|nobreak)(?![a-zA-Z])|~|\s+")
_ROW_END = re.compile(r"\\\\\s*\[[^\]]*\]")
# what LaTeX takes without braces: a digit, a letter or a sign. A root is none, but nobody means anything else by `\\frac1\\sqrt2`
_SIGN_NAME = r"\\(?:pi|theta|alpha|beta|gamma|delta|(?:var)?phi|lambda|mu|sigma|omega|tau|rho)(?![a-zA-Z])"
_ATOM = rf"(\d|[a-zA-Z]|{_SIGN_NAME}|\\sqrt\{{[^{{}}]*\}})"
_LOOSE_FRACTION = re.compile(rf"\\frac(?![a-zA-Z])\s*(?:{_ATOM}\s*(?:{_ATOM}|(?=\{{))|{_GROUP}\s*{_ATOM})")
_LOOSE_RADICAND = re.compile(rf"\\sqrt\s*({_SIGN_NAME}|\\frac{_GROUP}{_GROUP})")
_MOST_NESTED = 4  # fractions without braces inside each other
_E_NOTATION = re.compile(
    r"(?<![\w.\\{^])(?<!\d,)([-+]?(?:\d{1,3}(?:,\d{3})+|\d++\.?\d*+|\.\d++))\s?[eE]\s?([-+]?\d+)(?![\w.])", re.ASCII
)
_TEN_POWER = re.compile(
    r"(?<=[\d}])\s*(?:[xX*]|\\ast|\\cdot|\\times)\s*10\s*(?:\^|\*\*)\s*(?:\{([-+]?\d+)\}|\(([-+]?\d+)\)|([-+]?\d+))"
)
_PYTHON_POWER = re.compile(r"[\w)\]}]\*\* ?[\w({-]")  # other double stars are bold type
_POWER = re.compile(r"(?:\^|\*\*)\s*(?:([-+]?\d{2,}|-\d)|\(([^()]*)\))")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d{1,9})\)(?![\d.(^]))")
_OVER = re.compile(r"\{([^{}]*?)\\over(?![a-zA-Z])([^{}]*)\}|^([^{}]*?)\\over(?![a-zA-Z])([^{}]*)$")
_THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,])"
# beside a sign, a number with commas is no list; alone it is for `texts` and `shorthand`
_GROUPED = re.compile(
    rf"(?<=[=<>]){_THOUSANDS}|(?<=[=<>] ){_THOUSANDS}|(?<=[=<>]-){_THOUSANDS}|(?<=[=<>] -){_THOUSANDS}|"
    rf"(?<=[\w)}}]\+){_THOUSANDS}|(?<=\+ ){_THOUSANDS}|"
    rf"(?<=\\frac\{{){_THOUSANDS}(?=\}})|(?<=\}}\{{){_THOUSANDS}(?=\}})|"
    rf"(?<![\d,.(\[{{])(?<!, ){_THOUSANDS}(?= ?(?:\\times 10\^|\\pi|\\sqrt|[a-zA-Z](?![a-zA-Z])))",
    re.ASCII,
)
_MIXED_FRACTION = re.compile(
    r"(?<![\d./^{_a-zA-Z}\\])(?<!\d[ ,])(\d{1,12}) ?\\frac\{(\d{1,12})\}\{(\d{1,12})\}(?! ?(?:[\d{(^!]|\\(?!text|%|pi|sqrt)))"
)
_CUT = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:\.{2,}| ?\\[lc]?dots[a-z]?(?![a-zA-Z]))", re.ASCII)
_PERIOD = re.compile(r"(\d{0,12}?)(?:(\d)\2{2,}|(\d{2,9}?)\3+)|()(\d)\5+")
_TRANSPOSED = re.compile(r"\[([^\[\]]*)\] ?\^ ?\{?(?:T|\\top|\\intercal)\}?")
_AXES = re.compile(r"\\(?:mathbf|hat|vec|boldsymbol|bm)\s*\{\s*(?:\\mathbf\s*\{)?\\?([ijk])(?:math)?\s*\}?\s*\}")
_CURRENCY = re.compile(
    r"^(?:\\text\s*\{\s*)?(?:US|USD|EUR|GBP|CNY|RMB|INR|JPY|AUD|CAD|Rs\.?)\s*\}?\s*(?=[-\d.])|(?<=\d)\s?[元円圆个個枚人本只张米岁天页]+$"
)
_PROPORTION = re.compile(r"(\d+) ?(?:\\text\{ ?)?(to|in|out of) ?\}? ?(\d+)", re.ASCII)
_ORDINAL = re.compile(r"^(\d+) ?(?:\^ ?\{? ?)?(?:\\text\{ ?)?(?:st|nd|rd|th)(?: ?\}){0,2}$", re.ASCII)
_PHRASES = {
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "the real numbers": r"\mathbb{R}",
    "infinity": r"\infty", "positive infinity": r"\infty", "negative infinity": r"-\infty", "-infinity": r"-\infty",
}  # fmt: skip
_MIXED = re.compile(r"(?<![\d./^{])(?<!\d )(\d{1,3}(?: \d{3}){1,4}|\d+) (\d+)/(\d+)(?![\d/])", re.ASCII)
_GROUPS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_PLAIN_WORDS = {"pi": r"\pi", "infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "theta": r"\theta"}
_PLAIN_WORD = re.compile(r"(?<![a-zA-Z\\{])(?:pi|infinity|inf|oo|theta)(?![a-zA-Z])")
# a function as programs write it, `7*sin(pi*x/5)`: a parser of LaTeX would read the product of its letters
_NAME = re.compile(
    r"(?<![a-zA-Z\\])(?<!\\text\{)(?:(a)(?:rc)?(sin|cos|tan)|((?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp))"
    r"(?= ?[(^_\\\d]|x(?![a-zA-Z])| [a-zA-Z](?![a-zA-Z]))"
)
_ABSOLUTE = re.compile(r"(?<![a-zA-Z\\])abs ?\(([^()]*)\)")
_SQRT = re.compile(r"\\?sqrt\s*(?:\(([^()]*)\)|(\d)(?!\d)|\s([a-zA-Z0-9]))")
_RELATIONS = [(re.compile(p), r) for p, r in (
    (r">=|=>|\\(?:geqslant|geqq|ge)(?![a-zA-Z])", r"\\geq "),
    (r"<=|=<|\\(?:leqslant|leqq|le)(?![a-zA-Z])", r"\\leq "),
    (r"!=|\\not\s*=|\\ne(?![a-zA-Z])", r"\\neq "),
    (r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-zA-Z]))", r"\\ln "),
    (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
    (r"(\\|\{)ar(sin|cos|tan)h(?![a-zA-Z])", r"\1arc\2h"),
    (r"\\lnot(?![a-zA-Z])", r"\\neg"),
    (r"\\wedge(?![a-zA-Z])", r"\\land"),
    (r"\\vee(?![a-zA-Z])", r"\\lor"),
    (r"\\(?:overline|bar)\s*\{([A-Z]{2})\}", r"\1"),
    (r"(?:\{\})?[_^]\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?|(?<![\w\\])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1\3}{\2\4}"),
    (r"\\var(phi|epsilon)(?![a-zA-Z])", r"\\\1"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\(?:simeq|doteq|thickapprox|cong)(?![a-zA-Z])|~=", r"\\approx "),
    (r"\\(?:lor|vee)(?![a-zA-Z])", r"\\text{ or }"),
    (r"\\(?:land|wedge)(?![a-zA-Z])", r"\\text{ and }"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\[lr]vert(?![a-zA-Z])|\\vert(?![a-zA-Z])", "|"),
    (r"\\(?:varnothing|empty)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:mathbf|Bbb)\s*\{?R\}?(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\\mathbb\s*([A-Z])(?![a-zA-Z])|\\([RNZQ])(?![a-zA-Z])", r"\\mathbb{\1\2}"),
    (r"\\backslash(?![a-zA-Z])|(?<=\\mathbb\{[A-Z]\})\s?-\s?(?=\\\{)", r"\\setminus "),
)]  # fmt: skip
_DEGREES = re.compile(
    r"\s*(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z]))(?:\s*(?:\\text\{\s*)?([CF])(?:\s*\})?(?![a-zA-Z]))?"
)
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh",
    "ln", "log", "exp", "gcd", "lcm", "max", "min",
))  # fmt: skip


def plain(answer: str) -> str:
    """An answer in one LaTeX spelling. Texts with one spelling are one answer; the spelling is for reading, not for print."""
    if len(set(_AXES.findall(answer))) > 1:  # i alone may be the imaginary unit
        answer = _AXES.sub(r"\\vec{\1}", answer)
    text = _visible(answer.translate(_UNICODE) if not answer.isascii() else answer)
    for pattern, sign in _RELATIONS:
        text = pattern.sub(sign, text)
    text = _FONT.sub(r"\1", _FONT.sub(r"\1", text))
    text = _WORDS.sub(_unified, text)
    text = _DEGREES.sub(lambda sign: f" \\text{{degrees{' ' + sign[1] if sign[1] else ''}}}", text)
    text = " ".join(_numbers(_fractions(text)).split()).strip(" ;").removesuffix(".").rstrip(" \\")
    if phrase := _PHRASES.get(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().lower()):
        return phrase
    if proportion := _PROPORTION.fullmatch(text):
        return f"{proportion[1]}:{proportion[3]}" if proportion[2] == "to" else f"\\frac{{{proportion[1]}}}{{{proportion[3]}}}"
    text = _ORDINAL.sub(r"\1", text)
    text = _CURRENCY.sub("", _TRANSPOSED.sub(r"(\1)", _open_ended(text)))
    return text.replace(" ", "") if _GROUPS.fullmatch(text) else text


def _open_ended(text: str) -> str:
    """`]2,5[`, as some countries write an open interval, as `(2,5)`."""
    if not re.fullmatch(r"[\[\](][^\[\]()]*,[^\[\]()]*[\[\])]", text) or not (text[0] == "]" or text[-1] == "["):
        return text
    return ("(" if text[0] == "]" else text[0]) + text[1:-1] + (")" if text[-1] == "[" else text[-1])


def _visible(text: str) -> str:
    """The text without layout, delimiters and what a reader cannot see."""
    if not text.isascii():
        text = _RAISED_RUN.sub(lambda run: f"^{{{''.join(_RAISED[char] for char in run[0])}}}", text)
        text = _ROOT.sub(lambda root: f"\\sqrt{_INDEX[root[1]]}{{{root[2] or root[3] or root[4]}}}", text)
        text = unicodedata.normalize("NFKC", text)
    text = _HIDDEN.sub(" ", text)
    text = _DIGIT_SPACE.sub("", _LAYOUT.sub("", _ROW_END.sub(r"\\\\", text)))
    text = _SPACE.sub(" ", text.replace("\\!", "")).replace("**", "^" if _PYTHON_POWER.search(text) else "")
    text = _MONEY.sub("", text.replace("\\\\(", "(").replace("\\\\)", ")")).strip('`" ')
    return text.strip("`\"' ") if text[:1] == "'" else text  # a prime alone is no quotation mark


def _unified(words: re.Match[str]) -> str:
    """A text macro as `\\text{...}`, or as a bare letter where it holds one symbol, as in `\\mathrm{e}`."""
    content = words[1].strip()
    if re.search(r"\d", content):
        return words[1]
    if content in _FUNCTIONS:
        return f"\\{content} "
    if len(content) == 1 and not words[0].startswith(("\\text", "\\mbox")):
        return content
    return f"\\text{{{words[1]}}}" if content else " "


def _fractions(text: str) -> str:
    """Fractions and roots with their braces: `\\dfrac12` is `\\frac{1}{2}`, `sqrt(2)` is `\\sqrt{2}`."""
    text = _SQRT.sub(lambda root: f"\\sqrt{{{root[1] or root[2] or root[3]}}}", re.sub(r"\\surd(?![a-zA-Z])", "sqrt", text))
    text = _LOOSE_ROOT.sub(r"\\sqrt[\1]{\2}", text)
    text = _OVER.sub(lambda over: f"\\frac{{{over[1] or over[3]}}}{{{over[2] or over[4]}}}", text)
    text = re.sub(r"\\(?:[dtcsx]|nice|flat)frac(?![a-zA-Z])", r"\\frac", text)
    for _ in range(_MOST_NESTED):
        text = _LOOSE_RADICAND.sub(r"\\sqrt{\1}", _LOOSE_FRACTION.sub(_braced, text))
    return text


def _braced(fraction: re.Match[str]) -> str:
    top, bottom = fraction[1] or fraction[3], fraction[2] or fraction[4]
    return f"\\frac{{{top}}}" + (f"{{{bottom}}}" if bottom else "")


def _numbers(text: str) -> str:
    """Numbers as LaTeX: powers of ten for e-notation, a fraction for a repeating decimal, braces around long exponents."""
    text = _MIXED_FRACTION.sub(_improper, _MIXED.sub(_mixed, text))
    text = _NAME.sub(lambda name: f"\\{'arc' if name[1] else ''}{name[2] or name[3]} ", _ABSOLUTE.sub(r"|\1|", text))
    text = _CUT.sub(_endless, text)
    text = _TEN_POWER.sub(lambda power: f" \\times 10^{{{power[1] or power[2] or power[3]}}}", text)
    text = _E_NOTATION.sub(lambda power: f"{power[1]} \\times 10^{{{int(power[2]) if len(power[2]) < 10 else power[2]}}}", text)
    text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
    text = _POWER.sub(lambda power: f"^{{{power[1] or power[2] or ''}}}", text)
    text = _PLAIN_WORD.sub(lambda word: _PLAIN_WORDS[word[0]], text)
    return _REPEATING.sub(_fraction_of, text)


def _mixed(number: re.Match[str]) -> str:
    """`2 1/3` as `2\\frac{1}{3}`. With a fraction of 1 or more, as in `2 4/3`, it is no number, and stays as it is."""
    whole = number[1].replace(" ", "")
    return f"{whole}\\frac{{{number[2]}}}{{{number[3]}}}" if int(number[2]) < int(number[3]) else number[0]


def _improper(mixed: re.Match[str]) -> str:
    """`2\\frac{1}{3}` as `\\frac{7}{3}`. A fraction above 1 is a factor, and stays one."""
    whole, top, bottom = (int(number) for number in mixed.groups())
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}" if top < bottom else mixed[0]


def _endless(decimal: re.Match[str]) -> str:
    """`0.1666...` as `0.1\\overline{6}`, and `3.14159...` as the decimal that it begins with. Fewer places stay open."""
    period = _PERIOD.fullmatch(decimal[2])
    if period is None:
        return decimal[0] if len(decimal[2]) < 4 else f"{decimal[1]}.{decimal[2]}"
    return f"{decimal[1]}.{period[1] or ''}\\overline{{{period[2] or period[3] or period[5]}}}"


def _fraction_of(decimal: re.Match[str]) -> str:
    """`0.1\\overline{6}` as `\\frac{1}{6}`."""
    sign, whole, fixed, period = decimal[1], decimal[2], decimal[3], decimal[4] or decimal[5] or decimal[6]
    if len(fixed + period) > 60:
        return decimal[0]
    value = Fraction(
        int(f"{whole or 0}{fixed}{period}") - int(f"{whole or 0}{fixed}"), (10 ** len(period) - 1) * 10 ** len(fixed)
    )
    return f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"
