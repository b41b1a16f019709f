"""When two answers are equal, which the paper does not say: here, when their values are.

- Numbers are compared as exact fractions, however they are written (`_number` lists the ways); `50%` is 0.5, not 50.
- A unit counts only where both have one: `18 dollars` is 18 and $18, but neither €18 nor 18 apples.
- Roots and multiples of pi are compared by math-verify (`constants`).
- Anything else is words, equal up to case, white space and the marks around them.

What could be read in two ways (`5-3`, `1,2`, `3:30`, `5!`, `2 or 3`) is no number and is compared as text.
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from lorapar_utils.constants import same_constant

LONGEST = 300  # characters of an answer that is looked into; a longer one is compared as it stands


def answers_match(candidate: str, reference: str) -> bool:
    """Equal as values: as numbers with units, as roots and multiples of pi, or else as words; symmetric.

    Deviation: the paper names no rule; GSM8K's own compares the digits after `####`, and would hold 1/2 and 12 equal.

    Examples
    --------
    >>> answers_match("$1,200.00", "1200"), answers_match("50%", "1/2"), answers_match("18 dollars", "18")
    (True, True, True)
    >>> answers_match("50%", "50"), answers_match("€18", "$18"), answers_match("C++", "C")
    (False, False, False)
    """
    if candidate.strip() == reference.strip():
        return True
    left, right = _number(candidate), _number(reference)
    if left and right:
        return left.value == right.value and left.agrees_with(right)
    if not left and not right and _words(candidate) == _words(reference):
        return True
    return same_constant(_unmarked(candidate), _unmarked(reference))


def mentions(completion: str, reference: str) -> bool:
    """Whether the reference stands anywhere in the completion, as a whole number or as whole words.

    A number is compared by its value, and never with a part of another: neither 12,500 nor 12/5, -12, 12% or 12:30
    mentions 12, but 10-12 mentions both its ends, and `$12.00` does.
    """
    text, number = _plain(completion), _number(reference)
    if number:
        return any(
            other.value == number.value and other.agrees_with(number)
            for match in IN_TEXT.finditer(_in_line(re.sub(r"\\([$%])", r"\1", _latex_spacing(text))))
            for other in _numbers_of(match)
        )
    words = _words(reference)
    words_apart = r"\s+".join(map(re.escape, words.split()))
    pattern = rf"(?<![\w-])(?<!\w\.){words_apart}(?![\w+#]|[:.]\d)"
    return bool(words) and re.search(pattern, text if "\\" in words else text.casefold()) is not None


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
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree"), "°"),
)
MARKED = [  # alone, or before a unit: `**18** dollars`
    re.compile(rf"(?<![\w\\$*`])(?<!\d ){opened}{inside}{closed}(?![\w$*`])")
    for opened, inside, closed in (
        (r"\$\$", r"([^$]+)", r"\$\$"),
        (r"\$", r"((?:[^$\\]|\\.)+)", r"\$"),
        (r"\\\(", r"((?:(?!\\\)).)+)", r"\\\)"),
        (r"\\\[", r"((?:(?!\\\]).)+)", r"\\\]"),
        (r"\*\*", r"([^*]+)", r"\*\*"),
        ("`", "([^`]+)", "`"),
    )
]
AROUND = [  # only around the whole: elsewhere it may be a product, a call, a name
    re.compile(pattern)
    for pattern in (
        r"\*([^*]+)\*",
        r"(?!__?[a-z]\w*_)__?([^_]+)__?",  # a word in small letters between underscores is a name, as `__init__` is
        r'"([^"]+)"',
        r"'([^']+)'",
        r"“([^“”]+)”",
        r"‘([^‘’]+)’",
        r"«([^«»]+)»",
        r"„([^„“”]+)[“”]",
        r"\(([^(),;]+)\)",  # a list in brackets is another thing than one without
        r"\[([^\W\d_](?:[\w .'-]*[^\W_])?)\]",
    )
]
STOP = re.compile(r"(?<=[^\s.,;:!?])[.,;]$")  # one: what ends in `...` is not finished


@functools.lru_cache(maxsize=1 << 12)
def _plain(text: str) -> str:
    """Signs that mean the same as one: dashes, digits, wide letters, raised digits as a power, `½` as 1/2."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=\w)[\u2019\u02bc](?=\w)", "'", text)
    text = RAISED.sub(lambda raised: "^{" + raised[0].translate(LOWERED) + "}", unicodedata.normalize("NFC", text))
    return "".join(map(_plain_sign, text.translate(SIGNS)))


