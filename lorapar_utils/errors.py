"""The one exception that the package raises for input that a person can mend."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message names the field, the value and the remedy."""


@contextmanager
def told_on_the_command_line() -> Iterator[None]:
    """End the process with an InputError's message on stderr and code 2, instead of a traceback."""
    try:
        yield
    except InputError as error:
        print(f"InputError: {error}", file=sys.stderr)
        sys.exit(2)


def require(package: str, setting: str, extra: str) -> None:
    """Refuse a setting whose package is not installed; `extra` is the project's extra that brings it."""
    if not importlib.util.find_spec(package):
        raise InputError(f"{setting}: {package} is not installed; pip install -e '.[{extra}]'")
