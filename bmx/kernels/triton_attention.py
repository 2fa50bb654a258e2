"""Triton kernels of a prompt chunk's attention: tiles of queries that attend to keys, and column sums over queries.

The rows of a tile of queries are tokens times the query heads of one kv head: row m is token m // G, head m % G. Scores
are exponents of two. Vectors are in one part or two; what slots store in codes is decoded tile by tile.

Shapes: T packed tokens, N chunks, H query heads, K kv heads, G = H / K, R rows of all slots and heads, D key dim,
E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from bmx.kernels.triton_vectors import Parts, load, load_decoded, scales_of_head, store

LOWEST = tl.constexpr(-1e30)  # the maximum of no scores: finite, so that it can be subtracted
NEVER = tl.constexpr(-(2**30))  # the place of no key: before all others
TO_TWO = tl.constexpr(1.4426950408889634)  # from exponents of e to exponents of two


@dataclass(frozen=True)
class Sizes:
    """Sizes that the kernels are compiled for.

    Attributes:
        heads: H.
        group: G.
        window: newest keys that a query sees; 0 for all.
        capped: whether scores are capped.
        keys: how queries and keys are loaded.
        outputs: how values are loaded, and outputs stored.
        block_m: rows of a tile of queries.
        block_n: keys of a tile.
    """

    heads: int
    group: int
    window: int
    capped: bool
    keys: Parts
    outputs: Parts
    block_m: int
    block_n: int


@triton.jit
def _chunk(table, chunks, first, capacity):
    """A program's chunk: first packed row, tokens, tokens before it, rows in use, row limit, first row of the head."""
    entry = table + tl.program_id(2)
    offset = tl.load(entry)
    length = tl.load(entry + chunks).to(tl.int32)
    slot = tl.load(entry + 2 * chunks)
    start = tl.load(entry + 3 * chunks).to(tl.int32)
    head = slot * tl.num_programs(1) + tl.program_id(1)
    limit = tl.minimum(tl.load(entry + 4 * chunks), tl.load(capacity + head)).to(tl.int32)
    return offset, length, start, tl.minimum(start, limit), limit, tl.load(first + head)


@triton.jit
def _scores(left, right, inner, sizes: tl.constexpr):
    """Dot products of vectors in two parts, or their tanh under a cap; both are yet to be multiplied by the factor."""
    scores = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    if sizes.keys.high > 0:
        scores = tl.dot(left[1], tl.trans(right[1]), scores, input_precision="ieee")
    if sizes.capped:
        scores = 1 - 2 / (1 + tl.exp2(scores * inner))
    return scores


@triton.jit
def _tile(vectors, rows, valid, own: tl.constexpr, parts: tl.constexpr, masked: tl.constexpr, dtype: tl.constexpr):
    """Keys or values in two parts: the chunk's own, or a slot's."""
    if own or parts.format == "model":
        low, high = load(vectors[0], rows * vectors[1], valid, parts, masked)
    else:
        low, high = load_decoded(vectors[0], vectors[2], rows, vectors[1], valid, parts, masked, dtype)
    return low, high


