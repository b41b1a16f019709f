import logging
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
import sympy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lorapar_utils.data import answers
from lorapar_utils.training import rewards

SOLUTION = "1 + 2 = 3\n3 - 5 = -2\n#### -2"
THIN, NO_BREAK = "\u2009", "\u00a0"

# The same value on every line, however it is written.
SAME = [
    ["18", "18.0", "+18", "018", "18.", " 18 ", "1.8e1", "1.8E+1", "36/2", "x = 18", "= 18", "(18)"],
    ["18", "**18**", "***18***", "*18*", "__18__", "`18`", '"18"', "“18”", "**18.0**.", "18,", "１８"],
    ["18", r"\boxed{18}", "$18$", "$$18$$", r"\(18\)", r"\[18\]", r"$\boxed{18}$", r"\text{18}", r"\frac{36}{2}", r"\mathbf{18}"],
    ["18", "18 dollars", "$18", "$18.00", r"\$18", r"$\$18$", "18$", "USD 18", "18 USD", "US$18", "18 US dollars", "18 bucks", "**18** dollars", r"18\text{ dollars}"],
    ["18", "€18", "18 €", "18 euros", "EUR 18", "18 EUR"],
    ["18", "18 apples", "18 Apples", "$18$ apples"],
    ["18", "18 cards"],
    ["18", "18 friends"],
    ["18", "18 paths"],
    ["18", "18 km/h", "18km/h", "18 KM/h", "18 km per h", r"18 \text{ km}/\text{h}"],
    ["3", "3 cm^2", "3 cm²", "3cm2", r"3\,\mathrm{cm}^2", r"3~\mathrm{cm}^{2}"],
    ["90", "90°", "90 degrees", r"90^\circ", r"90^{\circ}"],
    ["1200", "1,200", "1,200.0", f"1{THIN}200", f"1{NO_BREAK}200", r"1{,}200", r"1,\!200", r"1\,200", "1.2 thousand", "12 hundred", "1.2 × 10^3"],
    ["1,200,000.50", "1200000.5", f"1{THIN}200{THIN}000.5"],
    ["-5", "−5", "–5", "—5", "- 5", "-5.0", "-$5", "$-5", "−$5", "-5 dollars", "x = -5", "$x=-5$", "-10/2", r"-\frac{10}{2}", r"\frac{-10}{2}"],
    ["1/2", "0.5", ".5", "½", "2/4", "50%", "50 %", "50 percent", "50 per cent", r"50\%", r"\frac{1}{2}", r"\dfrac12", "2^-1", "2^{-1}", "5e-1"],
    ["5/2", "2 1/2", "2½", "2.5", r"2\frac{1}{2}", "250%", "2 1/2 cups", "2.5 cup"],
    ["-5/2", "-2 1/2", "−2½", r"-2\frac{1}{2}"],
    ["100", "10^2", "10²", "10**2", "10^{2}", "$10^2$", "a hundred", "1 hundred"],
    ["300000", "3 × 10^5", "3 x 10^5", r"3 \times 10^{5}", r"$3\cdot10^5$", "3·10⁵", "3 hundred thousand", "0.3 million"],
    ["18000000", "18 million", "$18 million", "18 million dollars", "18,000,000"],
    ["12", "dozen", "a dozen", "1 dozen eggs", "12 eggs"],
    ["Paris", "paris.", '"Paris"', "**Paris**", "PARIS!", r"\text{Paris}", r"\boxed{\text{Paris}}", "(Paris)"],
    ["New York", "new  york", "New\tYork.", f"new{NO_BREAK}york"],
    ["N'Djamena", "N\u2019Djamena", "n'djamena."],
    ["C++", "c++", "`C++`", "C++."],
    ["C#", "c#"],
    ["B", "b", "(B)", "B."],
    ["3:30", "3:30."],
    [r"2\sqrt{2}", r"\sqrt{8}", "2√2", "2*sqrt(2)", r"\frac{4}{\sqrt{2}}", r"2\sqrt2"],
    [r"2\pi", "2π", "2pi", r"\pi \cdot 2", r"\frac{4\pi}{2}", r"2.0\pi"],
    ["2", r"\sqrt{4}", r"\sqrt{2}\sqrt{2}", r"\frac{2\pi}{\pi}"],
    [r"2\sqrt{3}", r"2\sqrt3 cm", r"2\sqrt{3}\text{ cm}", r"\sqrt{12} centimeters", "2√3 m", r"x = 2\sqrt3"],
    [r"\frac{\pi}{2}", "pi/2", r"\frac{\pi}{2} radians", r"\pi/2 rad"],
    [r"3+2\sqrt2", r"\sqrt8 + 3", r"\frac{1}{3-2\sqrt2}", r"3 + \frac{4}{\sqrt2}"],
    [r"\frac{1}{4\pi^2}", r"0.25\pi^{-2}"],
    ["5 ft", "5 feet", "5 foot", "5 Ft."],
    ["3 h", "3 hours", "3 hr", "3 hrs", "3 hour"],
    ["10 km", "10 kilometers", "10 kilometres", "10km", r"10\text{ km}"],
    ["2 kg", "2 kilograms", "2 KG"],
    ["30 min", "30 minutes", "30 mins", "30 minute"],
    ["5 pounds", "5 lbs", "5 lb", "5 lb."],
    ["5 pounds", "£5", "GBP 5"],
    ["60 mph", "60 miles per hour"],
    ["20 °C", "20 degrees Celsius", "20°C"],
    ["5 m", "5 meters", "5 metres"],
    ["6 in", "6 inches", "6 inch"],
    ["(1, 2)", "(1,2)", "( 1 , 2.0 )", r"\left(1, \tfrac{4}{2}\right)", "$(1,2)$", "**(1, 2)**", r"(\sqrt1, 2)"],
    ["[0, 1)", "[0,1)", "[0, 100%)"],
    [r"\{1, 2, Paris\}", "{1,2,paris}"],
    ["((1, 2), (3, 4))", "((1,2),(3,4))"],
    ["(1, 200)", "(1,200)"],
    ["no", "No", "NO"],
    ["3:30 PM", "3:30 pm"],
    ["World War II", "world war ii", "WORLD WAR II"],
    ["Vitamin B12", "vitamin b12"],
    ["5", "answer = 5", r"\theta = 5"],
]  # fmt: skip

