"""The device's side of ``triton_read``: a tile of queries that looks at keys, and a tile of keys that adds up queries.

The rows of a tile of queries are tokens times the query heads of one kv head: row m is token m // G, head m % G.
Scores are exponents of two. A dimension that is no power of two is taken in two parts (96 = 64 + 32).

Shapes: T packed tokens, N chunks, H query heads, K kv heads, G = H / K, R rows of all slots and heads, D key dim,
E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # the maximum of nothing: anything can be subtracted from it
TO_TWO = tl.constexpr(1.4426950408889634)  # from exponents of e to exponents of two


@dataclass(frozen=True)
class Parts:
    """A dimension as one power of two, or as the sum of two; ``high`` is 0 if there is one."""

    whole: int
    low: int
    high: int


@dataclass(frozen=True)
class Sizes:
    """What kernels are compiled for.

    Attributes:
        heads: H; ``group``: G.
        window: newest keys that a query sees; 0 for all.
        capped: whether scores are capped.
        dim, width: D and E in parts.
        block_m: rows of a tile of queries; ``block_n``: keys of a tile.
    """

    heads: int
    group: int
    window: int
    capped: bool
    dim: Parts
    width: Parts
    block_m: int
    block_n: int


@triton.jit
def _chunk(table, chunks, first, capacity):
    """A program's chunk: first packed row, tokens, tokens before it, rows in use, limit, first row of the head."""
    entry = table + tl.program_id(2)
    at = tl.load(entry)
    length = tl.load(entry + chunks).to(tl.int32)
    slot = tl.load(entry + 2 * chunks)
    start = tl.load(entry + 3 * chunks).to(tl.int32)
    rows = tl.load(capacity + slot)
    limit = tl.minimum(tl.load(entry + 4 * chunks), rows).to(tl.int32)
    return at, length, start, tl.minimum(start, limit), limit, tl.load(first + slot) + tl.program_id(1) * rows


@triton.jit
def _part(base, offsets, there, begin: tl.constexpr, size: tl.constexpr, dim: tl.constexpr, masked: tl.constexpr):
    """Columns ``begin`` .. ``begin + size`` of the vectors at these offsets; zeros where there are none."""
    columns = begin + tl.arange(0, size)
    at = base + offsets[:, None] + columns[None, :]
    if masked or begin + size > dim:
        part = tl.load(at, mask=there[:, None] & (columns < dim)[None, :], other=0.0)
    else:
        part = tl.load(at)
    return part


@triton.jit
def _vectors(base, offsets, there, parts: tl.constexpr, masked: tl.constexpr):
    """The vectors at these offsets, in both parts (one of them twice if there is but one); zeros where not there."""
    low = _part(base, offsets, there, 0, parts.low, parts.whole, masked)
    high = low
    if parts.high > 0:
        high = _part(base, offsets, there, parts.low, parts.high, parts.whole, masked)
    return low, high


@triton.jit
def _scores(left_low, left_high, right_low, right_high, inner, sizes: tl.constexpr):
    """Dot products, or tanh of their share of the cap; both have yet to be multiplied by the factor."""
    scores = tl.dot(left_low, tl.trans(right_low), input_precision="ieee")
    if sizes.dim.high > 0:
        scores = tl.dot(left_high, tl.trans(right_high), scores, input_precision="ieee")
    if sizes.capped:
        scores = 1 - 2 / (1 + tl.exp2(scores * inner))
    return scores


@triton.jit
def _look(
    top,
    total,
    seen_low,
    seen_high,
    query_low,
    query_high,
    tokens,
    keys,
    values,
    keys_row,
    values_row,
    positions,
    begin,
    stop,
    factor,
    inner,
    own: tl.constexpr,
    masked: tl.constexpr,
    sizes: tl.constexpr,
):
    """A tile's queries look at the keys ``begin`` .. ``stop``, one block after another (arXiv 2112.05682).

    Args:
        top, total, seen_low, seen_high: highest score so far; sums of weights, and of weighted values.
        tokens: the queries' places, which the chunk's ``own`` keys are compared with; with a window they and
            ``positions`` are those of the sequence where keys are rows of a slot, which all lie before the chunk.
    """
    dim: tl.constexpr = sizes.dim
    width: tl.constexpr = sizes.width
    for n in range(begin, stop, sizes.block_n):
        rows = n + tl.arange(0, sizes.block_n)
        there = rows < stop
        key_low, key_high = _vectors(keys, rows * keys_row, there, dim, masked)
        scores = _scores(query_low, query_high, key_low, key_high, inner, sizes)
        if masked:
            seen = there[None, :]
            if own:
                seen = rows[None, :] <= tokens[:, None]
            if sizes.window > 0:
                places = rows
                if not own:
                    places = tl.load(positions + rows, mask=there, other=-1)
                seen = seen & (places[None, :] > tokens[:, None] - sizes.window)
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weights, 1)
        top = highest
        low, high = _vectors(values, rows * values_row, there, width, masked)
        weights = weights.to(low.dtype)
        seen_low = tl.dot(weights, low, seen_low * fade[:, None], input_precision="ieee")
        if sizes.width.high > 0:
            seen_high = tl.dot(weights, high, seen_high * fade[:, None], input_precision="ieee")
    return top, total, seen_low, seen_high