@triton.jit
def _online_softmax(
    state,
    query,
    tokens,
    keys,
    values,
    positions,
    begin,
    stop,
    factors,
    own: tl.constexpr,
    masked: tl.constexpr,
    sizes: tl.constexpr,
):
    """A tile's queries attend to the keys ``begin`` .. ``stop``, block after block (arXiv 2112.05682).

    Args:
        state: highest score so far, sum of weights, and sum of weighted values in two parts.
        query: the tile's queries in two parts.
        tokens: the queries' places in the chunk; with a window and rows of a slot, their positions in the sequence.
        keys: address, stride from one key to the next, and the address of the scales of a slot's codes.
        values: the same of the values.
        positions: of the slot's rows in the sequence; used with a window.
        begin: first key.
        stop: the key after the last.
        factors: what scores are multiplied by, and what dot products are multiplied by before their tanh.
        own: whether the keys are the chunk's own, of which a query sees those up to its place.
        masked: whether some query does not see some key.
        sizes: what the kernel is compiled for.
    """
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.outputs
    top, total, low, high = state
    factor, inner = factors
    dtype: tl.constexpr = query[0].dtype
    for n in range(begin, stop, sizes.block_n):
        rows = n + tl.arange(0, sizes.block_n)
        valid = rows < stop
        tile = _tile(keys, rows, valid, own, key_parts, masked, dtype)
        scores = _scores(query, tile, inner, sizes)
        if masked:
            seen = valid[None, :]
            if own:
                seen = rows[None, :] <= tokens[:, None]
            if sizes.window > 0:
                places = rows
                if not own:
                    places = tl.load(positions + rows, mask=valid, other=-1)
                seen = seen & (places[None, :] > tokens[:, None] - sizes.window)
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weights, 1)
        top = highest
        value_low, value_high = _tile(values, rows, valid, own, value_parts, masked, dtype)
        weights = weights.to(dtype)
        low = tl.dot(weights, value_low, low * fade[:, None], input_precision="ieee")
        if sizes.outputs.high > 0:
            high = tl.dot(weights, value_high, high * fade[:, None], input_precision="ieee")
    return top, total, low, high


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["first", "capacity", "table"])
def attend_kernel(
    output,
    logsums,
    query,
    key,
    value,
    slot_rows,
    keys_row,
    values_row,
    sinks,
    first,
    capacity,
    table,
    chunks,
    factor,
    inner,
    sizes: tl.constexpr,
):
    """Attention, by programs (tile of the chunk, kv head, chunk); the last tiles, which see most keys, come first."""
    group: tl.constexpr = sizes.group
    key_parts: tl.constexpr = sizes.keys
    parts: tl.constexpr = sizes.outputs
    block_m: tl.constexpr = sizes.block_m
    low_size: tl.constexpr = parts.low
    high_size: tl.constexpr = parts.high if parts.high > 0 else 1
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_m
    head = tl.program_id(1)
    offset, length, start, used, _, row = _chunk(table, chunks, first, capacity)
    if begin >= length * group:
        return
    members = begin + tl.arange(0, block_m)
    tokens, heads = members // group, head * group + members % group
    valid = tokens < length
    at = tokens * query.token + heads * query.head
    queries = load(query.data + offset * query.token, at, valid, key_parts, True)
    top, total = tl.full([block_m], LOWEST, tl.float32), tl.zeros([block_m], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float32) * TO_TWO
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    state = (top, total, tl.zeros([block_m, low_size], tl.float32), tl.zeros([block_m, high_size], tl.float32))
    keys = (slot_rows.key + row * keys_row, keys_row, scales_of_head(slot_rows.key_scales, row, key_parts))
    values = (slot_rows.value + row * values_row, values_row, scales_of_head(slot_rows.value_scales, row, parts))
    own_keys = (key.data + offset * key.token + head * key.head, key.token, None)
    own_values = (value.data + offset * value.token + head * value.head, value.token, None)
    positions = slot_rows.positions
    factors = (factor, inner)
    earliest, stop = begin // group, tl.minimum((begin + block_m - 1) // group + 1, length)
    if sizes.window > 0:
        positions += row
        past, open_from = 0, tl.maximum(earliest - sizes.window + 1, 0) // sizes.block_n * sizes.block_n
        if earliest >= sizes.window - 1:  # none of the tile's queries sees what came before the chunk
            used = used * 0
    else:  # whole tiles that all queries see
        past, open_from = used // sizes.block_n * sizes.block_n, (earliest + 1) // sizes.block_n * sizes.block_n
        state = _online_softmax(state, queries, tokens, keys, values, positions, 0, past, factors, False, False, sizes)
        state = _online_softmax(
            state, queries, tokens, own_keys, own_values, positions, 0, open_from, factors, True, False, sizes
        )
    state = _online_softmax(
        state, queries, start + tokens, keys, values, positions, past, used, factors, False, True, sizes
    )
    top, total, low, high = _online_softmax(
        state, queries, tokens, own_keys, own_values, positions, open_from, stop, factors, True, True, sizes
    )
    # Recompute these indices: `min(length, 0)` is 0, but the compiler cannot prove it, so it does not keep the old ones
    # in registers.
    members = begin + tl.minimum(length, 0) + tl.arange(0, block_m)
    tokens, heads = members // group, head * group + members % group
    valid = tokens < length
    output += offset * sizes.heads * parts.whole
    offsets = (tokens * sizes.heads + heads) * parts.whole
    store(output, offsets, valid, low / total[:, None], high / total[:, None], parts)
    if logsums is not None:
        at = logsums + offset * sizes.heads + tokens * sizes.heads + heads
        tl.store(at, top + tl.log2(total), mask=valid)


