"""Fused steps of a layer do what policy and pool do: those of the specification, and the compiled ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from instruction_sets import on_every_set, required
from test_kernels import normal

from bmx import EngineConfig, kernels
from bmx.compress.policy import CompressionPolicy
from bmx.engine import ranking
from bmx.engine.attention import SlotAttention
from bmx.engine.packed import DecodeBatch, DecodeGroup, PackedStep, PromptChunk
from bmx.engine.ranking import DecodingSlot
from bmx.kernels.ranking import RANKS
from bmx.kernels.registry import CAPABILITIES
from bmx.kernels.slot_views import Chunks
from bmx.kv.layout import KVLayout, LayerLayout
from bmx.kv.pool import KVPool
from bmx.kv_formats import formats_of

BF16 = torch.bfloat16
NEAR = {"atol": 2e-2, "rtol": 2e-2}  # eight bits of a number


@dataclass(frozen=True)
class Chosen(kernels.Kernels):
    """Kernels that do whole steps, or leave them to policy and pool."""

    fused: bool

    @property
    def capabilities(self):
        return replace(CAPABILITIES[self.name], orders=RANKS if self.fused else ())


CHUNK_COLUMNS = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")


@dataclass(frozen=True)
class Sizes:
    """Of a layer: K, G, D, E."""

    kv_heads: int = 2
    group: int = 3
    key_dim: int = 32
    value_dim: int = 32


REGISTERS, ODD = Sizes(), Sizes(kv_heads=3, group=2, key_dim=12, value_dim=7)  # what compiled kernels take, and others
EITHER = pytest.mark.parametrize(  # kernels with each format that their fused steps read
    ("back_end", "sizes", "form"),
    [
        *(("reference", REGISTERS, form) for form in ("model", "int8/int4")),
        *(("reference", ODD, form) for form in ("fp8", "int8", "int4", "model/int4")),
        *on_every_set(
            ((REGISTERS, form) for form in ("model", "int8", "int4", "int8/int4", "model/int4")),
            few=[(REGISTERS, "int8/int4"), (REGISTERS, "int4/model")],
        ),
    ],
    indirect=["back_end"],
)


@pytest.fixture
def back_end(request):
    """The name of kernels that this machine can have."""
    return required(request.param)


def attention_of(chosen, policy, window, form, sizes, groups=((48, 5),)):
    """One layer's attention and its pool, with the same random pairs each time; groups of (C, S)."""
    capacity, (keys, values) = groups[-1][0], formats_of(form)
    made = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_budget=capacity, kv_sink=2, kv_recent=5))
    layouts = tuple(
        KVLayout((
            LayerLayout(
                capacity=rows, kv_heads=sizes.kv_heads, key_dim=sizes.key_dim, value_dim=sizes.value_dim, itemsize=2,
                window=window, owner=0, last_reader=0, by_age=False, key_format=keys, value_format=values,
                row_stats=made._row_stats if made.scorer else (),
            ),
        ))
        for rows, _ in groups
    )  # fmt: skip
    pool = KVPool(layouts, tuple(slots for _, slots in groups), BF16, torch.device("cpu"))
    for group, (_, slots) in enumerate(groups):
        part = pool.layer(group, 0)[0]
        for slot in range(slots):
            for seed, (store, dim) in enumerate(((part.keys, sizes.key_dim), (part.values, sizes.value_dim))):
                vectors = normal(sizes.kv_heads, part.layout.capacity, dim, seed=2 * slot + seed, dtype=BF16)
                store.append(slot, 0, vectors)
    return SlotAttention(pool, made, chosen), pool


def fill(part, slot, tokens, rows):
    """A slot after some tokens: it keeps ``rows`` of them, in any order, and each has received attention."""
    random = torch.Generator().manual_seed(slot)
    for head in range(part.layout.kv_heads):
        left = torch.randperm(tokens, generator=random) if tokens > rows else torch.arange(tokens)
        part.positions[slot, head, : min(tokens, rows)] = left[:rows].int()
    for note in part.row_stats.values():
        note[slot] = torch.rand(note[slot].shape, generator=random) * (part.positions[slot] >= 0)


def attended(attention, step, tokens, sizes):
    """What a layer says of random queries, keys and values."""
    heads = sizes.kv_heads
    shapes = ((heads * sizes.group, sizes.key_dim), (heads, sizes.key_dim), (heads, sizes.value_dim))
    q, k, v = (normal(1, heads, tokens, dim, seed=heads + i, dtype=BF16) for i, (heads, dim) in enumerate(shapes))
    with attention.forward(step):
        return attention(None, q, k, v, scaling=0.2)[0]


def assert_same(results):
    """The same output, and the same pairs in the same rows."""
    (unfused_output, unfused_pool), (output, pool) = results
    torch.testing.assert_close(output, unfused_output, **NEAR)
    rows, expected = pool.rows[0], unfused_pool.rows[0]
    assert torch.equal(rows.positions, expected.positions)
    for part in ("keys", "values", "key_scales", "value_scales"):
        assert same(getattr(rows, part), getattr(expected, part))
    for stat, other in ((rows.mass, expected.mass), (rows.ranks, expected.ranks)):
        if stat is not None:
            torch.testing.assert_close(stat, other, **NEAR)


def same(tensor, other):
    """Equal tensors, or none on both sides."""
    return tensor is other is None or torch.equal(tensor, other)


POLICIES = pytest.mark.parametrize("policy", ["average-attention", "h2o", "decay", "tova"])


