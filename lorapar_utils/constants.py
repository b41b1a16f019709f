r"""Roots and multiples of pi, `2\sqrt{3}` or `3\pi/4`, compared by math-verify.

math-verify reads what it can of a text (3 of `3:30`), multiplies the letters of a word and adds two numbers that stand
side by side. So only a text that consists of numbers, roots, pi and signs is given to it, with every product written
out; whatever else is compared as text by whoever asks.
"""

import functools
import logging
import re

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
# Two numbers side by side, a mixed number: a sum or a product. And powers of more than a number, which may take
# sympy for ever.
UNCLEAR = re.compile(r"[\d)}]\s+\d|\d\s*\\frac|[})]\s*\d|[})]\s*\^")
# A sum without a root is a range as well (10-12), or a date.
SURE = re.compile(r".*(?:\\sqrt|\\pi).*|-?\d+(?:/\d+)?", re.DOTALL)
LONGEST = 100


def same_constant(left: str, right: str) -> bool:
    """Whether two texts are the same constant, proved: a decimal that is near a root is not the root."""
    constants = _constant(left), _constant(right)
    if None in constants:
        return False
    try:
        _, verify = _math_verify()
        return verify(*constants) and verify(*reversed(constants))
    except Exception:  # sympy raises many kinds, and no text of a model's may end a training run
        return False


@functools.lru_cache(maxsize=1 << 12)
def _constant(text: str):
    """The sympy expression that a text is; None where it is anything else."""
    if len(text) > LONGEST:
        return None
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    text = PRODUCT.sub(r"\\cdot ", text)
    # Exact: math-verify would make a float of it.
    text = DECIMAL.sub(lambda number: rf"\frac{{{int(number[1] + number[2])}}}{{{10 ** len(number[2])}}}", text)
    if not CONSTANT.fullmatch(text) or UNCLEAR.search(text) or not SURE.fullmatch(text.strip()):
        return None
    parse, _ = _math_verify()
    try:
        value = parse(text)
        return value if value.is_number and value.is_finite else None
    except Exception:  # is what its parser raises
        return None


@functools.cache
def _math_verify():
    # Half a second to import, and only few answers need it.
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    # It warns of the time limit that is switched off below; with one it works in the main thread alone.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parse = functools.partial(latex2sympy, is_real=True, normalization_config=None)
    return parse, functools.partial(math_verify.verify, numeric_precision=1000, strict=True, timeout_seconds=None)
