"""Whether an answer repeats one stretch of tokens without end. Knows token ids; knows nothing of their text."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_STRETCH = 128  # tokens of the stretch that is repeated
LEAST_TIMES = 5  # how often it stands at the end of the answer, one after the other
LEAST_TOKENS = 128  # of all repetitions together: a line of dashes or a column of zeros is shorter
INTERVAL = 16  # tokens of the answer after which it is looked at again


def repeats(answer: Sequence[int]) -> bool:
    """Whether an answer ends in one stretch of tokens over and over; looked at where its length is due for it.

    The stretch has up to ``LONGEST_STRETCH`` tokens, and stands there at least ``LEAST_TIMES`` times and for at least
    ``LEAST_TOKENS`` tokens. The answer alone decides, so that no batch and no restart has a part in it.
    """
    if len(answer) < LEAST_TOKENS or len(answer) % INTERVAL:
        return False
    newest = answer[-LEAST_TIMES * LONGEST_STRETCH :]
    for stretch in range(1, LONGEST_STRETCH + 1):
        length = max(LEAST_TIMES * stretch, LEAST_TOKENS)
        if length > len(newest):
            return False
        if newest[-1 - stretch] == newest[-1] and newest[-length:-stretch] == newest[stretch - length :]:
            return True
    return False
