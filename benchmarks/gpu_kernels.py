"""What ``gpu.py`` asks of the kernels alone: right against float64, the same twice, and how fast; with its clock.

Sizes are those of models with 32 query heads. Everything that a kernel writes holds NaN before, and so do the rows of
slots that nobody uses.

Shapes: T packed tokens, N chunks, S slots, H query heads, K kv heads, C rows of a head in a slot, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_cells import Cell, Context, Place, median_seconds, share
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.formats import FORMATS, MODEL, Stored
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows

LIMIT = 1e-2  # relative error, Frobenius norm
RANKING = EvictionOrder(by="average", sink=4, recent=32, window=None, distance=32, power=2)
SEEN = 3  # times as many tokens as a slot has rows have passed it
PARTS = ("keys", "values", "positions", "mass", "key_scales", "value_scales")  # of rows, that kernels write


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model's heads, and how much is asked of its kernels."""

    dim: int
    heads: int
    kv_heads: int
    capacity: int
    chunk: int
    chunks: int
    inner: int
    kv_bytes: float  # that decoding is timed with
    formats: tuple[str, str] = (MODEL, MODEL)

    @property
    def slot_bytes(self) -> int:
        """Of a slot's keys and values."""
        of = [2 * self.dim if form == MODEL else FORMATS[form].vector_bytes(self.dim) for form in self.formats]
        return self.kv_heads * self.capacity * sum(of)

    @property
    def name(self) -> str:
        stored = "" if self.formats == (MODEL, MODEL) else " " + "/".join(self.formats)
        return f"D {self.dim}, {self.heads}/{self.kv_heads}{stored}"

    @property
    def order(self) -> EvictionOrder:
        return RANKING if self.capacity >= 512 else replace(RANKING, sink=2, recent=4, distance=4)


def sizes(place: Place) -> list[Size]:
    """The first two decide: the default formats, and pairs as the model has them."""
    coded = ("int8", "int4")
    if place.tried:
        small = dict(capacity=48, chunk=20, chunks=2, inner=96, kv_bytes=4e4)
        shapes = ((32, 4, 2, (MODEL, MODEL)), (24, 2, 2, coded))
        return [Size(dim=dim, heads=h, kv_heads=kv, formats=form, **small) for dim, h, kv, form in shapes]
    large = dict(capacity=1024, chunk=512, chunks=16, inner=14_336, kv_bytes=1.7e9)
    shapes = (
        (128, 8, (MODEL, MODEL)),
        (128, 8, coded),
        (128, 8, ("fp8", "fp8")),
        (96, 32, (MODEL, MODEL)),
        (64, 8, (MODEL, MODEL)),
    )
    return [Size(dim=dim, heads=32, kv_heads=kv, formats=form, **large) for dim, kv, form in shapes]


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, by the Frobenius norm; not finite where anything found is no number."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def random(*shape: int, place: Place, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=place.device).to(dtype or place.dtype)


def packed(tokens: int, heads: int, dim: int, place: Place, seed: int) -> Tensor:
    """[T, heads, D] as models give it: heads apart."""
    return random(heads, tokens, dim, place=place, seed=seed).transpose(0, 1)


def make_rows(size: Size, seen: list[int], place: Place, poison: bool = True) -> Rows:
    """Slots of one capacity, of which slot s has seen so many tokens; where it is full, any of them are left."""
    count, c = len(seen), size.capacity
    place_of = torch.rand(count, size.kv_heads, max(*seen, c), device=place.device)
    there = torch.tensor(seen, device=place.device)[:, None, None]
    tokens = torch.arange(place_of.shape[-1], device=place.device)
    place_of = place_of.masked_fill(tokens >= there, 2.0)
    left = place_of.topk(c, dim=-1, largest=False).indices.sort(dim=-1).values
    in_use = torch.arange(c, device=place.device) < there
    positions = torch.where(in_use, torch.where(there <= c, tokens[:c].expand_as(left), left), -1).int().flatten()
    vectors = [random(len(positions), size.dim, place=place, seed=seed) for seed in (1, 2)]
    (keys, key_scales), (values, value_scales) = (
        (part, None) if form == MODEL else FORMATS[form].encode(part)
        for part, form in zip(vectors, size.formats, strict=True)
    )
    if poison:
        for part in (keys, values, key_scales, value_scales):
            if part is not None and part.is_floating_point():
                part[positions < 0] = float("nan")
    mass = torch.rand(len(positions), device=place.device) * SEEN * (positions >= 0)
    heads = torch.arange(count * size.kv_heads, device=place.device).view(count, size.kv_heads)
    return Rows(
        keys=keys,
        values=values,
        key_scales=key_scales,
        value_scales=value_scales,
        key_format=size.formats[0],
        value_format=size.formats[1],
        positions=positions,
        mass=mass,
        first=heads * c,
        capacity=torch.full_like(heads, c),
        kv_heads=size.kv_heads,
        capacities=((c,) * size.kv_heads,) * count,
        largest=c,
    )