@triton.jit
def _add_columns(
    sums,
    keys,
    places,
    query,
    logsums,
    query_weights,
    begin,
    stop,
    length,
    factors,
    masked: tl.constexpr,
    distance: tl.constexpr,
    power: tl.constexpr,
    sizes: tl.constexpr,
):
    """Add the attention that a tile's keys receive from the query rows ``begin`` .. ``stop`` of one kv head.

    Args:
        sums: of each key.
        keys: the tile's keys in two parts.
        places: the keys' places in the chunk; rows of the slot lie before it, at negative places.
        query: address, and strides from one token and head to the next.
        logsums: logarithms to base 2 of the queries' sums of exponentials.
        query_weights: weight of each token's attention, or None.
        begin: first query row.
        stop: the query row after the last.
        length: tokens of the chunk.
        factors: as in ``_online_softmax``.
        masked: whether some query does not see some key, or is nearer to it than ``distance``.
        distance: tokens that a query must be behind a key at least, so that its attention counts.
        power: of the probabilities that are added up.
        sizes: what the kernel is compiled for.
    """
    key_parts: tl.constexpr = sizes.keys
    factor, inner = factors
    for m in range(begin, stop, sizes.block_m):
        members = m + tl.arange(0, sizes.block_m)
        tokens, heads = members // sizes.group, members % sizes.group
        valid = tokens < length
        logsum = tl.load(logsums + tokens * sizes.heads + heads, mask=valid, other=float("inf"))
        if query_weights is not None:
            weight = tl.load(query_weights + tokens, mask=valid, other=0.0)
        queries = load(query[0], tokens * query[1] + heads * query[2], valid, key_parts, True)
        scores = _scores(keys, queries, inner, sizes)
        if masked:
            seen = places[:, None] <= tokens[None, :] - distance
            if sizes.window > 0:
                seen = seen & (places[:, None] > tokens[None, :] - sizes.window)
            scores = tl.where(seen, scores, float("-inf"))
        received = tl.exp2(scores * (factor * power) - (logsum * power)[None, :])
        if query_weights is not None:
            received = received * weight[None, :]
        sums += tl.sum(received, 1)
    return sums


@triton.jit
def _column_sums(
    keys,
    places,
    query,
    logsums,
    query_weights,
    begin,
    middle,
    last,
    length,
    factors,
    masked: tl.constexpr,
    distance: tl.constexpr,
    power: tl.constexpr,
    sizes: tl.constexpr,
):
    """The attention that a tile's keys receive from the query rows ``begin`` .. ``last`` of one kv head.

    From ``middle`` on, each of them sees all keys of the tile and counts for them; with a window, none does. Without
    ``masked``, ``middle`` is ``begin``. The rest is as in ``_add_columns``.
    """
    block_n: tl.constexpr = sizes.block_n
    sums = tl.zeros([block_n], tl.float32)
    if masked:
        sums = _add_columns(
            *(sums, keys, places, query, logsums, query_weights, begin, tl.minimum(middle, last), length, factors),
            *(True, distance, power, sizes),
        )
    if sizes.window == 0:
        sums = _add_columns(
            *(sums, keys, places, query, logsums, query_weights, middle, last, length, factors),
            *(False, distance, power, sizes),
        )
    return sums


@triton.jit
def _past_places(positions, row, rows, valid, start, length, distance: tl.constexpr, sizes: tl.constexpr):
    """A tile of slot rows: their places in the chunk, all negative, and the query rows that ``_column_sums`` takes."""
    places, begin, middle, last = rows, 0, 0, length
    if sizes.window > 0 or distance > 0:
        places = tl.load(positions + row + rows, mask=valid, other=-1) - start
        oldest = tl.min(tl.where(valid, places, 0), 0)
        newest = tl.max(tl.where(valid, places, NEVER), 0)
        begin = tl.maximum(oldest + distance, 0)
        middle = tl.maximum(newest + distance, 0)
        if sizes.window > 0:
            last = tl.minimum(length, newest + sizes.window)
            middle = last
    begin *= sizes.group
    middle = begin + tl.cdiv(middle * sizes.group - begin, sizes.block_m) * sizes.block_m  # whole tiles of queries
    return places, begin, middle, last * sizes.group


