"""How important each KV pair is. A scorer ranks; protecting, choosing and writing are not its business.

A new method is one frozen dataclass here: say what it ``needs`` to see, and return a score per KV pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Needs(Enum):
    """What a scorer must see; nothing that no scorer needs is computed."""

    NOTHING = "positions alone"
    ATTENTION_MASS = "attention that each key received from every query so far"


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to rank, for any leading shape [...] and R rows.

    Attributes:
        mass: [..., R] float32, attention received: summed over queries, averaged over the heads of the group.
        positions: [..., R] int, the tokens' positions in their sequence.
        now: [..., 1] int or a number, tokens of the sequence seen so far.
        window: newest keys that a query may see, or None.
    """

    mass: Tensor
    positions: Tensor
    now: Tensor | int
    window: int | None = None


class Scorer(Protocol):
    """Gives each KV pair an importance: more is better."""

    needs: ClassVar[Needs]

    def __call__(self, seen: Seen) -> Tensor:
        """Scores [..., R] float32."""
        ...


@dataclass(frozen=True, slots=True)
class AverageAttention:
    """Attention received per query that could have seen the key (Batch-Max, arXiv 2412.05693).

    Dividing by the lifetime takes away the old tokens' advantage: under even attention over 4,096 tokens the plain
    sum (H2O) prefers the oldest to the newest by four orders of magnitude, the average by one.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS

    def __call__(self, seen: Seen) -> Tensor:
        """mass / lifetime; a key at position p has been seen by the queries p .. now - 1, or by a window of them."""
        lifetime = (seen.now - seen.positions).clamp(min=1, max=seen.window)
        return seen.mass / lifetime


@dataclass(frozen=True, slots=True)
class Newest:
    """The newer the better. With a capacity of a layer's own sliding window, this loses nothing."""

    needs: ClassVar[Needs] = Needs.NOTHING

    def __call__(self, seen: Seen) -> Tensor:
        """The position itself."""
        return seen.positions.float()