def copied(rows: Rows) -> Rows:
    return replace(rows, **{name: part.clone() for name in PARTS if (part := getattr(rows, name)) is not None})


def same(one: Rows, other: Rows) -> bool:
    """The same bits."""
    parts = [(getattr(one, name), getattr(other, name)) for name in PARTS]
    return all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in parts if a is not None)


def stored(rows: Rows) -> tuple[Stored, Stored]:
    """Keys and values as they lie in memory."""
    return (
        Stored(rows.keys, rows.key_scales, rows.key_format),
        Stored(rows.values, rows.value_scales, rows.value_format),
    )


def decoded(rows: Rows, size: Size) -> list[Tensor]:
    """Keys and values [S, K, C, D] in float64; zeros where there are none."""
    read = [part.read(slice(None), size.dim, torch.float32) for part in stored(rows)]
    return [by_head(rows, part.double().nan_to_num()) for part in read]


def make_chunks(size: Size, starts: list[int], place: Place) -> Chunks:
    """A chunk of full length for each slot, one after another."""
    n, t = len(starts), size.chunk
    columns = [[i * t for i in range(n)], [t] * n, list(range(n)), starts]
    columns += [[size.capacity] * n, [start + 2 * t + size.capacity for start in starts]]
    names = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
    named = {name: tuple(column) for name, column in zip(names, columns, strict=True)}
    return Chunks(**named, table=torch.tensor(columns, dtype=torch.int64, device=place.device))


def scores_of(positions: Tensor, mass: Tensor | None, now: int | Tensor, order: EvictionOrder) -> Tensor:
    """What pairs are worth, by age where there is no mass; float32, as kernels have it; ``now`` broadcasts."""
    worth = positions.float() if mass is None else mass / (now - positions - order.distance).clamp(min=1).float()
    worth = worth.masked_fill((positions < order.sink) | (positions >= now - order.recent), float("inf"))
    return worth.masked_fill(positions < 0, float("-inf"))


def by_head(rows: Rows, what: Tensor) -> Tensor:
    """[S, K, C, ...] of what rows have, slots being of one capacity and in order."""
    return what.view(len(rows.first), rows.kv_heads, rows.largest, *what.shape[1:])


# Decoding.


def decode_inputs(size: Size, count: int, place: Place) -> list[Tensor]:
    shapes = ((size.heads, 3), (size.kv_heads, 4), (size.kv_heads, 5))
    return [packed(count, heads, size.dim, place, seed) for heads, seed in shapes]


def decode(tokens: list[Tensor], rows: Rows, now: list[int], size: Size, counted: bool) -> Callable[[], Tensor]:
    """A decoding step of all slots; each call changes ``rows``."""
    from bmx.kernels import triton_decode

    device, count = rows.keys.device, len(rows.first)
    positions = torch.tensor(now, device=device)
    slots, row_limits = torch.arange(count, device=device), torch.full((count,), size.capacity, device=device)
    output = torch.full(tuple(tokens[0].shape), float("nan"), dtype=tokens[0].dtype, device=device)
    order = size.order if counted else replace(size.order, by="age")
    options = dict(scale=size.dim**-0.5, order=order, decay=1.0, accumulate=counted)

    def step() -> Tensor:
        triton_decode.decode_step(output, *tokens, rows, slots, positions, row_limits, **options)
        return output

    return step


