"""What reading prompts and decoding must compute and read at least, in FLOPs and bytes: what speeds are held against.

Knows sizes and lengths; measures nothing and loads no torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends


def prefill_flops(spec: ModelSpec, policy: CompressionPolicy, tokens: int, rows: int, chunk_size: int) -> int:
    """FLOPs of reading one prompt in chunks: its linear layers, and attention to the pairs that are kept.

    The output head is left out: it serves one token of a prompt.

    Args:
        tokens: of the prompt.
        rows: of its slot.
        chunk_size: most tokens of a chunk.
    """
    chunks = list(pairwise([0, *chunk_ends(tokens, chunk_size)]))
    attention = 0
    for layer, layout in zip(spec.layers, policy.layout(spec, rows).layers, strict=True):
        scores = sum(_scores(start, stop - start, layout.capacity, layer.window) for start, stop in chunks)
        attention += 2 * scores * layer.query_heads * (layer.key_dim + layer.value_dim)
    return tokens * spec.costs.flops + attention


def _scores(start: int, tokens: int, capacity: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: those that are kept of what came before, and the chunk up to itself."""
    seen = tokens * min(start, capacity) + tokens * (tokens + 1) // 2
    return min(seen, tokens * window) if window else seen


def held_rows(policy: CompressionPolicy, prompt_tokens: int, max_tokens: int) -> int:
    """KV pairs that a sequence holds while it decodes, on average; layers of other budgets counted as the mean one."""
    kept = policy.rows_needed(prompt_tokens, max_tokens)
    if policy.scorer is not None and policy.budget.pairs is not None:
        kept = min(kept, policy.budget.pairs)
    return min(kept, prompt_tokens + max_tokens // 2)


def weights_read(spec: ModelSpec, model: Any, tokens: int) -> int:
    """Bytes of the weights that a step of so many decoding tokens reads.

    Of the input embedding only a row a token; of experts no more than the tokens can ask for.
    """
    embedding = model.get_input_embeddings().weight
    idle = 0 if embedding is model.get_output_embeddings().weight else embedding.nbytes
    asked_for = tokens * spec.costs.flops // 2 * spec.itemsize + spec.head_bytes
    return int(min(spec.weight_bytes - idle, asked_for))
