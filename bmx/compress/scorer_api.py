"""What a scorer says about itself and what it is shown: the words that scorers and the policy share.

Knows no method and no tensor's meaning beyond its shape; loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

RANK_EVERY = 16  # decoding tokens between two rankings of a sequence by a scorer whose ranking is dear


class Needs(Flag):
    """What a scorer must see beside positions; nothing that no scorer needs is computed or remembered."""

    NOTHING = 0
    ATTENTION_MASS = auto()  # attention that each key received from the queries so far
    SQUARES = auto()  # squares of those probabilities, added up
    PROBE = auto()  # attention from the queries of the probe text
    KEYS = auto()
    VALUES = auto()
    QUERIES = auto()  # those of the chunk that was just read


TENSORS = Needs.KEYS | Needs.VALUES | Needs.QUERIES


@dataclass(frozen=True, slots=True)
class QueryWeights:
    """How the attention of many queries becomes one number per key: with which weight each query's counts.

    Attributes:
        decay: each query's vote counts so much of the next one's.
        window: only so many of the newest queries vote; None for all. Where fewer come at once (in decoding, one),
            they replace their share of the sum, so that it always holds about ``window`` votes.
    """

    decay: float = 1.0
    window: int | None = None

    def decay_over(self, queries: int) -> float:
        """The weight of what was added up before, once so many queries come on top."""
        return self.decay**queries if self.window is None else max(0.0, 1 - queries / self.window)

    def weights(self, queries: int) -> list[float]:
        """The weight of each new query, oldest first."""
        first = 0 if self.window is None else max(0, queries - self.window)
        return [0.0] * first + [self.decay ** (queries - 1 - i) for i in range(first, queries)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What there is to rank: K kv heads and R rows, for any leading shape [...].

    Attributes:
        positions: [..., K, R] int, the tokens' positions in their sequence; -1 for an empty row.
        now: [..., 1, 1] int or a number, tokens of the sequence seen so far.
        shown: what the scorer needs, by name; what it did not ask for is not there.
        surplus: of the rows, how many must go.
        window: newest keys that a query may see, or None.
        scale: factor of the dot products.
    """

    positions: Tensor
    now: Tensor | int
    shown: Mapping[str, Tensor] = field(default_factory=dict)
    surplus: int = 1
    window: int | None = None
    scale: float = 1.0

    @property
    def attention_mass(self) -> Tensor:
        """[..., K, R] float32, attention received: weighted by the votes, averaged over the heads of the group."""
        return self.shown["mass"]

    @property
    def squares(self) -> Tensor:
        """[..., K, R] float32, the same of squared probabilities."""
        return self.shown["squares"]

    @property
    def probe(self) -> Tensor:
        """[..., K, R] float32, attention received from the probe; -1 where there was none yet."""
        return self.shown["probe"]

    @property
    def keys(self) -> Tensor:
        """[..., K, R, D] float32."""
        return self.shown["keys"].float()

    @property
    def values(self) -> Tensor:
        """[..., K, R, E] float32."""
        return self.shown["values"].float()

    @property
    def queries(self) -> Tensor:
        """[T, K, G, D] float32, of the newest chunk."""
        return self.shown["queries"].float()

    @property
    def lifetime(self) -> Tensor:
        """[..., K, R]: queries that could have seen each key: those at p .. now - 1, or a window of them."""
        return (self.now - self.positions).clamp(min=1, max=self.window)

    @property
    def valid(self) -> Tensor:
        """[..., K, R] bool: rows that hold something."""
        return self.positions >= 0


class Scorer(Protocol):
    """Gives each KV pair an importance: more is better. Protecting, choosing and writing are not its business.

    Attributes:
        needs: what it must be shown.
        every: decoding tokens of a sequence between two rankings; 0 if there is no ranking in decoding. In between,
            the last ranking stands, and newer tokens go after all that were ranked, oldest first.
        votes: how attention is added up for it, if it needs that.
    """

    needs: ClassVar[Needs]
    every: ClassVar[int]

    @property
    def query_weights(self) -> QueryWeights:
        """How attention is added up."""
        ...

    def __call__(self, seen: Seen) -> Tensor:
        """Scores [..., K, R] float32."""
        ...


@dataclass(frozen=True, slots=True)
class ScorerDefaults:
    """What scorers have in common: all queries vote alike, and the ranking is new at each token."""

    needs: ClassVar[Needs] = Needs.NOTHING
    every: ClassVar[int] = 1
    query_weights: QueryWeights = QueryWeights()
