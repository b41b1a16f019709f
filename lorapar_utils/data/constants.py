r"""Roots and multiples of pi, such as `2\sqrt{3}` or `3\pi/4`, read and compared by math-verify.

math-verify reads a part of a text (3 of `3:30`), multiplies the letters of a word and adds two numbers side by side. So
it gets only texts of numbers, roots, pi and signs, with all products written out. For other texts `leading_constant`
returns None.
"""

import functools
import logging
import re
from fractions import Fraction

LONGEST, DEEPEST = 80, 3  # characters and nested brackets; the parser takes seconds for thirty brackets

SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        ("π|(?<![a-zA-Z\\\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"[·×*]|\\times(?![a-zA-Z])", r"\\cdot "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?:(?<![a-zA-Z])\\?sqrt|√)\s*\(([^()]*)\)|(?:\\sqrt|√)\s*(\d)(?!\d)|√\s*(\d+)", r"\\sqrt{\1\2\3}"),
    )
]
# Places of products without a sign, as LaTeX allows: 2\sqrt{3}, (1+2)\pi.
PRODUCT = re.compile(r"(?<=[\d)}])\s*(?=\\sqrt|\\pi|\()|(?<=\\pi)\s*(?=\\sqrt|\()")
DECIMAL = re.compile(r"(\d+)\.(\d+)")
CONSTANT = re.compile(
    r"(?:\d{1,20}|\\(?:frac|sqrt|pi|cdot)(?![a-zA-Z])|\^\s*\{?-?\d{1,2}\}?(?!\s*[\d^])|[-+/(){}]|\s)+"
)
# Unclear: two numbers side by side, as in a mixed number (sum or product?); a divisor that may include more factors
# (1/2 pi); powers of more than a number, which may take sympy for ever; 0^0, which has no value.
UNCLEAR = re.compile(
    r"[\d)}]\s+\d|\d\s*\\frac|[})]\s*\d|[})]\s*\^|/\s*(?:\d+|\\pi|\([^()]*\))\s*(?:\\cdot|\\sqrt|\\pi|\()|(?<!\d)0+\s*\^"
)


class Constant:
    """A number that is no fraction; equal to another if math-verify proves it."""

    def __init__(self, value):
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        try:
            _, verify = _math_verify()
            return verify(self._value, other._value) and verify(other._value, self._value)
        except Exception:  # sympy raises many kinds, and no model's text may end a training run
            return False


@functools.lru_cache(maxsize=1 << 12)
def leading_constant(text: str) -> tuple[Fraction | Constant, str] | None:
    """The constant at the start of a text, comparable by `==`, and the rest of the text; None if there is no constant.

    Examples
    --------
    >>> leading_constant(r"\\sqrt{8} cm") == leading_constant(r"2\\sqrt2 cm"), leading_constant("8 cm")
    (True, None)
    """
    if len(text) > LONGEST:
        return None
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    # An exact fraction, because math-verify would make a float.
    text = DECIMAL.sub(lambda number: rf"\frac{{{int(number[1] + number[2])}}}{{{10 ** len(number[2])}}}", text)
    start = CONSTANT.match(text)
    if start is None or not re.search(r"\\(?:sqrt|pi)", start[0]):
        return None
    if UNCLEAR.search(start[0]) or _depth(start[0]) > DEEPEST:
        return None
    parse, _ = _math_verify()
    try:
        value = parse(PRODUCT.sub(r"\\cdot ", start[0]))
        if not value.is_number or not value.is_finite:
            return None
        value = value.doit()
    except Exception:  # the class that the parser raises
        return None
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else Constant(value), text[start.end() :]


def _depth(text: str) -> int:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({") - (sign in ")}")
        deepest = max(deepest, depth)
    return deepest


@functools.cache
def _math_verify():
    # Imported here, because the import takes half a second and few answers need it.
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    # The time limit is off, because it works only in the main thread; math-verify logs a warning about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parse = functools.partial(latex2sympy, is_real=True, normalization_config=None)
    return parse, functools.partial(math_verify.verify, numeric_precision=1000, strict=True, timeout_seconds=None)
