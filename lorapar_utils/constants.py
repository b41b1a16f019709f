r"""Roots and multiples of pi, `2\sqrt{3}` or `3\pi/4`, read and compared by math-verify.

math-verify reads what it can of a text (3 of `3:30`), multiplies the letters of a word and adds two numbers that stand
side by side. So only what consists of numbers, roots, pi and signs is given to it, with every product written out;
whatever else is compared as text by whoever asks.
"""

import functools
import logging
import re
from fractions import Fraction

LONGEST, DEEPEST = 80, 3  # characters, and brackets within brackets: its parser takes seconds over thirty

SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        ("π|(?<![a-zA-Z\\\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"[·×*]|\\times(?![a-zA-Z])", r"\\cdot "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?:(?<![a-zA-Z])\\?sqrt|√)\s*\(([^()]*)\)|(?:\\sqrt|√)\s*(\d)(?!\d)|√\s*(\d+)", r"\\sqrt{\1\2\3}"),
    )
]
# Products are written without a sign in LaTeX: 2\sqrt{3}, (1+2)\pi.
PRODUCT = re.compile(r"(?<=[\d)}])\s*(?=\\sqrt|\\pi|\()|(?<=\\pi)\s*(?=\\sqrt|\()")
DECIMAL = re.compile(r"(\d+)\.(\d+)")
CONSTANT = re.compile(
    r"(?:\d{1,20}|\\(?:frac|sqrt|pi|cdot)(?![a-zA-Z])|\^\s*\{?-?\d{1,2}\}?(?!\s*[\d^])|[-+/(){}]|\s)+"
)
# Two numbers side by side, a mixed number: a sum or a product. A division by what might be all that follows (1/2 pi).
# Powers of more than a number, which may take sympy for ever. And 0^0, which has no value.
UNCLEAR = re.compile(
    r"[\d)}]\s+\d|\d\s*\\frac|[})]\s*\d|[})]\s*\^|/\s*(?:\d+|\\pi|\([^()]*\))\s*(?:\\cdot|\\sqrt|\\pi|\()|(?<!\d)0+\s*\^"
)


class Constant:
    """A number that is no fraction; equal to another where math-verify proves it."""

    def __init__(self, value):
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        try:
            _, verify = _math_verify()
            return verify(self._value, other._value) and verify(other._value, self._value)
        except Exception:  # sympy raises many kinds, and no text of a model's may end a training run
            return False


@functools.lru_cache(maxsize=1 << 12)
def leading_constant(text: str) -> tuple[Fraction | Constant, str] | None:
    """The constant that a text starts with, to be compared by `==`, and the rest; None where it is anything else.

    Examples
    --------
    >>> leading_constant(r"\\sqrt{8} cm") == leading_constant(r"2\\sqrt2 cm"), leading_constant("8 cm")
    (True, None)
    """
    if len(text) > LONGEST:
        return None
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    # Exact: math-verify would make a float of it.
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
    except Exception:  # is what its parser raises
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
    # Half a second to import, and only few answers need it.
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    # It warns of the time limit that is switched off below; with one it works in the main thread alone.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parse = functools.partial(latex2sympy, is_real=True, normalization_config=None)
    return parse, functools.partial(math_verify.verify, numeric_precision=1000, strict=True, timeout_seconds=None)
