"""What kernels see of a layer's slots and of the prompt chunks of a step. Knows tensors; computes nothing.

Shapes: R rows of all slots and heads, S slots, D key dim, E value dim, N chunks, T packed tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """All slots of one layer, those of every capacity, in one piece.

    Row c of kv head k of slot s is row ``first[s] + k * capacity[s] + c``.

    Attributes:
        keys: [R, D]; values [R, E].
        positions: [R] int32, the token's position in its sequence, -1 where the row is empty.
        mass: [R] float32, attention received, or None where nothing is added up.
        first: [S] int64; capacity [S] int64.
        kv_heads: K.
        sizes: the capacities again, on the host.
        largest: the greatest of them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor | None
    first: Tensor
    capacity: Tensor
    kv_heads: int
    sizes: tuple[int, ...]
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunks:
    """The prompt chunks of a step, each the next tokens of another slot's sequence, by number.

    Attributes:
        at: the packed row of its first token; ``lengths`` its tokens.
        slots: where its sequence lives; ``starts`` tokens of it before the chunk.
        limits: rows of a head that it may use; ``totals`` its tokens when its answer is as long as it may get.
        table: [6, N] int64, the same six, in this order, on the device.
        votes: [T] float32, the weight of each packed token's attention; None if all weigh 1.
        old: [N] float32, what is left of the attention added up before, as the chunk's comes on top; None if all of it.
    """

    at: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    limits: tuple[int, ...]
    totals: tuple[int, ...]
    table: Tensor
    votes: Tensor | None = None
    old: Tensor | None = None
