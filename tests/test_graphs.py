"""A round is captured as a CUDA graph only after a dry run in which the host never waits. CUDA is acted here."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from bmx.engine.graphs import DecodeGraphs, GraphRow
from bmx.kernels.drawing import draw

VOCAB, SLOTS = 11, 3


class Cuda:
    """What graphs ask of ``torch.cuda``.

    Attributes:
        mode: the sync debug mode.
        modes: that it was set to, in turn.
        captured: how many captures began.
        replayed: how many graphs were replayed.
    """

    def __init__(self, monkeypatch):
        self.mode, self.modes, self.captured, self.replayed = 0, [], 0, 0
        acted = {
            "Stream": lambda: self,
            "current_stream": lambda: self,
            "stream": nullcontext,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }
        for name, action in acted.items():
            monkeypatch.setattr(torch.cuda, name, action)
        monkeypatch.setattr("bmx.engine.graphs._warming_stream", lambda: self)

    def wait_stream(self, _):
        """Of a stream."""

    def set_mode(self, mode):
        self.mode = mode
        self.modes.append(mode)

    @contextmanager
    def graph(self, _, **__):
        assert self.mode == 0
        self.captured += 1
        yield

    def pool(self):
        """Of a graph."""

    def replay(self):
        self.replayed += 1


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def decoded(during):
    """Tokens of two sequences whose next token is always one more, and why rounds were not captured.

    Args:
        during: is called in each forward.
    """
    refused = []

    def forward(step, _):
        during()
        return torch.nn.functional.one_hot((step.input_ids[0] + 1) % VOCAB, VOCAB).float()

    graphs = DecodeGraphs(forward, torch.tensor([3, 6, 9, 0]), draw, refused.append, lambda *_: None)
    graphs.captures = True
    rows = [GraphRow(slot=slot, position=5, row_limit=8, tokens=3) for slot in (0, 2)]
    return graphs.decode(rows).read(), refused


def test_a_round_in_which_the_host_would_wait_is_never_captured_and_the_place_is_named(cuda):
    def wait():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    tokens, refused = decoded(wait)
    assert tokens == [4, 5, 6, 10, 0, 1]
    assert cuda.captured == 0
    assert cuda.modes == ["error", 0]
    [reason] = refused
    assert reason.startswith("called a synchronizing CUDA operation (tests/test_graphs.py:")


def test_errors_of_triton_are_told_too(cuda):
    runs = []

    class NotRuntimeError(Exception):
        """Like those of Triton."""

    def fail():
        runs.append(0)
        if len(runs) == 1:
            raise NotRuntimeError("out of resource: shared memory")

    tokens, [reason] = decoded(fail)
    assert tokens == [4, 5, 6, 10, 0, 1]
    assert cuda.captured == 0
    assert "out of resource: shared memory" in reason


def test_lack_of_memory_is_raised_and_the_mode_is_what_it_was(cuda):
    def fill():
        if cuda.mode == "error":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        decoded(fill)
    assert cuda.mode == 0
    assert cuda.captured == 0


def test_a_round_that_never_waits_is_captured_once_and_replayed(cuda):
    tokens, refused = decoded(lambda: None)
    assert refused == []
    assert (cuda.captured, cuda.replayed) == (1, 3)
    assert len(tokens) == 6


def test_rows_that_have_ended_are_nobodys_in_the_rounds_that_follow():
    """So mixers leave the states of their slots as they were after the last token."""
    seen = []

    def forward(step, _):
        seen.append(step.segments.decode_slots.tolist())
        assert not step.segments.batches
        return torch.nn.functional.one_hot((step.input_ids[0] + 1) % VOCAB, VOCAB).float()

    graphs = DecodeGraphs(forward, torch.tensor([3, 6, 9, 0]), draw, pytest.fail, lambda *_: None)
    rows = [
        GraphRow(slot=2, position=5, row_limit=9, tokens=4, ends=(1,)),
        GraphRow(slot=0, position=5, row_limit=9, tokens=3),
    ]
    assert graphs.decode(rows).read() == [10, 0, 1, None, 4, 5, 6]
    assert [slots[:2] for slots in seen] == [[2, 0], [2, 0], [2, 0], [-1, -1]]
    assert {slot for slots in seen for slot in slots[2:]} == {-1}