@triton.jit
def _store_sums(sums, own, mass, decay, row, rows, valid):
    """Write sums of slot rows to ``own``, or add them to the mass, which decays first."""
    if mass is None:
        tl.store(own + rows, sums, mask=valid)
    else:
        before = tl.load(mass + row + rows, mask=valid, other=0.0)
        if decay is not None:
            before = before * tl.load(decay + tl.program_id(2))
        tl.store(mass + row + rows, before + sums, mask=valid)


@triton.jit(
    do_not_specialize=["chunks", "past_tiles", "own_head"],
    do_not_specialize_on_alignment=["own", "query_weights", "first", "capacity", "table"],
)
def sums_kernel(
    own,
    query,
    key,
    slot_rows,
    keys_row,
    logsums,
    query_weights,
    decay,
    first,
    capacity,
    table,
    chunks,
    past_tiles,
    own_head,
    factor,
    inner,
    distance: tl.constexpr,
    power: tl.constexpr,
    sizes: tl.constexpr,
):
    """Column sums, by programs (tile of slot rows or, from ``past_tiles`` on, of own keys; kv head; chunk).

    With mass, sums of slot rows are added to it, and chunks whose sequences never evict are left out; without, they
    are written before those of own keys.
    """
    group: tl.constexpr = sizes.group
    key_parts: tl.constexpr = sizes.keys
    block_n: tl.constexpr = sizes.block_n
    head = tl.program_id(1)
    offset, length, start, used, limit, row = _chunk(table, chunks, first, capacity)
    counted = length > 0
    if slot_rows.mass is not None:
        counted = tl.load(table + 5 * chunks + tl.program_id(2)) > limit
    queries = (query.data + offset * query.token + head * group * query.head, query.token, query.head)
    logsums += offset * sizes.heads + head * group
    if query_weights is not None:
        query_weights += offset
    own += head.to(tl.int64) * own_head + offset
    factors = (factor, inner)
    dtype: tl.constexpr = query.data.dtype.element_ty
    sums = tl.zeros([block_n], tl.float32)
    tile = tl.program_id(0)
    if tile < past_tiles:
        rows = tile * block_n + tl.arange(0, block_n)
        valid = rows < used
        if counted and tile * block_n < used:
            keys = _tile(
                (slot_rows.key + row * keys_row, keys_row, scales_of_head(slot_rows.key_scales, row, key_parts)),
                rows,
                valid,
                False,
                key_parts,
                True,
                dtype,
            )
            places, begin, middle, last = _past_places(
                slot_rows.positions, row, rows, valid, start, length, distance, sizes
            )
            sums = _column_sums(
                *(keys, places, queries, logsums, query_weights, begin, middle, last, length, factors),
                *(sizes.window > 0 or distance > 0, distance, power, sizes),
            )
            _store_sums(sums / group, own, slot_rows.mass, decay, row, rows, valid)
    else:
        begin = (tile - past_tiles) * block_n
        rows = begin + tl.arange(0, block_n)
        valid = rows < length
        if begin < length:
            if counted:
                keys = load(key.data + offset * key.token + head * key.head, rows * key.token, valid, key_parts, True)
                far = (begin + distance) * group  # earlier queries are near all keys of the tile
                seers: tl.constexpr = block_n - 1 + (max(sizes.window - distance, 0) if sizes.window > 0 else 0)
                middle = far + tl.cdiv(seers * group, sizes.block_m) * sizes.block_m
                sums = _column_sums(
                    *(keys, rows, queries, logsums, query_weights, far, middle, length * group, length, factors),
                    *(True, distance, power, sizes),
                )
            if slot_rows.mass is None:
                own += used
            tl.store(own + rows, sums / group, mask=valid)