@functools.lru_cache(maxsize=1 << 12)
def _plain_sign(sign: str) -> str:
    # NFKC of the whole would make 102 of 10², 25 of 2⁵, 101 of 10①.
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
    """Without what only surrounds or sets it: Markdown, quotes, LaTeX's boxes and spacing, a full stop."""
    text, before = _plain(text).strip(), None
    while text != before:
        before = text
        text = LATEX_BOX.sub(_unboxed, _latex_spacing(text))
        for pattern in MARKED:
            text = pattern.sub(r"\1", text)
        for pattern in AROUND:
            if whole := pattern.fullmatch(text):
                text = whole[1]
        text = STOP.sub("", text.strip())
    return re.sub(r"\\([$%#&_])", r"\1", text)


def _latex_spacing(text: str) -> str:
    if "\\" in text or "{" in text:
        for pattern, plain in LATEX_SPACING:
            text = pattern.sub(plain, text)
    return text


def _unboxed(box: re.Match) -> str:
    before, after = box.string[: box.start()], box.string[box.end() :]
    inside = box[1].replace("~", " ")  # which is `about` only outside of LaTeX
    if re.match(r"\s*[\^_]", after) and not inside.strip().isalpha():
        return box[0]  # a power of what is in it
    # 1\text{2} is not 12.
    apart = bool(re.search(r"[\w}]$", before)), bool(re.match(r"[\w\\]", after))
    return " " * apart[0] + inside + " " * apart[1]


@functools.lru_cache(maxsize=1 << 14)
def _words(text: str) -> str:
    """Up to case, white space, and the punctuation around words; punctuation alone is as it is."""
    if len(text) > LONGEST:
        return " ".join(text.casefold().split())
    words = " ".join(_unmarked(text).split())
    if not any(map(str.isalnum, words)):
        return text.strip()
    if "\\" in words:  # \Delta is not \delta
        return words
    words = re.sub(r"^[,;:¡¿]+\s*(?=[^\W\d_])", "", words.casefold())
    # Not of a single letter: n! is not n.
    return re.sub(r"(?<=[^\W\d_]{2})[.,;:!?]+$", "", words)


# --- numbers ----------------------------------------------------------------------------------------------------------

_DECIMAL = rf"(?:(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:[{THIN}]\d{{3}})+)|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"\s*\^\s*(?P<{}>[-+]?\d{{1,3}})(?![\d.^])"
MAGNITUDES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7}
MAGNITUDES |= {"billion": 10**9, "trillion": 10**12}
CURRENCIES = {"US$": "dollar", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₩": "won"}
CURRENCIES |= {"₽": "ruble", "₿": "bitcoin", "฿": "baht", "₺": "lira", "₪": "shekel", "₫": "dong", "¢": "cent"}
CODES = {"usd": "dollar", "buck": "dollar", "bucks": "dollar", "eur": "euro", "gbp": "pound", "jpy": "yen"}
CODES |= {"inr": "rupee", "rs": "rupee", "krw": "won", "rub": "ruble"}
_MAGNITUDE, _CURRENCY = "|".join(MAGNITUDES), "|".join(map(re.escape, CURRENCIES))

SIMPLE_NUMBER = re.compile(r"-?[0-9]{1,100}(?:\.[0-9]{1,100})?")
IN_LINE_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|(\d)(\d))(?!\s*\^)"
)
IN_LINE_POWER = re.compile(r"(?:\^|(?<=[\d)}])\s*\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|\(([-+]?\d+)\)|(?=[-+\d]))")
NAME = re.compile(r"(?P<name>\\?[^\W\d_]\w*(?:\([a-z]\))?)?\s*=\s*(?!=)")
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*
    (?:(?P<currency>{_CURRENCY})\s*|(?P<code>(?i:USD|EUR|GBP|JPY|INR|KRW|RUB|Rs\.?))\s*(?=[-+\d]))?
    (?P<inner>[-+]?)\s*
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


