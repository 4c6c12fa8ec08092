"""Final answers of completions: find them, bring them to one form, compare them exactly.

The rules are our own; `#### 72` is GSM8K's mark (arXiv 2110.14168). A strong mark (`####`, `\\boxed`, `<answer>`) beats
a phrase ("the answer is"), which beats the last number of the text. What is hedged, negated, a range or a list is no
number. Numbers are exact rationals; only what is none goes to math-verify, in a process that may be killed.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DIGITS = 20_000
"""A longer number is none: the work on one answer stays bounded."""
MAX_EXPONENT = 4_000
MAX_FORMULA = 200
"""A longer formula is not checked."""
FORMULA_SECONDS = 5

_CHUNK = 4_000  # digits that int() and str() take at once, below Python's limit of 4,300
_PIECE = 10**_CHUNK


def extract(text: str) -> str | None:
    """The final answer in one form, equal numbers in equal strings; None if there is none.

    >>> extract("so 48 + 24 = 72\\n#### 72.0")
    '72'
    >>> extract("\\\\boxed{-\\\\frac{3}{4}}"), extract("\\\\boxed{x^2}"), extract("It is not 5.")
    ('-3/4', 'x^2', None)
    """
    text = _without_quotes(text)
    content = _last_mark(text)
    if content is not None:
        clean = _normalise(content)
        value = _first_number(clean)
        if value is not None:
            return _canonical(value)
        return None if _HEDGED.search(clean) else content
    clean = _normalise(text)
    sentence = _last_phrase(clean)
    value = _last_number(clean) if sentence is None else _first_number(sentence)
    return None if value is None else _canonical(value)


def marked(text: str) -> str | None:
    """What the last non-empty strong mark holds, as it was written.

    >>> marked("#### 5 \\\\boxed{ 1 + x }")
    '1 + x'
    """
    return _last_mark(_without_quotes(text))


def is_correct(completion: str, gold: str) -> bool:
    """Whether the final answer equals `gold`: exactly if both are numbers, else as math-verify sees it.

    >>> is_correct("#### 1,200.0", "1200"), is_correct("#### 0.333", "1/3")
    (True, False)
    """
    answer = extract(completion)
    if answer is None:
        return False
    wanted, given = parse_number(gold), parse_number(answer)
    if wanted is not None and given is not None:
        return wanted == given
    if not ((wanted is not None or _is_formula(gold)) and (given is not None or _is_formula(answer))):
        return False
    if wanted is not None and _LIST.search(_normalise(answer)):
        return False
    return _same_formula(_in_ascii(gold).strip(), _in_ascii(answer))


def is_checkable(gold: str) -> bool:
    """Whether `is_correct` can judge by `gold`: it is a number or a formula.

    >>> is_checkable("1/2"), is_checkable("\\\\sqrt{2}"), is_checkable("Paris")
    (True, True, False)
    """
    return parse_number(gold) is not None or _is_formula(gold)


@lru_cache(maxsize=1024)  # a group's completions are held to one answer
def parse_number(text: str) -> Fraction | None:
    """The number that the whole text is; None if it is more or less than one number.

    >>> parse_number("$1,200.50"), parse_number("5 apples")
    (Fraction(2401, 2), None)
    """
    text = _SPACED_SIGN.sub("-", _normalise(text).strip().strip("\"'“”‘’`").rstrip(".!?;").strip())
    spelled = _spelled(text)
    if spelled and not text[spelled[1] :].strip():
        return spelled[0]
    items = _items(text)
    item = next(items, None)
    if item is None or not re.fullmatch(r"\(?[-+]?", text[: item.start]) or text[item.end :].strip(") "):
        return None
    return _value(text, item)


# --- marks and phrases

_BOX = re.compile(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]")
_HASHES = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_NOTHING = re.compile(r"\\(?:boxed|fbox)\s*\{|</?answer>|####|[{}\s*$`\"']", re.IGNORECASE)
_QUOTE = re.compile(
    r'(?<!\w)"[^"\n]*"|“[^“”\n]*”|„[^„“”\n]*[“”]|«[^«»\n]*»|「[^「」\n]*」|`[^`\n]*`'
    r"|(?<!\w)'(?!\s)(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w)|‘[^‘\n]*?’(?!\w)"
)
_QUOTED_LINE = re.compile(r"^ {0,3}>[^\n]*", re.MULTILINE)
_ANY_MARK = re.compile(r"####|\\(?:boxed|fbox)\s*\{|</?answer>|\banswers?\b", re.IGNORECASE)
_PHRASE = re.compile(
    r"\b(?:answers?|final result)\b(?=[^.!?\n:=]{0,80}?(?:\b(?:is|are|was|be|equals|(?:is|are|was)n't)\b|[:=]))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


def _without_quotes(text: str) -> str:
    """Takes away marks that are quoted: they are someone else's answer."""
    text = _QUOTED_LINE.sub("", text)
    return _QUOTE.sub(lambda found: " " if _ANY_MARK.search(found[0]) else found[0], text)


