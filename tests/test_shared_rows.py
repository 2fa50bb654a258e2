"""Rows of one slot that others read in place give what a copy of them gives, and what dense float64 attention gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from instruction_sets import HERE, required
from test_compiled import CHUNK_COLUMNS, exact, rows_of, sequence_of
from test_kernels import dense_chunk, normal

from bmx.kernels import cpu, reference
from bmx.kernels.compiled import kernels_for
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, SharedRows

SHARED, TOKENS = 64, 150  # tokens of a prefix, and of a sequence in all
ORDER = EvictionOrder(by="age", sink=0, recent=0, window=None)
FORMATS = [("model", "model"), ("int8", "int4"), ("int4", "int4")]


def step(module, rows, sequence, start, stop, slot, shared=None, order=ORDER, **options):
    """Tokens of a sequence go through a slot, behind ``shared`` rows of slot 0; one alone as a decoding token."""
    q, k, v = (one[start:stop] for one in sequence)
    output, before = q.new_empty(*q.shape[:2], v.shape[-1]), shared or 0
    options = {"scale": 0.125, "order": order, **options}
    if stop - start == 1:
        numbers = (torch.tensor([n]) for n in (slot, start, TOKENS - before))
        others = SharedRows(torch.tensor([0]), torch.tensor([before])) if shared else None
        assert module.decode_step(output, q, k, v, rows, *numbers, decay=1.0, accumulate=True, shared=others, **options)
        return output
    columns = ((0,), (stop - start,), (slot,), (start,), (TOKENS - before,), (TOKENS - before,))
    chunks = Chunks(
        **dict(zip(CHUNK_COLUMNS, columns, strict=True)),
        table=torch.tensor(columns),
        shared=((0, before),) if shared else (),
    )
    assert module.prefill_step(output, q, k, v, rows, chunks, **options)
    return output


def outputs(module, sequence, formats, shared, **options):
    """What the tokens behind a prefix give, whose pairs are in slot 0, and in slot 1 too if they are copied there."""
    _, key, value = sequence
    rows = rows_of(TOKENS, dim=key.shape[-1], value_dim=value.shape[-1], dtype=key.dtype, formats=formats)
    step(module, rows, sequence, 0, SHARED, 0)
    if not shared:
        step(module, rows, sequence, 0, SHARED, 1)
    cuts = (SHARED, SHARED + 40, SHARED + 41, SHARED + 60, *range(SHARED + 61, TOKENS + 1))
    parts = [
        step(module, rows, sequence, start, stop, 1, shared and SHARED, **options)
        for start, stop in itertools.pairwise(cuts)
    ]
    return torch.cat(parts), rows


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("details", ["plain", "window and sinks"])
@pytest.mark.parametrize("name", ["reference", *HERE])
def test_rows_read_in_place_give_what_copied_rows_give_to_the_last_bit(name, details, formats):
    options = {}
    if details != "plain":
        options = {"order": EvictionOrder(by="age", sink=0, recent=0, window=50), "sinks": normal(6)}
    module = reference if name == "reference" else kernels_for(required(name))
    sequence = sequence_of(TOKENS)
    (copied, _), (in_place, rows) = (outputs(module, sequence, formats, s, **options) for s in (False, True))
    assert torch.equal(copied, in_place)
    own = rows.view(1, 0).positions[:, : TOKENS - SHARED]
    assert torch.equal(own, torch.arange(SHARED, TOKENS, dtype=torch.int32).expand(2, -1))
    assert not rows.mass.any()


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["reference", *HERE])
def test_two_sources_are_attended_to_as_float64_does(name, formats):
    module = reference if name == "reference" else kernels_for(required(name))
    sequence = sequence_of(TOKENS)
    query, key, value = sequence
    output, rows = outputs(module, sequence, formats, True)
    views = [view for slot in (0, 1) for _, view in rows.slot(slot)]
    counts = (SHARED, TOKENS - SHARED)
    past_key, past_value = (
        torch.cat([exact(getattr(v, which), size)[:, :n] for v, n in zip(views, counts, strict=True)], 1)
        for which, size in (("keys", key.shape[-1]), ("values", value.shape[-1]))
    )
    for n in (SHARED + 61, TOKENS - 1):  # decoding tokens read their own pairs as they are stored
        own = (past[:, n].unsqueeze(0) for past in (past_key, past_value))
        expected, _ = dense_chunk(query[n : n + 1], *own, past_key[:, :n], past_value[:, :n], scale=0.125)
        torch.testing.assert_close(output[n - SHARED].double(), expected[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tokens_that_share_rows_and_read_slots_of_their_own(module, softcap):
    """With slots that take no part, hidden rows and sinks: as each token alone over both."""
    query, sinks = normal(3, 6, 8), normal(6, seed=9)
    keys, values = normal(5, 2, 7, 8, seed=1), normal(5, 2, 7, 4, seed=2)
    shared = normal(2, 40, 8, seed=3), normal(2, 40, 4, seed=4)
    slots, hidden = torch.tensor([4, 0, 3]), torch.arange(7) > torch.tensor([2, 6, 0]).view(-1, 1, 1)
    details = {"scale": 0.4, "softcap": softcap, "sinks": sinks}
    output, sums = module.attend_slots(query, keys, values, slots, hidden=hidden, shared=shared, **details)
    assert sums is None
    for token, slot in enumerate(slots.tolist()):
        used = int((~hidden[token]).sum())
        both = [torch.cat([s, own[slot][:, :used]], 1) for s, own in zip(shared, (keys, values), strict=True)]
        past = [vectors[:, :-1] for vectors in both]
        own = [vectors[:, -1].unsqueeze(0) for vectors in both]
        expected, _ = dense_chunk(query[token : token + 1], *own, *past, **details)
        torch.testing.assert_close(output[token].double(), expected[0], atol=2e-5, rtol=2e-5)
