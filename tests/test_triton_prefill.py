"""Triton's attention of chunks and its column sums give what dense float64 matrices give, for all chunks at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

import pytest
from test_kernels import LOOSE, TIGHT, dense_chunk, normal, some_votes, window_mask

pytest.importorskip("triton")

from bmx.kernels import reference, triton_prefill
from bmx.kernels.slot_views import Chunks, Rows

NEAR = {torch.float32: TIGHT, torch.float16: LOOSE[torch.float16]}
UNTOUCHED = -7.0
BEFORE, BETWEEN, AFTER = 2, 1, 3  # packed tokens of no chunk


@dataclass(frozen=True)
class Prompt:
    """A chunk, and the slot that it finds."""

    slot: int
    length: int
    start: int
    limit: int
    total: int = 1000


@dataclass(frozen=True)
class Case:
    """Slots, chunks and a model's attention."""

    prompts: tuple[Prompt, ...]
    capacities: tuple[int, ...] = (20, 48, 20)
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    width: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float = 0.4
    distance: int = 0
    power: int = 1

    @property
    def details(self):
        """What both kernels take as keywords."""
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}

    @property
    def counting(self):
        """What the sums take besides."""
        return {**self.details, "distance": self.distance, "power": self.power}


MIXED = (
    Prompt(slot=2, length=37, start=0, limit=20),  # an empty slot, and more than it holds
    Prompt(slot=1, length=5, start=30, limit=48),  # room for all
    Prompt(slot=0, length=21, start=61, limit=33),  # full, and smaller than the limit
    Prompt(slot=3, length=1, start=40, limit=17),  # may not use all of its slot
)
FOUR = (20, 48, 20, 33)
CASES = {
    "four chunks": Case(MIXED, FOUR),
    "three heads each, odd sizes": Case(MIXED, FOUR, kv_heads=1, group=3, dim=96, width=64),
    "one head each": Case(MIXED, FOUR, group=1, dim=24, width=40),
    "values in two parts": Case(MIXED[1:], FOUR, kv_heads=1, dim=64, width=80),
    "below the least": Case(MIXED[:2], FOUR, dim=8, width=12),
    "softcap": Case(MIXED, FOUR, softcap=1.5),
    "sinks": Case(MIXED, FOUR, sinks=True),
    "window": Case(MIXED, FOUR, window=13),
    "window of one": Case(MIXED, FOUR, window=1),
    "window that ends where the second tile begins": Case((Prompt(slot=1, length=40, start=30, limit=48),), window=18),
    "window wider than all": Case(MIXED, FOUR, window=500),
    "all together": Case(MIXED, FOUR, kv_heads=1, group=3, dim=24, width=48, window=25, softcap=2.0, sinks=True),
}
FAR = {
    "far": Case(MIXED, FOUR, distance=9, power=2),
    "far by one": Case(MIXED, FOUR, distance=1),
    "cubes": Case(MIXED, FOUR, power=3),
    "farther than chunks are long": Case(MIXED, FOUR, distance=45, power=2),
    "farther than anything": Case(MIXED, FOUR, distance=2000),
    "far, within a window": Case(MIXED, FOUR, window=13, distance=5, power=2),
    "farther than the window": Case(MIXED, FOUR, window=13, distance=20),
    "just as far as the window": Case(MIXED, FOUR, window=13, distance=13),
    "far, three heads each, other sizes": Case(
        MIXED, FOUR, kv_heads=1, group=3, dim=96, width=64, distance=17, power=2
    ),
    "far, one head each": Case(MIXED, FOUR, group=1, dim=24, width=40, distance=16, power=2),
    "far, all together": Case(
        MIXED, FOUR, kv_heads=1, group=3, dim=24, width=48, window=25, softcap=2.0, sinks=True, distance=6, power=2
    ),
}