def _last_mark(text: str) -> str | None:
    marks = [*_boxes(text), *_tags(text), *_hashes(text)]
    full = [(start, content.strip()) for start, content in marks if _NOTHING.sub("", content)]
    return max(full)[1] if full else None


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    opened: list[tuple[int, bool]] = []
    for token in _BOX.finditer(text):
        if token[0] == "}":
            start, boxed = opened.pop() if opened else (0, False)
            if boxed:
                yield start, text[start : token.start()]
        elif token[0] == "{" or token[1]:
            opened.append((token.end(), bool(token[1])))


def _tags(text: str) -> Iterator[tuple[int, str]]:
    start = None
    for tag in _TAG.finditer(text):
        if tag[1] and start is not None:
            yield start, text[start : tag.start()]
        start = None if tag[1] else tag.end()


def _hashes(text: str) -> Iterator[tuple[int, str]]:
    for mark in _HASHES.finditer(text):
        yield mark.start(1), _TAG.split(mark[1])[0]


def _last_phrase(text: str) -> str | None:
    """What the last phrase that says something says, up to its sentence's end or the next phrase (so no text twice)."""
    limit = len(text)
    for phrase in reversed(list(_PHRASE.finditer(text))):
        said, limit = text[phrase.end() : limit], phrase.start()
        end = _SENTENCE_END.search(said, _start_of(said))
        said = said[: end.start()] if end else said
        if _HEDGE.search(_NEW_CLAUSE.split(text[max(0, limit - 80) : limit])[-1]):
            return "not" + said
        if _NO_ANSWER.search(said) or re.search(r"\d", said) or _spelled(said[_start_of(said) :]):
            return said
    return None


# --- one way of writing

_SAME = {"\u066b": ".", "\u066c": ",", "’": "'", "∶": ":", "π": "\\pi ", "∞": "\\infty "}
_SAME |= dict.fromkeys("‐‑‒–−﹣", "-") | dict.fromkeys("⁄∕", "/") | dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff", "")
_TABLE = str.maketrans(_SAME)
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_ARGUMENT = r"(?:\{\s*([-+]?[\d.,]+)\s*\}|\s*(\d))"
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator notes
        (r"</?[A-Za-z]\w{0,20}>", " "),
        (r"\\[()\[\]]|\\left\b|\\right\b|\\displaystyle\b|\\!", ""),
        (r"\\[,;: ]|\\quad\b|~(?=\S)(?<=\d~)", " "),
        (r"\\(?:text\w*|mathrm|mathbf|mathit|boxed|fbox|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:text|textbf|mathrm|mathbf|boxed|fbox|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:boxed|fbox)\s*\{", "\n"),  # cut off: a new line, so that its number is not listed with the one before
        (r"\{,\}", ","),
        (r"\\times\b", "×"), (r"\\cdot\b", "·"), (r"\\div\b", "÷"), (r"\\pm\b", "±"), (r"\\approx\b", "≈"),
        (r"\\(?:leq?|geq?|neq?|lt|gt)\b|[<>!]=", "≠"),
        (r"\^\s?\{?\s?\\circ\s?\}?|\\degree\b|°", "  "),
        (r"\\?%|‰", "  "),
        (r"(?<=\d)\\?[$€£¥₹₽₩¢](?=\d)", "  "),
        (r"\\?[$€£¥₹₽₩¢₫₺₴₪฿]|\b(?:USD|EUR|GBP|US(?=\$)|Rs\.?) ?(?=[-.\d])", ""),
        (r"(?<![\w*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![\w*])", ""),
        (r"(?<!\w)_{1,3}(?=[^\s_])|(?<=[^\s_])_{1,3}(?!\w)", ""),
        (r"\^\{\s?([-+]?\d+)\s?\}", r"^\1"),
        (r"(?<=\d)\s?(?=\\[dtc]?frac)", " "),
        (rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}(?![\d.])", r"\1\2/\3\4"),
    )
)  # fmt: skip


