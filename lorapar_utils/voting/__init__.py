"""Which questions need slow thinking: teachers, ballots, D1, D2 (paper, 3.1); it must not import training, records."""

from lorapar_utils.voting.ballots import Ballot, Teacher, decide, vote
from lorapar_utils.voting.costs import plan

__all__ = ["Ballot", "Teacher", "decide", "plan", "vote"]
