"""The interface between scorers and the policy: what a scorer declares, and what it is given to score.

Knows no scoring method, and of tensors only their shapes; loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

RANK_EVERY = 16  # decoding tokens between two rankings, for scorers that are too costly to run for each token


class Needs(Flag):
    """The inputs of a scorer beside positions. What no scorer needs is neither computed nor stored."""

    NOTHING = 0
    ATTENTION_MASS = auto()  # attention probabilities that each key has received, summed over queries
    SQUARES = auto()  # the squares of those probabilities, summed alike
    PROBE = auto()  # attention from the queries of the probe text
    KEYS = auto()
    VALUES = auto()
    QUERIES = auto()  # queries of the chunk that was just read


TENSORS = Needs.KEYS | Needs.VALUES | Needs.QUERIES


@dataclass(frozen=True, slots=True)
class QueryWeights:
    """With which weight each query's attention enters the sum that a key accumulates.

    Attributes:
        decay: factor on a query's weight for each query that follows it.
        window: number of newest queries with a weight above zero; None for all. Where fewer come at once (in decoding,
            one), they replace their share of the sum, so that it always stands for about ``window`` queries.
        far: a prompt's query counts for a key only if the key is no longer among the protected newest tokens. In
            decoding all queries count, or the first words of an answer would be evicted before the prompt's.
        power: of a probability, as it is summed: 1 or 2.
    """

    decay: float = 1.0
    window: int | None = None
    far: bool = False
    power: int = 1

    def decay_over(self, queries: int) -> float:
        """The factor on the attention that was summed before, as the attention of ``queries`` more is added."""
        return self.decay**queries if self.window is None else max(0.0, 1 - queries / self.window)

    def weights(self, queries: int) -> list[float]:
        """The weight of each of ``queries`` new queries, oldest first."""
        first = 0 if self.window is None else max(0, queries - self.window)
        return [0.0] * first + [self.decay ** (queries - 1 - i) for i in range(first, queries)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a scorer is given: K kv heads and R rows, for any leading shape [...].

    Attributes:
        positions: [..., K, R] int, the tokens' positions in their sequence; -1 for an empty row.
        now: [..., 1, 1] int or a number, tokens of the sequence seen so far.
        inputs: the tensors that the scorer needs, by name; others are missing.
        surplus: the number of rows that must be evicted.
        window: newest keys that a query sees (sliding window), or None.
        distance: a query counts for a key if it lies at least that many tokens after it.
        scale: factor of the dot products.
    """

    positions: Tensor
    now: Tensor | int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    surplus: int = 1
    window: int | None = None
    distance: int = 0
    scale: float = 1.0

    @property
    def attention_mass(self) -> Tensor:
        """[..., K, R] float32, attention received, to the scorer's power, from queries that count.

        It is weighted by query, and averaged over a kv head's query heads.
        """
        return self.inputs["mass"]

    @property
    def squares(self) -> Tensor:
        """[..., K, R] float32, the same sum of squared probabilities."""
        return self.inputs["squares"]

    @property
    def probe(self) -> Tensor:
        """[..., K, R] float32, attention received from the probe; -1 where no probe has followed the key yet."""
        return self.inputs["probe"]

    @property
    def keys(self) -> Tensor:
        """[..., K, R, D] float32."""
        return self.inputs["keys"].float()

    @property
    def values(self) -> Tensor:
        """[..., K, R, E] float32."""
        return self.inputs["values"].float()

    @property
    def queries(self) -> Tensor:
        """[T, K, G, D] float32, of the newest chunk."""
        return self.inputs["queries"].float()

    @property
    def lifetime(self) -> Tensor:
        """[..., K, R]: how many queries that count could see each key, at least 1.

        They lie at positions p + ``distance`` .. now - 1, less far from the key than a sliding window is wide.
        """
        most = None if self.window is None else max(1, self.window - self.distance)
        return (self.now - self.positions - self.distance).clamp(min=1, max=most)

    @property
    def valid(self) -> Tensor:
        """[..., K, R] bool: rows that hold a pair."""
        return self.positions >= 0


class Scorer(Protocol):
    """Gives each KV pair a score: the higher, the more important. Protecting and evicting pairs is the policy's part.

    Attributes:
        needs: the inputs of the scorer.
        every: decoding tokens of a sequence between two rankings; 0 for no ranking in decoding. Between rankings the
            last one stands, and newer tokens are evicted after all ranked ones, oldest first.
        query_weights: how attention is summed over queries, for scorers that need it.
    """

    needs: ClassVar[Needs]
    every: ClassVar[int]

    @property
    def query_weights(self) -> QueryWeights:
        """How attention is summed over queries."""
        ...

    def __call__(self, seen: Seen) -> Tensor:
        """Scores [..., K, R] float32."""
        ...


@dataclass(frozen=True, slots=True)
class ScorerDefaults:
    """The usual declarations: no inputs but positions, a ranking at each token, equal weights for all queries."""

    needs: ClassVar[Needs] = Needs.NOTHING
    every: ClassVar[int] = 1
    query_weights: QueryWeights = QueryWeights()
