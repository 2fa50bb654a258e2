"""Where the chunks of a prompt end. Knows numbers of tokens alone."""

from __future__ import annotations

ENDING = 64  # last tokens of a prompt that are read on its archive, as the answer is, and not in a slot under a budget


def ending_of(prompt_tokens: int, reading_rows: int) -> int:
    """Last tokens of a prompt that are read on its archive: questions tend to be there. 0 where nothing is evicted.

    Args:
        prompt_tokens: tokens of the prompt.
        reading_rows: rows of the slot in which it is read before it is archived; 0 where nothing is archived.
    """
    return min(ENDING, prompt_tokens // 2) if 0 < reading_rows < prompt_tokens else 0


def chunk_ends(tokens: int, chunk_size: int) -> list[int]:
    """The ends of a prompt's chunks: at multiples of the chunk size, but the last two chunks are of even length.

    So prompts that begin alike are cut alike, nearly to the end of the shorter one: the ends before any end but the
    last are all the multiples of the chunk size below it.
    """
    if tokens <= chunk_size:
        return [tokens]
    even = (-(-tokens // chunk_size) - 2) * chunk_size
    return [*range(chunk_size, even + 1, chunk_size), (even + tokens) // 2, tokens]


def steps_needed(prompt_tokens: int, max_tokens: int, chunk_size: int, ending: int = 0) -> int:
    """Steps of a request from its first chunk to its last token, if the answer is as long as it may get.

    Args:
        prompt_tokens: tokens of the prompt.
        max_tokens: most tokens of the answer.
        chunk_size: most prompt tokens of a step.
        ending: last tokens of the prompt that are a chunk of their own.
    """
    return -(-(prompt_tokens - ending) // chunk_size) + (ending > 0) + max_tokens