def _normalise(text: str) -> str:
    """Digits of all scripts, minus signs, spaces and fractions in ASCII; currency, percent and layout taken away."""
    text = _in_ascii(text)
    for pattern, new in _FORMS:
        text = pattern.sub(new, text)
    return text


def _in_ascii(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"(\d?)([¼-¾⅐-⅞↉])(?=(\d?))", _vulgar, text.translate(_TABLE))
    text = re.sub(r"(?<=\w)[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPT)}}}", text)
    return re.sub(r"[^\x00-\x7f]", lambda found: _ascii(found[0]), text)


def _vulgar(found: re.Match[str]) -> str:
    parts = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return (found[1] + " " if found[1] else "") + parts + ("  " if found[3] else "")


@lru_cache(maxsize=1024)
def _ascii(char: str) -> str:
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    return " " if unicodedata.category(char) == "Zs" else chr(ord(char) - 0xFEE0) if "！" <= char <= "～" else char


# --- numbers in normalised text


class Item(NamedTuple):
    """Digits that belong together: a number, or a range, list, ratio, date, sum, which are none."""

    start: int
    end: int


_RUN = re.compile(r"(?:(?<![\w.])\.)?\d[\d.,]*")
_JOIN = re.compile(
    r"[eE][-+]?|(?:,? \w{1,20})? or |[ \t]*(?:[-/'+*×÷·^~&|;±—_\\,xX]|:(?! )|(?<= ): ?"
    r"|(?:,[ \t]*)?\b(?:to|and|or|through|until|minus|plus|times|over|vs))?[ \t]*[-+]{0,2}"
)
_PLAIN = r"(?:\d{1,3}(?: \d{3})+(?:\.\d*)?|[\d.,]+)"
_ONE = re.compile(
    rf"(?:(?P<whole>\d+|\d[\d,]*) +(?=[\d,]+ ?/))?(?P<top>{_PLAIN})"
    rf"(?: ?/ ?(?P<bottom>[-+]?{_PLAIN})|(?:[eE]| ?[xX×*·] ?10 ?\^ ?)(?P<exponent>[-+]?\d{{1,9}}))?"
)
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|[1-9]\d{0,2}(?: \d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf" ?({'|'.join(_SCALES)})\b", re.IGNORECASE)
_PART_NAMES = r"half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
_PART = re.compile(rf"[ -](?:{_PART_NAMES})\b", re.IGNORECASE)


def _items(text: str) -> Iterator[Item]:
    current: Item | None = None
    for run in _RUN.finditer(text):
        start, end = run.start(), run.start() + len(run[0].rstrip(".,"))
        if current is not None:
            gap = text[current.end : start] if start - current.end <= 40 else "\n"
            if _JOIN.fullmatch(gap):
                current = Item(current.start, end)
                continue
            yield current
            current = None
        if start == 0 or not text[start - 1].isalpha():  # the 2 of H2O is no number
            current = Item(start, end)
    if current is not None:
        yield current


def _value(text: str, item: Item) -> Fraction | None:
    """The number that the item is, with the sign before it and the scale word ("million") after it."""
    if item.end - item.start > 2 * MAX_DIGITS:
        return None
    one = _ONE.fullmatch(text, item.start, item.end)
    sign = _sign(text[max(0, item.start - 12) : item.start])
    if one is None or sign is None:
        return None
    value = _assemble(one)
    after = text[item.end : item.end + 16]
    if value is None or _PART.match(after):
        return None
    scale = _SCALE.match(after)
    return sign * value * (_SCALES[scale[1].lower()] if scale else 1)