@dataclass
class Step:
    """A step's tensors."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rows: Rows
    chunks: Chunks
    sinks: torch.Tensor | None

    @property
    def mass(self):
        return self.rows.mass.clone()


def tables(prompts, query_weights=None, decay=None):
    """Chunks, packed with a few other tokens around; and how many tokens there are."""
    at, here = [], BEFORE
    for prompt in prompts:
        at.append(here)
        here += prompt.length + BETWEEN
    columns = (at, *([getattr(p, name) for p in prompts] for name in ("length", "slot", "start", "limit", "total")))
    names = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
    tokens = here + AFTER
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3))
    chunks = Chunks(
        **{name: tuple(column) for name, column in zip(names, columns, strict=True)},
        table=torch.tensor(columns, dtype=torch.int64, device=DEVICE),
        query_weights=weights.to(DEVICE) if query_weights else None,
        decay=torch.tensor([0.5, 0.25, 0.75, 0.0625][: len(prompts)], device=DEVICE) if decay else None,
    )
    return chunks, tokens


def used_rows(case, prompt):
    return min(prompt.start, prompt.limit, case.capacities[prompt.slot])


def step_of(case, dtype=torch.float32, query_weights=False, decay=False):
    """A step in which rows that are not in use are NaN, and heads come before tokens."""
    chunks, tokens = tables(case.prompts, query_weights, decay)
    total = sum(case.capacities) * case.kv_heads
    first = [
        [case.kv_heads * sum(case.capacities[:i]) + head * own for head in range(case.kv_heads)]
        for i, own in enumerate(case.capacities)
    ]
    keys, values = (torch.full((total, dim), math.nan, dtype=dtype) for dim in (case.dim, case.width))
    positions = torch.full((total,), -1, dtype=torch.int32)
    for seed, prompt in enumerate(case.prompts):
        used = used_rows(case, prompt)
        for head in range(case.kv_heads):
            here = first[prompt.slot][head]
            keys[here : here + used] = normal(used, case.dim, seed=100 * seed + head, dtype=dtype)
            values[here : here + used] = normal(used, case.width, seed=200 * seed + head, dtype=dtype)
            order = torch.randperm(prompt.start, generator=torch.Generator().manual_seed(seed * 9 + head))
            positions[here : here + used] = order[:used].int()
    rows = Rows(
        keys=keys.to(DEVICE),
        values=values.to(DEVICE),
        positions=positions.to(DEVICE),
        mass=torch.rand(total, generator=torch.Generator().manual_seed(4)).to(DEVICE),
        first=torch.tensor(first, device=DEVICE),
        capacity=torch.tensor(case.capacities, device=DEVICE).view(-1, 1).repeat(1, case.kv_heads),
        kv_heads=case.kv_heads,
        capacities=tuple((own,) * case.kv_heads for own in case.capacities),
        largest=max(case.capacities),
    )
    heads = case.kv_heads * case.group
    shapes = (heads, tokens, case.dim), (case.kv_heads, tokens, case.dim), (case.kv_heads, tokens, case.width)
    packed = [normal(*shape, seed=i, dtype=dtype).to(DEVICE).transpose(0, 1) for i, shape in enumerate(shapes)]
    return Step(*packed, rows, chunks, 2 * normal(heads, seed=8).to(DEVICE) if case.sinks else None)


def slot_rows(case, step, prompt, head):
    """Which rows of all are in use of this slot and head."""
    begin = int(step.rows.first[prompt.slot, head])
    return slice(begin, begin + used_rows(case, prompt))


def dense(case, step, index):
    """One chunk in float64: output [T, H, E], logarithms to base 2 [T, H], and [H, T, P + T] what is summed."""
    prompt, at = case.prompts[index], step.chunks.offsets[index]
    of_chunk, own = slice(at, at + prompt.length), torch.arange(prompt.start, prompt.start + prompt.length)
    found = []
    for head in range(case.kv_heads * case.group):
        owner = head // case.group
        here = slot_rows(case, step, prompt, owner)
        keys = torch.cat([step.rows.keys[here], step.key[of_chunk, owner]]).double()
        values = torch.cat([step.rows.values[here], step.value[of_chunk, owner]]).double()
        places = torch.cat([step.rows.positions[here].cpu().long(), own])
        unseen = places[None, :] > own[:, None]
        if case.window is not None:
            unseen |= places[None, :] <= own[:, None] - case.window
        scores = step.query[of_chunk, head].double() @ keys.T * case.scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(unseen.to(DEVICE), float("-inf"))
        extra = scores.new_full((len(scores), 1), float("-inf"))
        if step.sinks is not None:
            extra = step.sinks[head].double().expand(len(scores), 1)
        logsum = torch.logsumexp(torch.cat([scores, extra], dim=1), dim=1)
        weights = torch.exp(scores - logsum[:, None])
        far = (own[:, None] - places[None, :] >= case.distance).to(DEVICE)
        found.append((weights @ values, logsum / math.log(2), weights**case.power * far))
    outputs, logsums, weights = zip(*found, strict=True)
    return torch.stack(outputs, 1), torch.stack(logsums, 1), torch.stack(weights)


def attended(case, step, **more):
    """Output and logarithms of all tokens, with what was there before where nothing was written."""
    tokens, heads, _ = step.query.shape
    output = step.value.new_full((tokens, heads, case.width), UNTOUCHED)
    logsums = torch.full((tokens, heads), UNTOUCHED, device=DEVICE)
    options = {"sinks": step.sinks, "logsums": logsums, **case.details, **more}
    triton_prefill.attend(output, step.query, step.key, step.value, step.rows, step.chunks, **options)
    return output, logsums


def true_logsums(case, step):
    """What ``attend`` gives, worked out here."""
    found = torch.full(step.query.shape[:2], math.nan, device=DEVICE)
    for index, (at, length) in enumerate(zip(step.chunks.offsets, step.chunks.lengths, strict=True)):
        found[at : at + length] = dense(case, step, index)[1].float()
    return found


def added_up(case, step):
    """The mass of all rows afterwards, and what own keys got."""
    operands = step.query, step.key, step.rows, step.chunks, true_logsums(case, step)
    own = triton_prefill.add_up(*operands, **case.counting)
    return step.rows.mass, own


HALF = ("four chunks", "three heads each, odd sizes", "all together")  # and with these, in half precision
TYPED = [(name, torch.float32) for name in CASES] + [(name, torch.float16) for name in HALF]
EVERY_CASE = pytest.mark.parametrize(("name", "dtype"), TYPED, ids=lambda value: str(value).removeprefix("torch."))
EVERY_TYPE = pytest.mark.parametrize("dtype", NEAR, ids=str)


@EVERY_CASE
def test_chunks_attend_to_their_slots_and_causally_to_themselves(name, dtype):
    case = CASES[name]
    step = step_of(case, dtype)
    output, logsums = attended(case, step)
    wanted = torch.full(output.shape, UNTOUCHED, dtype=torch.float64, device=DEVICE)
    wanted_logsums = wanted[..., 0].clone()
    for index, (at, length) in enumerate(zip(step.chunks.offsets, step.chunks.lengths, strict=True)):
        wanted[at : at + length], wanted_logsums[at : at + length], _ = dense(case, step, index)
    torch.testing.assert_close(output.double(), wanted, **NEAR[dtype])
    torch.testing.assert_close(logsums.double(), wanted_logsums, **NEAR[dtype])


def test_logarithms_nobody_asked_for_change_nothing():
    case = CASES["four chunks"]
    step = step_of(case)
    output, unwritten = attended(case, step, logsums=None)
    assert torch.equal(output, attended(case, step)[0])
    assert (unwritten == UNTOUCHED).all()


# Every case once, by turns with weights and without; those of HALF both ways.
TURNS = [(name, dtype, bool(turn % 2)) for turn, (name, dtype) in enumerate(TYPED)]
TURNS += [(name, torch.float32, bool(turn % 2)) for turn, name in enumerate(FAR)]
TURNS += [("far", torch.float16, True), ("far, all together", torch.float16, False)]
TURNS += [
    (name, torch.float32, not weighted) for name, dtype, weighted in TURNS if name in HALF and dtype == torch.float32
]


@pytest.mark.parametrize(("name", "dtype", "weighted"), TURNS)
def test_mass_is_what_keys_received(name, dtype, weighted):
    """The mass of all rows is compared: those not in use and those of other slots stay as they are."""
    case = (CASES | FAR)[name]
    step = step_of(case, dtype, query_weights=weighted, decay=weighted)
    wanted = step.mass.double()
    own = torch.zeros(case.kv_heads, len(step.query), dtype=torch.float64, device=DEVICE)
    for index, prompt in enumerate(case.prompts):
        at = step.chunks.offsets[index]
        of_chunk = slice(at, at + prompt.length)
        given = step.chunks.query_weights
        query_weights = torch.ones(prompt.length, device=DEVICE) if given is None else given[of_chunk]
        weights = dense(case, step, index)[2].unflatten(0, (case.kv_heads, case.group)).mean(1)  # [K, T, P+T]
        sums = torch.einsum("t,ktn->kn", query_weights.double(), weights)
        used = used_rows(case, prompt)
        for head in range(case.kv_heads):
            here = slot_rows(case, step, prompt, head)
            wanted[here] = (
                wanted[here] * (1.0 if step.chunks.decay is None else step.chunks.decay[index]) + sums[head, :used]
            )
        own[:, of_chunk] = sums[:, used:]
    mass, found = added_up(case, step)
    torch.testing.assert_close(mass.double(), wanted, **NEAR[dtype])
    assert found.dtype == torch.float32
    assert found.shape == own.shape
    for at, length in zip(step.chunks.offsets, step.chunks.lengths, strict=True):
        of_chunk = slice(at, at + length)
        torch.testing.assert_close(found[:, of_chunk].double(), own[:, of_chunk], **NEAR[dtype])


def test_nothing_is_added_up_of_what_never_evicts():
    """Where an answer of any length fits: into the limit, or into a slot that is smaller."""
    prompts = (
        Prompt(slot=0, length=5, start=9, limit=30, total=20),  # just fits into its 20 rows
        Prompt(slot=1, length=7, start=9, limit=16, total=16),  # just fits into its limit
        Prompt(slot=2, length=5, start=9, limit=30, total=21),  # one more than fits
    )
    case = Case(prompts)
    step = step_of(case, decay=True)
    before = step.mass
    mass, own = added_up(case, step)
    sizes = [case.kv_heads * capacity for capacity in case.capacities]
    stays, other, moves = mass.split(sizes)
    was, other_was, moved = before.split(sizes)
    assert torch.equal(stays, was)
    assert torch.equal(other, other_was)
    assert not torch.equal(moves, moved)
    for index, nothing in enumerate((True, True, False)):
        at = step.chunks.offsets[index]
        assert (own[:, at : at + prompts[index].length] == 0).all() == nothing


@pytest.mark.parametrize("case", [CASES["all together"], FAR["far, all together"]], ids=["near", "far"])
def test_runs_are_alike_bit_for_bit(case):
    first, again = (step_of(case, query_weights=True, decay=True) for _ in range(2))
    for one, other in zip(attended(case, first), attended(case, again), strict=True):
        assert torch.equal(one, other)
    (mass, own), (other_mass, other_own) = added_up(case, first), added_up(case, again)
    assert torch.equal(mass, other_mass)
    for at, length in zip(first.chunks.offsets, first.chunks.lengths, strict=True):
        assert torch.equal(own[:, at : at + length], other_own[:, at : at + length])


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", ["four chunks", "all together", "far"])
def test_a_chunk_alone_is_as_it_is_in_company(name, index):
    case = (CASES | FAR)[name]
    together, alone = step_of(case, decay=True), step_of(case, decay=True)
    columns = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
    alone.chunks = Chunks(
        **{column: getattr(together.chunks, column)[index : index + 1] for column in columns},
        table=together.chunks.table[:, index : index + 1].contiguous(),
        decay=together.chunks.decay[index : index + 1].clone(),
    )
    at = together.chunks.offsets[index]
    of_chunk = slice(at, at + case.prompts[index].length)
    for one, all_ in zip(attended(case, alone), attended(case, together), strict=True):
        assert torch.equal(one[of_chunk], all_[of_chunk])
        assert (one[:at] == UNTOUCHED).all()
        assert (one[of_chunk.stop :] == UNTOUCHED).all()
    logsums = true_logsums(case, together)
    for step in (together, alone):
        step.own = triton_prefill.add_up(step.query, step.key, step.rows, step.chunks, logsums, **case.counting)
    assert torch.equal(alone.own[:, of_chunk], together.own[:, of_chunk])
    for head in range(case.kv_heads):
        here = slot_rows(case, together, case.prompts[index], head)
        assert torch.equal(alone.rows.mass[here], together.rows.mass[here])


def test_a_step_without_chunks_does_nothing():
    case = Case(())
    step = step_of(case)
    before = step.mass
    output, logsums = attended(case, step)
    assert (output == UNTOUCHED).all()
    assert (logsums == UNTOUCHED).all()
    assert torch.equal(added_up(case, step)[0], before)


def chunk_of(tokens, past, *, kv_heads=2, group=2, dim=16, width=16, dtype=torch.float32):
    """Query, key, value, past_key, past_value; the last two are the first rows of a slot whose others are NaN."""
    shapes = (tokens, kv_heads * group, dim), (tokens, kv_heads, dim), (tokens, kv_heads, width)
    found = [normal(*shape, seed=i, dtype=dtype).to(DEVICE) for i, shape in enumerate(shapes)]
    for seed, size in ((3, dim), (4, width)):
        pool = torch.full((3, kv_heads, past + 9, size), math.nan, dtype=dtype, device=DEVICE)
        pool[1, :, :past] = normal(kv_heads, past, size, seed=seed, dtype=dtype).to(DEVICE)
        found.append(pool[1, :, :past])
    return found


def on_host(chunk):
    return [t.cpu() for t in chunk]


def places_of(past, kv_heads):
    """[K, P] places of a slot's tokens before a chunk, some of them gone, in another order for each head."""
    older = -1 - torch.arange(past) - torch.arange(past) // 4 * 3
    random = torch.Generator().manual_seed(past)
    return torch.stack([older[torch.randperm(past, generator=random)] for _ in range(kv_heads)]).int().to(DEVICE)