def _spaced(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words of one or two letters after a number may be variables, so that of them only these are units.
SYMBOLS = frozenset("mgshlLVWJN")
SHORT = _spaced(
    """
    km cm mm dm nm um kg mg lb oz ft in yd mi hr yr ml dl cl kl hz kw mw kj mj kv mv ma ms ns kb mb gb tb pa ev
    pt qt ha am pm mph kph kmh fps rpm lbs hrs yrs min sec gal kwh mah ghz mhz khz kpa mpa sqm cal deg day usd
    eur gbp
    """
)
# Short symbols whose case tells a thousandth from a million, or bits from bytes.
BY_CASE = re.compile(r"m(?:g|m|s|w|v|a|hz|j|l|n|pa|wh|ev)|[kmgt]b", re.IGNORECASE)
# Spelled-out units, in the singular. Words of other counted things (apples, clips) are known by their plural.
SPELLED_OUT = _spaced(
    """
    dollar euro pound yen rupee won ruble bitcoin baht lira shekel dong cent penny pence usd eur gbp jpy inr krw
    meter metre kilometer kilometre centimeter centimetre millimeter millimetre inch foot feet yard mile
    gram kilogram milligram ton tonne ounce liter litre milliliter millilitre gallon quart pint cup tablespoon teaspoon
    millisecond second minute hour day week month year decade degree celsius fahrenheit kelvin radian
    square cubic acre hectare watt kilowatt volt ampere joule calorie newton hertz byte kilobyte megabyte gigabyte bit
    people person child children man men woman women per us u.s
    """
)
# Plurals after which a number is another one, or a sentence.
CHANGING_PLURAL = re.compile(
    r"(?:is|was|has|does|as|this|thus|plus|minus|times|less|unless|versus|perhaps|always|sometimes|pairs|couples|scores"
    r"|grosses|halves|quarters|squares|cubes|roots|powers|inverses|opposites|reciprocals|negatives|factorials"
    r"|multiples|percents|ones|twos|threes|fours|fives|sixes|sevens|eights|nines|tens|thirds|lacs|myriads|repeats"
    r"|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)ths"
    r"|[a-z]*(?:illions|illiards|dozens|hundreds|thousands|lakhs|crores))"
)


class Quantity(NamedTuple):
    """An exact number, with its unit (`$` is a dollar, `/` is per) and name (`x = 3`), if any."""

    value: Fraction
    unit: tuple[str, ...] = ()
    name: str = ""

    def agrees_with(self, other: "Quantity") -> bool:
        """Whether units and names are the same, each where both have one."""
        return _same_name(self.name, other.name) and (
            not self.unit
            or not other.unit
            or (len(self.unit) == len(other.unit) and all(map(_same_word, self.unit, other.unit)))
        )


@functools.lru_cache(maxsize=1 << 14)
def _number(text: str) -> Quantity | None:
    """The number that a text is, with nothing left over.

    Integers, decimals, `1,200`, thin spaces, `1/2`, `2 1/2`, `1.2e3`, `3 × 10^4`, `10^2`, `50%`, `18 million`, each
    with a sign, a currency, a unit, a name (`x = 3`), and within Markdown or LaTeX.
    """
    if SIMPLE_NUMBER.fullmatch(text):
        return Quantity(Fraction(text))
    if len(text) > LONGEST:
        return None
    text = _in_line(_unmarked(text)).strip()
    named = NAME.match(text)
    match = NUMBER.match(text, named.end() if named else 0)
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
    currency = CURRENCIES.get(match["currency"]) or CODES.get((match["code"] or "").casefold().rstrip("."))
    if currency and not (unit and _same_word(unit[0], currency)):
        unit = (currency, *unit)
    if currency and unit[1:] == ("m",):
        return None  # $18m: millions
    sign = -1 if "-" in (match["sign"], match["inner"]) else 1
    return Quantity(sign * value, unit, (named and named["name"]) or "")


def _magnitude(match: re.Match) -> Fraction | None:
    """The value without its sign; None where there is none, as of 1/0."""
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
            return _decimal(match["base"]) ** int(match["power"])
    except ZeroDivisionError:
        return None
    return _decimal(match["decimal"] or "1")  # a million


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub(rf"[,{THIN}]", "", digits))