def true_decode(tokens: list[Tensor], rows: Rows, now: list[int], size: Size, counted: bool) -> Tensor:
    """Output [S, H, D] in float64; ``rows`` become what they should, their mass in float32 of float64 sums."""
    query, key, value = tokens
    s, k, g = len(now), size.kv_heads, size.heads // size.kv_heads
    at = torch.tensor(now, device=query.device)[:, None]
    positions, mass = rows.positions, rows.mass
    worth = scores_of(
        by_head(rows, positions),
        by_head(rows, mass) if counted and mass is not None else None,
        at[..., None],
        size.order,
    )
    victim = torch.where(at < size.capacity, at, worth.argmin(-1))  # the first of equals
    row = (rows.first + victim).flatten()
    for part, vectors in zip(stored(rows), (key, value), strict=True):
        part.write(row, vectors.flatten(0, 1))
    positions[row] = at.expand(s, k).flatten().int()
    keys, values = decoded(rows, size)
    queries = query.double().reshape(s, k, g, -1) * size.dim**-0.5
    logits = torch.einsum("skgd,skcd->skgc", queries, keys)
    unused = by_head(rows, positions) < 0
    weights = torch.softmax(logits.masked_fill(unused.unsqueeze(2), float("-inf")), -1)
    if mass is not None:
        mass[row] = 0.0
        by_head(rows, mass).add_((weights**size.order.power).mean(2).float() if counted else 0.0)
    return torch.einsum("skgc,skcd->skgd", weights, values).reshape(s, size.heads, -1)