def compared(chunk, query_weights, dtype=torch.float32, squares=True, **details):
    """What one chunk's attention gives is what float64 loops give, and what the plain kernels give."""
    output, sums = triton_prefill.attend_chunk(*chunk, query_weights=query_weights, squares=squares, **details)
    plain, plain_sums = reference.attend_chunk(*chunk, query_weights=query_weights, squares=squares, **details)
    assert (output.dtype, output.shape) == (plain.dtype, plain.shape)
    torch.testing.assert_close(output, plain, **NEAR[dtype])
    assert (sums.dtype, sums.shape) == (plain_sums.dtype, plain_sums.shape)
    torch.testing.assert_close(sums, plain_sums, **NEAR[dtype])
    on_cpu = {name: d.cpu() if isinstance(d, torch.Tensor) else d for name, d in details.items()}
    wanted, wanted_sums = dense_chunk(*on_host(chunk), query_weights=query_weights.cpu(), **on_cpu)
    torch.testing.assert_close(output.cpu().double(), wanted, **NEAR[dtype])
    torch.testing.assert_close(sums.cpu().double(), wanted_sums[: len(sums)], **NEAR[dtype])


DETAILS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": normal(4).to(DEVICE)},
    "strong sinks": {"sinks": normal(4).to(DEVICE) + 50},
    "all together": {"softcap": 2.0, "sinks": normal(4).to(DEVICE)},
}


