"""The one exception that the package raises for input that a person can mend."""

import importlib.util


class InputError(ValueError):
    """Bad input: the message names the field, the value and the remedy."""


def require(package: str, setting: str, extra: str) -> None:
    """Refuse a setting whose package is not installed; `extra` is the project's extra that brings it."""
    if not importlib.util.find_spec(package):
        raise InputError(f"{setting}: {package} is not installed; pip install -e '.[{extra}]'")
