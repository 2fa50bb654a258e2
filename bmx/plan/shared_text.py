"""Which leading text of prompts is worth a slot of its own that all of them read. Knows numbers of tokens alone."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHARED_SLOTS = 3  # most texts that are read in place at once: those of rows that run, and of the next
COMMON = 16  # a length of text is worth a slot if at least one in so many of these prompts shares just that


@dataclass(frozen=True, slots=True)
class SharedText:
    """How prompts are laid out if they read what they share in place.

    Attributes:
        tokens: of each prompt, how many it reads in a shared slot; 0 for none.
        slots: how many shared slots there are.
        readers: most prompts that can run at once, if each text is shared by as many as on average, and those that
            share none run beside them.
    """

    tokens: list[int]
    slots: int
    readers: int

    @property
    def longest(self) -> int:
        """Rows of a shared slot."""
        return max(self.tokens)


def shared_text(in_place: Sequence[int], before: Sequence[int]) -> SharedText | None:
    """The shared slots for prompts; None if they share nothing that is worth one.

    Lengths that few prompts share come about where their own text begins alike by chance: such a prompt reads the
    longest text that is common.

    Args:
        in_place: leading tokens of each prompt that it could read in a shared slot.
        before: leading tokens that it shares with the prompt before it, in the order in which they run.
    """
    counts = Counter(tokens for tokens in in_place if tokens)
    common = [0, *sorted(tokens for tokens, count in counts.items() if COMMON * count >= counts.total())]

    def rounded(tokens: int) -> int:
        return common[bisect_right(common, tokens) - 1]

    tokens = [rounded(most) for most in in_place]
    sharing = sum(map(bool, tokens))
    if not sharing:
        return None
    texts = sum(own > rounded(shared) for own, shared in zip(tokens, before, strict=True)) or 1
    slots = min(texts, MAX_SHARED_SLOTS)
    return SharedText(tokens, slots, max(1, slots * sharing // texts) + len(tokens) - sharing)