# Half precision with two of them: what it changes is the arithmetic, and not what is hidden or capped.
@pytest.mark.parametrize(
    ("details", "dtype"),
    [*((name, torch.float32) for name in DETAILS), *((name, torch.float16) for name in list(DETAILS)[::3])],
)
def test_one_chunk_is_as_plain_kernels_have_it(details, dtype):
    query_weights = some_votes("one way", 37).to(DEVICE)
    compared(chunk_of(37, 21, dtype=dtype), query_weights, dtype, scale=0.4, **DETAILS[details])


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("kind", ["one way", "three ways", "two that share no query", "nobody"])
def test_one_chunk_is_added_up_as_the_weights_say(kind, squares):
    compared(chunk_of(35, 21), some_votes(kind, 35).to(DEVICE), squares=squares, scale=0.4)


SHAPES = {
    "an empty slot": {"tokens": 33, "past": 0},
    "one token": {"tokens": 1, "past": 19},
    "the very first token": {"tokens": 1, "past": 0},
    "one head each": {"tokens": 20, "past": 17, "group": 1},
    "three heads each, odd sizes": {"tokens": 20, "past": 17, "kv_heads": 1, "group": 3, "dim": 96, "width": 64},
}


@EVERY_TYPE
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_chunk_of_any_shape(shape, dtype):
    compared(chunk_of(**shape, dtype=dtype), torch.rand(2, shape["tokens"]).to(DEVICE), dtype, scale=0.3)


