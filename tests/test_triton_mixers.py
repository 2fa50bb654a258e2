"""Triton kernels of mixers, interpreted where there is no GPU, give what their specification gives."""

from __future__ import annotations

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine
from families import tiny_model
from test_kernels import normal

pytest.importorskip("triton")

from bmx.kernels import reference, triton
from bmx.kernels.segments import Segments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # interpreted Triton computes bfloat16 wrongly
SLOTS = 6
# Two decoding rows and an idle one, then prompts: longer than a chunk, shorter than a window, equal ones, and a probe
# which sees the state that the segment before it leaves, and leaves none.
DECODING = (4, -1, 1)
PROMPTS = ((3, 70, 0, True), (73, 2, 2, True), (75, 9, 3, True), (84, 9, 5, True), (93, 5, 5, False))
TOKENS = 98
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def tensor(*shape, seed, dtype=torch.float32):
    return normal(*shape, seed=seed).to(DEVICE, dtype)


def mixed():
    return Segments.of(torch.tensor(DECODING, device=DEVICE), PROMPTS, DEVICE)


def assert_same(name, operands, states, **options):
    """Both back ends give the same output and states; an idle row's output is zeros, and it leaves all states alone."""
    expected_states, spare = states.clone(), states[-1].clone()
    expected = getattr(reference, name)(*operands, expected_states, mixed(), **options)
    output = getattr(triton, name)(*operands, states, mixed(), **options)
    assert output.dtype == expected.dtype
    idle = DECODING.index(-1)
    assert not output[idle].any()
    assert torch.equal(states[-1], spare)
    expected[idle] = 0
    tolerance = max(TOLERANCE[operands[0].dtype], TOLERANCE[states.dtype])
    for one, other in ((output, expected), (states[:-1], expected_states[:-1])):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("width", "biased", "silu"), [(4, False, True), (3, True, False)])
def test_convolutions(dtype, width, biased, silu):
    x, weight = tensor(TOKENS, 150, seed=1, dtype=dtype)[:, 6:], tensor(144, width, seed=2, dtype=dtype)
    bias, windows = tensor(144, seed=3, dtype=dtype), tensor(SLOTS + 1, width - 1, 144, seed=4, dtype=dtype)

    def convolve(module, windows):
        return module.convolve(x, weight, bias if biased else None, windows, mixed(), silu=silu)

    expected_windows = windows.clone()
    expected, output = convolve(reference, expected_windows), convolve(triton, windows)
    expected[DECODING.index(-1)] = 0
    assert output.dtype == dtype
    assert (output - expected).double().norm() <= TOLERANCE[dtype] * expected.double().norm()
    assert torch.equal(windows[:-1], expected_windows[:-1])


@pytest.mark.parametrize(
    ("by_channel", "dtype", "state", "normalise"),
    [
        (False, torch.float32, torch.float32, True),
        (False, torch.float32, torch.bfloat16, False),
        (False, HALF, torch.float32, True),
        (True, torch.float32, torch.bfloat16, False),
        (True, HALF, torch.float32, True),
    ],
)
def test_the_delta_rule(by_channel, dtype, state, normalise):
    heads, dim, value_dim = 2, 24, 40
    query, key, value = torch.split(tensor(TOKENS, 4, dim, seed=1, dtype=dtype), [1, 1, 2], dim=1)
    value = torch.cat([value, value], -1)[..., :value_dim]
    key = key if normalise else key / 6
    decay = -3 * tensor(TOKENS, heads, *([dim] if by_channel else []), seed=2).square()
    operands = query, key, value, decay, tensor(TOKENS, heads, seed=3).sigmoid().to(dtype)
    states = tensor(SLOTS + 1, heads, dim, value_dim, seed=4, dtype=state)
    assert_same("delta_rule", operands, states, normalise=normalise)


@pytest.mark.parametrize("by_number", [False, True], ids=["Mamba-2", "Mamba"])
@pytest.mark.parametrize(
    ("dtype", "state", "groups", "numbers"),
    [
        (torch.float32, torch.float32, 2, 24),
        (torch.float32, torch.bfloat16, 1, 16),
        (HALF, torch.float32, 1, 5),
    ],
)
def test_state_spaces(by_number, dtype, state, groups, numbers):
    heads, channels = 4, 1 if by_number else 20
    x, step = tensor(TOKENS, heads, channels, seed=1, dtype=dtype), tensor(TOKENS, heads, seed=2).square() / 5
    rate = -tensor(heads, *([numbers] if by_number else []), seed=3).exp()
    inputs, outputs = (tensor(TOKENS, groups, numbers, seed=seed, dtype=dtype) for seed in (4, 5))
    skip = None if groups == 2 else tensor(heads, seed=6)
    states = tensor(SLOTS + 1, heads, channels, numbers, seed=7, dtype=state)
    assert_same("state_space", (x, step, rate, inputs, outputs, skip), states)


def test_decays_of_any_size_neither_overflow_nor_spoil_a_chunk():
    """A head that forgets nearly all at each token, beside one that forgets nothing."""
    heads, dim = 2, 16
    query, key, value = (tensor(TOKENS, heads, dim, seed=seed) for seed in (1, 2, 3))
    decay = torch.tensor([-80.0, 0.0], device=DEVICE).expand(TOKENS, heads)
    beta = torch.ones(TOKENS, heads, device=DEVICE)
    for forgets in (decay, decay.unsqueeze(2).expand(-1, -1, dim)):
        states = tensor(SLOTS + 1, heads, dim, dim, seed=4)
        assert_same("delta_rule", (query, key, value, forgets, beta), states, normalise=True)


def test_nothing_is_launched_for_a_step_without_tokens():
    empty = tensor(0, 2, 16, seed=1)
    output = triton.delta_rule(empty, empty, empty, empty[..., 0], empty[..., 0], empty, Segments(decode_slots=None),
                               normalise=True)  # fmt: skip
    assert output.shape == empty.shape


@pytest.mark.parametrize("family", ["granitemoehybrid", "lfm2"])
def test_same_greedy_tokens_as_generate(family, cpu_kernels):
    """In company, in chunks; decoding follows on the device, where rows end inside of a ring and others go on."""
    cpu_kernels("triton")
    prompts = random_prompts((5, 17, 9))
    settings = {"kv_policy": "none", "chunk_size": 8, "max_num_seqs": 2, "max_num_batched_tokens": 24}
    engine = tiny_engine(tiny_model(family).to(DEVICE), **settings)
    assert answers(engine, as_requests(prompts, max_tokens=4)) == reference_answers(tiny_model(family), prompts, 4)
    assert engine.backend.kernels.name == "triton"
    assert engine.stats.eager == ""
