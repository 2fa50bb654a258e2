"""The functions of mixers give what a recurrence in float64 gives, token by token, and what transformers gives."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from families import FAMILIES, tiny_model
from instruction_sets import HERE, required

from bmx.kernels import Kernels, reference
from bmx.kernels.instruction_sets import SETS
from bmx.kernels.segments import Segments
from bmx.model.fused_modules import fused_modules

CPU = torch.device("cpu")
SLOTS = 7
# Two decoding rows and one of nobody, then prompt segments of unlike lengths in unlike order of slots; the second of
# slot 5 is a probe, which sees the state that the first leaves, and leaves none.
DECODING = (6, -1, 2)
PROMPTS = ((3, 5, 4, True), (8, 130, 0, True), (138, 5, 3, True), (143, 5, 5, True), (148, 5, 5, False))
TOKENS = 153
TIGHT = {"atol": 2e-5, "rtol": 2e-5}
LOOSE = {"atol": 1e-2, "rtol": 1e-2}  # eight bits of a number


@pytest.fixture(params=["reference", *SETS])
def kernel(request):
    """The functions of plain torch, and those compiled for each instruction set that this machine has."""
    return Kernels(required(request.param), "").module


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixed():
    return Segments.of(torch.tensor(DECODING), PROMPTS, CPU)


def pieces():
    """(slot, rows, kept) of each sequence of the mixed step, in an order in which states may be read and written."""
    decoding = [(slot % (SLOTS + 1), slice(row, row + 1), True) for row, slot in enumerate(DECODING)]
    return decoding + [(slot, slice(begin, begin + length), kept) for begin, length, slot, kept in PROMPTS]


def recurrence(step, states, output):
    """Each token of each sequence by itself; states [S + 1, ...] are read, and written where they are kept."""
    for slot, rows, kept in pieces():
        state = states[slot].double()
        for row in range(rows.start, rows.stop):
            output[row], state = step(row, state)
        if kept:
            states[slot] = state
    return output


def delta_operands(dtype=torch.float32, *, by_channel=False, heads=4, key_heads=2, dim=32, value_dim=80):
    query, key = (normal(TOKENS, key_heads, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    value, beta = normal(TOKENS, heads, value_dim, seed=3, dtype=dtype), normal(TOKENS, heads, seed=4).sigmoid()
    decay = -3 * normal(TOKENS, heads, *([dim] if by_channel else []), seed=5).square()
    return query, key, value, decay, beta.to(dtype)


def delta_recurrence(query, key, value, decay, beta, states, *, normalise):
    heads, dim = value.shape[1], key.shape[-1]
    query, key, value, decay, beta = (one.double() for one in (query, key, value, decay, beta))
    if normalise:
        query, key = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (query, key))
    query, key = (one.repeat_interleave(heads // one.shape[1], 1) for one in (query / math.sqrt(dim), key))

    def step(row, state):
        left = decay[row].exp()
        state = state * (left[:, :, None] if left.dim() == 2 else left[:, None, None])
        change = beta[row][:, None] * (value[row] - torch.einsum("hde,hd->he", state, key[row]))
        state = state + key[row][:, :, None] * change[:, None, :]
        return torch.einsum("hde,hd->he", state, query[row]), state

    return recurrence(step, states, torch.zeros_like(value))


def space_operands(dtype=torch.float32, *, by_number=False, heads=6, groups=2, dim=20, numbers=32):
    dim = 1 if by_number else dim
    x, step = normal(TOKENS, heads, dim, seed=1, dtype=dtype), 0.2 * normal(TOKENS, heads, seed=2).square()
    rate = -normal(heads, *([numbers] if by_number else []), seed=3).exp()
    inputs, outputs = (normal(TOKENS, groups, numbers, seed=seed, dtype=dtype) for seed in (4, 5))
    return x, step, rate, inputs, outputs, normal(heads, seed=6)


def space_recurrence(x, step, rate, inputs, outputs, skip, states):
    heads = x.shape[1]
    x, step, rate, inputs, outputs = (one.double() for one in (x, step, rate, inputs, outputs))
    inputs, outputs = (one.repeat_interleave(heads // one.shape[1], 1) for one in (inputs, outputs))

    def advance(row, state):
        left = (step[row].view(-1, *[1] * (rate.dim() - 1)) * rate).exp()
        state = state * (left[:, None, :] if left.dim() == 2 else left[:, None, None])
        state = state + (step[row][:, None] * x[row])[:, :, None] * inputs[row][:, None, :]
        y = torch.einsum("hpn,hn->hp", state, outputs[row])
        return y if skip is None else y + skip.double()[:, None] * x[row], state

    return recurrence(advance, states, torch.zeros_like(x))


def compare(output, expected, states, expected_states, *, dtype=torch.float32):
    """Outputs and kept states, but those of nobody's row; a probe sees states as they are rounded."""
    rows = [row for row in range(TOKENS) if row != DECODING.index(-1)]
    exact = dtype == states.dtype == torch.float32
    torch.testing.assert_close(output[rows].double(), expected[rows], **(TIGHT if exact else LOOSE))
    kept = TIGHT if states.dtype == torch.float32 else LOOSE
    torch.testing.assert_close(states[:SLOTS], expected_states[:SLOTS], **kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("silu", "biased", "taps", "channels"), [(True, False, 4, 272), (False, True, 3, 32), (True, True, 2, 10)]
)
def test_convolutions_go_on_from_the_windows_of_their_sequences(kernel, dtype, silu, biased, taps, channels):
    x, weight = normal(TOKENS, channels + 6, dtype=dtype)[:, :channels], normal(channels, taps, seed=1, dtype=dtype)
    bias = normal(channels, seed=2, dtype=dtype) if biased else None
    windows = normal(SLOTS + 1, taps - 1, channels, seed=3, dtype=dtype)
    expected_windows = windows.clone()

    def step(row, window):
        seen = torch.cat([window, x[row].double()[None]])
        y = (seen * weight.double().t()).sum(0) + (0 if bias is None else bias.double())
        return y * y.sigmoid() if silu else y, seen[1:]

    expected = recurrence(step, expected_windows, torch.zeros(TOKENS, channels, dtype=torch.float64))
    output = kernel.convolve(x, weight, bias, windows, mixed(), silu=silu)
    assert output.dtype == dtype
    compare(output, expected, windows, expected_windows, dtype=dtype)
    assert torch.equal(windows[:SLOTS], expected_windows[:SLOTS])