def _assemble(one: re.Match[str]) -> Fraction | None:
    top = _decimal(one["top"])
    if top is None:
        return None
    if one["exponent"]:
        exponent = int(one["exponent"])
        return top * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
    if not one["bottom"]:
        return top
    bottom = _decimal(one["bottom"].lstrip("+-"))
    whole = _decimal(one["whole"]) if one["whole"] else Fraction(0)
    if not bottom or whole is None or (one["whole"] and top >= bottom):
        return None
    return whole + top / bottom * (-1 if one["bottom"].startswith("-") else 1)


def _decimal(text: str) -> Fraction | None:
    """A number of digits, grouped or not; None if the groups are not of three."""
    if len(text) > MAX_DIGITS or not _GROUPED.fullmatch(text):
        return None
    whole, _, part = text.replace(",", "").replace(" ", "").partition(".")
    return Fraction(_int(whole + part), 10 ** len(part))


def _sign(before: str) -> int | None:
    """The sign that stands before a number; None if what stands there makes it no number."""
    if re.search(r"(?:\b(?:minus|negative)|=\s*-)\s+$", before, re.IGNORECASE):
        return -1
    if re.search(r"[<>≤≥≠±√^~|\\]\s*$", before):
        return None
    if before[-1:] not in ("-", "+"):
        return 1
    if before[-1] == "-" and before[-2:-1].isalpha():
        return 1  # "COVID-19"
    if re.search(r"[\w)\]}+\-±]$", before[:-1]):
        return None
    return -1 if before[-1] == "-" else 1


def _int(digits: str) -> int:
    """int() in pieces: Python refuses more than 4,300 digits at once."""
    value = 0
    for at in range(0, len(digits), _CHUNK):
        piece = digits[at : at + _CHUNK]
        value = value * 10 ** len(piece) + int(piece)
    return value


def _str(value: int) -> str:
    pieces: list[str] = []
    while value >= _PIECE:
        value, rest = divmod(value, _PIECE)
        pieces.append(str(rest).zfill(_CHUNK))
    return str(value) + "".join(reversed(pieces))


def _canonical(value: Fraction) -> str:
    top = ("-" if value < 0 else "") + _str(abs(value.numerator))
    return top if value.denominator == 1 else f"{top}/{_str(value.denominator)}"


# --- number words

_DIGIT = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = {
    word: 10 * n for n, word in enumerate(re.split(" ", "twenty thirty forty fifty sixty seventy eighty ninety"), 2)
}
_WORDS = {"zero": 0, **_DIGIT, **{word: n for n, word in enumerate(re.split(" ", _TEENS), 10)}, **_TENS}
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_DIGIT)})\b)?|(?:{'|'.join(_WORDS)})\b)"
_BELOW_1000 = rf"(?:(?:an?|{_BELOW_100}) hundred\b(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_SPELLED = re.compile(
    rf"(minus |negative )?((?:an?|{_BELOW_1000}) thousand\b(?:,?(?: and)? {_BELOW_1000})?|{_BELOW_1000})\b",
    re.IGNORECASE,
)
_SPELLED_ON = re.compile(
    rf",?[ -]?(?:(?:or|to|and|point|,|-) ?)?(?:(?:{'|'.join(_WORDS)}|{'|'.join(_SCALES)}|{_PART_NAMES})\b|\d)",
    re.IGNORECASE,
)


def _spelled(text: str) -> tuple[Fraction, int] | None:
    """The number that the text begins with in words, and where it ends."""
    found = _SPELLED.match(text)
    if not found or _SPELLED_ON.match(text, found.end()):
        return None
    total = part = 0
    for word in re.split(r"[ ,-]+", found[2].lower()):
        if word == "thousand":
            total, part = 1000 * (part or 1), 0
        else:
            part = 100 * (part or 1) if word == "hundred" else part + _WORDS.get(word, 0)
    return Fraction((-1 if found[1] else 1) * (total + part)), found.end()


