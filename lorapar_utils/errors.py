"""The one exception that the package raises for input that a person can mend."""


class InputError(ValueError):
    """Bad input: the message names the field, the value and the remedy."""