# Nothing on a line is the same as another thing on it.
DIFFERENT = [
    ["12", "1/2", "1, 2", "1,2", "1 2", "1:2", "1-2", "1.2", "1_2", "-12", "12%", "1²", "①②", "1 or 2", "1 to 2"],
    ["12", r"1\text{2}", r"\frac{1}{2}", r"1^{2}"],
    ["12", r"\boxed{1}\boxed{2}", "1\u20442", "1\u00b9"],
    ["18", "18 or 19", "18 and a half", "not 18", "about 18", "~18", "≈18", ">18", "≥ 18", "18+", "18!", "18?", "at least 18", "18 squared", "18th", "18k", "$18m", "18bn", "18 hundredths", "18x", "18 x", "18i", "18 is wrong", "±18", r"\approx 18", "18...", "18万", "eighteen"],
    ["5", "5 doubled", "5 halved", "5 quadrillion", "5 trillionths", "5 elevenths", "5 kilo", "5 gross", "5 percents", "5 threes", "5 sixteenths", "5 oder mehr", "5 plus"],
    ["2", "4 + 3 - 7 + 2", "1 + 1", "4/2/1", "12 / 3 / 2"],
    ["5", "50%", "5000%", "5%", "0.005", "5 percent of 20"],
    ["120", "1,20", "12,0", "12,000", "1,2000", "0,120", f"1{THIN}20", "1.20"],
    ["1200", "1.200", "1 200", f"1{THIN}200{NO_BREAK}0"],
    ["x = 3", "x = -3", "y = 3", "x = 3 or 4", "3x"],
    ["$5", "€5", "£5", "5 cents", "5 apples", "$6"],
    ["5 mm", "5 Mm", "5 m", "5 ms", "5 s", "5 m/s", "5 m^2"],
    ["3 pm", "3 am", "3 o'clock in the morning"],
    ["2 1/2", "21/2", "2 1/3", "2-1/2", "1/2", "-2 1/2"],
    ["10-12", "-2", "10", "12", "1012", "10.12", "10/12"],
    ["2024-01-05", "2018", "2024", "2024/01/05"],
    ["1/0", "2/0", "0", "5/0"],
    ["12 apples and 3 pears", "12", "3", "123", "15"],
    ["101", "101 in base two", "0b101", "5"],
    ["2^3", "23", "6", "2^3^2", r"2^{3}4", "2^34"],
    ["100000000000000000001", "1e20", "1.00000000000000000001e21"],
    ["1/3", "0.333333333333333333333333333333", "33.3%"],
    [r"\sqrt{2}", "1.4142135623730950488016887242097", "2", r"\sqrt{3}", r"\sqrt{2}+10^{-99}"],
    [r"\pi", "3.14", "3.14159265358979323846264338327950288", "22/7", "p i"],
    [r"\Delta", r"\delta"],
    ["n!", "n", "n?"],
    ["2 to 3", "3 to 2"],
    ["is", "si"],
    ["(1, 2)", "(2, 1)", "[1, 2]", "[1, 2)", r"\{1, 2\}", "1, 2", "(1, 2, 3)"],
    ["x < 3", "x > 3", r"x \le 3", "x = 3"],
    ["3 < 5", "2 < 7"],
    ["C", "C++", "C#", "-C"],
    ["!", "?", "...", "…?", ".", "+", ""],
    [r"9^{9^{9^9}}", r"9^{9^{9^8}}", "1"],
    [r"\infty", r"-\infty", "1/0"],
    ["(1, 2)", "(1, 3)", "(1, 2, 2)", "[1, 2)", "(1, 2", "((1, 2))", "(12)", "(1, (2, 2))", "(1, 2)(1, 2)"],
    ["(1,200, 3)", "(1, 200, 3)", "(1200, 3)"],
    ["(a, b)", "(A, b)", "(a, B)"],
    ["5 m", "5 minutes", "5 miles", "5 M"],
    ["5 lbs", "£5", "5 kg"],
    ["5 MB", "5 Mb", "5 megabits"],
    [r"2\sqrt3 cm", r"2\sqrt3 m", r"2\sqrt3 h", r"2\sqrt3 + cm"],
    [r"2\pi", r"2\pi r", r"2\pi h", "2 pi radius", r"2\pi + 1", r"2\pi\%", r"2\sin\pi"],
    [r"\frac12\pi", r"1/2\pi", r"\frac{1}{2\pi}"],
    [r"\frac14\pi", r"\frac12^2\pi", r"\frac{1}{2}^2\pi", r"1\frac14\pi"],
    ["mF", "MF", "mf"],
    ["aB", "ab", "AB"],
    ["CO", "Co"],
    ["a + B", "A + b", "a + b"],
    ["f(X)", "F(x)", "f(x)", "F(X)"],
    ["sin X", "sin x"],
    ["2X", "2x"],
    ["x^N", "x^n", "X^n"],
    ["5", "not = 5", r"\not = 5", r"\neq = 5", "about = 5", "minus = 5"],
    ["0^0", "0", "1", "0**0", "-0^0"],
    [r"0^0\pi", "0", r"\pi"],
]  # fmt: skip