# --- which number of a text

_HEDGE = re.compile(
    r"(?:\b(?:not|never|neither|nor|maybe|perhaps|probably|possibly|guess(?:ing)?|might|may be|could be|likely"
    r"|presumably|unlikely|doubt|unsure|either|between|(?:less|more|fewer|greater) than)\b|n't\b)"
    r"(?: [^\s,.;:!?=]{1,20}){0,4}[\s*:(\"'“]*$",
    re.IGNORECASE,
)
_NEW_CLAUSE = re.compile(r"[.;!?](?=\s)|,(?=\s)|\n|=|\b(?:but|so|therefore|hence|thus|because|since)\b", re.IGNORECASE)
_HEDGE_AFTER = re.compile(
    r"[\"'”)]?,? ?(?:\w{1,20} ){0,2}?(?:maybe|perhaps|probably|possibly|i guess|i suppose|not sure|or so\b"
    r"|(?:is|was) (?:not|wrong|incorrect)|isn't|wasn't)",
    re.IGNORECASE,
)
_HEDGED = re.compile(r"\b(?:not|maybe|perhaps|probably|possibly|guess|might|could)\b|n't\b", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"\b(?:unknown|undefined|indeterminate|impossible|infinity|infinite|inf|nan|none|cannot|can't)\b|infty",
    re.IGNORECASE,
)
_TWO_EQUATIONS = re.compile(r"(?:,|;|\band\b|\bor\b)\s*[^\s=]{1,20}\s*=", re.IGNORECASE)
_CLAUSE_END = re.compile(r",(?!\d)|[;\n]|\.(?=\s)|\b(?:because|since|where)\b", re.IGNORECASE)
_MATH_BEFORE = re.compile(r"[\\^_+*/√|±{×÷·]|[-+\w]\([-+]?$|(?<!\w)[A-Za-z]\s*-\s*$")
_MATH_AFTER = re.compile(r"\s*[\\^_{√]|\(| ?[xyzn](?!\w)|[abcdefijkpqrtuvw](?![\w.])|\s*\*")
_MATH_LATER = re.compile(r"[\\+*×÷·√±]|-\s*(?:\d|[A-Za-z]\b)")
_SPACED_SIGN = re.compile(r"^-\s+")
_LEAD = re.compile(
    r"[\s*:=_\"'“‘`(]*(?:(?:is|are|was|be|equals|the|exactly|about|approximately)\b[\s*:=_\"'“‘`(]*){0,3}",
    re.IGNORECASE,
)


def _start_of(said: str) -> int:
    found = _LEAD.match(said)
    return found.end() if found else 0


def _first_number(content: str) -> Fraction | None:
    """The first number of what a mark or phrase holds, or the right side of its equation; None for a formula."""
    end = _CLAUSE_END.search(content := content.strip())
    clause = content[: end.start()] if end else content
    if "=" in clause:
        if _TWO_EQUATIONS.search(content):
            return None
        content = content[clause.rindex("=") + 1 :].strip()
    content = _SPACED_SIGN.sub("-", content)
    lead = content[_start_of(content) :]
    spelled = _spelled(lead)
    if spelled:
        after = lead[spelled[1] :]
        return None if _MATH_LATER.match(after.lstrip()) or _HEDGE_AFTER.match(after) else spelled[0]
    item = next(_items(content), None)
    return None if item is None or _is_math(content, item) else _sure(content, item)


def _last_number(text: str) -> Fraction | None:
    last = deque(_items(text), maxlen=1)
    return _sure(text, last[0]) if last else None


def _is_math(content: str, item: Item) -> bool:
    """Whether the number is a piece of a formula: the 2 of 2x."""
    after = content[item.end : item.end + MAX_FORMULA]
    end = _CLAUSE_END.search(after)
    before = content[max(0, item.start - MAX_FORMULA) : item.start]
    before = re.sub(r"(?<![\w)\]}])\+$", "", before)  # the sign of +5, and not the operator of x+5
    later = after[: end.start()] if end else after
    return bool(_MATH_BEFORE.search(before) or _MATH_AFTER.match(after) or _MATH_LATER.search(later))


