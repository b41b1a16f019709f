"""What travels between the two sandboxes, as literals alone: no pickle, and nothing of it is run.

None, booleans, numbers, text, bytes and lists are written as Python writes them; every other kind as a tuple of its
name and its parts. The side that reads knows how to build each name, and builds nothing else. A class of the program's
own arrives as what it is built on (an `IntEnum` as an int, a namedtuple as a tuple), without its methods: its idea of
equality stays behind. Put before both scripts, as text; nothing of the project can be imported there.
"""

LONGEST_PRINTED = 4000  # bits of an int that Python prints whatever its limit on digits is
MOST_ITEMS = 100_000  # of an iterator, which may have no end
FACTORIES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, set, tuple)} | {"none": None}


class CannotBeCarried(Exception):
    """Names the kind of the value."""


def packed(value):
    """A value as nested literals."""
    for kind in type(value).__mro__:
        take_apart = PARTS.get(f"{kind.__module__}.{kind.__qualname__}")
        if take_apart is not None:
            return take_apart(value)
    if hasattr(type(value), "__next__"):
        return ("iterator", _every(value))
    raise CannotBeCarried(type(value).__name__[:100])


def unpacked(literal):
    """The value that `packed` made nested literals of."""
    if isinstance(literal, list):
        return [unpacked(item) for item in literal]
    if isinstance(literal, tuple):
        name, *parts = literal
        return BUILT[name](*(unpacked(part) for part in parts))
    return literal


def _all(values):
    return [packed(value) for value in values]


def _every(iterator):
    items = []
    for item in iterator:
        if len(items) == MOST_ITEMS:
            raise CannotBeCarried(f"{type(iterator).__name__} of more than {MOST_ITEMS} items")
        items.append(packed(item))
    return items


def _integer(value):
    value = int(value)
    return value if value.bit_length() < LONGEST_PRINTED else ("int", hex(value))


def _real(value):
    value = float(value)
    return value if value - value == 0 else ("float", str(value))  # inf and nan are no literals


def _mapping(name):
    return lambda value: (name, _all(value), _all(value.values()))


def _defaulting(value):
    names = [name for name, factory in FACTORIES.items() if factory is value.default_factory]
    if not names:  # a function of the program's own; what is in the dict is all that can be compared
        return _mapping("dict")(value)
    return ("defaultdict", names[0], _all(value), _all(value.values()))


# By the full name of a class, so that a module is imported only where a value needs it.
PARTS = {
    "builtins.NoneType": lambda value: None,
    "builtins.ellipsis": lambda value: ("ellipsis",),
    "builtins.bool": bool,
    "builtins.int": _integer,
    "builtins.float": _real,
    "builtins.complex": lambda value: ("complex", _real(value.real), _real(value.imag)),
    "builtins.str": str.__str__,
    "builtins.bytes": bytes,
    "builtins.bytearray": lambda value: ("bytearray", bytes(value)),
    "builtins.list": _all,
    "builtins.tuple": lambda value: ("tuple", _all(value)),
    "builtins.set": lambda value: ("set", _all(value)),
    "builtins.frozenset": lambda value: ("frozenset", _all(value)),
    "builtins.range": lambda value: ("range", _integer(value.start), _integer(value.stop), _integer(value.step)),
    "builtins.dict": _mapping("dict"),
    "builtins.dict_keys": lambda value: ("keys", _all(value)),
    "builtins.dict_values": lambda value: ("values", _all(value)),
    "builtins.dict_items": lambda value: ("items", _all(value)),
    "builtins.mappingproxy": _mapping("dict"),
    "collections.UserDict": _mapping("dict"),
    "collections.ChainMap": _mapping("dict"),
    "collections.UserList": _all,
    "collections.UserString": str,
    "collections.Counter": _mapping("Counter"),
    "collections.OrderedDict": _mapping("OrderedDict"),
    "collections.defaultdict": _defaulting,
    "collections.deque": lambda value: ("deque", _all(value), value.maxlen),
    "fractions.Fraction": lambda value: ("Fraction", _integer(value.numerator), _integer(value.denominator)),
    "decimal.Decimal": lambda value: ("Decimal", str(value)),
}


def _from(module, name):
    """A class, imported when it is called."""
    return lambda *parts: getattr(__import__(module), name)(*parts)


BUILT = {
    "ellipsis": lambda: ...,
    "int": lambda digits: int(digits, 16),
    "float": float,
    "complex": complex,
    "bytearray": bytearray,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "range": range,
    "iterator": iter,
    "dict": lambda keys, values: dict(zip(keys, values, strict=True)),
    "keys": lambda keys: dict.fromkeys(keys).keys(),
    "values": lambda values: dict(enumerate(values)).values(),
    "items": lambda items: dict(items).items(),
    "Counter": lambda keys, values: _from("collections", "Counter")(dict(zip(keys, values, strict=True))),
    "OrderedDict": lambda keys, values: _from("collections", "OrderedDict")(zip(keys, values, strict=True)),
    "defaultdict": lambda name, keys, values: _from("collections", "defaultdict")(
        FACTORIES[name], zip(keys, values, strict=True)
    ),
    "deque": _from("collections", "deque"),
    "Fraction": _from("fractions", "Fraction"),
    "Decimal": _from("decimal", "Decimal"),
}
