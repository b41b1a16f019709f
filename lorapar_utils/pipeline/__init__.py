"""The phases, each made once and kept: votes, scores, partition, experiments; it must not import report or planning."""