def _sure(text: str, item: Item) -> Fraction | None:
    """The item's number, unless the words around it hedge or negate it."""
    before = _NEW_CLAUSE.split(text[max(0, item.start - 120) : item.start])[-1]
    if _HEDGE.search(before.rstrip("-+")) or _HEDGE_AFTER.match(text[item.end : item.end + 60]):
        return None
    return _value(text, item)


# --- formulas

_LIST = re.compile(r",(?!\d{3}\b)")
_FUNCTIONS = frozenset(["sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "pmatrix", "bmatrix"])
_HEAVY = re.compile(r"!|\^\s*\{[^{}]*\^|\^\s*\(|\^\s*\w+\s*\^|\^\s*\{?\s*-?\d{4}|\d{30}")
_BROKEN = re.compile(r"^[<>=*/^_]|[-+*/^_=<>]$|^[-+]?\s*\\infty$|^[\d\s.:;/'-]+$|\d_\d|^n/?a$|^\W*$|\0", re.IGNORECASE)
_worker: subprocess.Popen[str] | None = None
_lock = threading.Lock()


def _is_formula(text: str) -> bool:
    """Whether math-verify can read the text, and in bounded time as far as that can be seen."""
    text = _in_ascii(text).strip()
    clean = _normalise(text).strip()
    if (
        not clean
        or not clean.isascii()
        or len(text) > MAX_FORMULA
        or _HEAVY.search(text)
        or max(map(text.count, "([{")) > 12
        or _BROKEN.search(clean)
    ):
        return False
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[A-Za-z]+", " ", clean))
    if any(word.lower() not in _FUNCTIONS and len(word) > 2 for word in words):
        return False
    return bool(re.search(r"\\[A-Za-z]|[\^_+*/=<>(\[-]|\d\s*,|\d[A-Za-z]", clean))


@lru_cache(maxsize=4096)
def _same_formula(gold: str, answer: str) -> bool:
    """Asks the worker, which ends itself when a question takes too long; no reply is a no."""
    global _worker
    reply = ""
    with _lock:
        try:
            if _worker is None or _worker.poll() is not None:
                _stop()
                _worker = _start()
            if _worker.stdin and _worker.stdout:
                _worker.stdin.write(json.dumps([gold, answer]) + "\n")
                _worker.stdin.flush()
                reply = _worker.stdout.readline()
        except OSError:
            pass
        finally:  # also on a KeyboardInterrupt: the next question must not get this one's reply
            if not reply:
                _stop()
    return reply.strip() == "true"


def _start() -> subprocess.Popen[str]:
    # -P: the folder of this file holds a types.py, which must not stand before Python's own.
    command = [sys.executable, "-P", os.path.abspath(__file__)]
    # In a session of its own, so that Ctrl-C in the terminal does not end a question as if it were wrong.
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=null, text=True, encoding="utf-8", start_new_session=True
    )


@atexit.register
def _stop() -> None:
    global _worker
    process, _worker = _worker, None
    if process is None:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not flushed has no reader any more
                stream.close()


def _after_fork() -> None:
    """A fork's child asks a worker of its own, and leaves its parent's alone."""
    global _lock
    _lock = threading.Lock()
    if _worker is not None:
        _worker.returncode = 0
    _stop()


os.register_at_fork(after_in_child=_after_fork)


def _serve() -> None:
    """The worker: a line with two formulas in, a line with true or false out. The alarm ends it, hung or not."""
    import signal

    signal.alarm(120)
    from math_verify import parse, verify

    for line in sys.stdin:
        signal.alarm(FORMULA_SECONDS)
        try:
            gold, answer = ([parse(f"${side}$", parsing_timeout=0)] for side in json.loads(line))
            same = bool(gold[0] and answer[0] and verify(gold[0], answer[0], timeout_seconds=None))
        except Exception:  # whatever sympy raises on a formula, it was not understood
            same = False
        signal.alarm(0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
