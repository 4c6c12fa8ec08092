"""The answer checker against texts that were written to fool it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring import answers
from shoestring.answers import extract, is_checkable, is_correct, marked, parse_number

BOX = "\\boxed{%s}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "72"),
        ("#### 5\nthe answer is 6", "5"),
        ("the answer is 6. There are 7.", "6"),
        ("#### 5\n\\boxed{6}", "6"),
        ("\\boxed{6}\n#### 5", "5"),
        ("<answer>6</answer> #### 5", "5"),
        ("\\boxed{5} \\boxed{} #### \n<answer> </answer>", "5"),
        ("the answer is 5. The answer is 6.", "6"),
        ("The answer is clear. We have 5.", "5"),
        ("**Answer:** 12", "12"),
        ("Final answer:\n\n12", "12"),
        ("The answer to the question is $12$.", "12"),
        ("Answer: twenty-one", "21"),
        ("first 3 then, in the end, 4", "4"),
        ("#### 3 + 4 = 7", "7"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{x = \\frac{1}{2}}", "1/2"),
        ("#### 12 apples and 3 pears", "12"),
        ("#### so there are 12 apples", "12"),
        ("<answer>\nIt costs $12.\n</answer>", "12"),
        ("<answer>\\boxed{12}</answer>", "12"),
        ("<ANSWER>12</ANSWER>", "12"),
        ("#### 7 \\boxed{5", "7"),
        ("\\boxed{7} <answer>5", "7"),
        ("{ \\boxed{7}", "7"),
        ("no digits", None),
        ("", None),
        ("####", None),
        ("\\boxed{}", None),
        ("<answer></answer>", None),
        ("The answer is unknown.", None),
        ("#### NaN", "NaN"),
        ("\\boxed{ x^2+1 }", "x^2+1"),
        ("12-5=7", "7"),
        ("a 5-year-old", "5"),
        ("x=-5", "-5"),
        ("COVID-19", "19"),
        ("H2O", None),
    ],
)
def test_which_answer_counts(text: str, answer: str | None) -> None:
    assert extract(text) == answer


def test_no_number_equals_nothing() -> None:
    for text in ("", "nothing", "####", "#### none", "<answer></answer>"):
        assert not any(is_correct(text, gold) for gold in ("0", "", "none", "nan"))


def test_marked_is_the_raw_content() -> None:
    assert marked("#### 5 ") == "5"
    assert marked("#### 1\n\\boxed{ \\frac{1}{2} }") == "\\frac{1}{2}"
    assert marked("<answer>\n a b \n</answer>") == "a b"
    assert marked("the answer is 5") is None
    assert marked("\\boxed{5") is None
    assert marked('He wrote "#### 5"') is None


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("1,234", "1234"), ("1,234,567.50", "1234567.5"), ("1 234", "1234"), ("1\u00a0234\u00a0567", "1234567"),
        ("1\u2009234", "1234"), ("1\u202f234", "1234"), ("1{,}234", "1234"), ("1\\,234", "1234"), ("$5", "5"),
        ("\\$5", "5"), ("-$5", "-5"), ("$-5", "-5"), ("5€", "5"), ("£5.20", "5.2"), ("USD 5", "5"), ("50%", "50"),
        ("50 %", "50"), ("50\\%", "50"), ("5 km/h", "5"), ("12 cm^2", "12"), ("12\\text{ cm}^2", "12"),
        ("90^\\circ", "90"),
        ("90°", "90"), ("5 dollars", "5"), ("12.", "12"), ("12!", "12"), ("12,", "12"), ("12.0", "12"), ("5.", "5"),
        (".5", "1/2"), ("-.5", "-1/2"), ("007", "7"), ("3 1/2", "7/2"), ("1/2", "1/2"),
        ("1 / 2", "1/2"), ("6/4", "3/2"), ("-1/2", "-1/2"), ("½", "1/2"), ("2½", "5/2"), ("-½", "-1/2"), ("⅔", "2/3"),
        ("\\frac{1}{2}", "1/2"), ("\\dfrac12", "1/2"), ("\\tfrac{3}4", "3/4"), ("-\\frac{1}{2}", "-1/2"),
        ("\\frac{-1}{2}", "-1/2"), ("3\\frac{1}{2}", "7/2"), ("-5", "-5"), ("\u22125", "-5"), ("- 5", "-5"),
        ("+5", "5"),
        ("minus 5", "-5"), ("٣٤", "34"), ("१२", "12"), ("１２", "12"), ("－１．５", "-1.5"), ("twenty-one", "21"),
        ("twenty one", "21"), ("three hundred and five", "305"), ("two thousand", "2000"), ("a hundred", "100"),
        ("two thousand, three hundred and forty-five", "2345"), ("Twelve apples", "12"), ("minus five", "-5"),
        ("zero", "0"), ("5 thousand", "5000"), ("2.5 million", "2500000"), ("1.5e3", "1500"), ("1E-2", "1/100"),
        ("1.5 x 10^3", "1500"), ("1.5 × 10³", "1500"), ("1.5 \\times 10^{3}", "1500"), ("2 \\times 10^{-3}", "1/500"),
        ("**12**", "12"), ("__12__", "12"), ('"12"', "12"), ("“12”", "12"), ("'12'", "12"), ("`12`", "12"),
        ("$12$", "12"),
        ("\\(12\\)", "12"), ("\\[12\\]", "12"), ("\\text{12}", "12"), ("\\mathbf{12}", "12"), ("(12)", "12"),
    ],
)  # fmt: skip
def test_forms_of_one_number(content: str, number: str) -> None:
    assert Fraction(extract(f"#### {content}") or "nan") == Fraction(number)
    assert Fraction(extract(f"<answer>{content}</answer>") or "nan") == Fraction(number)
    assert is_correct(f"so \\boxed{{{content}}}", number)
    assert not is_correct(f"#### {content}", str(Fraction(number) + 1))


def test_mixed_numbers_keep_their_sign() -> None:
    assert extract("#### -3 1/2") == "-7/2"
    assert extract("#### -2½") == "-5/2"


@pytest.mark.parametrize(
    "content",
    [
        "3-5", "3 - 5", "3–5", "3—5", "3 to 5", "3 and 5", "3, 4, 5", "3,4,5", "(3, 5)", "[3, 5]", "3 4 5", "3; 4",
        "3/4/5",
        "2:1", "2 : 1", "12:30", "12:30 pm", "2020-01-02", "1.2.3", "3..5", "1/0", "0/0", "1,23", "1,234,56",
        "12,34,567",
        "1234,567", "0,123", "1.234,56", "3 5/2", "1e999999999", "1 x 10^99999999", "NaN", "nan", "Infinity", "-inf",
        "∞",
        "--5", "±5", "\\pm 5", "< 5", ">= 5", "!= 5", "≠5", "5+", "5x", "5\\pi", "x-5", "x^2", "2\\sqrt{9}", "f(5)",
        "|5|",
        "5 or 6", "5 apples or 6", "five or six", "three to five", "two thirds", "2 thirds", "0x5", "1_000", "x5",
        "5'000",
        "x=5, y=6", "x = 5 or x = 6", "x > 5", "\\{5\\}", "\\frac{1}{0}", "\\frac{1}{2}5", "-(-5)", "2^5",
    ],
)  # fmt: skip
def test_not_a_number(content: str) -> None:
    for text in (f"#### {content}", f"<answer>{content}</answer>", f"\\boxed{{{content}}}"):
        got = extract(text)
        assert got is None or parse_number(got) is None
    assert parse_number(content) is None


@pytest.mark.parametrize(
    ("content", "golds"),
    [("3-5", "3 5 -2 -5"), ("12:30", "12 30"), ("2:1", "2 1"), ("5 or 6", "5 6"), ("5+", "5"), ("< 5", "5"),
     ("5^", "5"),
     (">= 5", "5"), ("!= 5", "5"), ("5_000", "5 5000"), ("3, 5", "3 5"), ("1/0", "0 1"), ("x=5, y=6", "5 6"),
     ("5²", "5"),
     ("1,23", "1 23 123"), ("\\pm 5", "5 -5"), ("2020-01-02", "2020 2017 2"), ("1.2.3", "1 1.2 3")],
)  # fmt: skip
def test_what_is_no_number_is_wrong(content: str, golds: str) -> None:
    for gold in golds.split():
        assert not is_correct(f"#### {content}", gold)
        assert not is_correct(BOX % content, gold)


@pytest.mark.parametrize(
    "text",
    [
        "the answer is not 5", "The answer isn't 5.", "The answer isn’t 5.", "maybe 5", "probably 12", "perhaps 5",
        "5 or 6",
        "I guess 5", "might be 5", "it could be 5", "The answer might be 5", "Maybe the answer is 5", "5, maybe",
        "I guess the answer is 5", "The answer is 5, I guess", "The answer is probably 5", "The answer is 5 or 6",
        "I don't think the answer is 5", "#### not 5", "#### maybe 5", "\\boxed{\\text{probably }5}",
        "<answer>I guess 5</answer>", "It is not equal to 5", "It does not cost 5", "between 5 and 6",
        "The answer is 5-6",
        "It takes 3 to 5", "We met at 12:30", "on 2020-01-02", "version 1.2.3", "The answer is not twenty",
    ],
)  # fmt: skip
def test_hedged_and_negated_is_no_answer(text: str) -> None:
    assert extract(text) is None
    assert not any(is_correct(text, gold) for gold in ("5", "6", "12", "30", "-5", "20"))


def test_negation_of_something_else_does_not_count() -> None:
    assert extract("It is not 3, so 5") == "5"
    assert extract("Since x is not 3, the answer is 5") == "5"
    assert extract("I could not see it but there are 5") == "5"


@pytest.mark.parametrize(
    "quoted",
    ['He wrote "#### 5"', "> #### 5", "  > \\boxed{5}", "“\\boxed{5}”", "He wrote '#### 5'", "write `#### 5`",
     '"<answer>5</answer>"', "«#### 5»", "He said \"the answer is 5\""],
)  # fmt: skip
def test_a_quoted_mark_is_no_answer(quoted: str) -> None:
    assert extract(quoted) is None
    assert marked(quoted) is None
    assert extract(f"{quoted}\n#### 7") == "7"
    assert extract(f"#### 7\n{quoted}") == "7"


def test_numbers_of_any_length() -> None:
    limit = sys.get_int_max_str_digits()
    long = "7" * 5_000
    assert is_correct(f"#### {long}", long)
    assert is_correct(f"#### {long}.0", long)
    assert not is_correct(f"#### {long}", long[:-1] + "8")
    assert extract(f"#### -{long}/1") == f"-{long}"
    assert parse_number("9" * answers.MAX_DIGITS) is not None
    assert parse_number("9" * (answers.MAX_DIGITS + 1)) is None
    assert sys.get_int_max_str_digits() == limit


def test_exact_not_close() -> None:
    assert not is_correct("#### 0.333", "1/3")
    assert not is_correct("#### 0.3333333333333333333", "1/3")
    assert not is_correct("#### 3.1416", "\\pi")
    assert is_correct("#### 0.1", "1/10")


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", Fraction(12)), (" 1/2 ", Fraction(1, 2)), ("-3", Fraction(-3)), ("$1,200.50", Fraction(2401, 2)),
     ("twenty-one", Fraction(21)), ("5 apples", None), ("3 4", None), ("", None), ("nan", None), ("inf", None),
     ("1/0", None)],
)  # fmt: skip
def test_parse_number(text: str, number: Fraction | None) -> None:
    assert parse_number(text) == number


def test_what_can_be_checked() -> None:
    for gold in ("72", "-3/4", "1,000", "x^2+1", "\\sqrt{2}", "\\frac{\\pi}{2}", "(1, 2)", "2x", "3, 5"):
        assert is_checkable(gold), gold
    for gold in ("", " ", "Paris", "unknown", "nan", "yes", "well-known", "N/A", "12:30", "3-5", "\\text{Paris}", "∞"):
        assert not is_checkable(gold), gold


@pytest.mark.parametrize(
    ("content", "gold", "right"),
    [("2\\sqrt{9}", "6", True), ("1+x^2", "x^2+1", True), ("x²+1", "x^2+1", True), ("\\pi/2", "\\frac{\\pi}{2}", True),
     ("\\{2, 1\\}", "\\{1, 2\\}", True), ("(2, 1)", "(1, 2)", False), ("x^2-1", "(x-1)(x+1)", True),
     ("2^{10}", "1024", True),
     ("x^2", "x^3", False), ("5\\pi", "5", False), ("Paris", "Paris", False), ("\\frac{", "x^2", False)],
)  # fmt: skip
def test_formulas(content: str, gold: str, right: bool) -> None:
    assert is_correct(BOX % content, gold) is right


def test_formulas_off_the_main_thread() -> None:
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(is_correct("\\boxed{3\\sqrt{4}}", "6")))
    thread.start()
    thread.join(60)
    assert got == [True]


@pytest.mark.parametrize(
    "formula",
    ["9^{9^{9^{9}}}", "9^9^9^9", "100000!!!", "x!", "2^{99999}", "(9^9)^{9^9}", "\\frac{" * 50 + "1" + "}{2}" * 50,
     "(" * 90 + "x" + ")" * 90, "x+" * 300 + "1"],
)  # fmt: skip
def test_heavy_formulas_end(formula: str) -> None:
    start = time.monotonic()
    assert not is_correct(BOX % formula, "7")
    assert not is_correct("#### 7", formula)
    assert time.monotonic() - start < 4 * answers.FORMULA_SECONDS


def test_a_hung_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = "import signal, sys, time\nsys.stdin.readline()\nsignal.alarm(1)\ntime.sleep(60)"

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", sleeper], stdin=pipe, stdout=pipe, text=True)

    answers._stop()
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_start", start)
        assert not is_correct("\\boxed{7\\sqrt{4}}", "14")
    assert is_correct("\\boxed{8\\sqrt{4}}", "16")


def test_light_import_and_no_orphan() -> None:
    code = (
        "import sys, json, shoestring.answers as a\n"
        "heavy = [m for m in ('math_verify', 'sympy', 'torch', 'transformers') if m in sys.modules]\n"
        "right = a.is_correct('\\\\boxed{2\\\\sqrt{9}}', '6')\n"
        "print(json.dumps([heavy, right, a._worker.pid]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    heavy, right, pid = json.loads(done.stdout)
    assert (heavy, right, done.stderr) == ([], True, "")
    alive = subprocess.run(["ps", "-p", str(pid)], capture_output=True)
    assert alive.returncode != 0


def test_a_forked_child_has_its_own_worker() -> None:
    code = (
        "import os, shoestring.answers as a\n"
        "right = a.is_correct('\\\\boxed{2\\\\sqrt{9}}', '6')\n"
        "pid = os.fork()\n"
        "right = right and a.is_correct('\\\\boxed{3\\\\sqrt{9}}', '9')\n"
        "if pid == 0: os._exit(0 if right else 1)\n"
        "assert right and os.waitpid(pid, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_resource_warning() -> None:
    assert is_correct("\\boxed{2\\sqrt{16}}", "8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers._stop()
        gc.collect()


SHAPES = [
    "1", "1 ", "1,", "12, ", " ", "-", "1-", "/", "1/", "\\", "\\boxed{", "\\boxed{1}", "\\boxed", "{", "}", "<answer>",
    "<",
    "<answer>5</answer>", "</answer>", "####", "#### ", "#### 5\n", "the answer is ", "the answer is 5. ", "answer: ",
    "'",
    "> 5\n", ">", '"', ' "a', " '", "'a", "“", "`", "*", "**1", "_", "$1", "~", "½", "^{", "\\frac{1}", "\\text{", "<<",
    "\n",
    "not ", "maybe 5 ", "one ", "twenty-", "hundred and ", "1e9", "1 x 10^", "x = ", "=", ".", "1.", "(", "!", "é",
    "\u0301", "³",
    "or ", "5 or ", ";", "\ud800", "\x00", "\u00a0", "٣",
]  # fmt: skip


def best(call: Callable[[str], object], text: str) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call(text)
        times.append(time.perf_counter() - start)
        if times[-1] < 0.15:  # 30 times the floor: no need to know it better
            break
    return min(times)


def growth(call: Callable[[str], object], wrap: str, shape: str) -> float:
    small, large = (wrap % (shape * (size // len(shape))) for size in (10_000, 100_000))
    return best(call, large) / max(best(call, small), 0.005)


WRAPS = ["#### %s", "The answer is %s", BOX, "<answer>%s</answer>", "%s#### 5", "#### 5 %s"]


@pytest.mark.parametrize(("at", "shape"), [*enumerate(SHAPES)])
def test_time_grows_with_the_text_not_faster(at: int, shape: str) -> None:
    assert growth(extract, "%s", shape) < 40
    assert growth(extract, WRAPS[at % len(WRAPS)], shape) < 40
    assert growth(is_checkable, "%s", shape) < 40


PIECES = st.sampled_from([*SHAPES, "#### ", "\\boxed{", "}", "the answer is ", "5", "x", "\\frac12", "²", " and ", "%"])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(st.characters(), max_size=80), st.lists(PIECES, max_size=12).map("".join)))
def test_never_raises(text: str) -> None:
    answer = extract(text)
    assert answer is None or answer
    marked(text)
    parse_number(text)
    is_checkable(text)
    assert isinstance(is_correct(text, "7"), bool)
    assert isinstance(is_correct("#### 7", text), bool)


@given(st.one_of(st.integers(), st.fractions(), st.decimals(allow_nan=False, allow_infinity=False, places=4)))
def test_a_number_equals_itself(number: int | Fraction | Decimal) -> None:
    text = format(number, "f") if isinstance(number, Decimal) else str(number)
    assert is_correct(f"#### {text}", text)
    assert is_correct(f"so \\boxed{{{text}}}.", text)
    assert is_correct(f"The answer is {text}.", text)
    assert extract(f"#### {text}") == str(Fraction(number))


@given(st.integers(min_value=-(10**15), max_value=10**15))
def test_groupings_are_one_number(number: int) -> None:
    forms = [
        f"{number:,}",
        *(f"{number:,}".replace(",", gap) for gap in (" ", "\u00a0", "\u2009", "\u202f")),
        f"{number}.0",
    ]
    assert {extract(f"#### {form}") for form in forms} == {str(number)}
    assert all(is_correct(BOX % form, str(number)) for form in forms)


@given(st.fractions(), st.fractions())
def test_other_numbers_are_wrong(a: Fraction, b: Fraction) -> None:
    assert is_correct(f"#### {a}", str(b)) is (a == b)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (r"\boxed{x+1}", "1", False),
        (r"\boxed{n+1}", "1", False),
        (r"\boxed{(x+1)^2}", "1", False),
        (r"\boxed{a+5}", "5", False),
        ("The answer is x+1.", "1", False),
        ("#### x+1", "x+1", True),
        (r"\boxed{(x+1)^2}", "(x+1)^2", True),
        ("#### +5", "5", True),
        ("It is COVID-19", "19", True),
    ],
)
def test_a_number_of_a_sum_with_letters_is_not_the_answer(text: str, gold: str, right: bool) -> None:
    assert is_correct(text, gold) is right
