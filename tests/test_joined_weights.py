"""Layers of one input as one product on a GPU: the same numbers, no byte more, and the model's weights as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine
from families import tiny_model

triton = pytest.importorskip("bmx.kernels.triton")

from bmx import kernels
from bmx.kernels import reference
from bmx.kernels.linear import Linear, as_one
from bmx.kernels.registry import CAPABILITIES
from bmx.model import fp8_modules
from bmx.model.joined_weights import join_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def held(model):
    """Bytes that a model's tensors hold."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def parts_of(model):
    """The layers of one input, of each of a model's blocks."""
    for block in model.model.layers:
        yield [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
        yield [block.mlp.gate_proj, block.mlp.up_proj]


def linears(parts):
    return tuple(
        part.layer if isinstance(part, fp8_modules.Fp8Linear) else Linear(weight=part.weight, bias=part.bias)
        for part in parts
    )


@pytest.mark.parametrize("in_float8", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # the second has biases
def test_joined_weights_are_the_same_in_the_same_bytes(family, in_float8):
    model = tiny_model(family).requires_grad_(False)
    if in_float8:
        fp8_modules.quantise(model)
    before, bytes_before = {name: t.clone() for name, t in model.state_dict().items()}, held(model)
    assert all(as_one(linears(parts)) is None for parts in parts_of(model))
    for _ in range(2):
        join_weights(model)
        assert held(model) == bytes_before
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())
        for parts in parts_of(model):
            one = as_one(linears(parts))
            assert len(one.weight) == sum(len(layer.weight) for layer in linears(parts))
            assert one.weight.data_ptr() == linears(parts)[0].weight.data_ptr()


@pytest.mark.parametrize("in_float8", [False, True])
def test_one_product_gives_each_layers_numbers(in_float8):
    model = tiny_model("qwen2").requires_grad_(False).to(DEVICE)
    if in_float8:
        fp8_modules.quantise(model)
    x = torch.randn(1, 5, model.config.hidden_size, device=DEVICE)
    projections, gated = list(parts_of(model))[:2]
    apart = [triton.product((layer,))(x)[0] for layer in linears(projections)]
    gate_apart = triton.product(linears(gated), gated=True)(x)
    join_weights(model)
    for y, expected in zip(triton.product(linears(projections))(x), apart, strict=True):
        torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(triton.product(linears(gated), gated=True)(x), gate_apart, **CLOSE)
    if not in_float8:
        torch.testing.assert_close(apart, reference.product(linears(projections))(x), **CLOSE)


def test_what_is_shared_odd_or_elsewhere_stays_alone():
    model = tiny_model("llama").requires_grad_(False)
    first, second, *_ = model.model.layers
    first.self_attn.k_proj.weight = first.self_attn.v_proj.weight  # tied
    first.mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(len(first.mlp.up_proj.weight)), requires_grad=False)
    inner = second.self_attn.q_proj
    inner.weight.data = torch.cat([inner.weight, inner.weight])[: len(inner.weight)]  # a part of something larger
    second.mlp.up_proj.to("meta")
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    join_weights(model)
    after = {name: t.data_ptr() for name, t in model.state_dict().items()}
    alone = [name for name in before if name.startswith(("model.layers.0.", "model.layers.1."))]
    assert [name for name in alone if after[name] != before[name]] == []


def test_a_layer_of_a_model_is_four_products(monkeypatch, cpu_kernels):
    """Of queries, keys and values; of the output; of gate and up; of the inner state."""
    cpu_kernels("triton")
    changed = {**CAPABILITIES, "triton": replace(CAPABILITIES["triton"], model_dtypes=("float32",))}
    monkeypatch.setattr(kernels, "CAPABILITIES", changed)
    prompts = random_prompts((5,))
    expected = reference_answers(tiny_model("qwen3"), prompts, 2)
    model, multiply, counts = tiny_model("qwen3").to(DEVICE), torch.nn.functional.linear, []
    engine = tiny_engine(model, kv_policy="none", enforce_eager=True)

    def counted(*args):
        counts.append(args[0].shape)
        return multiply(*args)

    during = []  # products of each forward
    model.register_forward_pre_hook(lambda *_: during.append(len(counts)))
    model.register_forward_hook(lambda *_: during.append(len(counts) - during.pop()))
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    assert answers(engine, as_requests(prompts, max_tokens=2)) == expected
    assert set(during) == {4 * len(model.model.layers) + 1}