@pytest.mark.parametrize(("distance", "power"), [(1, 1), (7, 2), (20, 1), (50, 2)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_chunk_of_which_only_far_queries_count(shape, distance, power):
    shape = {"kv_heads": 2, **shape}
    counting = {"distance": distance, "power": power, "past_places": places_of(shape["past"], shape["kv_heads"])}
    weights = some_votes("three ways", shape["tokens"]).to(DEVICE)
    compared(chunk_of(**shape), weights, squares=power == 1, scale=0.3, **counting)


def test_sums_nobody_asked_for_are_not_there():
    chunk = chunk_of(20, 17)
    output, none = triton_prefill.attend_chunk(*chunk, scale=0.4, squares=True)
    assert none is None
    same, empty = triton_prefill.attend_chunk(*chunk, scale=0.4, query_weights=torch.empty(0, 20, device=DEVICE))
    assert empty.shape == (0, 2, 37)
    assert torch.equal(output, same)


def test_a_slot_may_be_laid_out_in_any_way():
    """Rows before heads, or keys and values of slots of different sizes: those are copied."""
    query, key, value, past_key, past_value = chunk_of(20, 17)
    turned = past_key.transpose(0, 1).contiguous().transpose(0, 1)
    query_weights = some_votes("one way", 20).to(DEVICE)
    compared((query, key, value, turned, past_value), query_weights, scale=0.4)
    compared((query, key, value, past_key, past_value.clone()), query_weights, scale=0.4)


def test_hidden_keys_are_left_to_the_plain_kernels():
    query_weights = some_votes("one way", 33).to(DEVICE)
    hidden = window_mask(33, 20, 2, window=7).to(DEVICE)
    compared(chunk_of(33, 20), query_weights, scale=0.4, hidden=hidden)
    compared(
        chunk_of(33, 20), query_weights, scale=0.4, hidden=hidden, distance=4, power=2, past_places=places_of(20, 2)
    )


def test_dot_products_too_large_for_float16_are_scaled_before_they_are_rounded():
    large = torch.full((1, 2, 256), 25.0, dtype=torch.float16, device=DEVICE)
    value = torch.full((1, 2, 4), 2.0, dtype=torch.float16, device=DEVICE)
    empty = large.new_empty(2, 0, 256), large.new_empty(2, 0, 4)
    output, _ = triton_prefill.attend_chunk(large, large, value, *empty, scale=1 / 16)
    assert torch.equal(output, value)
