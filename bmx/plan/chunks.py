"""Where the chunks of a prompt end. Knows numbers of tokens alone."""

from __future__ import annotations


def chunk_ends(tokens: int, chunk_size: int) -> list[int]:
    """Where the chunks of a prompt end: at multiples of their size, but the last two are as even as can be.

    So prompts that begin alike are cut alike, nearly as far as they go: the ends before any end, the last one
    excepted, are all the multiples below it.
    """
    if tokens <= chunk_size:
        return [tokens]
    even = (-(-tokens // chunk_size) - 2) * chunk_size
    return [*range(chunk_size, even + 1, chunk_size), (even + tokens) // 2, tokens]
