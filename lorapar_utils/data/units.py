"""Units of measurement and money: which words are units, and which are names of one unit."""

import re


def _spaced(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Short words after a number may be variables. Only these are units.
SYMBOLS = frozenset("mgshlLVWJN")
SHORT = _spaced(
    "dm um dl cl mw mj kj kv mv ma ns pa ev pt am pm fps rpm mah ghz mhz khz kpa mpa sqm kwh cal kl lb day mb gb tb"
)
# Name of a unit: other spellings. `same_unit` treats pound as weight or money.
_NAMED = """
meter: m metre; kilometer: km kilometre; centimeter: cm centimetre; millimeter: mm millimetre; nanometer: nm
foot: ft feet; inch: in inches; yard: yd; mile: mi; mile per hour: mph; kilometer per hour: kph kmh; hectare: ha
gram: g; kilogram: kg; milligram: mg; ounce: oz; lb: lbs; pound: pounds; liter: l litre; milliliter: ml millilitre
gallon: gal; quart: qt; second: s sec; millisecond: ms; minute: min; hour: h hr hrs; year: yr yrs
degree celsius: °C; degree fahrenheit: °F; degree kelvin: °K; volt: V; watt: W; kilowatt: kw; joule: J; newton: N
hertz: hz; kilobyte: kB KB; megabyte: MB; gigabyte: GB; terabyte: TB; penny: pence; radian: rad; degree: deg
dollar: usd buck; euro: eur; sterling: gbp; yen: jpy; rupee: inr rs; won: krw; ruble: rub
"""
_LINES = [line.strip().split(": ") for line in re.split(r"[;\n]", _NAMED.strip())]
UNIT_NAMES = {other: name for name, others in _LINES for other in others.split()}
# Short symbols whose case matters: a thousandth or a million, bits or bytes.
BY_CASE = re.compile(r"m(?:g|m|s|w|v|a|hz|j|l|n|pa|wh|ev)|[kmgt]b", re.IGNORECASE)
# Spelled-out units, in the singular. Other counted things (apples, clips) are recognised by the plural.
SPELLED_OUT = _spaced(
    """
    bitcoin baht lira shekel dong cent ton tonne pint cup tablespoon teaspoon day week month decade celsius fahrenheit
    kelvin square cubic acre ampere calorie byte bit people person child children man men woman women us u.s
    """
)
SHORT |= {other.casefold() for other in UNIT_NAMES if 1 < len(other) < 4}
SPELLED_OUT |= {word for name, others in _LINES for word in [*name.split(), *others.split()] if len(word) > 2}
# Words with a plural s that change the number before them or belong to a sentence.
CHANGING_PLURAL = re.compile(
    r"(?:is|was|has|does|as|this|thus|plus|minus|times|less|unless|versus|perhaps|always|sometimes|pairs|couples|scores"
    r"|grosses|halves|quarters|squares|cubes|roots|powers|inverses|opposites|reciprocals|negatives|factorials"
    r"|multiples|percents|ones|twos|threes|fours|fives|sixes|sevens|eights|nines|tens|thirds|lacs|myriads|repeats"
    r"|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)ths"
    r"|[a-z]*(?:illions|illiards|dozens|hundreds|thousands|lakhs|crores))"
)


def unit_name(word: str) -> str:
    """The standard name of a unit (`foot` for `ft`), or the word itself if the table has none."""
    symbol = _folded(word)
    return UNIT_NAMES.get(symbol) or UNIT_NAMES.get(symbol.removesuffix("s"), word)


def is_spelled_out(word: str) -> bool:
    """Whether a word, without plural s and power, is the full name of a unit instead of a symbol."""
    return word.rstrip("-0123456789").casefold().removesuffix("s") in SPELLED_OUT or word in SPELLED_OUT


def is_unit(word: str, attached: bool) -> bool:
    """Whether a word after a number names the counted things without changing the number."""
    if len(word) == 1:
        return word in SYMBOLS
    parts = re.split(r"['’.-]+", word.casefold().strip("."))
    if all(part in SHORT or is_spelled_out(part) for part in parts):
        return True
    if attached or not word.isalpha():
        return False
    plural = len(word) > 3 and word.casefold().endswith("s") and not word.casefold().endswith("ss")
    return plural and not CHANGING_PLURAL.fullmatch(word.casefold())


def same_unit(left: str, right: str) -> bool:
    """Whether two units are equal without case and plural s. For symbols both count: mW is not MW, m is not ms."""
    short, long = sorted((_folded(left), _folded(right)), key=len)
    if short == long or {short, long} in ({"lb", "pound"}, {"pound", "sterling"}):
        return True
    ending_in_y = short.endswith("y") and long == short[:-1] + "ies"
    return len(short) > 1 and (long in (short + "s", short + "es") or ending_in_y)


def _folded(word: str) -> str:
    if len(word) == 1 or BY_CASE.fullmatch(word):
        return word.replace("L", "l")
    return word.casefold()