@triton.jit
def _store(output, offsets, there, seen, begin: tl.constexpr, size: tl.constexpr, width: tl.constexpr):
    """Write columns ``begin`` .. ``begin + size`` of the outputs at these offsets."""
    columns = begin + tl.arange(0, size)
    mask = there[:, None] & (columns < width)[None, :]
    tl.store(output + offsets[:, None] + columns[None, :], seen.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["first", "capacity", "table"])
def attend_kernel(
    output,
    logsums,
    query,
    key,
    value,
    keys,
    values,
    positions,
    sinks,
    first,
    capacity,
    table,
    chunks,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    keys_row,
    values_row,
    factor,
    inner,
    sizes: tl.constexpr,
):
    """Attention, by programs (tile of the chunk, kv head, chunk); the last tiles, which see most, come first."""
    group: tl.constexpr = sizes.group
    dim: tl.constexpr = sizes.dim
    block_m: tl.constexpr = sizes.block_m
    width_low: tl.constexpr = sizes.width.low
    width_high: tl.constexpr = sizes.width.high if sizes.width.high > 0 else 1
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_m
    head = tl.program_id(1)
    at, length, start, used, _, row = _chunk(table, chunks, first, capacity)
    if begin >= length * group:
        return
    members = begin + tl.arange(0, block_m)
    tokens, mine = members // group, head * group + members % group
    there = tokens < length
    offsets = tokens * query_token + mine * query_head
    query_low, query_high = _vectors(query + at * query_token, offsets, there, dim, True)
    top = tl.full([block_m], LOWEST, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + mine).to(tl.float32) * TO_TWO
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    low = tl.zeros([block_m, width_low], tl.float32)
    high = tl.zeros([block_m, width_high], tl.float32)
    keys += row * keys_row
    values += row * values_row
    key += at * key_token + head * key_head
    value += at * value_token + head * value_head
    earliest = begin // group
    stop = tl.minimum((begin + block_m - 1) // group + 1, length)
    if sizes.window > 0:
        positions += row
        past, open_from = 0, tl.maximum(earliest - sizes.window + 1, 0) // sizes.block_n * sizes.block_n
        if earliest >= sizes.window - 1:  # none of the tile's queries sees what came before the chunk
            used = used * 0
    else:  # whole tiles that all queries see
        past, open_from = used // sizes.block_n * sizes.block_n, (earliest + 1) // sizes.block_n * sizes.block_n
        top, total, low, high = _look(
            *(top, total, low, high, query_low, query_high, tokens, keys, values, keys_row, values_row),
            *(positions, 0, past, factor, inner, False, False, sizes),
        )
        top, total, low, high = _look(
            *(top, total, low, high, query_low, query_high, tokens, key, value, key_token, value_token),
            *(positions, 0, open_from, factor, inner, True, False, sizes),
        )
    top, total, low, high = _look(
        *(top, total, low, high, query_low, query_high, start + tokens, keys, values, keys_row, values_row),
        *(positions, past, used, factor, inner, False, True, sizes),
    )
    top, total, low, high = _look(
        *(top, total, low, high, query_low, query_high, tokens, key, value, key_token, value_token),
        *(positions, open_from, stop, factor, inner, True, True, sizes),
    )
    # Anew, which compilers cannot know as they cannot know that lengths are positive: kept, these would fill registers.
    members = begin + tl.minimum(length, 0) + tl.arange(0, block_m)
    tokens, mine = members // group, head * group + members % group
    there = tokens < length
    output += at * sizes.heads * sizes.width.whole
    offsets = (tokens * sizes.heads + mine) * sizes.width.whole
    _store(output, offsets, there, low / total[:, None], 0, sizes.width.low, sizes.width.whole)
    if sizes.width.high > 0:
        _store(output, offsets, there, high / total[:, None], sizes.width.low, sizes.width.high, sizes.width.whole)
    if logsums is not None:
        tl.store(logsums + at * sizes.heads + tokens * sizes.heads + mine, top + tl.log2(total), mask=there)


@triton.jit
def _columns(
    sums,
    key_low,
    key_high,
    places,
    query,
    query_token,
    query_head,
    logsums,
    votes,
    begin,
    stop,
    length,
    factor,
    inner,
    masked: tl.constexpr,
    squares: tl.constexpr,
    sizes: tl.constexpr,
):
    """Add what the query rows ``begin`` .. ``stop`` of one kv head give to a tile's keys.

    Args:
        places: the keys' in the chunk; rows of the slot lie before it, at negative ones.
        length: tokens of the chunk.
    """
    dim: tl.constexpr = sizes.dim
    for m in range(begin, stop, sizes.block_m):
        members = m + tl.arange(0, sizes.block_m)
        tokens, mine = members // sizes.group, members % sizes.group
        there = tokens < length
        offsets = tokens * query_token + mine * query_head
        query_low, query_high = _vectors(query, offsets, there, dim, True)
        scores = _scores(key_low, key_high, query_low, query_high, inner, sizes)
        if masked:
            seen = places[:, None] <= tokens[None, :]
            if sizes.window > 0:
                seen = seen & (places[:, None] > tokens[None, :] - sizes.window)
            scores = tl.where(seen, scores, float("-inf"))
        logsum = tl.load(logsums + tokens * sizes.heads + mine, mask=there, other=float("inf"))
        given = tl.exp2(scores * factor - logsum[None, :])
        if squares:
            given = given * given
        if votes is not None:
            given = given * tl.load(votes + tokens, mask=there, other=0.0)[None, :]
        sums += tl.sum(given, 1)
    return sums


@triton.jit
def _note(sums, own, mass, old, row, rows, there):
    """Write sums of slot rows to ``own``, or add them to what is left of the mass that was there before."""
    if mass is None:
        tl.store(own + rows, sums, mask=there)
    else:
        before = tl.load(mass + row + rows, mask=there, other=0.0)
        if old is not None:
            before = before * tl.load(old + tl.program_id(2))
        tl.store(mass + row + rows, before + sums, mask=there)


@triton.jit(
    do_not_specialize=["chunks", "past_tiles", "own_head"],
    do_not_specialize_on_alignment=["own", "votes", "first", "capacity", "table"],
)
def sums_kernel(
    own,
    mass,
    query,
    key,
    keys,
    positions,
    logsums,
    votes,
    old,
    first,
    capacity,
    table,
    chunks,
    past_tiles,
    own_head,
    query_token,
    query_head,
    key_token,
    key_head,
    keys_row,
    factor,
    inner,
    squares: tl.constexpr,
    sizes: tl.constexpr,
):
    """Column sums, by programs (tile of slot rows or, from ``past_tiles`` on, of own keys; kv head; chunk).

    With ``mass``, sums of slot rows are added to it, and chunks whose sequences never evict are left out; without,
    they are written before those of own keys.
    """
    group: tl.constexpr = sizes.group
    dim: tl.constexpr = sizes.dim
    block_n: tl.constexpr = sizes.block_n
    head = tl.program_id(1)
    at, length, start, used, limit, row = _chunk(table, chunks, first, capacity)
    counted = length > 0
    if mass is not None:
        counted = tl.load(table + 5 * chunks + tl.program_id(2)) > limit
    query += at * query_token + head * group * query_head
    logsums += at * sizes.heads + head * group
    if votes is not None:
        votes += at
    own += head.to(tl.int64) * own_head + at
    sums = tl.zeros([block_n], tl.float32)
    last = length * group  # query rows
    tile = tl.program_id(0)
    if tile < past_tiles:
        rows = tile * block_n + tl.arange(0, block_n)
        there = rows < used
        if counted and tile * block_n < used:
            low, high = _vectors(keys + row * keys_row, rows * keys_row, there, dim, True)
            places = rows
            if sizes.window > 0:
                places = tl.load(positions + row + rows, mask=there, other=-1) - start
                newest = tl.max(tl.where(there, places, -sizes.window), 0)
                last = tl.minimum(last, (newest + sizes.window) * group)
            sums = _columns(
                *(sums, low, high, places, query, query_token, query_head, logsums, votes, 0, last, length),
                *(factor, inner, sizes.window > 0, squares, sizes),
            )
            _note(sums / group, own, mass, old, row, rows, there)
    else:
        begin = (tile - past_tiles) * block_n
        rows = begin + tl.arange(0, block_n)
        there = rows < length
        if begin < length:
            if counted:
                keys = key + at * key_token + head * key_head
                low, high = _vectors(keys, rows * key_token, there, dim, True)
                seers: tl.constexpr = block_n - 1 + sizes.window
                middle = begin * group + tl.cdiv(seers * group, sizes.block_m) * sizes.block_m
                sums = _columns(
                    *(sums, low, high, rows, query, query_token, query_head, logsums, votes, begin * group),
                    *(tl.minimum(middle, last), length, factor, inner, True, squares, sizes),
                )
                if sizes.window == 0:  # later queries see all keys of the tile; with a window they see none
                    sums = _columns(
                        *(sums, low, high, rows, query, query_token, query_head, logsums, votes, middle),
                        *(last, length, factor, inner, False, squares, sizes),
                    )
            if mass is None:
                own += used
            tl.store(own + rows, sums / group, mask=there)