def pairs(lines):
    return [(line[i], line[j]) for line in lines for i in range(len(line)) for j in range(i)]


def both_ways(left, right):
    there, back = answers.answers_match(left, right), answers.answers_match(right, left)
    assert there is back, (left, right)
    return there


@pytest.mark.parametrize("line", SAME, ids=lambda line: line[0])
def test_the_same_value_matches_however_it_is_written(line):
    # Two units may differ where one is left out beside a third: each with the first, which has none.
    assert [text for text in line if not both_ways(text, line[0])] == []


@pytest.mark.parametrize("line", DIFFERENT, ids=lambda line: line[0])
def test_another_value_never_matches(line):
    assert [pair for pair in pairs([line]) if both_ways(*pair)] == []


def test_a_unit_counts_where_both_have_one():
    assert both_ways("18", "18 apples") and both_ways("18", "$18") and not both_ways("$18", "18 apples")


# --- every way to write a number, for every number


def decimal(value: Fraction) -> str | None:
    """The whole of its decimals, if they end."""
    for places in range(12):
        if (value * 10**places).denominator == 1:
            digits = str(int(value * 10**places)).rjust(places + 1, "0")
            return digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
    return None


def grouped(digits: str, separator: str) -> str:
    whole, point, part = digits.partition(".")
    groups = [whole[max(0, end - 3) : end] for end in range(len(whole), 0, -3)][::-1]
    return separator.join(groups) + point + part


