"""How much memory each of the attention kernels needs while it works: numbers alone, so that plans need no torch.

Each function gives the bytes that one layer's attention holds beside its inputs, for a prompt chunk or for all slots,
whichever is more. ``rows`` are the keys that a query sees, ``slots`` those of all groups.
"""

from __future__ import annotations

from collections.abc import Callable

TILE = 192  # most queries of a tile on the CPU


def reference(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Whole matrices: scores in both precisions, and copies of keys and values."""
    prompt = heads * chunk * rows * (itemsize + 3 * 4) + 2 * heads * rows * head_dim * itemsize
    return max(prompt, _decode(heads, rows, slots, head_dim, itemsize))


def cpu(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """A tile's scores and weights, and copies of keys and values."""
    tile = 4 * heads * min(chunk, TILE) * rows * itemsize
    prompt = tile + (2 * heads * rows + 2 * heads * chunk) * head_dim * itemsize
    return max(prompt, _decode(heads, rows, slots, head_dim, itemsize))


def _decode(heads: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Scores, ranks of the rows, and a copy of the keys and values of half the slots."""
    return slots * heads * rows * (itemsize + 5 * 4) + slots // 2 * 2 * heads * rows * head_dim * itemsize


def triton(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Raw scores of the decoding tokens; of a prompt chunk, sums and what survives of it."""
    return max(4 * slots * heads * rows, heads * chunk * (3 * 4 + head_dim * itemsize))


# What the compiled kernels do not take is tiled; for the rest they hold less.
WORKSPACE: dict[str, Callable[..., int]] = {"reference": reference, "cpu": cpu, "avx512": cpu, "triton": triton}
