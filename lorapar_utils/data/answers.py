"""Equality of answers by value. The paper does not define it.

- Numbers are compared as exact fractions; `_number` lists the notations. `50%` is 0.5, not 50.
- Roots and multiples of pi are compared exactly (`constants`).
- Units are compared only if both answers have one: `18 dollars` equals 18 and $18, but neither €18 nor 18 apples.
- Lists in the same brackets are compared element by element, in order.
- Other answers are compared as words, without white space, surrounding marks and case, except the case of symbols: mF
  is not MF.

An ambiguous text (`5-3`, `1,2`, `3:30`, `5!`, `2 or 3`) is no number and is compared as words.
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from lorapar_utils.data.constants import Constant, leading_constant
from lorapar_utils.data.units import UNIT_NAMES, is_spelled_out, is_unit, same_unit, unit_name


@functools.cache
def _chrf():
    from sacrebleu.metrics import CHRF  # only where there is free text

    return CHRF(beta=1)


def overlap(completion: str, reference: str | None) -> float | None:
    """How much of the reference's wording the completion shares, in [0, 1]; the paper has no reward for free text.

    Dolly, Open-Platypus and CodeAlpaca have no answers that can be checked. The score is chrF, the overlap of sequences
    of one to six characters. It needs no tokenizer, so it works for code and any script, whereas ROUGE's usual package
    drops all but `[a-z0-9]`. Precision counts as much as recall (beta = 1 instead of chrF's usual 2), so that long
    completions gain nothing. White space does not count.

    Returns
    -------
    float or None
        1.0 for the reference itself; None if there is no usable reference.
    """
    if reference is None or not reference.strip():
        return None
    return _chrf().sentence_score(completion, [reference]).score / 100


def extract_answer(completion: str) -> str | None:
    """The text after the first `####`, or None without one."""
    final = FINAL.search(completion)
    return final.group(1).strip() if final else None


FINAL = re.compile(r"####[ \t]*([^\n]+)")

LONGEST = 300  # characters; a longer answer is compared as text


def answers_match(candidate: str, reference: str) -> bool:
    """Whether two answers are equal as numbers or constants with units, as lists, or else as words; symmetric.

    Deviation: the paper names no rule. GSM8K's own rule compares the digits after `####`, so 1/2 would equal 12.

    Examples
    --------
    >>> answers_match("$1,200.00", "1200"), answers_match("50%", "1/2"), answers_match("18 dollars", "18")
    (True, True, True)
    >>> answers_match("50%", "50"), answers_match("€18", "$18"), answers_match("C++", "C")
    (False, False, False)
    """
    candidate, reference = candidate.strip(), reference.strip()
    if candidate == reference:
        return True
    if max(len(candidate), len(reference)) > LONGEST:
        return candidate.split() == reference.split()
    left, right = _number(candidate) or _constant(candidate), _number(reference) or _constant(reference)
    if left and right:
        return left.value == right.value and left.agrees_with(right)
    if left or right:
        return False
    return _words(candidate) == _words(reference) or _same_list(_elements(candidate), _elements(reference))


def mentions(completion: str, reference: str) -> bool:
    """Whether the completion contains the reference, as a whole number or as whole words.

    Numbers are compared by value, never with a part of another number. 12,500, 12/5, -12, 12% and 12:30 do not mention
    12; `$12.00` does, and 10-12 mentions both ends. A name of one or two letters may also be a word, such as the
    symbols In, He and I. It counts only with a capital, and not at a place where a sentence has a capital anyway.
    """
    text, number = _plain(completion), _number(reference)
    if number:
        return any(other.value == number.value and other.agrees_with(number) for other in _numbers_in(text))
    name = _unmarked(reference) if len(reference) <= LONGEST else ""
    if len(name) <= 2 and name.isalpha() and name[0].isupper():
        before = AS_NAME + ("" if name == "I" else WITHIN_SENTENCE)
        alone = name == text.strip(" \t\n.,*_`'\"$()")
        return alone or re.search(rf"(?:{before}){name}{NO_MORE}(?!['’]\w)", text) is not None
    words = _words(reference)
    words_apart = r"\s+".join(map(re.escape, words.split()))
    searched = text if "\\" in words else _caseless(text, _is_formula(words))
    return bool(words) and re.search(rf"(?<![\w-])(?<!\w\.){words_apart}{NO_MORE}", searched) is not None


def leniently(completion: str, reference: str) -> bool:
    """Whether the completion's last number is the reference, or, if that is no number, whether it is mentioned.

    What is right but not in the taught layout counts too, as in lm-eval's `flexible-extract`.
    """
    number = _number(_plain(reference))
    if not number:
        return mentions(completion, reference)
    values = _numbers_in(_plain(completion))
    return bool(values) and values[-1].value == number.value and values[-1].agrees_with(number)


NO_MORE = r"(?![\w+#]|[:.]\d)"  # continuations that make another word or number
AS_NAME = r"\b(?:is|are|was)\s+|[:=#]\s*|\{|(?<!\w)[\"'“‘«*_`(\[$]"
WITHIN_SENTENCE = r"|[\w,)\"'*`’”][^\S\n]+"


# --- one spelling: signs, marks, LaTeX --------------------------------------------------------------------------------

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
INVISIBLE = "\u00ad\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff"
SIGNS = dict.fromkeys(map(ord, DASHES), "-") | dict.fromkeys(map(ord, INVISIBLE), "") | {0x2044: "/", 0x2215: "/"}
THIN = "\u00a0\u2007\u2009\u202f"  # spaces that group digits
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")

_NESTED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
LATEX_BOX = re.compile(r"\\(?:boxed|fbox|mbox|text|text(?:bf|it|rm)|math(?:rm|bf|it)|emph|underline)\s*" + _NESTED)
LATEX_SPACING = (
    (re.compile(r"\{,\}|,\\!(?=\d{3})"), ","),
    (re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))"), "\u2009"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"\\(?:[,:; ]|q?quad(?![a-zA-Z]))|(?<=[\w}])~"), " "),
    (re.compile(r"\^\s*+\{?\s*+\\circ\s*\}?|\\degree"), "°"),
)
MARKED = re.compile(  # alone, or before a unit: `**18** dollars`
    r"""(?<![\w\\$*`])(?<!\d\ )
    (?:\$\$([^$]+)\$\$|\$((?:[^$\\]|\\.)+)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]
      |\*{3}([^*]+)\*{3}|\*\*([^*]+)\*\*|`([^`]+)`)
    (?![\w$*`])""",
    re.VERBOSE,
)
# Only around the whole text, because inside it may be a product, a call or a name. A lower-case word between
# underscores is a name, such as `__init__`. A list in brackets differs from a list without.
AROUND = re.compile(
    r"""\*([^*]+)\*|(?!__?[a-z]\w*_)__?([^_]+)__?|"([^"]+)"|'([^']+)'|“([^“”]+)”|‘([^‘’]+)’|«([^«»]+)»|„([^„“”]+)[“”]"""
    r"""|\(([^(),;]+)\)|\[([^\W\d_](?:[\w .'-]*[^\W_])?)\]"""
)
STOP = re.compile(r"(?<=[^\s.,;:!?])[.,;]$")  # only one mark, because a text that ends in `...` is not finished


@functools.lru_cache(maxsize=1 << 12)
def _plain(text: str) -> str:
    """`text` with one spelling of equal signs: dashes, digits, wide letters, raised digits as a power, `½` as 1/2."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=\w)[\u2019\u02bc](?=\w)", "'", text)
    text = RAISED.sub(lambda raised: "^{" + raised[0].translate(LOWERED) + "}", unicodedata.normalize("NFC", text))
    return "".join(map(_plain_sign, text.translate(SIGNS)))


@functools.lru_cache(maxsize=1 << 12)
def _plain_sign(sign: str) -> str:
    # NFKC of the whole text would turn 10² into 102, 2⁵ into 25 and 10① into 101.
    digit = unicodedata.decimal(sign, None)
    if digit is not None:
        return str(digit)
    kind = unicodedata.decomposition(sign).partition(" ")[0]
    same = unicodedata.normalize("NFKC", sign)
    if kind == "<fraction>":
        return " " + same.translate(SIGNS) + " "
    if kind in ("<wide>", "<narrow>", "<compat>") and not sign.isspace() and not any(map(str.isdigit, same)):
        return same
    return sign


@functools.lru_cache(maxsize=1 << 12)
def _unmarked(text: str) -> str:
    """`text` without Markdown, surrounding quotes, LaTeX's boxes and spacing, and a full stop."""
    text, before = _plain(text).strip(), None
    while text != before:
        before = text
        text = LATEX_BOX.sub(_unboxed, _latex_spacing(text))
        text = MARKED.sub(lambda marked: marked[marked.lastindex], text)
        if whole := AROUND.fullmatch(text):
            text = whole[whole.lastindex]
        text = STOP.sub("", text.strip())
    return re.sub(r"\\([$%#&_])", r"\1", text)


def _latex_spacing(text: str) -> str:
    if "\\" in text or "{" in text:
        for pattern, plain in LATEX_SPACING:
            text = pattern.sub(plain, text)
    return text


def _unboxed(box: re.Match) -> str:
    before, after = box.string[: box.start()], box.string[box.end() :]
    inside = box[1].replace("~", " ")  # in LaTeX `~` is a space, elsewhere "about"
    if re.match(r"\s*[\^_]", after) and not inside.strip().isalpha():
        return box[0]  # the box is the base of a power
    # 1\text{2} is not 12.
    left, right = bool(re.search(r"[\w}]$", before)), bool(re.match(r"[\w\\]", after))
    return " " * left + inside + " " * right


@functools.lru_cache(maxsize=1 << 14)
def _words(text: str) -> str:
    """The words of `text` without case, extra white space and punctuation around them; punctuation alone stays."""
    if len(text) > LONGEST:
        return _caseless(" ".join(text.split()), False)
    words = " ".join(_unmarked(text).split())
    if not any(map(str.isalnum, words)):
        return text.strip()
    if "\\" in words:  # \Delta is not \delta
        return words
    words = re.sub(r"^[,;:¡¿]+\s*(?=[^\W\d_])", "", words)
    # Not after a single letter, because n! is not n.
    words = re.sub(r"(?<=[^\W\d_]{2})[.,;:!?]+$", "", words)
    return _caseless(words, _is_formula(words))


WORD = re.compile(r"[^\W\d_]+")
OPERATION = re.compile(r"[=+*/^<>|_]\s*[\w(]|\w\(|\s-\s|\b(?:sin|cos|tan|log|exp)\b")
# A word of three letters, or a text that is one letter (as of a choice), C++ or a short lower-case word.
WORDY = re.compile(
    r"[^\W\d_]{3}|^[^\W\d_](?:\+\+|#)?$|^[^\W\d_][^\W\d_A-Z]$|^(?i:no|ok)$|\d\s?(?i:am|pm|ad|bc)\b",
)


def _is_formula(text: str) -> bool:
    return bool(OPERATION.search(text)) or not WORDY.search(text)


def _caseless(text: str, is_formula: bool) -> str:
    """`text` without case, except symbols: words with an inner capital (mF, NaCl), short words of a formula."""

    def caseless(match: re.Match) -> str:
        word = match[0]
        symbol = (is_formula and len(word) < 3) or word not in (word.lower(), word.upper(), word.capitalize())
        return word if symbol else word.casefold()

    return WORD.sub(caseless, text)


@functools.lru_cache(maxsize=1 << 12)
def _elements(text: str) -> list[str]:
    """The brackets of a list, then the elements; [] for other texts, and if a comma may also group digits."""
    text = re.sub(r"\\([{}])", r"\1", _unmarked(text))
    if not re.fullmatch(r"[(\[{].*[)\]}]", text, re.DOTALL):
        return []
    # A list nested more than one level deep is cut into pieces that are no values, so it is compared as text.
    elements = re.split(r",(?![^(\[{]*[)\]}])", text[1:-1])
    spaced = any(element[:1].isspace() for element in elements[1:])
    grouped = any(re.match(r"\d{3}(?!\d)", element) for element in elements[1:])
    if len(elements) < 2 or not all(map(str.strip, elements)) or (spaced and grouped):
        return []
    return [text[0] + text[-1], *map(_unmarked, elements)]


def _same_list(left: list[str], right: list[str]) -> bool:
    if not left or len(left) != len(right) or left[0] != right[0]:
        return False
    # A single letter in a list is a symbol, so (a, b) is not (A, b).
    symbols = [{one, other} for one, other in zip(left, right, strict=True) if 1 in (len(one), len(other))]
    same_symbols = all(len(pair) == 1 for pair in symbols if any(map(str.isalpha, pair)))
    return same_symbols and all(map(answers_match, left[1:], right[1:]))


# --- numbers ----------------------------------------------------------------------------------------------------------

_DECIMAL = rf"(?:(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:[{THIN}]\d{{3}})+)|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"\s*\^\s*(?P<{}>[-+]?\d{{1,3}})(?![\d.^])"
MAGNITUDES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7}
MAGNITUDES |= {"billion": 10**9, "trillion": 10**12}
CURRENCIES = {"US$": "dollar", "$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee", "₩": "won"}
CURRENCIES |= {"₽": "ruble", "₿": "bitcoin", "฿": "baht", "₺": "lira", "₪": "shekel", "₫": "dong", "¢": "cent"}
_MAGNITUDE, _CURRENCY = "|".join(MAGNITUDES), "|".join(map(re.escape, CURRENCIES))

SIMPLE_NUMBER = re.compile(r"-?[0-9]{1,100}(?:\.[0-9]{1,100})?")
IN_LINE_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|(\d)(\d))(?!\s*\^)"
)
IN_LINE_POWER = re.compile(r"(?:\^|(?<=[\d)}])\s*\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|\(([-+]?\d+)\)|(?=[-+\d]))")
GREEK = "alpha|beta|gamma|delta|epsilon|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
NAME = re.compile(
    rf"(?P<name>(?!(?i:not?|non|nor|never|neither|ne|neq|isn|approx\w*|about|almost|nearly|minus|plus|under|over)\b)"
    rf"(?:\\(?i:{GREEK})(?![a-zA-Z])|[^\W\d_])\w*(?:\([a-z]\))?)?\s*=\s*(?!=)"
)
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*+
    (?:(?P<currency>{_CURRENCY})\s*+|(?P<code>(?i:USD|EUR|GBP|JPY|INR|KRW|RUB|Rs\.?))\s*(?=[-+\d]))?
    (?P<inner>[-+]?)\s*+
    (?:
        (?:(?P<whole>\d+)\s+)?(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})
      | (?P<mantissa>{_DECIMAL})
        (?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)|\s*(?:[x×*·]|\\times|\\cdot)\s*10{_POWER.format("ten")})
      | (?P<base>{_DECIMAL}){_POWER.format("power")}
      | (?P<decimal>{_DECIMAL})
      | (?:[aA]n?\s+)?(?=(?i:{_MAGNITUDE})\b)
    )""",
    re.VERBOSE,
)
TIMES = re.compile(rf"\s*({_MAGNITUDE})s?\b", re.IGNORECASE)
PERCENT = re.compile(r"\s*(?:%|(?:percent|per\s+cent|pct)\b)", re.IGNORECASE)
UNIT = re.compile(
    rf"""[\s·]*(?P<per>(?:/|per\b)\s*)?
    (?:(?P<currency>(?:US|U\.S\.)\s?dollars?\b|{_CURRENCY})
      |(?P<degree>°(?:\s?[CFK]\b)?)
      |(?P<word>[^\W\d_]+(?:['’.-][^\W\d_]+)*\.?))
    (?P<power>\s*\^\s*-?\d(?!\d)|(?<=[mntdi])[23]\b)?""",
    re.VERBOSE,
)


class Quantity(NamedTuple):
    """An exact number or constant, with unit (`$` is dollar, `/` is per) and name (`x = 3`), if any."""

    value: Fraction | Constant
    unit: tuple[str, ...] = ()
    name: str = ""

    def agrees_with(self, other: "Quantity") -> bool:
        """Whether units are the same and names are the same; a missing one agrees with any."""
        return _same_name(self.name, other.name) and (
            not self.unit
            or not other.unit
            or (len(self.unit) == len(other.unit) and all(map(same_unit, self.unit, other.unit)))
        )


@functools.lru_cache(maxsize=1 << 14)
def _number(text: str) -> Quantity | None:
    """The number of a text that contains nothing else; None otherwise.

    Notations: integers, decimals, `1,200`, thin spaces, `1/2`, `2 1/2`, `1.2e3`, `3 × 10^4`, `10^2`, `50%`,
    `18 million`; each may have a sign, a currency, a unit, a name (`x = 3`), and be within Markdown or LaTeX.
    """
    if SIMPLE_NUMBER.fullmatch(text):
        return Quantity(Fraction(text))
    if len(text) > LONGEST:
        return None
    text = _in_line(_unmarked(text)).strip()
    label = NAME.match(text)
    match = NUMBER.match(text, label.end() if label else 0)
    if match is None or (match["sign"] and match["inner"]):
        return None
    value, rest = _magnitude(match), text[match.end() :].rstrip()
    while times := TIMES.match(rest):
        value, rest = value and value * MAGNITUDES[times[1].casefold()], rest[times.end() :]
    if percent := PERCENT.match(rest):
        value, rest = value and value / 100, rest[percent.end() :]
    unit = _unit(rest)
    if value is None or unit is None:
        return None
    currency = CURRENCIES.get(match["currency"]) or UNIT_NAMES.get((match["code"] or "").casefold().rstrip("."))
    if currency and not (unit and same_unit(unit[0], currency)):
        unit = (currency, *unit)
    if currency and unit[1:] == ("meter",):
        return None  # $18m is in millions
    sign = -1 if "-" in (match["sign"], match["inner"]) else 1
    return Quantity(sign * value, unit, (label and label["name"]) or "")


def _constant(text: str) -> Quantity | None:
    """The constant of a text that contains nothing else but a name and a unit; None otherwise."""
    text = _unmarked(text)
    label = NAME.match(text)
    value, rest = leading_constant(text[label.end() if label else 0 :]) or (None, "")
    # A letter after a constant is usually a variable, as in 2πh, and a plural a word, as `radius`.
    unit = None if re.match(r"\s*[^\W\d_m](?![^\W\d_])", rest) else _unit(rest.rstrip())
    if value is None or unit is None or not all(map(is_spelled_out, unit)):
        return None
    return Quantity(value, unit, (label and label["name"]) or "")


def _magnitude(match: re.Match) -> Fraction | None:
    """The value without sign; None if undefined, as for 1/0."""
    try:
        if match["top"]:
            part = _decimal(match["top"]) / _decimal(match["bottom"])
            if not match["whole"]:
                return part
            proper = part < 1 and match["top"].isdigit() and match["bottom"].isdigit()
            return int(match["whole"]) + part if proper else None
        if match["mantissa"]:
            return _decimal(match["mantissa"]) * Fraction(10) ** int(match["exponent"] or match["ten"])
        if match["base"]:
            if int(match["power"]) == 0 == _decimal(match["base"]):
                return None  # 0^0
            return _decimal(match["base"]) ** int(match["power"])
    except ZeroDivisionError:
        return None
    return _decimal(match["decimal"] or "1")  # "a million" has no digits


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub(rf"[,{THIN}]", "", digits))


def _in_line(text: str) -> str:
    r"""`\frac{1}{2}` as 1/2, `10^{2}` and `10**2` as 10^2."""
    text = IN_LINE_FRACTION.sub(r"\1\3/\2\4 ", re.sub(r"(?<=\w)(?=\\[dtc]?frac)", " ", text))
    # The space keeps 2^{3}4 from becoming 2^34.
    return IN_LINE_POWER.sub(lambda power: f"^{power[1] or power[2]} " if power[1] or power[2] else "^", text)


def _unit(text: str) -> tuple[str, ...] | None:
    """The words of a unit, () for an empty text, None for any other text."""
    words, place, attached = [], 0, text[:1].isalpha()
    while place < len(text):
        match = UNIT.match(text, place)
        if match is None:
            return None
        word = match["word"]
        if word and not is_unit(word, attached and place == 0):
            return None
        name = unit_name(word.strip(".")) if word else "degree"
        if match["currency"]:
            name = CURRENCIES.get(match["currency"], "dollar")
        elif match["degree"]:
            name = UNIT_NAMES.get(re.sub(r"\s", "", match["degree"]), "degree")
        power = re.sub(r"[\s^]", "", match["power"] or "")
        words += ["per"] * bool(match["per"]) + (name + power).split()
        place = match.end()
    return tuple(words)


def _same_name(left: str, right: str) -> bool:
    if len(left) > 1 and "\\" not in left:
        left, right = left.casefold(), right.casefold()
    return not left or not right or left == right


IN_TEXT = re.compile(
    rf"""(?<![\w.^])(?<!\w-)
    (?P<number>(?>[-+]?(?:{_CURRENCY})?[-+]?\.?\d(?:[\d.,/:^{THIN}-]*\d)?(?:[eE][-+]?\d+)?(?:\s\d+/\d+)?))(?P<more>[\d_^]*)
    (?P<after>\s?(?:%|per\s+cent\b)|\s?[^\W\d_]+|(?:{_CURRENCY})(?!\d))?""",
    re.VERBOSE,
)
RANGE = re.compile(rf"({_DECIMAL})-({_DECIMAL})")


def _numbers_in(text: str) -> list[Quantity]:
    """Every number of a text, in order."""
    line = _in_line(re.sub(r"\\([$%])", r"\1", _latex_spacing(text)))
    return [value for match in IN_TEXT.finditer(line) for value in _numbers_of(match)]


def _numbers_of(match: re.Match) -> list[Quantity]:
    """The numbers in a stretch of digits: one number, both ends of a range, or none, as for a time or a date."""
    number, after = match["number"], match["after"] or ""
    if match["more"]:
        return []  # a power, or a part of a name
    texts = [number + after]
    if ends := RANGE.fullmatch(number):
        texts = [ends[1], ends[2]]
    elif _number(number + after) is None and after[:1].isspace():
        texts = [number]  # the next word is no unit, as in "12 and"
    return [value for value in map(_number, texts) if value]
