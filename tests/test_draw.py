"""Tokens drawn on a GPU without a sort: the same as with one, in rows of any kind, whatever the other rows are."""

from __future__ import annotations

import math

import pytest
import torch

triton_draw = pytest.importorskip("bmx.kernels.triton_draw")

from bmx.engine.graphs import CUTS, GraphRow, Round
from bmx.engine.sampler import NO_TOKEN, SamplingRow, sample
from bmx.kernels import drawing
from bmx.request import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 300
CUT = {
    "none": (1.0, 0, 1.0, 0.0),
    "hot": (1.9, 0, 1.0, 0.0),
    "cold": (1e-9, 0, 1.0, 0.0),
    "top k": (1.0, 7, 1.0, 0.0),
    "one token": (1.0, 1, 1.0, 0.0),
    "more than all": (1.0, 1000, 1.0, 0.0),
    "top p": (1.2, 0, 0.7, 0.0),
    "almost nothing": (1.0, 0, 1e-9, 0.0),
    "min p": (1.0, 0, 1.0, 0.1),
    "the best alone": (1.0, 0, 1.0, 1.0),
    "everything": (1.4, 40, 0.8, 0.05),
    "min p last": (1.4, 200, 0.99, 0.2),
}


def normal(*shape, seed=0, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype).to(DEVICE)


def sampling_of(*cuts, seed=0):
    """Cuts, each with a draw of its own."""
    draws = torch.rand(len(cuts), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(*cut, draw) for cut, draw in zip(cuts, draws, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).t().contiguous().to(DEVICE)


def assert_same(logits, sampling, rows=None):
    """The kernel draws what plain torch draws from a sorted vocabulary."""
    rows = torch.arange(len(logits), device=DEVICE) if rows is None else rows
    ids = triton_draw.draw(logits, rows, sampling)
    assert ids.dtype == torch.long
    assert ids.tolist() == drawing.draw(logits, rows, sampling).tolist()


@pytest.mark.parametrize("seed", range(2))
def test_every_cut_gives_the_token_of_a_sorted_vocabulary(seed):
    assert_same(normal(len(CUT), VOCAB, seed=seed, dtype=torch.bfloat16), sampling_of(*CUT.values(), seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_every_type_and_more_than_a_program_sees_at_once(dtype, monkeypatch):
    """Rows out of order, of a tensor whose rows are strided."""
    monkeypatch.setattr(triton_draw, "MOST_BLOCK", 128)
    cuts = [CUT[name] for name in ("none", "everything", "top p")]
    logits = normal(5, 2 * VOCAB, seed=3, dtype=dtype)[:, :VOCAB]
    assert_same(logits, sampling_of(*cuts, seed=4), torch.tensor([4, 0, 2], device=DEVICE))


def test_of_equal_logits_the_first_is_the_likelier_one():
    """Cuts within them, too; and tokens that are forbidden are never drawn."""
    logits = normal(6, VOCAB, seed=5).round()
    logits[1] = 0
    logits[2] = torch.tensor([0.0, -0.0] * (VOCAB // 2))
    logits[3, ::2] = -math.inf
    cuts = [CUT["top k"], CUT["top k"], (1.0, 0, 0.5, 0.0), CUT["none"], CUT["everything"], CUT["min p"]]
    assert_same(logits, sampling_of(*cuts, seed=6))


def test_no_draw_picks_what_was_cut():
    """Two tokens stay, the others are nearly as likely, and the draw is the greatest below one."""
    logits = torch.full((4, 24), -1.0, device=DEVICE)
    logits[:, 4], logits[:, 9] = 3.0, 3.5
    sampling = sampling_of((1.0, 2, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.4), CUT["none"])
    sampling[CUTS] = 1 - 2**-53
    ids = triton_draw.draw(logits.bfloat16(), torch.arange(4, device=DEVICE), sampling).tolist()
    assert ids == [4, 4, 4, 23]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's arithmetic
def test_a_row_that_is_no_number_leaves_the_others_alone():
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.9)
    rows = [SamplingRow(params, 0.3), SamplingRow(params, 0.6), SamplingRow.likeliest()]
    logits = normal(3, VOCAB, seed=7)
    expected = sample(logits, rows, drawing.draw).tolist()
    logits[1, 9] = math.nan
    assert sample(logits, rows, triton_draw.draw).tolist() == [expected[0], NO_TOKEN, expected[2]]


def test_rounds_draw_on_the_device_what_steps_draw():
    """Two rounds of four rows: one row is greedy, one ends after the first, and one is idle."""
    logits = normal(2, 4, VOCAB, seed=8)
    hot, cut = SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_k=9, top_p=0.9)
    draws = {0: (SamplingRow(hot, 0.2), SamplingRow(hot, 0.9)), 2: (SamplingRow(cut, 0.7),)}
    rows = [GraphRow(slot=i, position=5, row_limit=9, tokens=2 - (i == 2), draws=draws.get(i, ())) for i in range(3)]
    turns = iter(logits)
    decoding = Round(lambda *_: next(turns), torch.zeros(5, dtype=torch.long, device=DEVICE), 4, triton_draw.draw)
    decoding.begin(rows)
    decoding.run()
    decoding.run()
    greedy = SamplingRow.likeliest()
    first, second = (
        sample(logits[i], [row.draws[i] if i < len(row.draws) else greedy for row in rows] + [greedy], drawing.draw)
        for i in range(2)
    )
    assert decoding.ring[:2].tolist() == [[*first[:3].tolist(), NO_TOKEN], [*second[:2].tolist(), NO_TOKEN, NO_TOKEN]]
