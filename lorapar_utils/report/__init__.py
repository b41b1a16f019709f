"""Records in; tables, figures, claims and pages out; it must import neither torch nor a room that does."""