@pytest.mark.parametrize("by_channel", [False, True], ids=["by head", "by channel"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "normalise", "value_dim"),
    [
        (torch.float32, torch.float32, True, 80),
        (torch.float32, torch.bfloat16, True, 48),
        (torch.bfloat16, torch.float32, True, 32),
        (torch.bfloat16, torch.bfloat16, True, 16),
        (torch.float32, torch.float32, False, 24),
    ],
)
def test_the_delta_rule_is_the_recurrence(kernel, by_channel, dtype, state_dtype, normalise, value_dim):
    operands = delta_operands(dtype, by_channel=by_channel, value_dim=value_dim)
    if not normalise:
        operands = (operands[0], 0.15 * operands[1], *operands[2:])  # keys beyond length 1 make states grow
    states = normal(SLOTS + 1, 4, 32, value_dim, seed=9, dtype=state_dtype)
    expected_states = states.clone()
    expected = delta_recurrence(*operands, expected_states, normalise=normalise)
    output = kernel.delta_rule(*operands, states, mixed(), normalise=normalise)
    assert output.dtype == dtype
    compare(output, expected, states, expected_states, dtype=dtype)


@pytest.mark.parametrize("by_number", [False, True], ids=["Mamba-2", "Mamba"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "numbers", "skipping"),
    [
        (torch.float32, torch.float32, 32, True),
        (torch.float32, torch.bfloat16, 16, True),
        (torch.bfloat16, torch.float32, 16, False),
        (torch.bfloat16, torch.bfloat16, 8, True),
    ],
)
def test_state_spaces_are_the_recurrence(kernel, by_number, dtype, state_dtype, numbers, skipping):
    *operands, skip = space_operands(dtype, by_number=by_number, numbers=numbers)
    operands.append(skip if skipping else None)
    states = normal(SLOTS + 1, 6, operands[0].shape[-1], numbers, seed=9, dtype=state_dtype)
    expected_states = states.clone()
    expected = space_recurrence(*operands, expected_states)
    output = kernel.state_space(*operands, states, mixed())
    assert output.dtype == torch.float32
    compare(output, expected, states, expected_states)


