"""What a profile will need, before it starts: data, memory, time; it must not import report."""