def check_decode(size: Size, place: Place, counted: bool) -> dict[str, Any]:
    """Full slots that evict, one that is not full, one that becomes full."""
    c = size.capacity
    now = [SEEN * c, c // 2, c - 1, c, 2 * c + 1][: 3 if place.tried else 5]
    before, tokens = make_rows(size, now, place), decode_inputs(size, len(now), place)
    if not counted:
        before = replace(before, mass=None)
    runs = []
    for _ in range(2):
        rows = copied(before)
        runs.append((decode(tokens, rows, now, size, counted)().clone(), rows))
    wanted_rows = copied(before)
    wanted = true_decode(tokens, wanted_rows, now, size, counted)
    (output, rows), (again, rows_again) = runs
    found = {"error": error(output, wanted), "bit_equal": torch.equal(output, again) and same(rows, rows_again)}
    found["rows_exact"] = same(replace(rows, mass=None), replace(wanted_rows, mass=None))
    if counted:
        found["mass_error"] = error(rows.mass, wanted_rows.mass)
    return found


def time_decode(size: Size, place: Place, counted: bool, rates: dict[str, float]) -> dict[str, Any]:
    """All slots full and evicting."""
    slots = max(2, int(size.kv_bytes / size.slot_bytes))
    now = [SEEN * size.capacity + i % 7 for i in range(slots)]
    rows = make_rows(size, now, place, poison=False)
    rows = rows if counted else replace(rows, mass=None)
    seconds = median_seconds(decode(decode_inputs(size, slots, place), rows, now, size, counted), place)
    read = slots * size.slot_bytes
    return {
        "slots": slots,
        "kv_bytes": read,
        "seconds": seconds,
        "tb_per_second": read / seconds / 1e12,
        "share_of_copy": share(read, seconds, rates.get("copy")),
    }


# Reading prompts.


@dataclass
class Reading:
    """A step of prompt chunks."""

    size: Size
    rows: Rows
    chunks: Chunks
    tokens: list[Tensor]

    @classmethod
    def of(cls, size: Size, starts: list[int], place: Place) -> Reading:
        total = len(starts) * size.chunk
        shapes = ((size.heads, 6), (size.kv_heads, 7), (size.kv_heads, 8))
        tokens = [packed(total, heads, size.dim, place, seed) for heads, seed in shapes]
        return cls(size, make_rows(size, starts, place), make_chunks(size, starts, place), tokens)

    def poisoned(self, logged: bool) -> tuple[Tensor, Tensor | None]:
        """What attention writes to."""
        query = self.tokens[0]
        output = torch.full(tuple(query.shape), float("nan"), dtype=query.dtype, device=query.device)
        return output, torch.full(tuple(query.shape[:2]), float("nan"), device=query.device) if logged else None

    def attend(self, into: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        from bmx.kernels import triton_prefill

        scale = self.size.dim**-0.5
        triton_prefill.attend(into[0], *self.tokens, self.rows, self.chunks, scale=scale, logsums=into[1])
        return into

    def add_up(self, logsums: Tensor, far: bool = True) -> Tensor:
        from bmx.kernels import triton_prefill

        options = {"scale": self.size.dim**-0.5}
        if far:
            options |= {"distance": self.size.order.distance, "power": self.size.order.power}
        return triton_prefill.add_up(*self.tokens[:2], self.rows, self.chunks, logsums, **options)

    def evict(self, sums: Tensor) -> None:
        from bmx.kernels import triton_evict

        if not triton_evict.evict(*self.tokens[1:], self.rows, self.chunks, sums, order=self.size.order):
            raise RuntimeError("evict refused")

    def true(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [T, H, D], logarithms [T, H], the mass afterwards [R] and own sums [K, T], in float64."""
        size, t, c = self.size, self.size.chunk, self.size.capacity
        k, g = size.kv_heads, size.heads // size.kv_heads
        outputs, logs, owns, held = [], [], [], decoded(self.rows, size)
        mass = by_head(self.rows, self.rows.mass.double())
        for n, start in enumerate(self.chunks.starts):
            query, key, value = (part[n * t : (n + 1) * t].double().transpose(0, 1) for part in self.tokens)
            used = min(start, c)
            past = [part[n, :, :used] for part in held]
            keys, values = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
            logits = torch.einsum("kgtd,kcd->kgtc", query.reshape(k, g, t, -1), keys) * size.dim**-0.5
            future = torch.ones(t, used + t, dtype=torch.bool, device=keys.device).triu(used + 1)
            logits = logits.masked_fill(future, float("-inf"))
            logs.append((torch.logsumexp(logits, -1) * 1.4426950408889634).flatten(0, 1).T)
            weights = torch.softmax(logits, -1)
            outputs.append(torch.einsum("kgtc,kcd->tkgd", weights, values).flatten(1, 2))
            now = torch.arange(start, start + t, device=keys.device)
            places = torch.cat([by_head(self.rows, self.rows.positions)[n, :, :used], now.expand(k, -1)], 1)
            far = now[:, None] - places[:, None] >= size.order.distance  # [K, T, P + T]
            seen = ((weights**size.order.power).mean(1) * far).sum(1)  # [K, P + T]
            mass[n, :, :used] += seen[:, :used]
            owns.append(seen[:, used:])
        return torch.cat(outputs), torch.cat(logs), mass.flatten(), torch.cat(owns, 1)

    def true_evict(self, sums: Tensor) -> Rows:
        """The rows afterwards: the best of equals the first, survivors in the rows of what went, both in order."""
        rows, size, t = copied(self.rows), self.size, self.size.chunk
        for n, start in enumerate(self.chunks.starts):
            mine = slice(n * t, (n + 1) * t)
            own = torch.arange(start, start + t, device=sums.device, dtype=torch.int32)
            for head in range(size.kv_heads):
                used, first = min(start, size.capacity), int(rows.first[n, head])
                candidates = torch.cat([rows.positions[first : first + used], own])
                received = torch.cat([rows.mass[first : first + used], sums[head, mine]])
                worth = scores_of(candidates, received, start + t, size.order)
                best = worth.sort(descending=True, stable=True).indices[: size.capacity]
                stays = torch.zeros(len(candidates), dtype=torch.bool, device=sums.device)
                stays[best] = True
                kept = torch.zeros(size.capacity, dtype=torch.bool, device=sums.device)
                kept[:used] = stays[:used]
                new = stays[used:].nonzero().flatten()
                row = first + (~kept).nonzero().flatten()[: len(new)]
                for part, vectors in zip(stored(rows), self.tokens[1:], strict=True):
                    part.write(row, vectors[mine, head][new])
                rows.positions[row], rows.mass[row] = own[new], sums[head, mine][new]
        return rows


def check_reading(size: Size, place: Place) -> dict[str, Any]:
    """A full slot, one that becomes full, an empty one; each kernel is given what float64 says of those before."""
    starts = [SEEN * size.capacity, size.capacity - size.chunk // 2, 0]
    reading = Reading.of(size, starts, place)
    before = copied(reading.rows)
    output, logs, mass, own = reading.true()
    runs = [reading.attend(reading.poisoned(True)) for _ in range(2)]
    plain = reading.attend(reading.poisoned(False))[0]
    found: dict[str, Any] = {
        "attend": {
            "error": error(runs[0][0], output),
            "error_without_logsums": error(plain, output),
            "logsums_error": error(runs[0][1], logs),
            "bit_equal": all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
            "numbers_that_differ_without_logsums": int((plain != runs[0][0]).sum()),
        }
    }
    summed = []
    for _ in range(2):
        reading.rows = copied(before)
        summed.append((reading.add_up(logs.float().contiguous()), reading.rows.mass))
    found["add_up"] = {
        "error": error(summed[0][0], own),
        "mass_error": error(summed[0][1], mass),
        "bit_equal": all(torch.equal(a, b) for a, b in zip(*summed, strict=True)),
    }
    reading.rows = replace(copied(before), mass=summed[0][1])
    sums, after, kept = summed[0][0], reading.rows, []
    wanted = reading.true_evict(sums)
    for _ in range(2):
        reading.rows = copied(after)
        reading.evict(sums)
        kept.append(reading.rows)
    found["keep"] = {"survivors_exact": same(kept[0], wanted), "bit_equal": same(*kept)}
    return found


def time_reading(size: Size, place: Place, rates: dict[str, float]) -> dict[str, Any]:
    """Chunks of full length that fill a step, to full slots."""
    starts = [SEEN * size.capacity] * size.chunks
    reading = Reading.of(size, starts, place)
    t, tokens = size.chunk, size.chunk * size.chunks
    pairs = size.chunks * (t * size.capacity + t * (t + 1) // 2)
    flops = 4 * pairs * size.heads * size.dim
    layer = 2 * tokens * layer_parameters(size) / rates["flops"] if rates.get("flops") else None
    found: dict[str, Any] = {"chunks": size.chunks, "tokens": tokens, "layer_seconds": layer}
    for name, logged in (("attend", True), ("attend_without_logsums", False)):
        into = reading.poisoned(logged)
        seconds = median_seconds(lambda: reading.attend(into), place)  # noqa: B023
        found[name] = {
            "microseconds": 1e6 * seconds,
            "tflops": flops / seconds / 1e12,
            "share_of_matmul": share(flops, seconds, rates.get("flops")),
        }
    logsums = reading.attend(reading.poisoned(True))[1]
    sums = reading.add_up(logsums)
    works = {
        "add_up": lambda: reading.add_up(logsums),
        "add_up_from_all_queries": lambda: reading.add_up(logsums, far=False),
        "evict": lambda: reading.evict(sums),
    }
    for name, work in works.items():
        seconds = median_seconds(work, place)
        found[name] = {"microseconds": 1e6 * seconds, "share_of_layer": seconds / layer if layer else None}
    return found


def layer_parameters(size: Size) -> int:
    """Of the linear layers of one layer in the shape of Llama-3.1-8B with these heads."""
    hidden = 4096 if size.inner > 1000 else size.heads * size.dim
    return hidden * size.dim * (2 * size.heads + 2 * size.kv_heads) + 3 * hidden * size.inner


# A model's small parts.


def small_parts(size: Size, place: Place, rates: dict[str, float]) -> dict[str, Any]:
    """RMSNorm, gate and rotation: error, bits and speed."""
    from bmx.kernels import triton_pointwise

    tokens = size.chunk * size.chunks if not place.tried else 3
    hidden = size.heads * size.dim
    x, weight = random(tokens, hidden, place=place, seed=9), random(hidden, place=place, seed=10)
    gates = [random(tokens, size.inner, place=place, seed=seed) for seed in (11, 12)]
    heads = packed(tokens, size.heads, size.dim, place, 13).transpose(0, 1).unsqueeze(0)
    turns = [random(1, tokens, size.dim, place=place, seed=seed) for seed in (14, 15)]
    works = {
        "rms_norm": (lambda m, x, w: m.rms_norm(x, w, 1e-5), [x, weight]),
        "gate": (lambda m, a, b: m.gate(a, b), gates),
        "rotate": (lambda m, x, c, s: m.rotate(x, c, s), [heads, *turns]),
    }
    found = {}
    for name, (work, tensors) in works.items():
        made, again = work(triton_pointwise, *tensors), work(triton_pointwise, *tensors)
        wanted = true_norm(*tensors) if name == "rms_norm" else work(reference, *(t.double() for t in tensors))
        seconds = median_seconds(lambda: work(triton_pointwise, *tensors), place)  # noqa: B023
        moved = sum(t.nbytes for t in (*tensors, made))
        found[name] = {
            "error": error(made, wanted),
            "bit_equal": torch.equal(made, again),
            "microseconds": 1e6 * seconds,
            "share_of_copy": share(moved, seconds, rates.get("copy")),
        }
    return found


def true_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float64, which ``reference`` computes in float32."""
    return weight.double() * x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)


def verdict(found: Any) -> list[str]:
    """Names of what is wrong among results of checks."""
    wrong = []
    for name, value in found.items():
        if isinstance(value, dict):
            wrong += [name] if "failed" in value else [f"{name}.{inner}" for inner in verdict(value)]
        elif "error" in name and isinstance(value, float):
            wrong += [] if value <= LIMIT else [name]  # NaN is wrong too
        elif isinstance(value, bool) and not value:
            wrong.append(name)
    return wrong


def right(size: Size, context: Context) -> dict[str, Any]:
    """Every kernel against float64; one that fails keeps no other from its turn."""
    torch.manual_seed(0)
    works = {
        "decode": partial(check_decode, counted=True),
        "decode_by_age": partial(check_decode, counted=False),
        "reading": check_reading,
    }
    found = attempted({name: partial(work, size, context.place) for name, work in works.items()}, context)
    return {**found, "wrong": verdict(found)}


def fast(size: Size, context: Context) -> dict[str, Any]:
    """How long each kernel takes, and what share of the machine's rates that is."""
    place, rates = context.place, context.rates
    works = {
        "decode": partial(time_decode, size, place, True, rates),
        "decode_by_age": partial(time_decode, size, place, False, rates),
        "reading": partial(time_reading, size, place, rates),
    }
    return attempted(works, context)


def parts(size: Size, context: Context) -> dict[str, Any]:
    """A model's small parts: right, and how fast."""
    found = attempted({"parts": partial(small_parts, size, context.place, context.rates)}, context)
    return {**found, "wrong": verdict(found)}


def attempted(works: dict[str, Callable[[], dict[str, Any]]], context: Context) -> dict[str, Any]:
    """What comes of each, noted at once; a problem is noted in its place."""
    import traceback

    found: dict[str, Any] = {}
    for name, work in works.items():
        try:
            found[name] = work()
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:500]}
            found[name]["traceback"] = traceback.format_exc(limit=-3)[-1500:]
        context.note(name, found[name])
        if not context.place.tried:
            torch.cuda.empty_cache()
    return found


def cells(place: Place) -> list[Cell]:
    """Right and fast, for each size; what decides comes first."""
    made = []
    for number, size in enumerate(sizes(place)):
        for name, work, seconds in (("right", right, 70), ("fast", fast, 60), ("small parts", parts, 40)):
            if work is not parts or size.formats == (MODEL, MODEL):
                cell = Cell(part="kernels", name=f"{size.name}, {name}", seconds=seconds, work=partial(work, size))
                made.append(replace(cell, decisive=number < 2 and work is right))
    return made
