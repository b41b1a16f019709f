"""Blocks: the records of one seed, which may be compared only where all were made in one way (see `SAME`)."""

from collections.abc import Iterable, Sequence

from lorapar_utils.errors import InputError
from lorapar_utils.records.record import Record


def blocks(sides: Sequence[Iterable[Record]]) -> dict[int, list[Record]]:
    """The records of each seed that all `sides` have, one for each side, by seed.

    Raises
    ------
    InputError
        The records of a seed differ in one of `SAME`, or one was measured on another split than the test's.
    """
    by_seed = [{record.run["seed"]: record for record in side} for side in sides]
    paired = {seed: [side[seed] for side in by_seed] for seed in sorted(set.intersection(*map(set, by_seed)))}
    for seed, records in paired.items():
        check_block(records, seed)
    return paired


def check_block(records: Sequence[Record], seed: int) -> None:
    """Raise an InputError that names what differs within a block, or which record no claim may rest on."""
    for record in records:
        split = record.run["parameters"].get("measured_on", "test")
        if split != "test":
            raise InputError(
                f"record {record.name}: it was measured on {split}, to choose settings; compare those of the test split"
            )
    for what, value_of in SAME.items():
        values = {record.name: value_of(record) for record in records}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise InputError(
                f"block {seed}: its records differ in {what} ({listed}), so they cannot be compared; run the block "
                "again from one commit, on one kind of machine"
            )


def _machine(record: Record) -> str:
    hardware = record.environment["hardware"]
    sets = "+".join(hardware.get("instructions") or ())
    return hardware.get("gpu") or f"{hardware.get('cpu')} {hardware.get('cpu_family')} {sets}"


# What the records of a block have in common -> how it is read from a record.
SAME = {
    "commit": lambda record: record.run["commit"],
    "pool": lambda record: record.environment["hashes"].get("data"),
    "weights": lambda record: record.environment["hashes"].get("weights"),
    "dtype": lambda record: record.environment.get("dtype"),
    "kind of machine": _machine,
}