@st.composite
def written(draw, value: Fraction, units=("", "", "dollars")):
    """One of the ways in which a value is written."""
    size = abs(value)
    top, bottom = size.numerator, size.denominator
    factor = draw(st.integers(1, 4))
    ways = [
        f"{top * factor}/{bottom * factor}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{top * factor}}}{{{bottom * factor}}}",
    ]
    if size > 1 and bottom > 1:
        ways += [f"{top // bottom} {top % bottom}/{bottom}", rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"]
    if digits := decimal(size):
        ways += [digits, digits, digits + (".00" if "." not in digits else "0"), digits + "e0"]
        ways += [grouped(digits, separator) for separator in (",", THIN, NO_BREAK, "{,}")]
    percents = []
    if share := decimal(size * 100):
        percents = [share + "%", share + " %", share + " percent", share + r"\%", grouped(share, ",") + "%"]
    for word, times in (("million", 10**6), ("thousand", 10**3), ("dozen", 12)):
        if share := decimal(size / times):
            ways += [f"{share} {word}"]
    for power in range(-3, 7):
        if share := decimal(size / Fraction(10) ** power):
            ways += [f"{share}e{power}", f"{share} × 10^{power}", rf"{share} \times 10^{{{power}}}"]
        if size == Fraction(10) ** power:
            ways += [f"10^{power}", f"10^{{{power}}}"]
    text = draw(st.sampled_from(ways + percents))
    unit = "" if text in percents else draw(st.sampled_from(units))
    sign = draw(st.sampled_from(["-", "−"] if value < 0 else ["", "", "+"]))
    money = unit == "dollars" and draw(st.booleans())
    text = draw(st.sampled_from([sign + r"\$" + text, r"\$" + sign + text])) if money else sign + text
    if unit and not money:
        text += draw(st.sampled_from([f" {unit}", rf"\text{{ {unit}}}"]))
    frame = draw(
        st.sampled_from(
            [
                "{}",
                "{}",
                "{}.",
                " {} ",
                "**{}**",
                "`{}`",
                "${}$",
                r"\({}\)",
                r"\boxed{{{}}}",
                "x = {}",
                '"{}"',
                r"$\boxed{{{}}}$",
            ]
        )
    )
    return frame.format(text)


VALUES = st.one_of(
    st.integers(-2000, 2000).map(Fraction),
    st.builds(Fraction, st.integers(-200, 200), st.integers(1, 30)),
    st.builds(lambda digits, places: Fraction(digits, 10**places), st.integers(-(10**7), 10**7), st.integers(0, 4)),
)
NEAR = [
    lambda value: -value,
    lambda value: value * 10,
    lambda value: value / 100,
    lambda value: value + 1,
    lambda value: value + Fraction(1, 10**9),
    lambda value: 1 / value if value else value,
    lambda value: Fraction(int(f"{abs(value.numerator)}{value.denominator}")),
]
OFTEN = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@OFTEN
@given(st.data(), VALUES)
def test_one_value_written_in_two_ways_matches(data, value):
    left, right = data.draw(written(value)), data.draw(written(value))
    assert both_ways(left, right), (left, right)


@OFTEN
@given(st.data(), VALUES, st.one_of(VALUES, st.sampled_from(NEAR)))
def test_two_values_never_match_however_they_are_written(data, value, other):
    other = other if isinstance(other, Fraction) else other(value)
    assume(other != value)
    units = ("", "", "dollars", "apples", "km/h")
    left, right = data.draw(written(value, units)), data.draw(written(other, units))
    assert not both_ways(left, right), (left, right)


@OFTEN
@given(st.data(), VALUES)
def test_one_value_of_two_units_never_matches(data, value):
    left, right = data.draw(written(value, ("dollars", "km"))), data.draw(written(value, ("apples", "km/h")))
    assume("%" not in left + right and "percent" not in left + right)
    assert not both_ways(left, right), (left, right)


LATEX = (r"\frac", r"\sqrt", r"\boxed", r"\text", r"\pi")
SCRAPS = st.sampled_from(
    [
        *"1203 .,-+/^*(){}[]$€%xeiπ=<!?'\"\\½²−`",
        "**",
        "12",
        "{1}",
        "{2}",
        "and",
        "million",
        "km",
        "Paris",
        "C++",
        *LATEX,
    ]
)
TEXTS = st.lists(SCRAPS, max_size=8).map("".join)


@OFTEN
@given(TEXTS, TEXTS)
def test_any_text_matches_itself_and_matching_is_symmetric(left, right):
    assert answers.answers_match(left, left) and answers.answers_match(left, f" {left}\n")
    both_ways(left, right)
    answers.mentions(left, right)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 40 + r"\pi",
        "(" * 40 + r"\pi" + ")" * 40,
        "((((9^99)^99)^99)^99)^99" + r"\pi",
        r"(1+\sqrt2+\sqrt3+\sqrt5)^99",
        "+" + " " * 290 + "1",
        "1," * 50_000 + "1_",
        "^" + " " * 100_000 + "x",
        "(" * 49 + "x" + ")" * 49,
        "9^{9^{9^{9^9}}}",
        "(a+b+c+d)^{20}(a-b-c-d)^{20}",
        "9" * 5000,
        "9" * 200 + "^999",
        "1e999",
        r"\frac{" * 200,
        "1^" * 2000,
        "**" * 2000,
        "x=" * 2000,
        "1 1/" * 1000,
        "(1," * 90 + ")" * 90,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_no_text_takes_long(text):
    answers.answers_match("x^2", "x*x")  # imports
    began = time.process_time()
    for other in ("12", "x+1", r"\sqrt{2}", text + "1"):
        assert not both_ways(text, other)
        answers.mentions(text, other)
    assert time.process_time() - began < 2


PIECES = st.sampled_from([*"()[]{}$\\^_*-+.,:/ 0129abxz", r"\frac", r"\sqrt", r"\pi", r"\boxed{", "√", "½", " cm"])


@OFTEN
@given(st.lists(PIECES, min_size=1, max_size=6).map("".join), st.lists(PIECES, max_size=3).map("".join))
def test_no_repeated_text_takes_long(repeated, before):
    text = (before + repeated * 300)[:300]
    for call in (answers.answers_match, answers.mentions):
        # The quickest of three: another process may hold the processor.
        times = []
        for number in range(3):
            began = time.process_time()
            call(text[: -number or None], "12")
            times.append(time.process_time() - began)
        assert min(times) < 0.05, text


@st.composite
def constants(draw):
    """A text of a constant, and sympy's value of it."""
    text, value = [], sympy.Integer(0)
    for _ in range(draw(st.integers(1, 2))):
        factor, root, power = (draw(st.sampled_from(values)) for values in ((1, 2, 3), (1, 2, 3, 8, 12), (0, 1, 2)))
        text.append(rf"\frac{{{factor}\sqrt{{{root}}}\pi^{power}}}{{2}}" if power else rf"{factor}\sqrt{{{root}}}")
        value += factor * sympy.sqrt(root) * (sympy.pi**power / 2 if power else 1)
    return " + ".join(text), value


@settings(max_examples=60, deadline=None)
@given(constants(), constants())
def test_constants_match_just_where_they_are_equal(one, other):
    assert both_ways(one[0], other[0]) is (sympy.expand(one[1] - other[1]) == 0)


@OFTEN
@given(st.data(), st.lists(VALUES, min_size=2, max_size=4), VALUES)
def test_lists_match_where_their_brackets_and_all_elements_do(data, values, other):
    brackets = data.draw(st.sampled_from(["()", "[]", "[)", "(]"]))

    def listed(elements):
        texts = [data.draw(st.sampled_from([str(v), f"{2 * v.numerator}/{2 * v.denominator}"])) for v in elements]
        return brackets[0] + data.draw(st.sampled_from([", ", " , "])).join(texts) + brackets[1]

    assert both_ways(listed(values), listed(values))
    place = data.draw(st.integers(0, len(values) - 1))
    assume(values[place] != other)
    assert not both_ways(listed(values), listed([*values[:place], other, *values[place + 1 :]]))
    assert not both_ways(listed(values), listed(values)[:-1] + ("]" if brackets[1] == ")" else ")"))


def test_expressions_are_compared_outside_the_main_thread_and_without_a_warning(caplog):
    said = []
    with caplog.at_level(logging.DEBUG):
        thread = threading.Thread(target=lambda: said.append(both_ways(r"\sqrt{27}", r"3\sqrt{3}")))
        thread.start()
        thread.join()
    assert said == [True] and not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_plain_answers_import_neither_sympy_nor_sacrebleu():
    code = "import sys; from lorapar_utils.data import answers; from lorapar_utils.training import rewards; assert rewards.correctness('#### $1,200', '1200') == 2; answers.answers_match('Paris', '5-3'); "
    code += "print([name for name in ('sympy', 'sacrebleu', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        (SOLUTION, "-2", 2.0),
        ("#### -2.0", "-2", 2.0),
        ("#### 1,200", "1200", 2.0),
        ("#### $1,200.", "1200", 2.0),
        ("#### 2", "-2", 0.0),
        ("-2", "-2", 0.0),
        ("####", "-2", 0.0),
        ("", "-2", 0.0),
        ("#### paris.", "Paris", 2.0),
        ("#### Parish", "Paris", 0.0),
        ("anything", None, None),
        ("anything", "  ", None),
    ],
)
def test_correctness(completion, reference, expected):
    assert rewards.correctness(completion, reference) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (SOLUTION, 0.5),
        ("#### 4", 0.5),
        ("#### 4\n#### 4", 0.0),
        ("#### 4\nso it is", 0.0),
        ("#### ", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_layout(completion, expected):
    assert rewards.layout(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (SOLUTION, 1.0),
        ("1 + 2 = 3\n3 - 5 = 8\n#### 8", 0.5),
        ("1 + 2 = 4\n3 - 5 = -2\n#### -2", 0.0),
        ("3 - 5 = -2\n1 + 2 = 3", 0.0),
        ("", 0.0),
    ],
)
def test_step_share_counts_leading_right_steps(completion, expected):
    assert rewards.step_share(completion, SOLUTION) == expected