def test_a_segment_in_two_parts_equals_it_whole(kernel):
    """With compiled kernels, to the last bit."""
    operands, space = delta_operands(), space_operands()
    x, taps = normal(TOKENS, 48), normal(48, 4, seed=1)
    whole, parts = [(0, TOKENS, 1, True)], [[(0, 70, 1, True)], [(70, TOKENS - 70, 1, True)]]

    def outputs(steps):
        windows, states, spaces = torch.zeros(3, 3, 48), torch.zeros(3, 4, 32, 80), torch.zeros(3, 6, 20, 32)
        found = [torch.zeros(TOKENS, 48), torch.zeros(TOKENS, 320), torch.zeros(TOKENS, 120)]
        for step in steps:
            segments = Segments.of(None, step, CPU)
            own = slice(step[0][0], step[0][0] + step[0][1])
            found[0][own] = kernel.convolve(x, taps, None, windows, segments, silu=True)[own]
            found[1][own] = kernel.delta_rule(*operands, states, segments, normalise=True).flatten(1)[own]
            found[2][own] = kernel.state_space(*space, spaces, segments).flatten(1)[own]
        return [*found, windows, states, spaces]

    for one, other in zip(outputs([whole]), outputs(parts), strict=True):
        torch.testing.assert_close(one, other, **(TIGHT if kernel is reference else {"atol": 0, "rtol": 0}))


def test_segments_of_equal_length_are_computed_together_and_probes_last():
    segments = mixed()
    assert [(batch.begins, batch.length, batch.slots.tolist(), batch.kept) for batch in segments.batches] == [
        ((3, 138, 143), 5, [4, 3, 5], True),
        ((8,), 130, [0], True),
        ((148,), 5, [5], False),
    ]
    x, y = normal(TOKENS, 2), torch.zeros(TOKENS, 2)
    for batch in segments.batches:
        batch.put(y, batch.take(x))
    assert torch.equal(y[3:], x[3:])
    assert Segments.of(None, [(0, 2, 1, True), (2, 2, 0, True)], CPU).batches[0].take(x).data_ptr() == x.data_ptr()


def code_of(family):
    return import_module(f"transformers.models.{family}.modeling_{family}")


def whole(tokens=TOKENS):
    return Segments.of(None, [(0, tokens, 0, True)], CPU)


