"""The least that prefill and decoding must compute (FLOPs) and read (bytes), to compare measured speeds with.

Knows sizes and lengths; measures nothing and loads no torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends


def prefill_flops(spec: ModelSpec, policy: CompressionPolicy, tokens: int, rows: int, chunk_size: int) -> int:
    """FLOPs of reading one prompt in chunks: its linear layers, and attention to the KV pairs that are kept.

    The output head is left out, since it is computed for one token of a prompt.

    Args:
        spec: the model's sizes.
        policy: which KV pairs stay in a slot.
        tokens: of the prompt.
        rows: of its slot.
        chunk_size: most tokens of a chunk.
    """
    chunks = list(pairwise([0, *chunk_ends(tokens, chunk_size)]))
    attention = 0
    for layer, layout in zip(spec.layers, policy.layout(spec, rows).layers, strict=True):
        scores = sum(
            _scores(start, stop - start, rows, layer.window) for start, stop in chunks for rows in layout.capacities
        )
        attention += 2 * scores * (layer.query_heads // layer.kv_heads) * (layer.key_dim + layer.value_dim)
    return tokens * spec.costs.flops + attention


def _scores(start: int, tokens: int, capacity: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: keys kept from earlier chunks, and its own chunk up to itself.

    Args:
        start: tokens before the chunk.
        tokens: of the chunk.
        capacity: rows of a kv head in the slot.
        window: of the layer, if it has one.
    """
    seen = tokens * min(start, capacity) + tokens * (tokens + 1) // 2
    return min(seen, tokens * window) if window else seen


def held_rows(policy: CompressionPolicy, prompt_tokens: int, max_tokens: int) -> int:
    """KV pairs per layer and head that a sequence holds on average while it decodes; layers count with the mean budget.

    Args:
        policy: which KV pairs stay in a slot.
        prompt_tokens: tokens of the prompt.
        max_tokens: tokens of the answer.
    """
    kept, policy = policy.rows_needed(prompt_tokens, max_tokens), policy.answering
    if policy.scorer is not None and policy.budget.pairs is not None:
        kept = min(kept, policy.budget.pairs)
    return min(kept, prompt_tokens + max_tokens // 2)


def weights_read(spec: ModelSpec, model: Any, tokens: int) -> int:
    """Bytes of the weights that a decoding step reads.

    Of the input embedding, one row a token is read; of the experts, no more than the tokens can be routed to.

    Args:
        spec: the model's sizes.
        model: the torch module.
        tokens: sequences that decode.
    """
    embedding = model.get_input_embeddings().weight
    unread = 0 if embedding is model.get_output_embeddings().weight else embedding.nbytes
    used_by_tokens = tokens * spec.costs.flops // 2 * spec.itemsize + spec.head_bytes
    return int(min(spec.weight_bytes - unread, used_by_tokens))