def test_step_share_without_steps_is_none():
    assert rewards.step_share("#### Paris", "#### Paris") is None
    assert rewards.step_share("x", None) is None


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("It is Paris.", "Paris", True),
        ("Parisian", "Paris", False),
        ("so 12", "2", False),
        ("so -2", "2", False),
        ("= 2.", "2", True),
        ("It costs 12,500.", "12", False),
        ("It costs 12,500.", "12500", True),
        ("12. So", "12", True),
        ("12, 13 and 14", "13", True),
        ("1/2 of it", "1", False),
        ("1/2 of it", "2", False),
        ("1/2 of it", "0.5", True),
        (r"\frac{1}{2}", "2", False),
        (r"\frac{1}{2}", "1/2", True),
        ("2 1/2", "2", False),
        ("12%", "12", False),
        (r"12\%", "12", False),
        ("12 percent", "12", False),
        ("12 percent", "12%", True),
        ("12 million", "12", False),
        ("12 apples", "12", True),
        ("12 apples", "12 pears", False),
        ("$12.00", "12", True),
        ("12€", "$12", False),
        ("**12** or `13`", "12", True),
        (r"\boxed{12}", "12", True),
        ("10-12 days", "12", True),
        ("10–12 days", "10", True),
        ("10-12 days", "-12", False),
        ("3 - 5 = -2", "5", True),
        ("3 - 5 = -2", "-5", False),
        ("12:30", "12", False),
        ("12:30", "12:30", True),
        ("2024-12-05", "12", False),
        ("the 12th", "12", False),
        ("x2 or 2x", "2", False),
        ("10^2", "10", False),
        ("10²", "100", True),
        ("0.12", "12", False),
        ("in C++", "C", False),
        ("in C#", "C", False),
        ("in C++ now", "C++", True),
        ("new\nyork", "New York", True),
        ("non-Paris", "Paris", False),
        ("die Straße", "Straße", True),
        ("anything", " ", False),
        ("In the beginning it was gold.", "In", False),
        ("Gold. In the beginning", "In", False),
        ("first\nIn the beginning", "In", False),
        ("and I think so", "I", False),
        ("He's right: it is Fe.", "He", False),
        ("he or HE", "He", False),
        ("Yes, as it is", "As", False),
        ("In", "In", True),
        ("**In**", "In", True),
        ("The symbol is In.", "In", True),
        ("Symbol: In", "In", True),
        ("#### I", "I", True),
        ("x = I", "I", True),
        ("It is `He`.", "He", True),
        (r"\boxed{He}", "He", True),
        ("the gas He, of course", "He", True),
        ("the unit mF", "MF", False),
        ("a + b", "a + B", False),
        ("so a + B.", "a + B", True),
        ("1,2,12^3", "12", False),
    ],
)
def test_mentions_whole_words_and_numbers(completion, reference, expected):
    assert answers.mentions(completion, reference) is expected


