"""What a profile will need, before it starts: data, memory, time; it must not import report."""


def duration(seconds: float) -> str:
    """A time as a person says it: `40 s`, `12 min`, `1.8 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