def _in_line(text: str) -> str:
    r"""`\frac{1}{2}` as 1/2, `10^{2}` and `10**2` as 10^2."""
    text = IN_LINE_FRACTION.sub(_fraction_in_line, text)
    # The space keeps 2^{3}4 from being 2^34.
    return IN_LINE_POWER.sub(lambda power: f"^{power[1] or power[2]} " if power[1] or power[2] else "^", text)


def _fraction_in_line(fraction: re.Match) -> str:
    top, bottom = fraction[1] or fraction[3], fraction[2] or fraction[4]
    before, after = fraction.string[: fraction.start()], fraction.string[fraction.end() :]
    return " " * before[-1:].isalnum() + f"{top}/{bottom}" + " " * after[:1].isalnum()


def _unit(text: str) -> tuple[str, ...] | None:
    """The words of a unit, () where there is nothing; None where the text is something else."""
    words, place, attached = [], 0, text[:1].isalpha()
    while place < len(text):
        match = UNIT.match(text, place)
        if match is None:
            return None
        word = match["word"]
        if word and not _is_unit(word, attached and place == 0):
            return None
        name = CODES.get(word.casefold(), word.strip(".")) if word else "degree"
        if match["currency"]:
            name = CURRENCIES.get(match["currency"], "dollar")
        elif match["degree"]:
            name += match["degree"].strip("° ")
        words += ["per"] * bool(match["per"]) + [name + (match["power"] or "").replace("^", "").replace(" ", "")]
        place = match.end()
    return tuple(words)


def _is_unit(word: str, attached: bool) -> bool:
    """Whether a word after a number names what is counted, and changes nothing about how many."""
    if len(word) == 1:
        return word in SYMBOLS
    parts = re.split(r"['’.-]+", word.casefold().strip("."))
    if all(part in SHORT or part in SPELLED_OUT or part.removesuffix("s") in SPELLED_OUT for part in parts):
        return True
    if attached or not word.isalpha():
        return False
    plural = len(word) > 3 and word.casefold().endswith("s") and not word.casefold().endswith("ss")
    return plural and not CHANGING_PLURAL.fullmatch(word.casefold())


def _same_word(left: str, right: str) -> bool:
    """Up to case and a plural's s, but for symbols: neither is mW MW, nor m ms."""
    short, long = sorted((_folded(left), _folded(right)), key=len)
    if short == long or {short, long} in ({"foot", "feet"}, {"penny", "pence"}):
        return True
    ending_in_y = short.endswith("y") and long == short[:-1] + "ies"
    return len(short) > 1 and (long in (short + "s", short + "es") or ending_in_y)


def _folded(word: str) -> str:
    if len(word) == 1 or BY_CASE.fullmatch(word):
        return word.replace("L", "l")
    return word.casefold()


def _same_name(left: str, right: str) -> bool:
    if len(left) > 1 and "\\" not in left:
        left, right = left.casefold(), right.casefold()
    return not left or not right or left == right


IN_TEXT = re.compile(
    rf"""(?<![\w.^])(?<!\w-)
    (?P<number>(?>[-+]?(?:{_CURRENCY})?[-+]?\.?\d(?:[\d.,/:^{THIN}-]*\d)?(?:[eE][-+]?\d+)?(?:\s\d+/\d+)?))(?![\d_^])
    (?P<after>\s?(?:%|per\s+cent\b)|\s?[^\W\d_]+|(?:{_CURRENCY})(?!\d))?""",
    re.VERBOSE,
)
RANGE = re.compile(rf"({_DECIMAL})-({_DECIMAL})")


def _numbers_of(match: re.Match) -> list[Quantity]:
    """What a stretch of digits in a text says: one number, both ends of a range, or none, as a time or a date."""
    number, after = match["number"], match["after"] or ""
    texts = [number + after]
    if ends := RANGE.fullmatch(number):
        texts = [ends[1], ends[2]]
    elif _number(number + after) is None and after[:1].isspace():
        texts = [number]  # what follows is no unit: 12 and
    return [value for value in map(_number, texts) if value]