def test_overlap_is_one_for_the_reference_itself_and_pays_for_no_rambling():
    reference = "The cat sat on the mat, and looked at the moon."
    assert answers.overlap(reference, reference) == 1.0
    assert answers.overlap("", reference) == answers.overlap("zzz", reference) == 0.0
    half = answers.overlap("The cat sat on the mat.", reference)
    rambling = answers.overlap(f"{reference} " + "And then it thought of other things to do. " * 5, reference)
    assert 0 < rambling < half < 1
    assert answers.overlap("a", "a") == 1.0
    assert answers.overlap("anything", None) is answers.overlap("anything", " \n") is None


@pytest.mark.parametrize(
    "reference", ["def f(x):\n    return x + 1", "Der Mond ist aufgegangen", "月亮升起来了", "Луна взошла", "[];{}"]
)
def test_overlap_works_for_code_and_in_any_script(reference):
    assert answers.overlap(reference, reference) == 1.0
    assert 0 < answers.overlap(reference[: len(reference) // 2 + 1], reference) < 1
    assert answers.overlap("qqqq", reference) == 0.0


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("4 + 7 = 11", "11", True),
        ("The sum of 4 and 7 is 11.", "11", True),
        ("11 is what 4 + 7 gives", "11", False),  # its last number is 7
        ("It is in Paris, of course", "Paris", True),
        ("Parisian", "Paris", False),
        ("", "11", False),
    ],
)
def test_lenient_scoring_takes_the_last_number_or_a_whole_word(completion, reference, expected):
    assert answers.leniently(completion, reference) is expected