@EITHER
@pytest.mark.parametrize("policy", ["average-attention", "h2o", "decay", "tova", "streaming", "none"])
@pytest.mark.parametrize("limits", [(48, 48, 48, 48), (40, 48, 44, 48)])
@pytest.mark.parametrize("window", [None, 20])
def test_a_decoding_step_in_one_call_is_what_policy_and_pool_do(back_end, policy, window, limits, form, sizes):
    assert_decodes_alike(back_end, policy, window, limits, form, sizes, (100, 30, 60, 47))


def assert_decodes_alike(back_end, policy, window, limits, form, sizes, now):
    """Two groups of slots, of which the second one's have sequences that evict and have seen ``now`` tokens."""
    found, seen = [], (20, 7)
    for fused in (False, True):
        attention, pool = attention_of(Chosen(back_end, "", fused), policy, window, form, sizes, ((31, 3), (48, 5)))
        slots_of, groups = ((2, 0), (4, 0, 2, 3)), []
        for group, (slots, asked, rows) in enumerate(zip(slots_of, (seen, now), ((31, 31), limits), strict=True)):
            tokens = asked
            if policy == "none":
                tokens = tuple(min(n, limit - 1) for n, limit in zip(tokens, rows, strict=True))
            for slot, count, limit in zip(slots, tokens, rows, strict=True):
                fill(pool.layer(group, 0)[0], slot, count, limit)
            groups.append(
                DecodeGroup(
                    rows=slice(2 * group, 2 + 4 * group), group=group, slots=torch.tensor(slots), slots_host=slots,
                    positions=torch.tensor(tokens), positions_host=tokens,
                    row_limits=torch.tensor(rows), row_limits_host=rows,
                    totals=tuple(n + 90 * (policy != "none") for n in tokens),
                )
            )  # fmt: skip
        decode_batch = DecodeBatch(
            slots=torch.cat([groups[0].slots, 3 + groups[1].slots]), evicting=policy != "none",
            positions=torch.cat([one.positions for one in groups]),
            row_limits=torch.cat([one.row_limits for one in groups]),
        )  # fmt: skip
        step = PackedStep(
            input_ids=None, positions=None, logits_at=0, decode_batch=decode_batch, decode_groups=tuple(groups)
        )
        if fused:
            numbers = (decode_batch.slots, decode_batch.positions, decode_batch.row_limits)
            attention.rank(DecodingSlot(*one) for one in zip(*(each.tolist() for each in numbers), strict=True))
        found.append((attended(attention, step, 6, sizes), pool))
    assert_same(found)


@EITHER
@POLICIES
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("limit", [48, 40])
@pytest.mark.parametrize(("start", "tokens"), [(0, 30), (0, 60), (20, 30), (48, 17), (100, 64), (40, 8)])
def test_chunks_read_in_one_call_leave_what_policy_and_pool_leave(
    back_end, policy, start, tokens, limit, window, form, sizes
):
    """One that evicts, behind a decoding token, and one that never will."""
    found = []
    for fused in (False, True):
        attention, pool = attention_of(Chosen(back_end, "", fused), policy, window, form, sizes)
        fill(pool.layer(0, 0)[0], 1, start, limit)
        prompts = (
            PromptChunk(rows=slice(1, 1 + tokens), group=0, slot=1, start=start, total=900, row_limit=limit),
            PromptChunk(rows=slice(1 + tokens, 13 + tokens), group=0, slot=4, start=0, total=40, row_limit=40),
        )
        table = [[1, 1 + tokens], [tokens, 12], [1, 4], [start, 0], [limit, 40], [900, 40]]
        weights, decay = torch.zeros(13 + tokens), torch.ones(2)
        for n, (at, length) in enumerate(((1, tokens), (1 + tokens, 12))):
            for own in attention._policy.query_weights(length, 0):
                weights[at : at + length] = torch.tensor(own)
            decay[n] = attention._policy.decay(length)
        chunks = Chunks(
            **dict(zip(CHUNK_COLUMNS, map(tuple, table), strict=True)),
            table=torch.tensor(table), query_weights=weights, decay=decay,
        )  # fmt: skip
        step = PackedStep(input_ids=None, positions=None, logits_at=0, chunks=chunks, prompts=prompts)
        found.append((attended(attention, step, 13 + tokens, sizes)[:, 1:], pool))
    assert_same(found)


RANKED = pytest.mark.parametrize("policy", ["window", "r-kv", "keydiff", "knorm"])
FORMS = pytest.mark.parametrize("form", ["model", "int8/int4"])


@RANKED
@FORMS
@pytest.mark.parametrize(
    ("start", "tokens", "limit"), [(0, 30, 48), (0, 60, 40), (20, 30, 48), (100, 64, 40), (40, 8, 44)]
)
@pytest.mark.parametrize("at_once", [2**26, 1])
def test_chunks_ranked_all_at_once_leave_what_policy_and_pool_leave(
    policy, start, tokens, limit, form, at_once, monkeypatch
):
    monkeypatch.setattr(ranking, "RANKED_BYTES", at_once)
    test_chunks_read_in_one_call_leave_what_policy_and_pool_leave(
        "reference", policy, start, tokens, limit, None, form, REGISTERS
    )


@RANKED
@FORMS
@pytest.mark.parametrize("limits", [(48, 48, 48, 48), (40, 48, 44, 48)])
@pytest.mark.parametrize("now", [(96, 30, 60, 48), (104, 48, 64, 47), (97, 64, 61, 49)])
@pytest.mark.parametrize("at_once", [2**26, 1])
def test_slots_ranked_all_at_once_when_they_are_due_evict_what_policy_and_pool_evict(
    policy, limits, now, form, at_once, monkeypatch
):
    monkeypatch.setattr(ranking, "RANKED_BYTES", at_once)
    assert_decodes_alike("reference", policy, None, limits, form, REGISTERS, now)