def test_the_delta_rule_is_that_of_transformers():
    query, key, value, decay, beta = delta_operands()
    states = torch.zeros(2, 4, 32, 80)
    output = reference.delta_rule(query, key, value, decay, beta, states, whole(), normalise=True)
    expected, state = code_of("qwen3_5").torch_chunk_gated_delta_rule(
        query[None], key[None], value[None], g=decay[None], beta=beta[None], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    torch.testing.assert_close(output, expected[0], **TIGHT)
    torch.testing.assert_close(states[:1], state, **TIGHT)


def test_the_delta_rule_by_channel_is_that_of_transformers():
    query, key, value, decay, beta = delta_operands(by_channel=True, key_heads=4)
    states = torch.zeros(2, 4, 32, 80)
    output = reference.delta_rule(query, key, value, decay, beta, states, whole(), normalise=True)
    expected, state = code_of("kimi_linear").chunk_kimi_delta_attention(
        query[None], key[None], value[None], g=decay[None], beta=beta[None], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    torch.testing.assert_close(output, expected[0], **TIGHT)
    torch.testing.assert_close(states[:1], state, **TIGHT)


def test_state_spaces_are_those_of_transformers():
    x, step, rate, inputs, outputs, skip = space_operands()
    states = torch.zeros(2, 6, 20, 32)
    output = reference.state_space(x, step, rate, inputs, outputs, skip, states, whole())
    expected, state = code_of("granitemoehybrid").mamba2_chunk_scan(
        x[None], step[None], rate, inputs[None], outputs[None], 32, D=skip, return_final_states=True
    )
    torch.testing.assert_close(output, expected[0], **TIGHT)
    torch.testing.assert_close(states[:1], state, **TIGHT)


def test_state_spaces_by_number_are_those_of_transformers():
    x, step, rate, inputs, outputs, skip = space_operands(by_number=True, groups=1)
    states = torch.zeros(2, 6, 1, 32)
    output = reference.state_space(x, step, rate, inputs, outputs, skip, states, whole())
    expected, state = code_of("jamba").mamba_selective_scan(
        x[:, :, 0].t()[None], step.t()[None], rate, inputs[:, 0].t()[None], outputs[:, 0].t()[None], D=skip,
        return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(output[:, :, 0].t()[None], expected, **TIGHT)
    torch.testing.assert_close(states[:1, :, 0], state, **TIGHT)


@pytest.mark.parametrize("family", ["qwen3_5", "jamba"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolutions_are_those_of_transformers(family, activation):
    x, weight, bias = normal(TOKENS, 10), normal(10, 4, seed=1), normal(10, seed=2)
    output = reference.convolve(x, weight, bias, torch.zeros(2, 3, 10), whole(), silu=activation == "silu")
    expected = code_of(family).causal_conv1d_fn(x.t()[None], weight, bias, activation)
    torch.testing.assert_close(output.t()[None], expected, **TIGHT)


@pytest.mark.parametrize("width", [48, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_hybrids_are_those_of_float64(kernel, dtype, width):
    x, gate = (normal(5, 3, width, seed=seed, dtype=dtype) for seed in (1, 2))
    weight = normal(width, seed=3, dtype=dtype)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = TIGHT if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    gated = kernel.gated_norm(x, gate, weight, 1e-6)
    expected = normed * weight.double() * gate.double() * gate.double().sigmoid()
    torch.testing.assert_close(gated.double(), expected, **tolerance)
    offset = kernel.offset_norm(x, weight, 1e-6)
    torch.testing.assert_close(offset.double(), normed * (1 + weight.double()), **tolerance)
    assert gated.dtype == offset.dtype == dtype


def normed_by_kernels(model):
    """The norms of a model in bfloat16 that kernels compute, by the end of their names, and all of its norms."""
    model = model.to(torch.bfloat16)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    with fused_modules(model, Kernels(required([*HERE, *SETS][0]), "")):
        found = [type(module).__name__ for module in norms if "forward" in vars(module)]
    return found, norms


def test_all_norms_of_a_qwen_hybrid_are_computed_by_kernels():
    found, norms = normed_by_kernels(tiny_model("qwen3_5_text"))
    wide = [norm for norm in norms if len(norm.weight) % 16 == 0]
    assert len(found) == len(wide)
    assert "Qwen3_5RMSNormGated" in found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [96, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_gated_vectors_are_those_of_float64(kernel, dtype, width, groups):
    x, gate, weight = normal(5, 3, width), normal(5, 3, width, seed=2, dtype=dtype), normal(width, seed=3, dtype=dtype)
    gated = (x.double() * gate.double() * gate.double().sigmoid()).unflatten(-1, (groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)
    output = kernel.norm_of_gated(x, gate, weight, 1e-6, width // groups)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), normed * weight.double(), **TIGHT)


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_of_gated_vectors_are_found(monkeypatch, groups):
    """Without its gate, such a norm is a plain one; that kernel in its place would fail when it is called."""
    config = FAMILIES["granitemoehybrid"]()
    config.mamba_n_groups = groups
    monkeypatch.setitem(FAMILIES, "granitemoehybrid", lambda: config)
    found, norms = normed_by_kernels(tiny_model("granitemoehybrid"))
    assert len(found) == len(norms)
    assert "GraniteMoeHybridRMSNormGated" in found
